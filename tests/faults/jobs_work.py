"""Jobs that the tests run in processes of their own; each keeps what it did in its folder."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

from ascent.jobs.context import JobContext
from ascent.records.errors import BadInput, Busy, Interrupted
from ascent.records.files import append_jsonl, read_jsonl

KINDS = {
    name: f"faults.jobs_work:{name}"
    for name in (
        "count",
        "echo",
        "refuse",
        "away",
        "broken",
        "crash",
        "hog",
        "sleep",
        "stubborn",
        "fork",
        "shout",
        "full",
    )
}
PHASES = ("check", "train", "save", "register")
STEPS = 3


def count(job: JobContext) -> dict[str, Any]:
    """Walk the phases in steps. A step's effect, one line of a file, is its own checkpoint: each is there once.

    `die` names a phase in whose middle the process kills itself, in its first attempt;
    `pause` makes every new step last, or those of the phase `slow`.
    """
    work = job.folder / "work.jsonl"
    done = [(row["phase"], row["step"]) for row in read_jsonl(work)]
    for phase in PHASES:
        job.phase(phase)
        for step in range(STEPS):
            if job.cancelled():
                raise Interrupted("saved")
            if (phase, step) not in done:
                append_jsonl(work, [{"phase": phase, "step": step, "attempt": job.attempt}])
                done.append((phase, step))
                time.sleep(job.payload.get("pause", 0) if job.payload.get("slow", phase) == phase else 0)
            job.meter(f"{phase}/{step}", model="tiny", training_tokens=100)
            job.progress(step + 1, STEPS)
            if job.payload.get("die") == phase and job.attempt == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    return {"steps": len(done), "name": job.name}


def echo(job: JobContext) -> dict[str, Any]:
    """Return the payload, the environment, and what can be seen of this process."""
    job.log(f"hello from {job.name} of {job.owner}")
    with open("/proc/self/oom_score_adj") as file:
        adjusted = int(file.read())
    seen = {"environment": dict(os.environ), "folder": os.getcwd(), "path": sys.path, "oom_score_adj": adjusted}
    seen |= {"nice": os.nice(0), "autogroup": ""}
    with contextlib.suppress(FileNotFoundError), open("/proc/self/autogroup") as file:
        seen["autogroup"] = file.read().strip().partition(" ")[2]
    return {"payload": job.payload, **seen}


def refuse(job: JobContext) -> dict[str, Any]:
    """Find bad input."""
    raise BadInput("data.jsonl:7: no target; add one")


def away(job: JobContext) -> dict[str, Any]:
    """Need something that is away, and there the second time."""
    if job.attempt == 1:
        raise Busy("the teacher is busy", retry_after_s=1)
    return {"attempt": job.attempt}


def broken(job: JobContext) -> dict[str, Any]:
    """Return what is no JSON."""
    return {"bad": object()}


def crash(job: JobContext) -> dict[str, Any]:
    """End without a word."""
    os._exit(7)


def hog(job: JobContext) -> dict[str, Any]:
    """Hold memory, together with a child that holds as much."""
    code = f"import time; held = bytearray(b'x' * ({job.payload['mb']} << 20)); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code])
    held = b"x" * (job.payload["mb"] << 20)
    deadline = time.monotonic() + job.payload["seconds"]
    while time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.wait()
    return {"held": len(held)}


def sleep(job: JobContext) -> dict[str, Any]:
    """Wait, interruptible."""
    (job.folder / f"began{job.attempt}").touch()
    job.phase("asleep")
    time.sleep(job.payload.get("seconds", 60))
    return {}


def stubborn(job: JobContext) -> dict[str, Any]:
    """Ignore every polite signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return sleep(job)


def fork(job: JobContext) -> dict[str, Any]:
    """Leave processes behind: one in this session, one that made a session of its own, and a forked copy."""
    for session in (False, True):
        process = subprocess.Popen(["sleep", "300"], start_new_session=session, stdout=None)
        append_jsonl(job.folder / "pids.jsonl", [{"pid": process.pid}])
    if not (pid := os.fork()):
        time.sleep(300)
        os._exit(0)
    append_jsonl(job.folder / "pids.jsonl", [{"pid": pid}])
    job.phase("forked")
    time.sleep(job.payload.get("seconds", 0))
    if job.payload.get("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"pids": [row["pid"] for row in read_jsonl(job.folder / "pids.jsonl")]}


def shout(job: JobContext) -> dict[str, Any]:
    """Write more than fits."""
    for _ in range(job.payload["mb"]):
        sys.stdout.write(("x" * 1023 + "\n") * 1024)
    sys.stdout.flush()
    return {}


def full(job: JobContext) -> dict[str, Any]:
    """Meet a full disk while saving: the limit on file sizes ends a write as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    (job.folder / "model").write_bytes(b"x" * (1 << 20))
    return {}
