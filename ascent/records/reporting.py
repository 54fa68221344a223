"""What rests on disk after work is done: reports, cards and verdicts."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from ascent.records.learning import Episode
from ascent.records.record import Record


class Estimate(Record):
    """A measured mean with its 95 % interval. `n` counts scored items; the other counts say what is missing."""

    name: str
    value: float
    low: float
    high: float
    n: int
    successes: float | None = None
    unscored: int = 0
    not_applicable: int = 0
    method: str = "wilson"


class DataSource(Record):
    """A data set as it was used: where, how many rows, and the sha256 of its bytes."""

    name: str
    path: str
    rows: int
    sha256: str


class Report(Record):
    """One model measured once on one data set. Immutable; `items` keep every episode with its scores."""

    id: str
    model: str
    stage: str
    data: DataSource
    metrics: dict[str, Estimate]
    items: tuple[Episode, ...] = ()
    groups: dict[str, str] = Field(default_factory=dict)
    sampling: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    created: str = ""

    def values(self, metric: str) -> dict[str, float]:
        """Return task id → value for the items this metric scored; of several samples of a task, their mean."""
        found: dict[str, list[float]] = {}
        for item in self.items:
            score = item.score(metric)
            if score is not None and score.value is not None:
                found.setdefault(item.task_id, []).append(score.value)
        return {task: sum(values) / len(values) for task, values in found.items()}


class ModelCard(Record):
    """A model in the store: where it came from, its licence, its files, its parent."""

    VERSION = 1
    id: str
    family: str
    source: str
    licence: str
    sha256: str
    kind: Literal["base", "adapter", "merged", "embedder"] = "base"
    parent: str | None = None
    parameters: int = 0
    dtype: str = "float32"
    context: int = 0
    run: str | None = None
    created: str = ""


class RunCard(Record):
    """How a training run came about: enough to repeat it."""

    id: str
    row: str
    recipe: dict[str, Any]
    base: str
    seed: int
    data: tuple[DataSource, ...] = ()
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    final: dict[str, float] = Field(default_factory=dict)
    created: str = ""


class Decision(StrEnum):
    """A gate's answer."""

    GO = "GO"
    STOP = "STOP"
    COLLECT = "COLLECT"
    NO_GO = "NO-GO"


class Change(Record):
    """A paired comparison of one metric on the same items: challenger minus champion."""

    metric: str
    n: int
    champion: float
    challenger: float
    difference: float
    low: float
    high: float
    p_value: float
    fixed: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    test: str = "mcnemar-exact"


class Verdict(Record):
    """What a gate decided about a stage and why. `reasons` are sentences; `evidence` holds the numbers."""

    stage: str
    phase: Literal["before", "after"]
    decision: Decision
    reasons: tuple[str, ...]
    collect: int = 0
    champion: str = ""
    changes: tuple[Change, ...] = ()
    evidence: dict[str, Any] = Field(default_factory=dict)
