"""Model-written Python in a sandbox: take it out of an answer, run it, say what came of it.

The isolation is that of `ascent.evaluate.sandbox`. Where it cannot be had nothing is run.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ascent.records import Unscored

TIME_LIMIT_S = 3.0
"""Wall clock of one program with its tests: well under the five seconds that a `GraderPool` gives a grader."""

MEMORY_BYTES = 1 << 30
FILE_BYTES = 4 << 20
FOLDER_BYTES = 64 << 20
OPEN_FILES = 64

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = frozenset({"", "python", "python3", "py"})
_SANDBOX = Path(__file__).with_name("sandbox.py")


@dataclass(frozen=True)
class Ran:
    """What came of a program.

    `stdout` is what it printed. `problem` is empty if it ended well, or says in one line how it did not. `tests` has
    one line per test, empty for a test that passed. `unscored` is set where nothing can be said about the program: it
    did not end in time, it was killed from outside, or the sandbox could not be had; `problem` then says which.
    """

    stdout: str = ""
    problem: str = ""
    tests: tuple[str, ...] = ()
    unscored: Unscored | None = None


def extract_code(text: str) -> str:
    """Return the last fenced block of Python, where an answer ends; a text without any fence is code itself.

    A fence without a language counts as Python, one that is never closed ends with the text. With fences of other
    languages only, there is no code and the result is empty.
    """
    blocks = _FENCE.findall(text)
    if not blocks:
        return text
    return next((code for _, language, code in reversed(blocks) if language.lower() in _PYTHON), "")


def run_code(code: str, tests: str | Sequence[str] = (), *, stdin: str = "", time_limit_s: float = TIME_LIMIT_S) -> Ran:
    """Run a program, then its tests in the same process, in a sandbox: see `ascent.evaluate.sandbox`.

    The program has an empty folder to write to (64 MiB, 4 MiB per file and for what it prints), 1 GiB of memory, the
    standard library, one process, no network, and hashes strings the same way every time. With tests it is a module
    called `answer`, without it is `__main__`.

    Each text in a list of tests is one test: it passes unless it raises. Of a single text the functions named
    `test...` are the tests, or else its `assert` statements, or else the whole. Results carry a mark that is shown to
    the process only after the program has run, so printing them or leaving early counts as failing. Code that searches
    its own process for the mark can still forge them, as can objects that are equal to everything.

    Raises:
        ValueError, SyntaxError: the tests are empty or no Python.
    """
    steps = _steps(tests) if tests else []
    if sys.platform != "linux":
        return Ran(problem=f"there is no sandbox for {sys.platform}; grade code on Linux", unscored=Unscored.error)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder())
        job, report, out, err, into = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(5))
        seconds = math.ceil(time_limit_s) + 1
        first = {
            "code": code,
            "folder": folder,
            "parent": os.getpid(),
            "module": "answer" if steps else "__main__",
            "limits": {"AS": MEMORY_BYTES, "CPU": seconds, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES},
        }
        mark = secrets.token_hex(16)
        length = job.write(json.dumps(first).encode())
        job.write(json.dumps({"mark": mark, "steps": steps}).encode() if steps else b"")
        into.write(stdin.encode("utf-8", "replace"))
        into.seek(0)
        job.flush()
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", _SANDBOX, str(job.fileno()), str(length), str(report.fileno())],
            stdin=into,
            stdout=out,
            stderr=err,
            pass_fds=[job.fileno(), report.fileno()],
            start_new_session=True,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"},
        )
        stopped = _wait(process, folder, time_limit_s)
        return _result(process.returncode, stopped, _lines(report), mark, steps, _text(out), _text(err))


def _steps(tests: str | Sequence[str]) -> list[tuple[str, bool]]:
    """Return sources to run in order, and whether each is a test or makes ready for one."""
    if not isinstance(tests, str):
        return [(source, True) for source in tests]
    body = ast.parse(tests).body
    if not body:
        raise ValueError("the tests hold no statement")
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    if functions:
        return [(tests, False), *((f"{name}()", True) for name in functions)]
    if not any(isinstance(node, ast.Assert) for node in body):
        return [(tests, True)]
    return [(ast.unparse(node), isinstance(node, ast.Assert)) for node in body]


def _wait(process: subprocess.Popen[bytes], folder: str, time_limit_s: float) -> Ran | None:
    """Wait for the end, or bring it about with SIGKILL to the whole group; then say why."""
    until = time.monotonic() + time_limit_s
    stopped = None
    try:
        handle = os.pidfd_open(process.pid)
        try:
            ended = select.poll()
            ended.register(handle, select.POLLIN)
            while stopped is None and not ended.poll(max(0.0, min(0.1, until - time.monotonic())) * 1000):
                if time.monotonic() >= until:
                    reason = f"the program did not end within {time_limit_s:g} s and was stopped"
                    stopped = Ran(problem=reason, unscored=Unscored.timeout)
                elif _is_full(folder):
                    stopped = Ran(problem=f"the program filled its folder with more than {FOLDER_BYTES >> 20} MiB")
        finally:
            os.close(handle)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return stopped


def _is_full(folder: str) -> bool:
    total, places = 0, [folder]
    while places and total <= FOLDER_BYTES:
        place = places.pop()
        if len(place) > 2000:  # so deep that it is no use but to hide
            return True
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                total += 4096
                if entry.is_dir(follow_symlinks=False):
                    places.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    return total > FOLDER_BYTES


def _result(
    status: int,
    stopped: Ran | None,
    lines: list[dict[str, Any]],
    mark: str,
    steps: list[tuple[str, bool]],
    stdout: str,
    stderr: str,
) -> Ran:
    """Put together what the process reported, how it ended and what it printed."""
    if not lines or "confined" not in lines[0]:
        if stopped is not None and stopped.unscored is not None:
            return stopped
        missing = lines[0].get("missing") if lines else None
        why = missing or f"its process ended with status {status}: {stderr[-300:].strip()}"
        return Ran(problem=f"the sandbox could not be set up, so nothing was run: {why}", unscored=Unscored.error)
    if stopped is None and status == -signal.SIGXCPU:
        stopped = Ran(problem="the program used up its processor time", unscored=Unscored.timeout)
    if stopped is None and status == -signal.SIGKILL:
        reason = "the program was killed from outside; look for a lack of memory on this machine"
        stopped = Ran(problem=reason, unscored=Unscored.crash)
    if stopped is not None:
        return stopped
    problem = next((line["problem"] for line in lines if "problem" in line and "mark" not in line), "")
    if not problem and status != 0:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        problem = f"the program {how}"
    results = [line["problem"] for line in lines if line.get("mark") == mark and line["counts"]]
    wanted = sum(counts for _, counts in steps)
    results += [problem or "the program ended before this test"] * (wanted - len(results))
    return Ran(stdout=stdout, problem=problem, tests=tuple(results))


def _lines(report: IO[bytes]) -> list[dict[str, Any]]:
    """Return what the process reported; a line that is not its own is left out."""
    found = []
    report.seek(0)
    for line in report.read().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(FILE_BYTES).decode("utf-8", "replace")


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A fresh folder, removed at the end, however deep the program nested it."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="ascent-code-"))
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:
            subprocess.run(["rm", "-rf", "--", folder], check=False)
