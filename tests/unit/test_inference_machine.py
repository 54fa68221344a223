"""What this process may use, from affinity and from the limits of control groups written to a tree of the test's."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from ascent.inference.machine import this_machine

V1, V2 = "sys/fs/cgroup/cpu", "sys/fs/cgroup"
QUOTA = {f"{V1}/y/cpu.cfs_quota_us": "150000", f"{V1}/y/cpu.cfs_period_us": "100000"}


def write_files(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ("", {}, None, None),
        ("0::/a/b", {f"{V2}/a/memory.max": str(64 << 20), f"{V2}/a/b/memory.max": "max"}, None, 64),
        ("0::/a", {f"{V2}/a/cpu.max": "100000 100000"}, 1, None),
        ("4:memory:/x", {f"{V2}/memory/x/memory.limit_in_bytes": str(32 << 20)}, None, 32),
        ("2:cpu,cpuacct:/y", QUOTA, 1, None),
        ("2:cpu,cpuacct:/y", QUOTA | {f"{V1}/y/cpu.cfs_quota_us": "-1"}, None, None),
    ],
)
def test_a_containers_limits_count(
    tmp_path: Path, groups: str, files: dict[str, str], cores: int | None, memory: int | None
) -> None:
    write_files(tmp_path, {"proc/self/cgroup": f"{groups}\n" * bool(groups), **files})
    found = this_machine(tmp_path)
    assert found.cores == (cores or len(os.sched_getaffinity(0)))
    assert found.memory >> 20 == (memory or psutil.virtual_memory().total >> 20)
    assert 0 < found.free <= found.memory


def test_what_a_container_holds_is_not_free(tmp_path: Path) -> None:
    memory = {f"{V2}/a/memory.max": "4000000", f"{V2}/a/memory.current": "3000000"}
    write_files(tmp_path, {"proc/self/cgroup": "0::/a", **memory})
    found = this_machine(tmp_path)
    assert (found.memory, found.free) == (4_000_000, 1_000_000)
