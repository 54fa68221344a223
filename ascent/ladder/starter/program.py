"""How this use case asks, reads the answer and grades it. Edit freely: Ascent finds the functions by name.

A grader is any public function of (task, episode). It returns a number, a bool, or None where it does not apply.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel

from ascent.records import Episode, Task

Queue = Literal["billing", "delivery", "returns", "account", "technical"]
Urgency = Literal["high", "normal", "low"]


class EXPECTED(BaseModel):
    """What a row's `expected` may hold. A label outside of it is an error when the data are loaded."""

    queue: Queue
    urgency: Urgency


def prepare(input: dict[str, Any]) -> str:
    """Return the user's turn for one row."""
    return f"Message: {input['message']}"


def finish(text: str, input: dict[str, Any]) -> dict[str, Any] | None:
    """Return the answer as data, or None when it is not a JSON object."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def exact_match(task: Task, episode: Episode) -> bool | None:
    """Every part that the row has a label for is right."""
    wanted = task.expected or {}
    return all(_right(task, episode, part) for part in wanted) if wanted else None


def queue(task: Task, episode: Episode) -> bool | None:
    """The queue is right."""
    return _right(task, episode, "queue")


def urgency(task: Task, episode: Episode) -> bool | None:
    """The urgency is right."""
    return _right(task, episode, "urgency")


def urgent_missed(task: Task, episode: Episode) -> bool | None:
    """An urgent message was not seen as one. Applies to urgent messages only."""
    if (task.expected or {}).get("urgency") != "high":
        return None
    return not _right(task, episode, "urgency")


def reward(task: Task, episode: Episode) -> float | None:
    """What reinforcement learning raises: half for each right part, a little for an answer that is JSON at all."""
    wanted = task.expected or {}
    if not wanted:
        return None
    if not isinstance(episode.output, dict):
        return 0.0
    share = sum(bool(_right(task, episode, part)) for part in wanted) / len(wanted)
    return 0.1 + 0.9 * share


def _right(task: Task, episode: Episode, part: str) -> bool | None:
    """Whether one part of the answer is right; None when the row has no label for it."""
    wanted = task.expected or {}
    if part not in wanted:
        return None
    return isinstance(episode.output, dict) and episode.output.get(part) == wanted[part]
