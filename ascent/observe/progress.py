"""What the user watches: one live line on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TextIO

if TYPE_CHECKING:
    import rich.progress

Unit = Literal["step", "bytes"]
_LIVE_REFRESH_S = 0.1
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


class Progress:
    """Progress of one task, as a context manager.

    A line holds the task's name, done/total, tokens (or bytes) per second, the estimated time left, and any
    named numbers (loss, reward, kl, entropy, clip fraction, ...). On a terminal it is one live line drawn by
    rich. Anywhere else it is a plain ASCII line, at most one every `interval_s` seconds, and one at the end;
    the end says whether the task was finished or stopped on the way.

        with Progress("sft", total=300) as progress:
            for step in range(300):
                progress.update(step + 1, tokens=2048, loss=1.23)

    Calls are cheap and may come from several threads.
    """

    def __init__(
        self,
        task: str,
        total: int | None = None,
        *,
        unit: Unit = "step",
        start: int = 0,
        stream: TextIO | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        silent: bool = False,
    ) -> None:
        """Describe a task; nothing is shown before the `with` block begins.

        Args:
            task: its name.
            total: how many steps or bytes there are, if known.
            unit: what is counted. Bytes are shown as MB, and as MB/s in the place of tokens/s.
            start: what was done before (a resumed run or download); it does not count for speed and time
                left.
            stream: where to write; by default standard error, as it is when the block begins.
            interval_s: the shortest time between two plain lines.
            clock: seconds, never running backwards.
            silent: show nothing at all.
        """
        self.task, self.total, self.unit = task, total, unit
        self.done, self.tokens, self.numbers = start, 0, dict[str, float]()
        self._start, self._stream, self._interval_s = start, stream, interval_s
        self._clock, self._silent = clock, silent
        self._began = self._shown = clock()
        self._live: rich.progress.Progress | None = None
        self._lock = threading.Lock()

    @classmethod
    def quiet(cls, task: str = "", total: int | None = None) -> Progress:
        """Return a progress that counts and shows nothing, for tests and callers that want silence."""
        return cls(task, total, silent=True)

    def __enter__(self) -> Self:
        self._began = self._shown = self._clock()
        self._stream = self._stream or sys.stderr
        if not self._silent and _is_terminal(self._stream):
            self._live = _live_line(self._stream)
            self._live.add_task("", total=self.total, completed=self.done, line=self.line())
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            ending = "stopped" if kind is not None else "done"
            if self._live is not None:
                self._draw(self._live, ending)
                self._live.stop()
            elif not self._silent:
                self._write(f"{self.line(ending=ending)}\n")

    def update(self, done: int | None = None, *, tokens: int = 0, total: int | None = None, **numbers: float) -> None:
        """Say how far the task is.

        Args:
            done: steps or bytes done so far, `start` included; left out, it stays.
            tokens: tokens processed since the last call.
            total: a new total, when it becomes known or changes.
            numbers: named numbers to show; a name keeps its place and its last value.
        """
        with self._lock:
            self.done = self.done if done is None else done
            self.total = self.total if total is None else total
            self.tokens += tokens
            self.numbers.update(numbers)
            self._show()

    def advance(self, count: int = 1, *, tokens: int = 0) -> None:
        """Count further steps or bytes; the form that callbacks such as `on_done` want."""
        with self._lock:
            self.done += count
            self.tokens += tokens
            self._show()

    def line(self, *, ending: str = "") -> str:
        """Return the line as it is now: `sft 120/300 40% 812 tokens/s 1:23 left loss 0.512`."""
        elapsed = max(self._clock() - self._began, 1e-9)
        parts = [self.task, self._count()]
        if ending:
            parts.append(f"{ending} in {_duration(elapsed)}")
        if self.unit == "bytes" and self.done > self._start:
            parts.append(f"{_bytes((self.done - self._start) / elapsed)}/s")
        elif self.tokens:
            parts.append(f"{self.tokens / elapsed:.0f} tokens/s")
        left = self._seconds_left(elapsed)
        if left is not None and not ending:
            parts.append(f"{_duration(left)} left")
        parts += [_numbers(self.numbers)]
        return " ".join(part for part in parts if part)

    def _count(self) -> str:
        done, total = (self.done, self.total) if self.unit == "step" else (_bytes(self.done), _bytes(self.total or 0))
        if not self.total:
            return f"{done}"
        return f"{done}/{total} {min(100, 100 * self.done // self.total)}%"

    def _seconds_left(self, elapsed: float) -> float | None:
        gained = self.done - self._start
        if not self.total or gained <= 0:
            return None
        return max(0, self.total - self.done) * elapsed / gained

    def _show(self) -> None:
        if self._silent:
            return
        wait = _LIVE_REFRESH_S if self._live is not None else self._interval_s
        if self._clock() - self._shown < wait:
            return
        self._shown = self._clock()
        if self._live is not None:
            self._draw(self._live)
        else:
            self._write(f"{self.line()}\n")

    def _draw(self, live: rich.progress.Progress, ending: str = "") -> None:
        live.update(live.task_ids[0], completed=self.done, total=self.total, line=self.line(ending=ending))

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text)
        stream.flush()


def _live_line(stream: TextIO) -> rich.progress.Progress:
    import rich.console
    import rich.progress
    import rich.table

    return rich.progress.Progress(
        rich.progress.BarColumn(bar_width=12),
        rich.progress.TextColumn("{task.fields[line]}", markup=False, table_column=rich.table.Column(ratio=1)),
        console=rich.console.Console(file=stream),
        expand=True,
    )


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _numbers(numbers: Mapping[str, float]) -> str:
    return " ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in numbers.items())


def _short(value: float) -> str:
    """Three or four significant digits; whole numbers in full."""
    number = float(value)
    if math.isfinite(number) and number == int(number) and abs(number) < 1e6:
        return str(int(number))
    return f"{number:.3g}"


def _bytes(count: float) -> str:
    """Decimal units with one decimal, as download pages give them."""
    unit = 0
    while count >= 999.95 and unit < len(_BYTE_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_BYTE_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_BYTE_UNITS[unit]}"


def _duration(seconds: float) -> str:
    """Return `4:05` or `1:02:03`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
