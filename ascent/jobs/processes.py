"""Processes on this machine: who is still there, what a job's processes hold, and how to end every one of them.

A job's processes are known by the session that they run in, and by a variable of their environment that they inherit
even into sessions of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import psutil

MARK = "ASCENT_JOB"
"""The environment variable that names the job and the attempt that a process belongs to."""
KEPT = {"PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"}
KEPT |= {"ASCENT_HOME", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_ENDPOINT", "SSL_CERT_FILE", "SSL_CERT_DIR"}
"""What a job inherits from its worker; everything else, secrets above all, stays behind."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
PR_SET_PDEATHSIG = 1
FIRST_VICTIM = "500"  # of 1000: when memory runs out, the kernel ends jobs before the server
LAST = 19  # of the niceness
ROUNDS, ROUND_S = 50, 0.02

_PROC = Path("/proc")


def this_process() -> str:
    """Return a name of this process that `is_gone` can judge: machine, boot, pid namespace, pid and start time."""
    return f"{_machine()}/{os.getpid()}/{_started(os.getpid())}"


def shown(name: str | None) -> str:
    """Return the host and the number of a process named by `this_process`, for people."""
    machine, _, rest = (name or "").partition("/")
    return f"{machine.partition('|')[0]}:{rest.partition('/')[0]}" if rest else machine


def is_gone(name: str | None) -> bool:
    """Return whether `name` is a process of this machine that has ended. False for what cannot be judged from here."""
    machine, _, rest = (name or "").partition("/")
    pid, _, started = rest.partition("/")
    return machine == _machine() and pid.isdigit() and started != "" and _started(int(pid)) != started


def environment(
    job: str, attempt: int, threads: int, passed: Iterable[str] = (), source: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the environment of a job's processes: what is kept or `passed` by name, its mark, its threads."""
    names = {*KEPT, *passed}
    found = {name: value for name, value in source.items() if name in names or name.startswith("LC_")}
    return found | dict.fromkeys(THREADS, str(threads)) | {MARK: f"{job}/{attempt}", "PYTHONUNBUFFERED": "1"}


def follow(parent: int, number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process `number` when its `parent` is gone."""
    with contextlib.suppress(OSError, AttributeError):  # no Linux: the guardian alone must do
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the kernel was told
        os._exit(1)


def go_first() -> None:
    """Let the kernel end this process, and those it starts, before others when memory runs out."""
    with contextlib.suppress(OSError):
        (_PROC / "self/oom_score_adj").write_text(FIRST_VICTIM)


def stand_back() -> None:
    """Let this process, and those it starts, compute in what time others leave: answers do not wait for a training."""
    os.nice(LAST)
    with contextlib.suppress(OSError):
        (_PROC / "self/autogroup").write_text(
            str(LAST)
        )  # where Linux shares time by session, niceness counts within one


def guard(life: int) -> None:
    """Fork a guardian that ends this process group when the pipe `life` closes, as it does when the worker is killed.

    Call it early, while this process is small and has one thread.
    """
    group = os.getpgrp()
    if os.fork():
        os.close(life)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.dup2(life, 0)
    os.closerange(1, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 1 << 16 else 1 << 16)
    with contextlib.suppress(OSError):
        os.read(0, 1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


def resident_mb(session: int) -> float:
    """Return the MiB that a session's processes hold; what several share is counted once where the kernel tells."""
    return sum(map(_resident, _members(session))) / 2**20


def end_all(job: str, attempts: Container[int], session: int | None = None) -> int:
    """Kill every process of some attempts at a job, until none is left. Returns how many there were."""
    ended = set[int]()
    for _ in range(ROUNDS):
        left = _marked(job, attempts) | (_members(session) if session else set())
        left.discard(os.getpid())
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        ended |= left
        time.sleep(ROUND_S)
    return len(ended)


def _members(session: int) -> set[int]:
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == session and not _is_zombie(pid):
                found.add(pid)
    return found


def _marked(job: str, attempts: Container[int]) -> set[int]:
    beginning = f"{MARK}={job}/".encode()
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            for variable in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                if variable.startswith(beginning) and int(variable.removeprefix(beginning)) in attempts:
                    found.add(pid)
    return found


def _resident(pid: int) -> int:
    try:
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
    return 0


def _is_zombie(pid: int) -> bool:
    return _stat(pid)[:1] in (["Z"], ["X"])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on, behind the name, which may hold anything."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> str:
    """When a process was started, in clock ticks since the boot; empty when it has ended, or cannot be asked about."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink(_PROC / "self/ns/pid"))
    return "|".join(parts).replace("/", "_")
