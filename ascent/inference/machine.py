"""What this process may use of its machine: cores and memory, a container's limits included."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Machine:
    """What this process may use: whole cores, bytes of memory, and how many of them nobody holds now."""

    cores: int
    memory: int
    free: int


def this_machine(root: Path = Path("/")) -> Machine:
    """Read affinity, memory, and the limits of control groups, version 1 or 2, from the tree below `root`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    system = psutil.virtual_memory()
    memory, free = system.total, system.available
    for controller, folder in _groups(root):
        if controller in ("memory", ""):
            for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
                if most := _number(folder / limit):
                    memory, free = min(memory, most), min(free, max(0, most - _number(folder / usage)))
        if controller in ("cpu", ""):
            quota, _, period = _text(folder / "cpu.max").partition(" ")
            if not period:
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(quota) and int(period):
                cores = min(cores, max(1, int(quota) // int(period)))
    return Machine(cores, memory, free)


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
