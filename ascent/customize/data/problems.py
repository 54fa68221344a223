"""Everything wrong with one file, told at once instead of one error per run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ascent.records.errors import BadData

SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a file: on which line (None: the whole file), in which field, and what to do."""

    line: int | None
    field: str | None
    message: str

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line is not None else "file"
        return f"{place}{f' [{self.field}]' if self.field else ''}: {self.message}"


class Problems:
    """Collects the problems of one file and raises them as a single `BadData`."""

    def __init__(self, file: Path | str) -> None:
        self.file = file
        self.found: list[Problem] = []

    def add(self, line: int | None, field: str | None, message: str) -> None:
        """Note a problem. `message` says what, why and what to do."""
        self.found.append(Problem(line, field, message))

    def raise_any(self) -> None:
        """Raise if anything was noted; do nothing otherwise.

        Raises:
            BadData: carries file, line and field of the first problem in file order; its message lists the
                first twenty and counts the rest.
        """
        if not self.found:
            return
        ordered = sorted(self.found, key=lambda problem: problem.line or 0)
        first, rest = ordered[0], ordered[1:]
        message = first.message
        if rest:
            listed = "\n".join(f"  {problem}" for problem in rest[: SHOWN - 1])
            more = len(ordered) - SHOWN
            tail = f"\n  and {more} more" if more > 0 else ""
            message += f"\n{len(ordered)} problems in all; nothing was loaded. The others:\n{listed}{tail}"
        raise BadData(message, file=self.file, line=first.line, field=first.field)
