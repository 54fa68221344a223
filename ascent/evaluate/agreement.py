"""Does a judge agree with people? The gold-set check that stands before training on a judge, and the alarm during it.

Pure functions of human labels and judge scores on the same items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from ascent.evaluate.statistics import clustered_bootstrap, effective_n, is_binary, is_clustered, wilson
from ascent.records import Record
from ascent.records.errors import BadInput, UnknownName

Floats = npt.NDArray[np.float64]
Values = Sequence[float] | Floats
Weights = Literal["linear", "quadratic"]

THRESHOLD = 0.6
"""Cohen's kappa from which agreement is called substantial (Landis & Koch 1977, Biometrics 33:159)."""

MIN_ITEMS = 20
"""Items (clusters, where items share one) below which an interval says nothing."""


def cohen_kappa(human: Values, judge: Values, weights: Weights | None = None) -> float:
    """Return the agreement beyond chance of two raters (Cohen 1960; weighted: Cohen 1968, Psych. Bull. 70:213).

    κ = (a - e) / (1 - e), where a is the mean of 1 - w over the items and e the same under independence. Without
    weights w is 1 for different labels; with them it is |i - j| or (i - j)² over its largest value, on the ranks of the
    labels that either rater used. NaN if both used a single label.
    """
    observed, expected = _agreement(np.asarray(human, dtype=float), np.asarray(judge, dtype=float), weights)
    return math.nan if expected >= 1 else (observed - expected) / (1 - expected)


def pearson(human: Values, judge: Values) -> float:
    """Return the linear correlation; NaN if either is constant."""
    a, b = np.asarray(human, dtype=float), np.asarray(judge, dtype=float)
    return math.nan if np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.corrcoef(a, b)[0, 1])


def spearman(human: Values, judge: Values) -> float:
    """Return the correlation of the mean ranks (Spearman 1904); NaN if either is constant."""
    return pearson(stats.rankdata(human), stats.rankdata(judge))


def kendall(human: Values, judge: Values) -> float:
    """Return Kendall's tau-b, which corrects for ties; NaN if either is constant."""
    return float(stats.kendalltau(human, judge).statistic)


COEFFICIENTS: dict[str, Callable[[Values, Values], float]] = {
    "kappa": cohen_kappa,
    "linear-kappa": lambda human, judge: cohen_kappa(human, judge, "linear"),
    "quadratic-kappa": lambda human, judge: cohen_kappa(human, judge, "quadratic"),
    "kendall": kendall,
    "pearson": pearson,
    "spearman": spearman,
}
"""Coefficients by name. The kappas compare labels, the others any numbers."""

_WEIGHTS: dict[str, Weights | None] = {"kappa": None, "linear-kappa": "linear", "quadratic-kappa": "quadratic"}


class JudgeCheck(Record):
    """How well one judge agrees with people on one gold set, and whether that is enough to train on.

    `judge` and `judge_digest` say which judge: `digest` of a judge covers its model, rubric and wording. `items` were
    labelled and scored, `unscored` labelled only. `value` is the coefficient with its interval `low` to `high` at
    `confidence`; `passed` means that `low`, not `value`, reaches `threshold`, so that a small gold set cannot pass by
    luck. `accuracy` is the share of equal labels with its interval. With 0/1 labels, `sensitivity` is the share of
    people's 1s that the judge called 1, `specificity` that of their 0s called 0: it is low where bad answers pass.
    `override` is the reason given for training on a judge that did not pass.
    """

    judge: str
    judge_digest: str
    coefficient: str
    items: int
    unscored: int
    value: float
    low: float
    high: float
    confidence: float
    threshold: float
    passed: bool
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    sensitivity: float | None = None
    specificity: float | None = None
    override: str | None = None


def check_judge(
    judge: str,
    judge_digest: str,
    human: Sequence[float],
    scores: Sequence[float | None],
    *,
    coefficient: str = "kappa",
    threshold: float = THRESHOLD,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> JudgeCheck:
    """Compare a judge's scores with people's labels, item by item; None is an item the judge left unscored.

    The kappas need scores that are labels: round or cut a judge's numbers first, or choose a correlation. `clusters`
    names what an item belongs to, as in `ascent.evaluate.statistics`.

    Raises:
        UnknownName: there is no such coefficient.
        BadInput: labels and scores do not pair, nothing was scored, one side is constant, or a kappa is asked of scores
            that are no labels.
    """
    if coefficient not in COEFFICIENTS:
        raise UnknownName("coefficient", coefficient, COEFFICIENTS)
    if len(human) != len(scores) or (clusters is not None and len(clusters) != len(human)):
        raise BadInput(f"every item needs a label and a score, got {len(human)} labels and {len(scores)} scores")
    kept = [at for at, score in enumerate(scores) if score is not None]
    a = np.array([human[at] for at in kept], dtype=float)
    b = np.array([scores[at] for at in kept], dtype=float)
    groups = None if clusters is None else [clusters[at] for at in kept]
    _check_values(judge, coefficient, a, b)
    low, high = interval(a, b, coefficient, groups, confidence, draws, seed)
    value = COEFFICIENTS[coefficient](a, b)
    equal = (a == b).astype(float)
    accuracy, accuracy_low, accuracy_high = _share(equal, groups, confidence, draws, seed)
    binary = is_binary(a) and is_binary(b)
    return JudgeCheck(
        judge=judge,
        judge_digest=judge_digest,
        coefficient=coefficient,
        items=len(kept),
        unscored=len(scores) - len(kept),
        value=value,
        low=low,
        high=high,
        confidence=confidence,
        threshold=threshold,
        passed=low >= threshold,
        accuracy=accuracy,
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        sensitivity=float(equal[a == 1].mean()) if binary and (a == 1).any() else None,
        specificity=float(equal[a == 0].mean()) if binary and (a == 0).any() else None,
    )


def interval(
    human: Values,
    judge: Values,
    coefficient: str,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bootstrap interval of a coefficient, resampling items or whole clusters.

    The limits are expanded percentiles, as in `statistics.clustered_bootstrap`. Draws in which the coefficient does not
    exist (one label only) are left out. Below `MIN_ITEMS` items or clusters the interval is -1 to 1. Resampling items
    that all agree shows no spread, so the interval of a kappa is never narrower than (a - e) / (1 - e) over the Wilson
    interval of its observed agreement a.
    """
    a, b = np.asarray(human, dtype=float), np.asarray(judge, dtype=float)
    numbers: dict[Hashable, list[int]] = {}
    for at in range(len(a)):
        numbers.setdefault(at if clusters is None else clusters[at], []).append(at)
    groups = [np.array(members) for members in numbers.values()]
    count = len(groups)
    if count < MIN_ITEMS:
        return -1.0, 1.0
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = np.concatenate([groups[at] for at in rng.integers(0, count, count)])
        found.append(COEFFICIENTS[coefficient](a[drawn], b[drawn]))
    there = np.array(found)[~np.isnan(found)]
    if len(there) < draws / 2:
        return -1.0, 1.0
    t = float(special.stdtrit(count - 1, 0.5 + confidence / 2))
    tail = float(special.ndtr(-math.sqrt(count / (count - 1)) * t))
    low, high = (float(limit) for limit in np.quantile(there, [tail, 1 - tail]))
    if coefficient in _WEIGHTS:
        observed, expected = _agreement(a, b, _WEIGHTS[coefficient])
        n = effective_n((a == b).astype(float), clusters)
        wide = [(limit - expected) / (1 - expected) for limit in wilson(observed * n, n, confidence)]
        low, high = min(low, wide[0]), max(high, wide[1])
    return max(low, -1.0), min(high, 1.0)


def require_agreement(check: JudgeCheck, override: str | None = None) -> JudgeCheck:
    """Return the check if the judge may be trained on; with an override reason, the check with that reason recorded.

    Raises:
        BadInput: the lower limit of the agreement is under the threshold and no reason was given.
    """
    if check.passed:
        return check
    if override and override.strip():
        return check.model_copy(update={"override": override.strip()})
    few = f" Under {MIN_ITEMS} items nothing can be said." if (check.low, check.high) == (-1, 1) else ""
    raise BadInput(
        f"the judge {check.judge!r} does not agree well enough with people to train on: {check.coefficient} "
        f"{check.value:.2f}, {check.confidence:.0%} interval {check.low:.2f} to {check.high:.2f} on {check.items} "
        f"items, and its lower limit must reach {check.threshold:.2f}.{few} Label more items if the interval is wide, "
        "sharpen the rubric or change the model if it is not, or give a reason to override the check; it is recorded"
    )


def diverged(
    judge_curve: Sequence[float],
    gold_curve: Sequence[float],
    window: int = 5,
    *,
    tolerance: float = 0.02,
    higher_is_better: bool = True,
) -> str | None:
    """Say whether the judge's score keeps rising while the held-out gold metric falls: reward hacking.

    Both curves have one value per measurement, of the same steps. Over the last `window` measurements the change of a
    curve is that of its least-squares line from end to end, slope · (window - 1), so a single outlier does not decide.
    It is an alarm when the judge's change is positive and the gold metric's is worse than -`tolerance`, in the metric's
    own unit: choose the tolerance above the metric's noise, such as twice its standard error. Fewer measurements than
    the window are no alarm.

    Cause: Gao et al. 2022 (arXiv 2210.10760, figure 1): past a point, optimising a proxy lowers the gold reward.

    Returns:
        A sentence with the numbers and the measurement (from 1) where gold was best, or None.

    Raises:
        ValueError: the curves have different lengths or values that are not finite, or the window is under 3.
    """
    judge, gold = np.asarray(judge_curve, dtype=float), np.asarray(gold_curve, dtype=float)
    if judge.shape != gold.shape or judge.ndim != 1 or window < 3 or tolerance < 0:
        raise ValueError(
            f"two curves of equal length, a window of at least 3 and a tolerance of at least 0 are needed, got "
            f"{judge.size} and {gold.size} values, {window} and {tolerance}"
        )
    if not (np.isfinite(judge).all() and np.isfinite(gold).all()):
        raise ValueError("a measurement is not finite; leave it out of both curves")
    if len(judge) < window:
        return None
    sign = 1.0 if higher_is_better else -1.0
    rise, gain = _change(judge[-window:]), sign * _change(gold[-window:])
    if rise <= 0 or gain >= -tolerance:
        return None
    best = int(np.argmax(sign * gold))
    return (
        f"over the last {window} measurements the judge's score rose by {rise:.3g} while the gold metric got worse by "
        f"{-gain:.3g} (least-squares lines; tolerance {tolerance:g}): the policy is learning the judge, not the task. "
        f"Gold was best at measurement {best + 1} of {len(gold)} ({gold[best]:.3g}); go back to that checkpoint"
    )


def _change(values: Floats) -> float:
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    return float(steps @ values / (steps @ steps) * (len(values) - 1))


def _agreement(a: Floats, b: Floats, weights: Weights | None) -> tuple[float, float]:
    """Return the observed and the expected agreement in 0..1."""
    labels, positions = np.unique(np.concatenate([a, b]), return_inverse=True)
    size = len(labels)
    table = np.bincount(positions[: len(a)] * size + positions[len(a) :], minlength=size * size).reshape(size, size)
    share = table / table.sum()
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)
    if weights is None:
        distance = (distance > 0).astype(float)
    elif weights == "quadratic":
        distance = distance**2
    agreement = 1 - distance / max(distance.max(), 1.0)
    return float((share * agreement).sum()), float(share.sum(1) @ agreement @ share.sum(0))


def _check_values(judge: str, coefficient: str, a: Floats, b: Floats) -> None:
    if not len(a):
        raise BadInput(f"the judge {judge!r} scored none of the items; look at the reasons of its scores")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise BadInput(f"labels and scores of the judge {judge!r} must be finite; leave out or mend the other items")
    for who, values in (("people", a), (f"the judge {judge!r}", b)):
        if np.ptp(values) == 0:
            raise BadInput(
                f"{who} gave all {len(values)} items the value {values[0]:g}, so agreement cannot be measured; "
                "a gold set needs good and bad answers that the judge can tell apart"
            )
    strange = sorted(set(b.tolist()) - set(a.tolist()))
    if coefficient in _WEIGHTS and len(set(b.tolist()) | set(a.tolist())) > 20:
        raise BadInput(
            f"{coefficient} compares labels, but the judge {judge!r} gave values that are none, such as "
            f"{(strange or b.tolist())[0]:g}; cut its scores into labels, or check it with spearman"
        )


def _share(
    equal: Floats, clusters: Sequence[Hashable] | None, confidence: float, draws: int, seed: int
) -> tuple[float, float, float]:
    """Return a share with its Wilson interval, or the wider one of it and the bootstrap over clusters."""
    share = float(equal.mean())
    n = effective_n(equal, clusters)
    low, high = wilson(share * n, n, confidence)
    if is_clustered(clusters):
        _, wide_low, wide_high = clustered_bootstrap(equal, clusters, confidence, draws, seed)
        low, high = min(low, wide_low), max(high, wide_high)
    return share, max(low, 0.0), min(high, 1.0)
