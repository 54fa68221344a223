"""The learning curve on disk and the line the user watches."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ascent.observe import MetricLog, Progress
from ascent.records.errors import Corrupt, NoSpace


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# MetricLog


def test_rows_are_readable_at_once_and_every_number_survives(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricLog(path) as log:
        log.append(1, {"loss": 0.1 + 0.2, "ok": True, "note": "warm-up", "kl": None})
        assert MetricLog.read(path) == [{"step": 1, "loss": 0.1 + 0.2, "ok": True, "note": "warm-up", "kl": None}]
        log.append(2, {"loss": math.nan, "up": math.inf, "down": -math.inf, "reward": np.float32(0.25)})
    last = MetricLog.read(path)[-1]
    assert math.isnan(last["loss"]) and (last["up"], last["down"]) == (math.inf, -math.inf)
    assert last["reward"] == 0.25

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_resuming_writes_the_same_file_as_never_stopping(tmp_path: Path) -> None:
    def rows(log: MetricLog, first: int, last: int) -> None:
        for step in range(first, last + 1):
            log.append(step, {"loss": 1 / step, "grad": math.nan if step == 2 else 1.0})

    with MetricLog(tmp_path / "whole.jsonl") as log:
        rows(log, 1, 9)
    path = tmp_path / "cut.jsonl"
    rows(MetricLog(path), 1, 7)
    with path.open("ab") as file:
        file.write(b'{"step": 8, "lo')  # what a kill in the middle of a write leaves
    resumed = MetricLog(path)
    assert resumed.last_step == 7
    assert resumed.truncate_after(4) == 3
    assert resumed.last_step == 4
    rows(resumed, 5, 9)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert resumed.truncate_after(9) == 0
    assert resumed.truncate_after(-1) == 9 and resumed.last_step is None and MetricLog.read(path) == []


def test_a_step_is_written_once(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "m.jsonl")
    log.append(3, {"loss": 1.0})
    for step in (3, 2):
        with pytest.raises(ValueError, match="truncate_after"):
            MetricLog(log.path).append(step, {"loss": 1.0})
    with pytest.raises(ValueError, match="cannot be called 'step'"):
        log.append(4, {"step": 4})
    assert [row["step"] for row in MetricLog.read(log.path)] == [3]


def test_the_disk_is_forced_now_and_then_and_on_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real(handle))[1])
    clock = Clock()
    log = MetricLog(tmp_path / "m.jsonl", sync_every_s=10, clock=clock)
    counts = []
    for step in range(1, 26):
        clock.now += 1
        log.append(step, {"loss": 1.0})
        counts.append(len(synced))
    assert counts == [0] * 9 + [1] * 10 + [2] * 6
    log.close()
    log.close()
    assert len(synced) == 3


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    log = MetricLog(tmp_path / "m.jsonl", sync_every_s=0, clock=clock)
    log.append(1, {"loss": 1.0})
    before = log.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NoSpace):
            log.append(2, {"loss": 1.0})
    assert log.path.read_bytes() == before
    log.append(2, {"loss": 1.0})
    assert [row["step"] for row in MetricLog.read(log.path)] == [1, 2]


@pytest.mark.parametrize("line", ["[1]", '{"loss": 1}', '{"step": "1"}', "{"])
def test_a_log_that_was_edited_is_named_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(Corrupt, match=r"m\.jsonl:2"):
        MetricLog(path)


# Progress


def run(steps: list[tuple[float, dict[str, Any]]], **arguments: Any) -> list[str]:
    """Play updates `seconds -> arguments` to a stream that is no terminal and return its lines."""
    stream, clock = io.StringIO(), Clock()
    with Progress(arguments.pop("task", "sft"), stream=stream, clock=clock, **arguments) as progress:
        for seconds, update in steps:
            clock.now = 100 + seconds
            progress.update(**update)
    return stream.getvalue().splitlines()


def test_plain_lines_come_at_most_every_ten_seconds_and_at_the_end() -> None:
    steps = [
        (second, {"done": second, "tokens": 500, "loss": 2 / second, "clip_fraction": 0.0123})
        for second in range(1, 26)
    ]
    lines = run(steps, total=100)
    assert lines == [
        "sft 10/100 10% 500 tokens/s 1:30 left loss 0.2 clip fraction 0.0123",
        "sft 20/100 20% 500 tokens/s 1:20 left loss 0.1 clip fraction 0.0123",
        "sft 25/100 25% done in 0:25 500 tokens/s loss 0.08 clip fraction 0.0123",
    ]
    assert all(line.isascii() for line in lines)


def test_speed_and_time_left_do_not_count_what_was_done_before() -> None:
    """A run resumed at 50 of 100 that takes 30 s for 10 steps needs 120 s for the other 40."""
    assert run([(30, {"done": 60})], total=100, start=50)[0] == "sft 60/100 60% 2:00 left"
    lines = run([(10, {"done": 30_000_000})], total=100_000_000, start=10_000_000, unit="bytes", task="pull x")
    assert lines[0] == "pull x 30.0 MB/100.0 MB 30% 2.0 MB/s 0:35 left"
    assert lines[1] == "pull x 30.0 MB/100.0 MB 30% done in 0:10 2.0 MB/s"


def test_unknown_totals_and_large_and_odd_numbers() -> None:
    assert run([(10, {"done": 5_500_000_000})], unit="bytes")[0] == "sft 5.5 GB 550.0 MB/s"
    assert run([(4000, {"done": 1, "loss": math.nan, "reward": -1, "kl": 1e-5})], total=3)[0] == (
        "sft 1/3 33% 2:13:20 left loss nan reward -1 kl 1e-05"
    )


def test_an_interrupted_task_says_stopped() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress("dpo", total=10, stream=stream) as progress:
        progress.update(3)
        raise KeyboardInterrupt
    assert re.fullmatch(r"dpo 3/10 30% stopped in 0:00\n", stream.getvalue())


def test_quiet_counts_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress.quiet("x", 400) as progress:
        threads = [threading.Thread(target=lambda: [progress.advance(tokens=2) for _ in range(100)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (progress.done, progress.tokens) == (400, 800)
    assert capfd.readouterr() == ("", "")


SCRIPT = """
import sys
from ascent.observe import Progress
with Progress("dpo [bold]a", total=3) as progress:
    for step in range(3):
        progress.update(step + 1, tokens=10, loss=0.5, reward=0.25)
assert ("rich" in sys.modules) == sys.stderr.isatty()
"""


def screen(term: str) -> str:
    """Run the script on a pseudo-terminal and return what it drew, without control sequences."""
    ours, theirs = pty.openpty()
    env = {"TERM": term, "COLUMNS": "200", "PATH": ""}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs, stdout=theirs, env=env)
    os.close(theirs)
    drawn = b""
    while chunk := _read(ours):
        drawn += chunk
    os.close(ours)
    assert process.wait(30) == 0, drawn
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.decode())


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # Linux says EIO where others say end of file
        return b""


def test_a_terminal_gets_a_live_line_that_ends_complete() -> None:
    last = [line for line in screen("xterm").replace("\r", "\n").splitlines() if line.strip()][-1]
    assert re.search(r"\[bold\]a 3/3 100% done in 0:0\d \d+ tokens/s loss 0.5 reward 0.25", last)


def test_a_pipe_gets_plain_text_without_loading_rich() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=30)
    assert re.fullmatch(r"dpo \[bold\]a 3/3 100% done in 0:0\d \d+ tokens/s loss 0.5 reward 0.25\n", done.stderr)
    assert done.stdout == ""
