"""Selective answering: the confidence below which a model hands over, so that what passes keeps to a stated risk."""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from ascent.records import Record
from ascent.records.errors import BadInput

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEVEL = 0.95
GRID = (0.999, 0.998, 0.995, *(round(0.99 - step / 100, 2) for step in range(100)))
"""Thresholds on a probability, from the strictest down."""


class Abstention(Record):
    """A threshold with the evidence for it: of `passed` answers at least that confident, `wrong` were wrong.

    `bound` is the upper end of the one-sided interval of their error rate; `reached` tells whether it keeps to `risk`.
    """

    below: float
    risk: float
    items: int
    passed: int
    wrong: int
    bound: float
    reached: bool

    @property
    def sentence(self) -> str:
        """The threshold and its evidence in words."""
        kept = f"of {self.items} calibration answers {self.passed} pass and {self.wrong} of those are wrong"
        bound = f"at most {100 * self.bound:.1f} % with 95 % confidence"
        if self.reached:
            return f"Answers with a confidence below {self.below:.2f} are handed over: {kept}, {bound}."
        return (
            f"No confidence threshold shows an error rate below {100 * self.risk:.3g} %; that with the lowest bound, "
            f"{self.below:.2f}, is used: {kept}, {bound}. More validation items can show less."
        )


def upper_bound(wrong: int, n: int, confidence: float = LEVEL) -> float:
    """One-sided upper bound of an error rate: the p at which P(≤ wrong of n) = 1 − confidence (Clopper-Pearson)."""
    from scipy import special  # loads on use

    if not 0 <= wrong <= n:
        raise ValueError(f"wrong must lie between 0 and n, got {wrong} of {n}")
    return 1.0 if wrong == n else float(special.betaincinv(wrong + 1, n - wrong, confidence))


def abstention(confidence: Sequence[float], wrong: Sequence[bool], risk: float) -> Abstention:
    """Choose the lowest threshold at which the answers that pass keep to `risk`, with 95 % confidence.

    The thresholds tried lie between the answers' own confidences, which says nothing about which are right, so the
    guarantee of `lowest_threshold` stands.

    Args:
        confidence: of each answer that passes without a threshold.
        wrong: whether that answer is wrong.
        risk: the error rate to stay below among what passes.

    Returns:
        The threshold; where none keeps to the risk, the one with the lowest bound, and `reached` is False.

    Raises:
        BadInput: there is no answer to calibrate on.
    """
    if not confidence:
        raise BadInput("no answer passes, so there is nothing to choose a threshold on; give more validation items")
    sure_N, right_N = np.array(confidence, float), 1.0 - np.array(wrong, float)
    known = np.unique(sure_N)[::-1]
    thresholds = [*((known[1:] + known[:-1]) / 2), 0.0]
    chosen, _ = lowest_threshold(sure_N, right_N, range(len(sure_N)), risk, LEVEL, thresholds)
    if chosen is not None:
        return _passing(sure_N, right_N, chosen, risk, reached=True)
    return min((_passing(sure_N, right_N, below, risk) for below in thresholds), key=lambda found: found.bound)


def _passing(sure_N: Floats, right_N: Floats, below: float, risk: float, *, reached: bool = False) -> Abstention:
    """What a threshold lets pass, and how often that is wrong."""
    accepted = sure_N >= below
    passed, right = int(accepted.sum()), int(right_N[accepted].sum())
    return Abstention(
        below=float(below),
        risk=risk,
        items=len(sure_N),
        passed=passed,
        wrong=passed - right,
        bound=upper_bound(passed - right, passed),
        reached=reached,
    )


def lowest_threshold(
    confidence_N: Floats,
    correct_N: Floats,
    clusters: Sequence[Hashable],
    risk: float,
    level: float,
    thresholds: Sequence[float] = GRID,
) -> tuple[float | None, str]:
    """Return the lowest threshold at which the risk of an answer is at most `risk`, or None, and a sentence on it.

    Fixed-sequence testing (Angelopoulos et al. 2021, "Learn then test", arXiv 2110.01052, section 3.2): thresholds
    are tried from the strictest down; each must have a Clopper–Pearson bound of at most `risk`, and the first that
    fails ends the search, so no correction for having tried many is needed. Thresholds that accept too few rows to
    pass with one error (without any, where the former takes over half of the rows) are skipped, or a single confident
    mistake would end most searches. That looks at no label, so the guarantee stands where the risk does not rise with
    confidence. Rows of one cluster are counted as if they all said the same: n becomes Kish's
    n² / Σ m² over cluster sizes m (Kish 1965), the errors their share of it, rounded up.

    Args:
        confidence_N: of each answer [N].
        correct_N: 1 where it is right, 0 where it is wrong [N].
        clusters: of each answer.
        risk: the share of wrong answers that is allowed among those at least as confident as the threshold.
        level: the chance at which the risk is kept.
        thresholds: from the strictest down, chosen without a look at what is right.
    """
    numbers = numbered(clusters)
    chosen, rows = None, 0
    allowed = 1 if 2 * needed(risk, level, 1) <= effective(confidence_N >= 0, correct_N, numbers)[1] else 0
    least = needed(risk, level, allowed)
    why = f"no threshold accepts the {least} independent rows that the bound needs"
    for threshold in thresholds:
        accepted = confidence_N >= threshold
        errors, n = effective(accepted, correct_N, numbers)
        if accepted.sum() == rows or n < least:
            continue  # a threshold that accepts the same rows as a stricter one has not been put to the test
        upper = upper_bound(errors, n, level)
        if upper > risk:
            why = f"at {threshold}, the first with enough rows, {errors} of {n} are wrong: the risk may be {upper:.1%}"
            break
        chosen, rows = threshold, int(accepted.sum())
    if chosen is None:
        return None, f"no threshold keeps the risk at {risk:.1%}, so it abstains on everything: {why}"
    return chosen, f"the lowest threshold whose risk is at most {risk:.1%} with {level:.0%} confidence"


def needed(risk: float, confidence: float, errors: int = 0) -> int:
    """Return the least number of answers whose risk is bounded by `risk` although `errors` of them are wrong."""

    def bounded(n: int) -> bool:
        return upper_bound(errors, n, confidence) <= risk

    high = errors + 1
    while not bounded(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=errors, key=bounded)


def numbered(clusters: Sequence[Hashable]) -> Ints:
    """Return clusters as whole numbers from 0 on."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(cluster, len(number)) for cluster in clusters], np.int64)


def effective(accepted: npt.NDArray[np.bool_], correct_N: Floats, cluster_N: Ints) -> tuple[int, int]:
    """Return (errors, n) of the accepted rows, in independent rows: see `lowest_threshold`."""
    total = int(accepted.sum())
    if total == 0:
        return 0, 0
    sizes = np.bincount(cluster_N[accepted])
    n = int(total**2 / int((sizes**2).sum()))
    errors = total - int(correct_N[accepted].sum())
    return min(n, math.ceil(errors * n / total - 1e-9)), n
