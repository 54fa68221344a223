"""What runs inside the sandbox of model-written code: give up every right, check that it is gone, then run.

`ascent.evaluate.code` starts this file as a script in a process of its own; it imports the standard library only.
No root and no helper program is needed, only Linux 5.13 or newer on x86-64 or arm64:

- Files: Landlock (kernel documentation, userspace-api/landlock) leaves the temporary folder, and the folders of
  Python's and the system's libraries for reading. That other files exist can still be seen, their content cannot.
- Network, processes, signals, other programs, file modes and everything else: a seccomp filter lets only those
  system calls through that a Python program in one process needs. It may start threads but no process, so nothing
  can outlive it.
- Memory, processor time, size and number of open files: resource limits.

What cannot be had is reported, and the program is not run.
"""

from __future__ import annotations

import _socket
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

# System calls that are let through: name, number on x86-64 (asm/unistd_64.h), number on arm64 (asm-generic/unistd.h).
ALLOWED = """
read:0:63 write:1:64 open:2: close:3:57 stat:4: fstat:5:80 lstat:6: poll:7: lseek:8:62 mmap:9:222 mprotect:10:226
munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 pread64:17:67 pwrite64:18:68
readv:19:65 writev:20:66 access:21: pipe:22: select:23: sched_yield:24:124 mremap:25:216 madvise:28:233 dup:32:23
dup2:33: pause:34: nanosleep:35:101 getitimer:36:102 alarm:37: setitimer:38:103 getpid:39:172 sendfile:40:71
exit:60:93 uname:63:160 flock:73:32 fsync:74:82 fdatasync:75:83 ftruncate:77:46 getcwd:79:17 chdir:80:49 fchdir:81:50
rename:82: mkdir:83: rmdir:84: creat:85: link:86: unlink:87: symlink:88: readlink:89: umask:95:166 gettimeofday:96:169
getrlimit:97:163 getrusage:98:165 sysinfo:99:179 times:100:153 getuid:102:174 getgid:104:176 geteuid:107:175
getegid:108:177 getppid:110:173 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133
sigaltstack:131:132 statfs:137:43 fstatfs:138:44 gettid:186:178 time:201: futex:202:98 sched_getaffinity:204:123
getdents64:217:61 set_tid_address:218:96 restart_syscall:219:128 fadvise64:221:223 clock_gettime:228:113
clock_getres:229:114 clock_nanosleep:230:115 exit_group:231:94 epoll_wait:232: epoll_ctl:233:21 openat:257:56
mkdirat:258:34 newfstatat:262:79 unlinkat:263:35 renameat:264:38 linkat:265:37 symlinkat:266:36 readlinkat:267:78
faccessat:269:48 pselect6:270:72 ppoll:271:73 set_robust_list:273:99 get_robust_list:274:100 epoll_pwait:281:22
dup3:292:24 epoll_create1:291:20 pipe2:293:59 eventfd2:290:19 preadv:295:69 pwritev:296:70 getrandom:318:278
renameat2:316:276 copy_file_range:326:285 statx:332:291 rseq:334:293 faccessat2:439:439 close_range:436:436
sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockopt:55:209 setsockopt:54:208
getsockname:51:204 getpeername:52:205
"""

# Those whose arguments decide: the numbers, then what lets one through, as (argument, mask, value) that must all hold.
Condition = tuple[int, int, int]
ALL = (1 << 64) - 1
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # duplicate, flags, locks; nothing that names an owner for signals
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, how much is there, blocking, inheriting
CHECKED: dict[str, tuple[int, int, tuple[tuple[Condition, ...], ...]]] = {
    "clone": (56, 220, (((0, 0x10000, 0x10000),),)),  # CLONE_THREAD
    "fcntl": (72, 25, tuple(((1, ALL, command),) for command in FCNTL)),
    "ioctl": (16, 29, tuple(((1, ALL, request),) for request in IOCTL)),
    "prlimit64": (302, 261, (((2, ALL, 0),),)),  # reading limits
    "socketpair": (53, 199, (((0, ALL, 1), (1, 0xF, 1)),)),  # AF_UNIX, SOCK_STREAM: asyncio wakes itself through one
}
CLONE3 = 435
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
MACHINES = {"x86_64": (0, 0xC000003E, 126, 317, 234), "aarch64": (1, 0xC00000B7, 91, 277, 131)}
"""Column of the tables, audit architecture, and the numbers of capset, seccomp and tgkill."""

# Landlock's rights to files, by bit: linux/landlock.h.
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
MAKE_SPECIAL = 1 << 0 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # execute; devices, sockets, fifos
RIGHTS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # from version 5 on: 16

READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = {"/dev/null": READ_FILE | WRITE_FILE, "/dev/zero": READ_FILE, "/dev/urandom": READ_FILE}

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

_execute, _compile = exec, compile  # so that a program that replaces the built-in ones still has its tests run


class Missing(Exception):
    """A part of the isolation that cannot be had here; the message says which and why."""


def main() -> int:
    """Confine this process, run the program and its tests, report line by line; return the exit status.

    Arguments: the descriptor of the job and how long its first part is, the descriptor of the report. The first part of
    the job is read now, the second (tests, and the word that marks true results) only after the program has run.
    """
    job_fd, length, report_fd = map(int, sys.argv[1:])
    job = json.loads(os.pread(job_fd, length, 0))
    try:
        confine(job["folder"], job["parent"], job["limits"])
    except Missing as error:
        _report(report_fd, {"missing": str(error)})
        return 3
    _report(report_fd, {"confined": True})
    module = sys.modules["__main__"] = sys.modules[job["module"]] = ModuleType(job["module"])
    sys.argv = ["answer.py"]
    problem = run(job["code"], "answer", module)
    if problem:
        _report(report_fd, {"problem": problem})
        return 1
    rest = os.pread(job_fd, os.fstat(job_fd).st_size, length)
    if rest:
        checks = json.loads(rest)
        for number, (source, counts) in enumerate(checks["steps"]):
            problem = run(source, f"test {number + 1}", module)
            _report(report_fd, {"mark": checks["mark"], "counts": counts, "problem": problem})
    return 0


def run(source: str, name: str, module: ModuleType) -> str:
    """Execute source in a module's namespace. Returns what it raised, in one line, or an empty string."""
    try:
        _execute(_compile(source, f"<{name}>", "exec"), module.__dict__)
    except SystemExit as error:
        return "" if error.code in (None, 0) and name == "answer" else f"SystemExit: {error.code}"
    except BaseException as error:  # the program may raise anything; that is its result
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == f"<{name}>"]
        text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:300]
        return f"{text} ({name}:{lines[-1]})" if lines else text
    return ""


def confine(folder: str, parent: int, limits: dict[str, int]) -> None:
    """Give up everything but the folder, for good.

    Args:
        folder: the only place to write to.
        parent: the process whose end is to end this one.
        limits: values of the resource limits, by name (`AS` for RLIMIT_AS).

    Raises:
        Missing: this system lacks a part, or it does not hold.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise Missing(f"the sandbox needs Linux on {' or '.join(MACHINES)}, this is {sys.platform} on {machine}")
    column, audit, capset, seccomp, tgkill = MACHINES[machine]
    libc = ctypes.CDLL(None, use_errno=True)
    for name, value in {**limits, "CORE": 0}.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        allowed = resource.getrlimit(kind)[1]
        hard = value + (name == "CPU")  # the soft limit's SIGXCPU tells a time-out from a kill
        hard = hard if allowed == resource.RLIM_INFINITY else min(hard, allowed)
        resource.setrlimit(kind, (min(value, hard), hard))
    nothing = (ctypes.c_uint32 * 6)()
    _demand("dropping capabilities", libc.syscall(capset, (ctypes.c_uint32 * 2)(0x20080522, 0), nothing))
    _demand("PR_SET_PDEATHSIG", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    _demand("PR_SET_NO_NEW_PRIVS", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if os.getppid() != parent:
        raise Missing("the process that started this one is gone")
    _restrict_files(libc, folder)
    program = _filter(column, audit, tgkill)
    buffer = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _demand("the seccomp filter", libc.syscall(seccomp, 1, 0, head))  # SECCOMP_SET_MODE_FILTER
    _verify()


def _restrict_files(libc: Any, folder: str) -> None:
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)  # LANDLOCK_CREATE_RULESET_VERSION
    if version < 1:
        why = os.strerror(ctypes.get_errno())
        raise Missing(f"Landlock is not available ({why}); it needs Linux 5.13 or newer with Landlock switched on")
    rights = (1 << RIGHTS_BITS.get(version, 16)) - 1
    rules = dict.fromkeys((*READABLE, os.path.join(sys.base_prefix, sys.platlibdir)), READ_FILE | READ_DIR)
    rules |= {**DEVICES, os.path.join(sys.base_prefix, "lib"): READ_FILE | READ_DIR, folder: rights & ~MAKE_SPECIAL}
    ruleset = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0)
    _demand("the Landlock rule set", ruleset)
    for path, granted in rules.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        granted = granted if os.path.isdir(path) else granted & ~READ_DIR
        _demand(
            f"the Landlock rule for {path}",
            libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", granted, place), 0),
        )
        os.close(place)
    _demand("Landlock", libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def _filter(column: int, audit: int, tgkill: int) -> bytes:
    """Return the seccomp program: instructions (code, jump if true, jump if false, value) of classic BPF."""
    allow, refuse = _step(0x06, 0x7FFF0000), _step(0x06, 0x00050000 | 1)  # EPERM
    absent, kill = _step(0x06, 0x00050000 | 38), _step(0x06, 0x80000000)  # ENOSYS; another architecture's calls
    program = _load(4) + _step(0x15, audit, 1, 0) + kill + _load(0)
    for entry in ALLOWED.split():
        if digits := entry.split(":")[1 + column]:
            program += _step(0x15, int(digits), 0, 1) + allow
    program += _step(0x15, CLONE3, 0, 1) + absent  # its arguments lie in memory; libraries then use clone
    checked = [(numbers[column], ways) for *numbers, ways in CHECKED.values()]
    checked.append((tgkill, (((0, ALL, os.getpid()),),)))  # abort() signals its own process
    for number, ways in checked:
        body = b"".join(_unless(conditions) + allow for conditions in ways) + refuse
        program += _step(0x15, number, 0, len(body) // 8) + body
    return program + refuse


def _unless(conditions: tuple[Condition, ...]) -> bytes:
    """Return instructions that go past the next one unless all conditions hold, each on both 32-bit halves."""
    halves = []
    for argument, mask, value in conditions:
        for shift in (0, 32):
            if part := mask >> shift & 0xFFFFFFFF:
                halves.append((16 + 8 * argument + shift // 8, part, value >> shift & 0xFFFFFFFF))
    program = b""
    for left, (offset, mask, value) in zip(range(len(halves) - 1, -1, -1), halves, strict=True):
        program += _load(offset) + _step(0x54, mask) + _step(0x15, value, 0, 3 * left + 1)
    return program


def _load(offset: int) -> bytes:
    return _step(0x20, offset)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _verify() -> None:
    """Try what must fail: a kernel or container that only pretends would otherwise go unnoticed."""
    attempts: dict[str, Callable[[], object]] = {
        "files outside": lambda: os.listdir("/"),
        "the network": _socket.socket,
        "other programs": lambda: os.execv("/bin/true", ["true"]),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except PermissionError:
            continue
        except OSError as error:
            raise Missing(f"the check of {what} failed in another way than refusal: {error}") from error
        raise Missing(f"{what} could still be reached after it was forbidden")


def _demand(what: str, result: int) -> None:
    if result < 0:
        raise Missing(f"{what} was refused by the kernel: {os.strerror(ctypes.get_errno())}")


def _report(fd: int, line: dict[str, Any]) -> None:
    os.write(fd, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
