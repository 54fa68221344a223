"""Guard metrics: shown to be no worse than a margin, or not.

A guard passes when the hypothesis "it got worse by the margin or more" is rejected, one-sided, at the use
case's alpha after Holm's correction over all guards. No harm seen in a few items is no proof of no harm: the
test behind it (`evaluate.statistics.noninferiority_p`) stays honest when nothing changed at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite
from statistics import NormalDist
from typing import Any

from ascent.ladder.usecase import Guard, UseCase
from ascent.ladder.words import interval_words, percent, points, signed
from ascent.records import Change, Report

_NORMAL = NormalDist()


@dataclass(frozen=True)
class GuardCheck:
    """One guard's outcome. `harm` is the change for the worse; `p_value` is Holm-adjusted non-inferiority."""

    guard: Guard
    change: Change
    harm: float
    p_value: float
    alpha: float
    collect: int

    @property
    def passed(self) -> bool:
        """True when the guard is shown to be no worse than its margin."""
        return self.p_value < self.alpha and not self.violated

    @property
    def violated(self) -> bool:
        """True when the guard got worse by its margin or more."""
        return self.harm >= self.guard.margin

    def numbers(self) -> dict[str, Any]:
        """Return the numbers behind the sentence."""
        return {
            "n": self.change.n,
            "champion": self.change.champion,
            "challenger": self.change.challenger,
            "harm": self.harm,
            "margin": self.guard.margin,
            "p_value": self.p_value,
            "passed": self.passed,
        }

    def sentence(self) -> str:
        """Return the outcome as a sentence."""
        change, margin = self.change, points(self.guard.margin)
        told = (
            f"{change.metric} ({self.guard.direction} is better) went from {percent(change.champion)} to "
            f"{percent(change.challenger)}, {signed(change.difference)} "
            f"({interval_words(change.low, change.high, in_points=True)})"
        )
        shown = f"p = {self.p_value:.3f}" if self.p_value >= 0.001 else "p < 0.001"
        if self.violated:
            return f"Guard violated: {told}; a loss of {margin} or more is not accepted."
        if self.passed:
            return f"Guard kept: {told}; a loss of {margin} is excluded (non-inferiority {shown})."
        return (
            f"Guard unproven: {told}; a loss of {margin} cannot be excluded (non-inferiority {shown}, needed "
            f"below {self.alpha:g}). About {self.collect:,} more test items would settle it."
        )


def check_guards(champion: Report, challenger: Report, spec: UseCase) -> list[GuardCheck]:
    """Compare every guard metric on the items that both reports graded."""
    from ascent.evaluate.statistics import compare_noninferior, holm  # numpy and scipy load on use

    limits, guards = spec.thresholds, spec.metrics.guards
    adjusted = holm(
        {
            guard.name: compare_noninferior(
                champion, challenger, guard.name, guard.margin, guard.direction, like=spec.metrics.primary.name
            )
            for guard in guards
        }
    )
    checks = []
    for guard in guards:
        change = compared(champion, challenger, guard.name, like=spec.metrics.primary.name)
        missing = _items_to_settle(guard, change, limits.alpha / len(guards), limits.power)
        p_value = float(adjusted[guard.name])
        checks.append(GuardCheck(guard, change, _harm(guard, change), p_value, limits.alpha, missing))
    return checks


def compared(champion: Report, challenger: Report, metric: str, like: str | None = None) -> Change:
    """Return the paired comparison of one metric; where nothing changed, `like` tells how alike clustered items are."""
    from ascent.evaluate.statistics import compare  # numpy and scipy load on use

    return compare(champion, challenger, metric, like=like)


def _harm(guard: Guard, change: Change) -> float:
    return change.difference if guard.direction == "lower" else -change.difference


def _items_to_settle(guard: Guard, change: Change, alpha: float, power: float) -> int:
    """Return how many more items would prove non-inferiority if the rates stay as observed.

    A normal approximation; where no item changed, the variance is that of the hypothesis, as in Tango's test.
    """
    room = guard.margin - _harm(guard, change)
    if room <= 0:
        return 0
    width = change.high - change.low
    error = width / (2 * _NORMAL.inv_cdf(0.975)) if isfinite(width) else 0.0
    variance = max(error * error * change.n, guard.margin * (1 - min(guard.margin, 1.0)))
    wanted = _NORMAL.inv_cdf(1 - alpha) + _NORMAL.inv_cdf(power)
    return max(1, ceil(variance * (wanted / room) ** 2) - change.n)
