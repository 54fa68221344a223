"""How good probabilities are, and from which confidence on they may be acted upon."""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from ascent.customize.features.card import Abstention, Reliability
from ascent.evaluate.selective import upper_bound
from ascent.records import Episode, Estimate, Score

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 10
THRESHOLDS = (0.999, 0.998, 0.995, *(round(0.99 - step / 100, 2) for step in range(100)))
"""Tried from the strictest down. Fixed beforehand: thresholds that came from the data would need a correction."""


def reliability(proba_NK: Floats, label_N: Ints, clusters: Sequence[Hashable], seed: int = 0) -> Reliability:
    """Measure probabilities [N, K] against the right labels' columns. Clusters are what the intervals resample."""
    rows = np.arange(len(label_N))
    right = np.clip(proba_NK[rows, label_N], np.finfo(float).eps, 1)
    hit = np.eye(proba_NK.shape[1])[label_N]
    correct = (proba_NK.argmax(axis=1) == label_N).astype(float)
    confidence = proba_NK.max(axis=1)
    return Reliability(
        accuracy=share_estimate("accuracy", correct, clusters, seed),
        log_loss=_loss_estimate("log_loss", -np.log(right), clusters, seed),
        brier=_loss_estimate("brier", ((proba_NK - hit) ** 2).sum(axis=1), clusters, seed),
        ece=calibration_error(confidence, correct),
        ece_if_calibrated=_chance_error(confidence, seed),
    )


def share_estimate(name: str, values: Floats, clusters: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Return the mean of 0/1 values with the interval that `ascent.evaluate.suite.estimate` gives them."""
    from ascent.evaluate.suite import estimate

    episodes = [
        Episode(task_id=f"{row:09d}", model="", messages=(), text="", scores=(Score(name=name, value=float(value)),))
        for row, value in enumerate(values)
    ]
    groups = {f"{row:09d}": str(cluster) for row, cluster in enumerate(clusters)}
    return estimate(name, episodes, groups, seed=seed)


def _loss_estimate(name: str, values: Floats, clusters: Sequence[Hashable], seed: int) -> Estimate:
    """Return a mean loss with its bootstrap interval over clusters."""
    from ascent.evaluate.statistics import clustered_bootstrap, is_clustered

    mean, low, high = clustered_bootstrap(values, clusters, seed=seed)
    method = "clustered-bootstrap" if is_clustered(clusters) else "bootstrap"
    return Estimate(name=name, value=mean, low=low, high=high, n=len(values), method=method)


def calibration_error(confidence_N: Floats, correct_N: Floats, bins: int = BINS) -> float:
    """Return Σ_b n_b/N |mean correct - mean confidence| over bins of (nearly) equal size.

    Guo et al. 2017 (arXiv 1706.04599), equation 3, with bins by rank instead of by value: no bin is then so small
    that it only measures noise (Nixon et al. 2019, arXiv 1904.01685, section 3).
    """
    order = np.argsort(confidence_N, kind="stable")
    gaps = (correct_N - confidence_N)[order]
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, min(bins, len(gaps)))) / len(gaps))


def _chance_error(confidence_N: Floats, seed: int, draws: int = 1000) -> tuple[float, float]:
    """Return 2.5th and 97.5th percentile of the error when each answer is right with exactly its confidence."""
    rng = np.random.default_rng(seed)
    found = [
        calibration_error(confidence_N, (rng.random(len(confidence_N)) < confidence_N).astype(float))
        for _ in range(draws)
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def choose_abstention(
    confidence_N: Floats,
    correct_N: Floats,
    clusters: Sequence[Hashable],
    risk: float | None,
    confidence: float,
    seed: int = 0,
) -> Abstention:
    """Choose the threshold as `lowest_threshold` does, or 0 where no risk was stated, and count what it accepts."""
    threshold: float | None
    if risk is None:
        threshold, reason = 0.0, "no risk was stated, so it always answers"
    else:
        threshold, reason = lowest_threshold(confidence_N, correct_N, clusters, risk, confidence)
    accepted = confidence_N >= (math.inf if threshold is None else threshold)
    errors, n = _effective(accepted, correct_N, _numbered(clusters))
    return Abstention(
        threshold=threshold,
        risk=risk,
        confidence=confidence,
        accepted=int(accepted.sum()),
        errors=int(accepted.sum()) - int(correct_N[accepted].sum()),
        coverage=share_estimate("coverage", accepted.astype(float), clusters, seed),
        upper=upper_bound(errors, n, confidence),
        reason=reason,
    )


def lowest_threshold(
    confidence_N: Floats, correct_N: Floats, clusters: Sequence[Hashable], risk: float, confidence: float
) -> tuple[float | None, str]:
    """Return the lowest threshold at which the risk of an answer is at most `risk`, or None, and a sentence on it.

    Fixed-sequence testing (Angelopoulos et al. 2021, "Learn then test", arXiv 2110.01052, section 3.2): thresholds
    are tried from the strictest down; each must have a Clopper–Pearson bound of at most `risk`, and the first that
    fails ends the search, so no correction for having tried many is needed. Thresholds that accept too few rows to
    pass with one error (without any, where the former takes over half of the rows) are skipped, or a single confident
    mistake would end most searches. That looks at no label, so the guarantee stands where the risk does not rise with
    confidence. Rows of one cluster are counted as if they all said the same: n becomes Kish's
    n² / Σ m² over cluster sizes m (Kish 1965), the errors their share of it, rounded up.
    """
    numbers = _numbered(clusters)
    chosen, rows = None, 0
    allowed = 1 if 2 * needed(risk, confidence, 1) <= _effective(confidence_N >= 0, correct_N, numbers)[1] else 0
    least = needed(risk, confidence, allowed)
    why = f"no threshold accepts the {least} independent rows that the bound needs"
    for threshold in THRESHOLDS:
        accepted = confidence_N >= threshold
        errors, n = _effective(accepted, correct_N, numbers)
        if accepted.sum() == rows or n < least:
            continue  # a threshold that accepts the same rows as a stricter one has not been put to the test
        upper = upper_bound(errors, n, confidence)
        if upper > risk:
            why = f"at {threshold}, the first with enough rows, {errors} of {n} are wrong: the risk may be {upper:.1%}"
            break
        chosen, rows = threshold, int(accepted.sum())
    if chosen is None:
        return None, f"no threshold keeps the risk at {risk:.1%}, so it abstains on everything: {why}"
    return chosen, f"the lowest threshold whose risk is at most {risk:.1%} with {confidence:.0%} confidence"


def needed(risk: float, confidence: float, errors: int = 0) -> int:
    """Return the least number of answers whose risk is bounded by `risk` although `errors` of them are wrong."""

    def bounded(n: int) -> bool:
        return upper_bound(errors, n, confidence) <= risk

    high = errors + 1
    while not bounded(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=errors, key=bounded)


def _numbered(clusters: Sequence[Hashable]) -> Ints:
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(cluster, len(number)) for cluster in clusters], np.int64)


def _effective(accepted: npt.NDArray[np.bool_], correct_N: Floats, cluster_N: Ints) -> tuple[int, int]:
    """Return (errors, n) of the accepted rows, in independent rows."""
    total = int(accepted.sum())
    if total == 0:
        return 0, 0
    sizes = np.bincount(cluster_N[accepted])
    n = int(total**2 / int((sizes**2).sum()))
    errors = total - int(correct_N[accepted].sum())
    return min(n, math.ceil(errors * n / total - 1e-9)), n
