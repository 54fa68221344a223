"""Graders: the signature `(Task, Episode) -> Graded`, how an answer becomes a `Score`, and the built-in ones.

A built-in reads what it needs from `task.expected`, and answers None (not applicable) where the task does not
say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from ascent.records import Episode, Score, Task, Unscored

Graded = Score | float | bool | int | None
Grader = Callable[[Task, Episode], Graded]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?\.?\d+(?:[eE][-+]?\d+)?")


def as_score(name: str, graded: object) -> Score:
    """Turn what a grader returned into a score of that grader's name.

    True is 1 and False is 0; anything that converts to a finite float is its value; None is *not applicable*.
    A NaN, an infinity or another type is an unscored error, because averaging it would silently spoil the
    metric.
    """
    if graded is None:
        return Score(name=name, unscored=Unscored.not_applicable)
    if isinstance(graded, Score):
        if graded.value is None or math.isfinite(graded.value):
            return graded if graded.name == name else graded.model_copy(update={"name": name})
        return failed(name, f"the grader returned {graded.value}; a score is a finite number")
    if not hasattr(graded, "__float__"):
        return failed(name, f"the grader returned a {type(graded).__name__}; return a Score, a number, a bool or None")
    value = float(graded)
    if not math.isfinite(value):
        return failed(name, f"the grader returned {value}; a score is a finite number")
    return Score(name=name, value=value)


def failed(name: str, reason: str, cause: Unscored = Unscored.error) -> Score:
    """Return an unscored score with a cause and a reason that is safe to store as UTF-8."""
    return Score(name=name, unscored=cause, reason=reason.encode("utf-8", "replace").decode()[:1000])


def exact(task: Task, episode: Episode) -> Graded:
    """1 if the output equals `expected["answer"]`, else 0.

    The structured output is compared as JSON (1 and 1.0 are equal, 1 and true are not). An answer that is a
    string is also compared with the raw text, surrounding white space ignored.
    """
    if task.expected is None or "answer" not in task.expected:
        return None
    answer = task.expected["answer"]
    if isinstance(answer, str) and episode.text.strip() == answer.strip():
        return True
    return _same(episode.output, answer)


def contains(task: Task, episode: Episode) -> Graded:
    """1 if the text contains `expected["answer"]`, ignoring case; of a list, the share that it contains."""
    if task.expected is None or "answer" not in task.expected:
        return None
    answer = task.expected["answer"]
    wanted = [str(part).casefold() for part in (answer if isinstance(answer, list) else [answer])]
    if not wanted:
        return None
    text = episode.text.casefold()
    missing = [part for part in wanted if part not in text]
    reason = f"missing: {', '.join(missing)}" if missing else ""
    return Score(name="contains", value=1 - len(missing) / len(wanted), reason=reason)


def json_valid(task: Task, episode: Episode) -> Graded:
    """1 if the whole text is one JSON value by RFC 8259 (so no NaN and no code fence), else 0."""
    try:
        parse_json(episode.text)
    except ValueError as error:
        return Score(name="json_valid", value=0.0, reason=str(error))
    return True


def numeric(task: Task, episode: Episode) -> Graded:
    """1 if the answer's number is within a relative tolerance of `expected["answer"]`, else 0.

    The number is the output itself, or else the last number in the text ("1,250.5" reads as 1250.5). The
    tolerance is `expected["tolerance"]`, 1e-6 unless given; around an answer of 0 it is absolute.
    """
    if task.expected is None or "answer" not in task.expected:
        return None
    answer = float(task.expected["answer"])
    tolerance = float(task.expected.get("tolerance", 1e-6))
    if isinstance(episode.output, int | float) and not isinstance(episode.output, bool):
        value = float(episode.output)
    else:
        numbers = _NUMBER.findall(episode.text)
        if not numbers:
            return Score(name="numeric", value=0.0, reason="no number in the text")
        value = float(numbers[-1].replace(",", ""))
    close = abs(value - answer) <= tolerance * (abs(answer) or 1.0)
    return Score(name="numeric", value=float(close), reason="" if close else f"read {value:g}, expected {answer:g}")


def regex(task: Task, episode: Episode) -> Graded:
    """1 if the regular expression `expected["pattern"]` is found in the text, else 0."""
    if task.expected is None or "pattern" not in task.expected:
        return None
    return re.search(task.expected["pattern"], episode.text) is not None


BUILTIN: dict[str, Grader] = {
    "contains": contains,
    "exact": exact,
    "json_valid": json_valid,
    "numeric": numeric,
    "regex": regex,
}


def parse_json(text: str) -> Any:
    """Parse one JSON value strictly.

    Raises ValueError for everything else, for NaN, for half a surrogate pair and for more than 200 levels of
    nesting, so that what it returns can be written to a report again.
    """
    return from_json(text, allow_inf_nan=False)


def _same(left: object, right: object) -> bool:
    """Equality of JSON values: numbers by value, but a bool is never a number."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
