"""The error tree. Every message says what happened, why, and what to do.

AscentError
├── BadInput              the user's file, field or argument (exit code 2)
│   ├── BadFile           a file; carries file, line and field
│   │   ├── BadRecipe     a recipe or use-case file
│   │   └── BadData       a data row
│   ├── UnknownName       a model, row, grader or metric that is not registered
│   └── QuotaExceeded     the owner's share of the queue is used up (jobs/specs.py)
├── Unavailable           the machine or the network lacks something
│   ├── MissingExtra      an optional dependency; the message holds the install line
│   ├── PullFailed        a download that did not arrive or has the wrong checksum
│   ├── NoSpace           the disk is full; nothing was half-written
│   └── Busy              too much is waiting already; carries when to try again
├── LeaseLost             a job that belongs to another worker by now (jobs/specs.py)
├── Corrupt               a stored file that fails its own checksum or schema
└── Interrupted           Ctrl-C after a checkpoint was written (exit code 130)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class AscentError(Exception):
    """Base of all errors that Ascent raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error cross from one process to another whole, whatever its constructor asks for."""
        return _as_it_was, (type(self), self.args, vars(self))


class BadInput(AscentError):
    """The caller gave something that cannot be used; nothing was changed."""


class BadFile(BadInput):
    """A file of the user's is malformed. `file`, `line` (1-based) and `field` say where, when they are known."""

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        self.file, self.line, self.field = file, line, field
        place = str(file) if file is not None else ""
        if line is not None:
            place += f":{line}"
        if field is not None:
            place += f" [{field}]"
        super().__init__(f"{place}: {message}" if place else message)


class BadRecipe(BadFile):
    """A recipe or use-case file is malformed."""


class BadData(BadFile):
    """A data file is malformed."""


class UnknownName(BadInput):
    """A name that is not registered; the message offers the nearest valid one, and a `hint` where there is one."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str = "") -> None:
        names = sorted(known)
        super().__init__(f"unknown {kind} {name!r}{nearest(name, names)}; known: {', '.join(names) or 'none'}{hint}")


class Unavailable(AscentError):
    """This machine or the network lacks something that the request needs."""


class MissingExtra(Unavailable):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the extra {extra!r}; install it with: pip install 'ascent-posttrain[{extra}]'")


class PullFailed(Unavailable):
    """A model could not be fetched whole. What arrived is kept as a `.partial` file and resumed next time."""


class NoSpace(Unavailable):
    """The disk is full. The target file is as it was before."""


class Busy(Unavailable):
    """Too much is waiting already; nothing was begun. `retry_after_s` says when it is worth another try."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Corrupt(AscentError):
    """A file in the store does not match its checksum or schema."""


class Interrupted(AscentError):
    """The user pressed Ctrl-C; the run's state was saved and `--resume` continues it."""

    exit_code = 130


def _as_it_was(kind: type[AscentError], args: tuple[Any, ...], fields: dict[str, Any]) -> AscentError:
    error = kind.__new__(kind, *args)
    vars(error).update(fields)
    return error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
