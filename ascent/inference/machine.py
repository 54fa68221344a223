"""How much of this machine jobs may take: its cores and memory, a container's limits included."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CORES_PER_SLOT = 4
"""Training of small models gains little from more threads than this, and loses much with fewer than all of two."""
SHARE = 0.8
"""Of the memory; the rest is the system's, the server's and the worker's own."""


@dataclass(frozen=True)
class Machine:
    """What this process may use: whole cores, and MiB of memory."""

    cores: int
    memory_mb: int

    @property
    def slots(self) -> int:
        """How many jobs run at a time."""
        return max(1, self.cores // CORES_PER_SLOT)

    @property
    def job_memory_mb(self) -> int:
        """What all jobs together may take."""
        return int(self.memory_mb * SHARE)


def this_machine(root: Path = Path("/")) -> Machine:
    """Read affinity, memory, and the limits of control groups, version 1 or 2, from the tree below `root`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().total
    for controller, folder in _groups(root):
        if controller in ("memory", ""):
            for name in ("memory.max", "memory.limit_in_bytes"):
                memory = min(memory, _number(folder / name) or memory)
        if controller in ("cpu", ""):
            quota, _, period = _text(folder / "cpu.max").partition(" ")
            if not period:
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(quota) and int(period):
                cores = min(cores, max(1, int(quota) // int(period)))
    return Machine(cores, memory >> 20)


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (controller, folder) of this process's control groups and all above them; "" is version 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, place = line.split(":", 2)
        for controller in names.split(","):
            top = root / "sys/fs/cgroup" / controller
            folder = top / place.strip("/")
            while True:
                yield controller, folder
                if folder == top:
                    break
                folder = folder.parent


def _number(file: Path) -> int:
    text = _text(file)
    return int(text) if text.isdigit() else 0


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8").strip()
    return ""
