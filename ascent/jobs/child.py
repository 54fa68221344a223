"""A job's process: `python -m ascent.jobs.child FOLDER`.

A worker starts it with two pipes, named by descriptor in the environment: one that takes its events, one whose end
tells that the worker is gone. Started by hand, without them, it runs the job of a folder for whoever debugs it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ascent.jobs.context import JobContext, sender
from ascent.jobs.processes import follow, go_first, guard, stand_back
from ascent.jobs.specs import JOB_FILE
from ascent.records.errors import AscentError, BadInput, Interrupted, MissingExtra, NoSpace, Unavailable

EVENTS, LIFE, PARENT = "ASCENT_JOB_EVENTS", "ASCENT_JOB_LIFE", "ASCENT_JOB_WORKER"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOCK_FILE = ".lock"


def main(folder: Path) -> int:
    """Run the job of a folder. Returns the exit status; what it raises was reported to the worker before."""
    events = _from_worker()
    send = sender(events)
    with (folder / LOCK_FILE).open("w") as lock:  # held as long as this process lives
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            send({"event": "ended", "outcome": "held"})
            return 1
        return _run(folder, send)


def _run(folder: Path, send: Callable[[dict[str, Any]], None]) -> int:
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    context = JobContext(job["id"], job["owner"], job["name"], job["payload"], folder, job["attempt"], send)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = load_function(job["function"])(context)
        sys.stdout.flush()
        send({"event": "ended", "outcome": "completed", "result": result})
    except BaseException as error:
        send({"event": "ended", **explain(error)})
        raise
    return 0


def load_function(place: str) -> Callable[[JobContext], dict[str, Any]]:
    """Return the function at `package.module:function`. Raises BadInput when there is none."""
    module, _, name = place.partition(":")
    try:
        function: Callable[[JobContext], dict[str, Any]] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"the job's function {place!r} cannot be loaded ({error}); check the worker's kinds") from error
    return function


def explain(error: BaseException) -> dict[str, Any]:
    """Return outcome, message and whether another attempt can help, for what a job's function raised."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return {"outcome": "interrupted", "message": str(error) or "interrupted"}
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return {"outcome": "memory", "message": f"out of memory: {error or type(error).__name__}"}
    if isinstance(error, OSError) and error.errno in FULL:
        what = f"the disk is full or a limit is reached ({error}); make room, then submit the job again"
        return {"outcome": "failed", "message": what, "retry": False}
    away = isinstance(error, Unavailable) and not isinstance(error, MissingExtra | NoSpace)
    if isinstance(error, AscentError):
        return {"outcome": "failed", "message": str(error), "retry": away}
    again = isinstance(error, ConnectionError | TimeoutError)
    return {
        "outcome": "failed",
        "message": f"{type(error).__name__}: {error}; the job's log says where",
        "retry": again,
    }


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _from_worker() -> int | None:
    """Tie this process to the worker that started it; return where events go."""
    found = {name: int(os.environ.pop(name, "-1")) for name in (EVENTS, LIFE, PARENT)}
    if -1 in found.values():
        return None
    os.set_inheritable(found[EVENTS], False)  # a program that the job starts must not keep the worker waiting
    guard(found[LIFE])
    follow(found[PARENT])
    go_first()
    stand_back()
    return found[EVENTS]


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(Path(sys.argv[1]).absolute()))
