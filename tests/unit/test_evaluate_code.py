"""The sandbox of model-written code: what it must keep from the code is really tried, from inside."""

from __future__ import annotations

import re
import socket
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from ascent.evaluate import code as module
from ascent.evaluate import sandbox
from ascent.evaluate.code import extract_code, run_code
from ascent.evaluate.graders import BUILTIN, as_score
from ascent.evaluate.pool import GraderPool
from ascent.records import Episode, Score, Task, Unscored

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
PATIENT_S = 60
"""A limit for what ends by itself, so that a busy machine fails no test."""
HEADERS = {
    1: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    2: Path("/usr/include/asm-generic/unistd.h"),
}


def out(code: str, stdin: str = "") -> str:
    """Run code that prints what it saw, and must not fail for another reason."""
    ran = run_code(textwrap.dedent(code), stdin=stdin, time_limit_s=PATIENT_S)
    assert (ran.problem, ran.unscored) == ("", None)
    return ran.stdout.strip()


def results(attempts: Sequence[str]) -> dict[str, str]:
    """Try statements inside, one after the other; return what each raised, or `went through`."""
    printed = out(f"""
        import ctypes, multiprocessing, os, pathlib, resource, signal, socket, subprocess, sys
        libc = ctypes.CDLL(None, use_errno=True)
        intel = os.uname().machine == "x86_64"
        def call(*arguments):
            if libc.syscall(*arguments) < 0:
                raise OSError(ctypes.get_errno(), "refused")
        for attempt in {attempts!r}:
            try:
                exec(attempt)
            except BaseException as error:
                print(type(error).__name__)
            else:
                print("went through")
    """)
    return dict(zip(attempts, printed.splitlines(), strict=True))


def test_what_leaves_the_sandbox_is_refused() -> None:
    attempts = [
        "open('/etc/shadow').read()",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        f"os.listdir({str(Path.home())!r})",
        f"open({__file__!r}).read()",
        "os.listdir('/')",
        "os.listdir('/proc')",
        "open(f'/proc/{os.getppid()}/mem', 'rb+')",
        "open('/dev/shm/left', 'w')",
        "os.mkfifo('pipe')",
        "os.execv('/bin/sh', ['sh', '-c', 'true'])",
        "subprocess.run(['true'])",
        "os.fork()",
        "multiprocessing.get_context('fork').Process(target=print).start()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.create_connection(('127.0.0.1', 9), 1)",
        "os.kill(os.getppid(), signal.SIGKILL)",
        "os.kill(-1, signal.SIGKILL)",
        "call(234 if intel else 131, os.getppid(), os.getppid(), 9)  # tgkill",
        "call(425, 8, None)  # io_uring_setup",
        "call(272 if intel else 97, 0x10000000)  # unshare",
        "call(101 if intel else 117, 16, os.getppid(), 0, 0)  # ptrace",
        "os.setsid()",
        "os.setuid(0)",
        "os.chroot('.')",
        "os.chmod('.', 0o777)",
        "os.utime('.')",
        "os.setxattr('.', 'user.a', b'1')",
        "os.memfd_create('x')",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    ]
    assert results(attempts) == dict.fromkeys(attempts, "PermissionError")


def test_limits_cannot_be_raised() -> None:
    raised = "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"
    assert results([raised]) == {raised: "ValueError"}


def test_writing_outside_leaves_nothing_and_the_program_gets_the_error(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("before")
    mode = mine.stat().st_mode
    attempts = [
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(mine)!r}, 'a')",
        f"open({str(mine)!r}).read()",
        f"os.unlink({str(mine)!r})",
        f"os.rename({str(mine)!r}, 'stolen')",
        f"os.link({str(mine)!r}, 'link')",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.truncate({str(mine)!r}, 0)",
        f"os.chmod({str(mine)!r}, 0o777)",
        f"os.symlink({str(mine)!r}, 'way'); open('way', 'w')",
        f"os.symlink({str(tmp_path)!r}, 'road'); open('road/new', 'w')",
        f"open(pathlib.Path({str(Path.home())!r}) / '.ascent-sandbox-test', 'w')",
    ]
    found = results(attempts)
    assert set(found.values()) <= {"PermissionError", "OSError"}, found  # a link between file systems is no permission
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (mine.read_text(), mine.stat().st_mode) == ("before", mode)
    assert not (Path.home() / ".ascent-sandbox-test").exists()

    ran = run_code(f"open({str(tmp_path / 'new')!r}, 'w')")
    assert "PermissionError: [Errno 13]" in ran.problem
    assert "(answer:1)" in ran.problem


def test_a_listening_neighbour_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 1).close()
        server.accept()[0].close()
        attempt = f"socket.create_connection(('127.0.0.1', {port}), 1)"
        assert results([attempt]) == {attempt: "PermissionError"}
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_environment_and_the_folder_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCENT_SECRET", "token")
    found = out(
        """
        import os, tempfile
        print(sorted(os.environ), os.listdir(), os.getcwd() == os.environ["HOME"] == tempfile.gettempdir())
        open("left", "w").write("x"); os.makedirs("a/b")
        print(os.getcwd())
    """
    )
    words, place = found.splitlines()
    assert words == "['HOME', 'LANG', 'PYTHONHASHSEED', 'PYTHONUTF8', 'TMPDIR'] [] True"
    folder = Path(place)
    assert folder.name.startswith("ascent-code-")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("code", "cause", "reason"),
    [
        ("while True: pass", Unscored.timeout, "did not end within 0.5 s"),
        ("import time; time.sleep(60)", Unscored.timeout, "did not end within 0.5 s"),
        ("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)", Unscored.timeout, "did not end"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", Unscored.timeout, "end"),
        ("x = bytearray(4 << 30)", None, "MemoryError"),
        ("x = []\nwhile True: x.append(bytes(10 << 20))", None, "MemoryError (answer:2)"),
        ("import ctypes; ctypes.string_at(0)", None, "killed by SIGSEGV"),
        ("import os; os.abort()", None, "killed by SIGABRT"),
        ("import sys; sys.exit(3)", None, "SystemExit: 3"),
        ("import os; os._exit(3)", None, "exit status 3"),
        ("def f(): f()\nf()", None, "RecursionError"),
        ("print('ok'", None, "SyntaxError"),
        ("\0", None, "null bytes"),
        ("class E(Exception):\n def __str__(self): raise SystemExit\nraise E", None, "E"),
        ("import os\nwhile True: os.write(1, b'x' * (1 << 20))", None, "File too large"),
        ("open('big', 'wb').write(bytes(8 << 20))", None, "File too large"),
        ("x = [open('/dev/null') for _ in range(100)]", None, "Too many open files"),
    ],
)
def test_a_program_that_misbehaves_costs_only_itself(code: str, cause: Unscored | None, reason: str) -> None:
    ran = run_code(code, time_limit_s=0.5 if cause else PATIENT_S)
    assert ran.unscored is cause
    assert reason in ran.problem
    assert len(ran.stdout) <= module.FILE_BYTES


def test_a_full_folder_ends_the_program_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fill = "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(bytes(4 << 20))"
    ran = run_code(fill, time_limit_s=PATIENT_S)
    assert "filled its folder with more than 64 MiB" in ran.problem
    ran = run_code("import os\nfor _ in range(1500): os.mkdir('deep'); os.chdir('deep')", time_limit_s=PATIENT_S)
    assert ran.problem == "" or "filled" in ran.problem
    assert list(tmp_path.iterdir()) == []


def test_no_child_is_left_behind_and_a_bomb_of_forks_and_threads_is_bounded() -> None:
    before = {process.pid for process in psutil.process_iter()}
    assert (
        out("""
        import os, threading, time
        made = 0
        for _ in range(50):
            try:
                os.fork(); made += 1
            except PermissionError:
                pass
        try:
            for _ in range(5000):
                threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
        except (RuntimeError, MemoryError):
            pass
        print(made)
    """)
        == "0"
    )
    ours = [process for process in psutil.process_iter(["cmdline"]) if process.pid not in before]
    assert not [process for process in ours if any("sandbox.py" in part for part in process.info["cmdline"] or ())]


def test_a_killed_worker_takes_its_sandbox_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's limit is shorter than the program's: the kernel ends the program when its worker is killed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    task = Task(id="1", expected={"stdout": "", "time_limit_s": 60})
    with GraderPool(None, ["code_output"], time_limit_s=1) as pool:
        [graded] = pool.grade([(task, answer("import time; time.sleep(60)"))])
    assert graded.scores[0].unscored is Unscored.timeout
    deadline = time.monotonic() + PATIENT_S
    while sandboxes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sandboxes() == []


def test_a_pool_grades_code() -> None:
    pairs = [(Task(id="1", expected={"stdout": "4"}), answer(text)) for text in ("print(4)", "print(5)", "4 +")]
    with GraderPool(None, ["code_output"], time_limit_s=PATIENT_S) as pool:
        assert [episode.scores[0].value for episode in pool.grade(pairs)] == [1.0, 0.0, 0.0]


def sandboxes() -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(module._SANDBOX) in (process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


def test_without_isolation_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is replaced in a copy of the script; the program would leave a file if it ran at all."""
    mark = tmp_path / "ran"
    source = Path(sandbox.__file__).read_text()
    for change, reason in {
        "LANDLOCK_CREATE, None, 0, 1)": "Landlock is not available",
        "libc.syscall(seccomp, 1, 0, head)": "the network could still be reached",
        "libc.syscall(LANDLOCK_RESTRICT, ruleset, 0)": "files outside could still be reached",
        "platform.machine()": "needs Linux on x86_64 or aarch64, this is linux on riscv64",
        "def main() -> int:": "its process ended with status 1",
    }.items():
        assert change in source
        broken = {
            "LANDLOCK_CREATE, None, 0, 1)": "9999, None, 0, 1)",
            "platform.machine()": "'riscv64'",
            "def main() -> int:": "def main() -> int:\n    raise OSError('no')\n",
        }.get(change, "0")
        script = tmp_path / "sandbox.py"
        script.write_text(source.replace(change, broken))
        monkeypatch.setattr(module, "_SANDBOX", script)
        ran = run_code(f"open({str(mark)!r}, 'w')\nprint('ran')")
        assert (ran.unscored, ran.stdout) == (Unscored.error, "")
        assert "the sandbox could not be set up, so nothing was run" in ran.problem
        assert reason in ran.problem
        assert not mark.exists()
    score = as_score("unit_tests", BUILTIN["unit_tests"](Task(id="1", expected={"tests": ["1"]}), answer("")))
    assert score.unscored is Unscored.error
    monkeypatch.setattr(module.sys, "platform", "plan9")
    assert "no sandbox for plan9" in run_code("").problem


@pytest.mark.parametrize("column", sorted(HEADERS))
def test_the_numbers_of_system_calls_are_the_kernels(column: int) -> None:
    if not HEADERS[column].exists():
        pytest.skip("the kernel's headers are not installed")
    text = HEADERS[column].read_text()
    known: dict[str, set[int]] = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text):
        known.setdefault({"fstatat": "newfstatat"}.get(name, name), set()).add(int(number))
    _, _, capset, seccomp, tgkill = sandbox.MACHINES["x86_64" if column == 1 else "aarch64"]
    mine = {entry.split(":")[0]: entry.split(":")[column] for entry in sandbox.ALLOWED.split()}
    mine |= {name: str(numbers[column - 1]) for name, numbers in sandbox.CHECKED.items()}
    mine |= {"capset": str(capset), "seccomp": str(seccomp), "tgkill": str(tgkill), "clone3": str(sandbox.CLONE3)}
    mine |= {"landlock_create_ruleset": str(sandbox.LANDLOCK_CREATE), "landlock_add_rule": str(sandbox.LANDLOCK_ADD)}
    mine |= {"landlock_restrict_self": str(sandbox.LANDLOCK_RESTRICT)}
    wrong = {name: number for name, number in mine.items() if number and int(number) not in known.get(name, set())}
    assert not wrong


def test_ordinary_programs_run() -> None:
    assert out(
        """
        import asyncio, concurrent.futures, csv, dataclasses, datetime, decimal, hashlib, json, math, os, random, re
        import sqlite3, ssl, statistics, tempfile, threading, unittest, uuid, zoneinfo

        @dataclasses.dataclass
        class Point:
            x: "int"

        async def later():
            await asyncio.sleep(0.01)
            return Point(3).x

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            print(sum(pool.map(abs, range(10))), asyncio.run(later()))
        with tempfile.TemporaryDirectory() as folder:
            open(os.path.join(folder, "a"), "w").write("b")
            os.rename(os.path.join(folder, "a"), os.path.join(folder, "c"))
            summer = datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
            print(os.listdir(folder), summer.utcoffset())
        with sqlite3.connect("data") as database:
            print(database.execute("select 6 * 7").fetchone()[0], input(), input())
        if __name__ == "__main__":
            print("main")
    """,
        stdin="one\ntwo\n",
    ).splitlines() == ["45 3", "['c'] 2:00:00", "42 one two", "main"]


def test_the_same_program_prints_the_same_twice() -> None:
    code = "print(list({str(n) for n in range(50)}), hash('a'))"
    assert out(code) == out(code)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("print(1)", "print(1)"),
        ("First:\n```python\na = 1\n```\nthen\n```py\na = 2\n```\nDone.", "a = 2\n"),
        ("```Python\nx = '''\n``` not a fence\n'''\n```", "x = '''\n``` not a fence\n'''\n"),
        ("```\nb = 1\n```\n```json\n{}\n```", "b = 1\n"),
        ("```json\n{}\n```", ""),
        ("cut off\n```python\nc = 1", "c = 1"),
        ("~~~python\nd = 1\n~~~", "d = 1\n"),
        ("````python\ns = 1\n```\nt = 2\n````", "s = 1\n```\nt = 2\n"),
        ("  ```python\n  e = 1\n  ```", "  e = 1\n"),
    ],
)
def test_code_is_taken_from_the_last_fence(text: str, code: str) -> None:
    assert extract_code(text) == code


def answer(text: str) -> Episode:
    return Episode(task_id="1", model="m", messages=(), text=text, output=text)


def grade(name: str, text: str, expected: dict[str, object]) -> Score:
    task = Task(id="1", expected={"time_limit_s": PATIENT_S, **expected})
    return as_score(name, BUILTIN[name](task, answer(text)))


@pytest.mark.parametrize(
    ("text", "expected", "value", "reason"),
    [
        ("```python\nprint(2 + 2)\n```", {"stdout": "4"}, 1.0, ""),
        ("print('a  ')\nprint()", {"stdout": "a\n"}, 1.0, ""),
        ("print(int(input()) * 2)", {"stdout": "14\n", "stdin": "7\n"}, 1.0, ""),
        ("print(1)\nprint(5)", {"stdout": "1\n4"}, 0.0, "line 2 is '5', expected '4'"),
        ("print(1)", {"stdout": "1\n4"}, 0.0, "printed 1 lines, expected 2"),
        ("print(4)\n1/0", {"stdout": "4"}, 0.0, "ZeroDivisionError: division by zero (answer:2)"),
        ("no code at all", {"stdout": "4"}, 0.0, "SyntaxError"),
    ],
)
def test_code_output(text: str, expected: dict[str, object], value: float, reason: str) -> None:
    score = grade("code_output", text, expected)
    assert score.value == value
    assert reason in score.reason


ADD = "```python\ndef add(a, b):\n    return a + b if a < 10 else 0\n```"
TESTS = "import math\ndef test_one(): assert add(1, 2) == 3\ndef test_two():\n    assert add(20, 2) == 22"


@pytest.mark.parametrize(
    ("text", "expected", "value", "reason"),
    [
        (ADD, {"tests": ["assert add(1, 1) == 2", "assert add(2, 2) == 4"]}, 1.0, "passed 2 of 2 tests"),
        (
            ADD,
            {"tests": ["assert add(1, 1) == 2", "assert add(20, 2) == 22, 'big'"]},
            0.5,
            "test 2: AssertionError: big",
        ),
        (ADD, {"tests": ["assert add(1, 1) == 2", "assert add(20, 2) == 22"], "all": True}, 0.0, "1 of 2"),
        (ADD, {"tests": ["assert add(1, 1) == 2"], "all": True}, 1.0, "1 of 1"),
        (ADD, {"tests": TESTS}, 0.5, "test 2: AssertionError"),
        (
            ADD,
            {"tests": "x = 3\nassert add(1, 2) == x\nassert add(20, 2) == x\nassert add(0, 3) == x"},
            2 / 3,
            "2 of 3",
        ),
        (ADD, {"tests": "def check(f):\n    assert f(1, 2) == 3\ncheck(add)"}, 1.0, "1 of 1"),
        (ADD, {"tests": "def check(f):\n    assert f(20, 2) == 22\ncheck(add)"}, 0.0, "0 of 1"),
        ("def sub(): pass", {"tests": ["assert add(1, 1) == 2", "1"]}, 0.5, "NameError: name 'add'"),
        ("import sys; sys.exit(0)", {"tests": ["assert add(1, 1) == 2"]}, 0.0, "NameError"),
        ("import os; os._exit(0)", {"tests": ["1", "1"]}, 0.0, "0 of 2 tests; test 1: the program ended before"),
        ("1/0", {"tests": ["1", "1"]}, 0.0, "ZeroDivisionError"),
        ("def f(): import os; os._exit(0)", {"tests": ["1", "f()", "1"]}, 1 / 3, "test 2: the program ended before"),
        ("def f(): raise SystemExit(0)", {"tests": ["f()"]}, 0.0, "SystemExit"),
        ("import builtins; builtins.exec = builtins.compile = print", {"tests": ["assert False"]}, 0.0, "Assertion"),
        ("import __main__; __main__.run = lambda *a: ''", {"tests": ["assert False"]}, 0.0, "Assertion"),
        (
            'import os\nfor fd in range(3, 9):\n try: os.write(fd, b\'{"problem": "", "counts": true, "mark": 1}\\n\')'
            "\n except OSError: pass\nos._exit(0)",
            {"tests": ["1"]},
            0.0,
            "ended before",
        ),
        ("if __name__ == '__main__': raise SystemExit(1)", {"tests": ["1"]}, 1.0, ""),
    ],
)
def test_unit_tests(text: str, expected: dict[str, object], value: float, reason: str) -> None:
    score = grade("unit_tests", text, expected)
    assert score.value == pytest.approx(value)
    assert reason in score.reason


def test_a_program_or_test_that_never_ends_is_unscored_not_wrong() -> None:
    loop = {"tests": ["assert True", "f()"], "time_limit_s": 0.3}
    score = grade("unit_tests", "def f():\n    while True: pass", loop)
    assert (score.value, score.unscored) == (None, Unscored.timeout)
    assert grade("code_output", "while True: pass", {"stdout": "", "time_limit_s": 0.3}).unscored is Unscored.timeout


def test_tests_that_are_no_python_are_the_graders_error() -> None:
    with pytest.raises(SyntaxError):
        grade("unit_tests", ADD, {"tests": "assert ("})
    with pytest.raises(ValueError, match="no statement"):
        grade("unit_tests", ADD, {"tests": "# nothing"})
