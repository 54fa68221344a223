"""One attempt at a job, as its worker sees it: the processes, what they write, and how they are brought to an end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascent.jobs.child import EVENTS, LIFE, PARENT
from ascent.jobs.processes import end_all, environment, resident_mb
from ascent.jobs.specs import JOB_FILE, LOG_FILE, STOP_FILE, Job, Lease
from ascent.records.files import write_atomic

CHUNK, CHUNKS = 1 << 16, 64  # read at a time, so that a job that never stops writing lets the others have their turn
LOG_BYTES = 64 << 20
"""Of one attempt's log; what comes later is left out."""
LONGEST_EVENT = 16 << 20
TERM_S = 5.0
"""Between SIGTERM and SIGKILL, after the grace that followed SIGINT."""

End = Literal["completed", "failed", "memory", "interrupted", "held", "crashed"]


@dataclass(frozen=True)
class Ended:
    """How an attempt came to its end: what it reported last, or what its exit status says."""

    outcome: End
    message: str = ""
    retry: bool = False
    result: dict[str, Any] | None = None


class AttemptRun:
    """The processes of one attempt. Nothing here waits: `read` and `press_on` are called again and again."""

    def __init__(self, lease: Lease, function: str, *, threads: int, passed: Iterable[str] = ()) -> None:
        """Start the attempt, after ending what an earlier one may have left running on this machine.

        Raises:
            OSError, NoSpace: folder, log or process cannot be made.
        """
        self.lease, self.folder = lease, lease.job.folder
        self.phase, self.done, self.total = "", 0, None
        self.changed = self.moved_on = False  # progress, a new phase that nobody has taken down
        self.trouble: Ended | None = None
        self.asked: float | None = None
        self.peak_mb = 0.0
        self._reported: Ended | None = None
        self._tail, self._written = b"", 0
        end_all(lease.job.id, range(lease.number))
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(STOP_FILE.format("*")):
            left.unlink(missing_ok=True)
        write_atomic(self.folder / JOB_FILE, json.dumps(_described(lease.job, function, lease.number)))
        self._log = (self.folder / LOG_FILE).open("ab", buffering=0)
        self.began = time.monotonic()
        with contextlib.ExitStack() as undo:
            undo.callback(self._log.close)
            self.process = self._start(threads, passed)
            undo.pop_all()

    def _start(self, threads: int, passed: Iterable[str]) -> subprocess.Popen[bytes]:
        log, log_in = os.pipe()
        events, events_in = os.pipe()
        life_out, life = os.pipe()
        self.pipes = {log: self._take_log, events: self._take_events}
        self._life: int | None = life
        names = environment(self.lease.job.id, self.lease.number, threads, passed)
        names |= {EVENTS: str(events_in), LIFE: str(life_out), PARENT: str(os.getpid())}
        try:
            for pipe in self.pipes:
                os.set_blocking(pipe, False)
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "ascent.jobs.child", str(self.folder.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=log_in,
                stderr=log_in,
                pass_fds=(events_in, life_out),
                start_new_session=True,
                cwd=self.folder,
                env=names,
            )
        except BaseException:
            for descriptor in (log, events, life):
                os.close(descriptor)
            raise
        finally:
            for descriptor in (log_in, events_in, life_out):
                os.close(descriptor)

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.began

    def read(self) -> None:
        """Take what the processes have written until now."""
        for pipe, take in list(self.pipes.items()):
            with contextlib.suppress(BlockingIOError):
                for _ in range(CHUNKS):
                    if raw := os.read(pipe, CHUNK):
                        take(raw)
                        continue
                    del self.pipes[pipe]
                    os.close(pipe)
                    break

    def ask(self) -> None:
        """Ask the job to save its state and leave: by a file that it may look for, and as Ctrl-C does."""
        if self.asked is not None:
            return
        self.asked = time.monotonic()
        with contextlib.suppress(OSError):
            (self.folder / STOP_FILE.format(self.lease.number)).touch()
        self._signal(signal.SIGINT)

    def press_on(self, grace_s: float) -> None:
        """Once the grace since `ask` is over, terminate; a little later, kill."""
        waited = time.monotonic() - self.asked if self.asked is not None else 0.0
        if waited > grace_s + TERM_S:
            self.kill()
        elif waited > grace_s:
            self._signal(signal.SIGTERM)

    def give_up(self, trouble: Ended, *, at_once: bool = False) -> None:
        """End the attempt because of `trouble`, which then is its outcome: with a chance to save, or at once."""
        self.trouble = self.trouble or trouble
        if at_once:
            self.kill()
        else:
            self.ask()

    def kill(self) -> None:
        """Kill every process of the job."""
        session = self.process.pid if self.process.returncode is None else None  # later the number may be another's
        end_all(self.lease.job.id, (self.lease.number,), session)

    def memory_mb(self) -> float:
        """Return what the processes hold now."""
        now = resident_mb(self.process.pid)
        self.peak_mb = max(self.peak_mb, now)
        return now

    def poll(self) -> Ended | None:
        """Return how the attempt ended once it has, with no process left and all that it wrote read."""
        status = self.process.poll()
        if status is None:
            return None
        if self._life is not None:
            os.close(self._life)
            self._life = None
            end_all(self.lease.job.id, (self.lease.number,), self.process.pid)
        self.read()
        for pipe in self.pipes:  # held open by a process that is no longer ours
            os.close(pipe)
        self.pipes.clear()
        self._log.close()
        return self.trouble or self._reported or _crashed(status)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _take_log(self, raw: bytes) -> None:
        if self._written >= LOG_BYTES or (self.trouble is not None and self.trouble.message.startswith("the log")):
            return
        self._written += len(raw)
        if self._written >= LOG_BYTES:
            raw += f"\n[the log is {LOG_BYTES >> 20} MiB long; what follows is left out]\n".encode()
        try:
            while raw:
                raw = raw[self._log.write(raw) or 0 :]
        except OSError as error:
            what = f"the log {self.folder / LOG_FILE} cannot be written ({error.strerror}); make room, submit it again"
            self.give_up(Ended("failed", what), at_once=True)

    def _take_events(self, raw: bytes) -> None:
        *lines, self._tail = (self._tail + raw).split(b"\n")
        if len(self._tail) > LONGEST_EVENT:
            size = f"the job's function returned more than {LONGEST_EVENT >> 20} MiB; let it return a path instead"
            self._tail = b""
            self.give_up(Ended("failed", size), at_once=True)
        for line in lines:
            event = _event(line)
            if event.get("event") == "progress":
                self.moved_on = self.moved_on or event["phase"] != self.phase
                self.phase, self.done, self.total = str(event["phase"]), int(event["done"]), event["total"]
                self.changed = True
            elif event.get("event") == "ended":
                parts = {name: event[name] for name in ("message", "retry", "result") if name in event}
                self._reported = Ended(event["outcome"], **parts)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder, those that vanish meanwhile left out."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _described(job: Job, function: str, attempt: int) -> dict[str, Any]:
    named = {"id": job.id, "kind": job.kind, "function": function, "owner": job.owner, "name": job.name}
    return {**named, "payload": job.payload, "attempt": attempt}


def _event(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:  # torn by a kill
        return {}
    return found if isinstance(found, dict) else {}


def _crashed(status: int) -> Ended:
    if status >= 0:
        return Ended("crashed", f"the job's process ended with status {status} and no result; its log says more", True)
    name = signal.Signals(-status).name if -status in list(signal.Signals) else f"signal {-status}"
    hint = "; often the system ran out of memory" if -status == signal.SIGKILL else ""
    return Ended("crashed", f"the job's process was ended by {name}{hint}; its log says more", True)
