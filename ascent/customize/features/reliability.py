"""How good probabilities are, and from which confidence on they may be acted upon."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from ascent.customize.features.card import Abstention, Reliability
from ascent.evaluate.selective import effective, lowest_threshold, numbered, upper_bound
from ascent.records import Episode, Estimate, Score

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 10


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
    errors, n = effective(accepted, correct_N, numbered(clusters))
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
