"""The pharmacy program: what the model is asked, what its answer becomes, and how an answer is graded.

`exact_match` and the component graders look only at components that a row's `expected` lists, so a partly labelled
file works. `needs_review` is a metric of its own. Numbers agree within 1 %, units in singular or plural.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sigs.assemble import assemble
from sigs.normalise import normalise
from sigs.quantities import singular
from sigs.safety import review
from sigs.slots import parse_slots
from sigs.wording import direction as in_plain_words

if TYPE_CHECKING:
    from ascent.records import Episode, Task

_DOSE = ("dose_min", "dose_max")
_COMPONENTS = (*_DOSE, "dose_unit", "route", "max_times_per_day", "as_needed", "duration_days", "stated_max_daily")
_TOLERANCE = 0.01
# Partial credit of `reward`: a well-formed answer, and all components but not all right.
_FORMAT_CREDIT, _PARTIAL_CREDIT = 0.05, 0.35


class EXPECTED(BaseModel):
    """The labels a row may carry; each may be left out, and an unknown one is an error with its line."""

    model_config = ConfigDict(extra="forbid")

    dose_min: float | None = None
    dose_max: float | None = None
    dose_unit: str | None = None
    route: str | None = None
    max_times_per_day: float | None = None
    as_needed: bool | None = None
    duration_days: float | None = None
    stated_max_daily: float | str | None = None
    needs_review: bool | None = None
    review_reasons: list[str] | None = None
    direction: str | None = None


def prepare(input: dict[str, Any]) -> str:
    """Return what the model reads: the normalised direction. Drug, strength and form serve the rules, not the model."""
    return normalise(_sig(input))


def finish(text: str, input: dict[str, Any], doubtful: bool = False) -> dict[str, Any]:
    """Return components, review reasons and plain words for a model's answer."""
    source = normalise(_sig(input))
    result = assemble(text, source)
    reasons = review(result, source, input, doubtful=doubtful)
    return {
        **result.components.model_dump(),
        "needs_review": bool(reasons),
        "review_reasons": reasons,
        "direction": in_plain_words(result),
    }


def _sig(input: dict[str, Any]) -> str:
    return str(input.get("sig") or input.get("text") or input.get("prompt") or "")


def _right(key: str, output: dict[str, Any], expected: dict[str, Any]) -> bool:
    got, want = output.get(key), expected[key]
    if key == "as_needed":
        return bool(got) == bool(want)
    if key == "dose_unit":
        return (singular(str(got)) if got else None) == (singular(str(want)) if want else None)
    if key == "route":
        return str(got or "").strip().lower() == str(want or "").strip().lower()
    if got is None or want is None:
        return got is None and want is None
    return abs(_number(got) - _number(want)) <= _TOLERANCE * abs(_number(want)) + 1e-9


def _number(value: Any) -> float:
    """Read a number, also one that a label writes with its unit ("100 mg")."""
    if isinstance(value, int | float):
        return float(value)
    found = re.search(r"\d+(?:\.\d+)?", str(value))
    return float(found.group()) if found else math.nan


def _facts(task: Task, episode: Episode) -> tuple[dict[str, Any], dict[str, Any]]:
    expected = task.expected or {}
    output = episode.output if isinstance(episode.output, dict) else {}
    return output, expected


def _all(keys: tuple[str, ...], task: Task, episode: Episode) -> bool | None:
    output, expected = _facts(task, episode)
    listed = [key for key in keys if key in expected]
    if not listed:
        return None
    return bool(output) and all(_right(key, output, expected) for key in listed)


def exact_match(task: Task, episode: Episode) -> bool | None:
    """All listed components are right."""
    return _all(_COMPONENTS, task, episode)


def dose(task: Task, episode: Episode) -> bool | None:
    """Lower and upper end of the amount."""
    return _all(_DOSE, task, episode)


def dose_unit(task: Task, episode: Episode) -> bool | None:
    """The unit of the amount."""
    return _all(("dose_unit",), task, episode)


def route(task: Task, episode: Episode) -> bool | None:
    """The route."""
    return _all(("route",), task, episode)


def frequency(task: Task, episode: Episode) -> bool | None:
    """Times per day at the most frequent end."""
    return _all(("max_times_per_day",), task, episode)


def as_needed(task: Task, episode: Episode) -> bool | None:
    """Whether the medicine is taken only when needed."""
    return _all(("as_needed",), task, episode)


def duration(task: Task, episode: Episode) -> bool | None:
    """The duration in days."""
    return _all(("duration_days",), task, episode)


def stated_max(task: Task, episode: Episode) -> bool | None:
    """The maximum per day that the text states."""
    return _all(("stated_max_daily",), task, episode)


def needs_review(task: Task, episode: Episode) -> bool | None:
    """The decision to hand a direction to a person is the expected one."""
    output, expected = _facts(task, episode)
    if "needs_review" not in expected:
        return None
    return bool(output.get("needs_review", True)) == bool(expected["needs_review"])


def review_reason(task: Task, episode: Episode) -> bool | None:
    """The reasons are the expected ones, in any order."""
    output, expected = _facts(task, episode)
    if "review_reasons" not in expected:
        return None
    return set(output.get("review_reasons") or ()) == set(expected["review_reasons"] or ())


def near_miss(task: Task, episode: Episode) -> bool | None:
    """A wrong direction that no rule stopped. Lower is better."""
    right = exact_match(task, episode)
    if right is None:
        return None
    output, _ = _facts(task, episode)
    return not right and not output.get("needs_review", True)


def error_when_passed(task: Task, episode: Episode) -> bool | None:
    """Wrong, among the directions that no rule stopped. Lower is better, and flagging everything does not help."""
    right = exact_match(task, episode)
    output, _ = _facts(task, episode)
    return None if right is None or output.get("needs_review", True) else not right


def false_alarm(task: Task, episode: Episode) -> bool | None:
    """Flagged although the row expects no review. Lower is better."""
    output, expected = _facts(task, episode)
    if expected.get("needs_review") is not False:
        return None
    return bool(output.get("needs_review", True))


def missed_review(task: Task, episode: Episode) -> bool | None:
    """Not flagged although the row expects a review. Lower is better."""
    output, expected = _facts(task, episode)
    if expected.get("needs_review") is not True:
        return None
    return not output.get("needs_review", True)


def abstained(task: Task, episode: Episode) -> bool:
    """Handed to a person, whatever the row expects."""
    output, _ = _facts(task, episode)
    return bool(output.get("needs_review", True))


def reward(task: Task, episode: Episode) -> float | None:
    """Between 0 and 1: 1 for an exact answer, else 0.05 for a readable one and up to 0.35 for right components.

    Slots that are not in the text cost the credit for being readable, so that inventing never pays.
    """
    right = exact_match(task, episode)
    if right is None:
        return None
    output, expected = _facts(task, episode)
    invented = "not_in_text" in (output.get("review_reasons") or ())
    readable = not parse_slots(episode.text).broken and not invented
    if right:
        return 1.0 if readable else 0.9
    listed = [key for key in _COMPONENTS if key in expected]
    share = sum(_right(key, output, expected) for key in listed) / len(listed) if output else 0.0
    return _FORMAT_CREDIT * readable + _PARTIAL_CREDIT * share**2
