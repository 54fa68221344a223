"""What the gates weigh, what one check finds, and how findings become a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ascent.ladder.usecase import StageSpec, UseCase
from ascent.records import Decision, Report, Verdict


@dataclass(frozen=True)
class Inventory:
    """Data on hand, counted as distinct usable rows."""

    labels: int = 0
    pairs: int = 0
    prompts: int = 0
    trajectories: int = 0
    test_items: int = 0


@dataclass(frozen=True)
class VerifierCheck:
    """The reward tried on known answers: how often it sided with the reference (right high, wrong low)."""

    items: int
    agreed: int


@dataclass(frozen=True)
class Probe:
    """The champion sampled `k` times on each of `groups` training prompts and graded by the reward.

    A group is informative when its rewards differ. `pass_1` and `pass_k` are the mean chance that one, or at
    least one of `k`, samples is right.
    """

    groups: int
    informative: int
    k: int
    pass_1: float
    pass_k: float


@dataclass(frozen=True)
class Spend:
    """Time and money, in seconds and in the use case's currency."""

    seconds: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """What is known before a stage. `verifier` and `probe` matter to online stages only.

    `planning` says that nothing has been run for this stage yet: what the climb itself will find out (does
    the verifier hold, is there head-room) is then an open question instead of a shortcoming.
    """

    stage: StageSpec
    spec: UseCase
    champion: Report | None = None
    inventory: Inventory = Inventory()
    verifier: VerifierCheck | None = None
    probe: Probe | None = None
    spent: Spend = Spend()
    forecast: Spend = Spend()
    planning: bool = False


@dataclass(frozen=True)
class Finding:
    """One check's outcome: a sentence, and a decision when the check objects."""

    reason: str
    objection: Decision | None = None
    collect: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)


def verdict_of(stage: str, phase: Literal["before", "after"], findings: Sequence[Finding], champion: str) -> Verdict:
    """Let the first objection decide; without one the answer is GO. Objections lead the reasons."""
    deciding = next((finding for finding in findings if finding.objection is not None), None)
    objections = [finding for finding in findings if finding.objection is not None]
    others = [finding for finding in findings if finding.objection is None]
    numbers: dict[str, Any] = {}
    for finding in findings:
        numbers.update(finding.numbers)
    return Verdict(
        stage=stage,
        phase=phase,
        decision=deciding.objection if deciding and deciding.objection else Decision.GO,
        reasons=tuple(finding.reason for finding in [*objections, *others]),
        collect=deciding.collect if deciding else 0,
        champion=champion,
        evidence=numbers,
    )


def label_cost(spec: UseCase, count: int) -> str:
    """Return what labelling `count` items costs, in brackets, or nothing when no price is set."""
    cost = spec.costs.labels(count)
    hours = spec.costs.minutes_per_label * count / 60
    return f" (about {hours:,.1f} hours of labelling, {cost:,.0f} {spec.costs.currency})" if cost else ""
