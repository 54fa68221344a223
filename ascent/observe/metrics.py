"""The learning curve on disk: one JSON object per step, appended as the run goes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ascent.records.errors import Corrupt
from ascent.records.files import append_jsonl, read_jsonl, write_atomic

Number = float | int | bool | str | None

_TEXT = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricLog:
    """An append-only `metrics.jsonl` whose rows have strictly increasing steps.

    Every row reaches the operating system at once, so a killed process loses none; the disk is forced every
    `sync_every_s` seconds and on close, so a power cut loses at most that much. To resume from a checkpoint,
    call `truncate_after` with its step: the rows written since are dropped and will be written again.

    JSON has no NaN: a number that is not finite is stored as the text "NaN", "Infinity" or "-Infinity", and
    `read` turns it back.
    """

    def __init__(self, path: Path, *, sync_every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._sync_every_s, self._clock = path, sync_every_s, clock
        self._synced_at = clock()
        self._unsynced = False
        rows = self.read(path)
        self.last_step: int | None = rows[-1]["step"] if rows else None

    def append(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Write one row, `{"step": step, **numbers}`. Scalars of array libraries are stored as plain floats.

        Raises:
            ValueError: the step is not after the last one, or `numbers` has a key `step`.
            NoSpace: the disk is full; the log is as it was before.
        """
        if self.last_step is not None and step <= self.last_step:
            raise ValueError(
                f"step {step} does not come after step {self.last_step}, the last in {self.path.name}; "
                "call truncate_after with the checkpoint's step before resuming"
            )
        if "step" in numbers:
            raise ValueError("the numbers of a step cannot be called 'step'; rename that one")
        row = {"step": step} | {name: _storable(value) for name, value in numbers.items()}
        due = self._clock() - self._synced_at >= self._sync_every_s
        append_jsonl(self.path, [json.dumps(row, ensure_ascii=False, allow_nan=False)], sync=due)
        self.last_step, self._unsynced = step, not due
        if due:
            self._synced_at = self._clock()

    def truncate_after(self, step: int) -> int:
        """Drop the rows after `step` and return how many there were. Call it with a checkpoint's step."""
        rows = self.read(self.path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            stored = ({name: _storable(value) for name, value in row.items()} for row in kept)
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in stored)
            write_atomic(self.path, "".join(lines))
        self.last_step = kept[-1]["step"] if kept else None
        return len(rows) - len(kept)

    def close(self) -> None:
        """Force what was written to the disk. The log can still be appended to."""
        if self._unsynced and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return the rows of a log, oldest first; an absent file has none, and a torn last line is left out.

        Raises:
            Corrupt: a complete line is not a row of metrics.
        """
        rows = []
        for number, row in enumerate(read_jsonl(path), 1):
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise Corrupt(f"{path}:{number}: not a row of metrics: it has no whole number 'step'")
            rows.append(
                {name: _TEXT.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
            )
        return rows


def _storable(value: Any) -> Number:
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
