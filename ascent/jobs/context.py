"""What a job's function is given: its payload and folder, and how it says what it is doing."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascent.jobs.specs import STOP_FILE, USAGE_FILE
from ascent.records.files import append_jsonl

BETWEEN_S = 0.2


@dataclass
class JobContext:
    """One attempt at a job, as its function sees it.

    The function may be started again on the same folder after any break, so it keeps in `folder` what it must find
    again, and does no step twice that may not be done twice. It returns JSON values. SIGINT interrupts it like Ctrl-C;
    code that waits for that to save a checkpoint, as training does, raises `Interrupted` then.

    Attributes:
        id, owner, name: of the job.
        payload: what the submitter gave.
        folder: its own, and its working directory.
        attempt: 1 for the first start.
    """

    id: str
    owner: str
    name: str
    payload: dict[str, Any]
    folder: Path
    attempt: int
    send: Callable[[dict[str, Any]], None]
    _phase: str = field(default="", init=False)
    _sent: float = field(default=float("-inf"), init=False)

    def phase(self, name: str) -> None:
        """Say which part begins; its progress starts at nothing."""
        self._phase = name
        self.send({"event": "progress", "phase": name, "done": 0, "total": None})

    def progress(self, done: int, total: int | None = None) -> None:
        """Say how far the phase is. Cheap: what comes too fast is left out, except the end."""
        if done != total and time.monotonic() - self._sent < BETWEEN_S:
            return
        self._sent = time.monotonic()
        self.send({"event": "progress", "phase": self._phase, "done": done, "total": total})

    def log(self, text: str) -> None:
        """Write a line to the job's log, where standard output and error go as well."""
        print(text, flush=True)  # noqa: T201 - the log is what this process prints

    def cancelled(self) -> bool:
        """Return whether the job is to stop, or to make room: save what there is and raise `Interrupted`."""
        return (self.folder / STOP_FILE.format(self.attempt)).exists()

    def meter(
        self, key: str, *, model: str = "", training_tokens: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0
    ) -> None:
        """Note what was used, durably; the ledger takes it when the attempt ends.

        Args:
            key: names the piece of work within the job; the same key again, as after a restart, is charged once.
            model: whose price applies.
            training_tokens: tokens trained on, every pass counted.
            prompt_tokens: tokens that a model was given.
            completion_tokens: tokens that a model wrote.
        """
        counts = {
            "training_tokens": training_tokens,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }
        append_jsonl(self.folder / USAGE_FILE, [{"key": key, "model": model, **counts}])


def sender(descriptor: int | None) -> Callable[[dict[str, Any]], None]:
    """Return a function that writes events as JSON lines to a pipe; without one they are dropped."""
    lock = threading.Lock()

    def send(event: dict[str, Any]) -> None:
        if descriptor is None:
            return
        line = (json.dumps(event) + "\n").encode()
        with lock:
            while line:
                line = line[os.write(descriptor, line) :]

    return send
