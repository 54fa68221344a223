"""What all sides share: a job read from a file, laps timed, and a result written after each of them.

    python with_SIDE.py JOB.json RESULT.json

Only the standard library: it runs in every side's own environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Stopwatch:
    """Times laps; the first `warmup` do not count, and after `steps` more, or `enough` seconds, the process ends.

    Peak memory is that of this process and of its children, each at its own highest.
    """

    def __init__(self, job: dict[str, Any], result: Path, packages: tuple[str, ...]) -> None:
        self._left, self._steps, self._result = job["warmup"], job["steps"], result
        self._enough = job.get("enough", math.inf)
        self._found: dict[str, Any] = {"seconds": [], "tokens": [], "facts": {}, "versions": versions(packages)}
        self._started = time.perf_counter()

    def lap(self, tokens: float = 0, **facts: float) -> None:
        """End a step of so many tokens. Of `facts` the first and the last are kept, to compare what sides computed."""
        seconds = time.perf_counter() - self._started
        for name, value in facts.items():
            self._found["facts"].setdefault(f"first {name}", value)
            self._found["facts"][name] = value
        if self._left > 0:
            self._left -= 1
        else:
            self._found["seconds"].append(seconds)
            self._found["tokens"].append(tokens)
        self.write()
        times = self._found["seconds"]
        if len(times) >= self._steps or (times and sum(times) >= self._enough):
            raise SystemExit(0)
        self._started = time.perf_counter()

    def note(self, **facts: Any) -> None:
        """Keep facts beside the times."""
        self._found["facts"] |= facts

    def write(self) -> None:
        """Write what is known."""
        self._found["peak_mb"] = round(peak_mb())
        self._result.write_text(json.dumps(self._found), encoding="utf-8")


def start(packages: tuple[str, ...]) -> tuple[dict[str, Any], Stopwatch]:
    """Read the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job, Stopwatch(job, Path(sys.argv[2]), packages)


def peak_mb() -> float:
    """The largest resident memory of this process, plus that of every process under it that is still there, in MiB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (kilobytes + sum(_highest(pid) for pid in _descendants(os.getpid()))) / 1024


def _descendants(parent: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{parent}/task").iterdir()
        children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid for child in children for pid in (child, *_descendants(child))]


def _highest(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of those packages that are there."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
