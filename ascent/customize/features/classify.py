"""The light classifiers: candidates, their choice by nested cross-validation, their calibration, their numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ascent.customize.features.card import FeatureConfig
from ascent.customize.features.predict import Weights
from ascent.records.errors import BadInput, MissingExtra

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Splits = list[tuple[Ints, Ints]]

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
LEAVES = (4, 16)
ROUNDS, LEAF_ROWS = 60, 5
ISOTONIC_ROWS, ISOTONIC_RAREST = 1000, 100


@dataclass(frozen=True)
class Fitted:
    """A calibrated classifier (scikit-learn's `CalibratedClassifierCV`) and how it was chosen."""

    model: Any
    chosen: str
    losses: dict[str, float]
    calibration: str


def candidates(config: FeatureConfig) -> dict[str, Callable[[], Any]]:
    """Return name -> maker of an untrained classifier.

    Logistic regression on standardised features at four strengths of L2 (C is scikit-learn's inverse strength), and
    histogram gradient boosting (Ke et al. 2017, LightGBM) of 60 rounds with trees of 4 or 16 leaves.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("features", "feature-based tuning") from error

    def logistic(strength: float) -> Callable[[], Any]:
        return lambda: make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))

    def boosting(leaves: int) -> Callable[[], Any]:
        return lambda: HistGradientBoostingClassifier(
            max_iter=ROUNDS,
            max_leaf_nodes=leaves,
            min_samples_leaf=LEAF_ROWS,
            early_stopping=False,
            random_state=config.seed,
        )

    found = {f"logistic C={strength:g}": logistic(strength) for strength in STRENGTHS}
    if config.gradient_boosting:
        found |= {f"gradient_boosting leaves={leaves}": boosting(leaves) for leaves in LEAVES}
    return found


def splits(label_N: Ints, cluster_N: Ints, folds: int, seed: int) -> Splits:
    """Return (training rows, test rows) of folds with like shares of each label, no cluster in two of them.

    Raises:
        BadInput: a training part lacks a label, because too few clusters have it.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    grouped = len(np.unique(cluster_N)) < len(cluster_N)
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    folder = kind(n_splits=folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about rare labels, which the check below judges
        found = [(train, test) for train, test in folder.split(label_N, label_N, cluster_N)]
    known = set(label_N.tolist())
    for train, test in found:
        if set(label_N[train].tolist()) != known or not len(test):
            raise BadInput(
                f"{folds} folds that keep groups whole leave a training part without some label; collect rows of more "
                "groups, merge rare labels, or set fewer folds"
            )
    return found


def calibration_for(label_N: Ints, config: FeatureConfig) -> str:
    """Return the calibration that `config` asks for; see `FeatureConfig.calibration`."""
    if config.calibration != "auto":
        return config.calibration
    counts = np.bincount(label_N)
    if len(label_N) >= ISOTONIC_ROWS and counts.min() >= ISOTONIC_RAREST:
        return "isotonic"
    return "sigmoid" if len(counts) == 2 else "temperature"


def fit(values_ND: Floats, label_N: Ints, cluster_N: Ints, config: FeatureConfig) -> Fitted:
    """Choose the candidate of least inner log-loss, calibrate it on the inner folds' test parts, train it on all rows.

    Calibration sees scores of rows that the scoring classifier was not trained on, over all inner folds together
    (scikit-learn's `ensemble=False`).
    """
    makers = candidates(config)  # first, for its word on a missing extra
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.metrics import log_loss

    inner = splits(label_N, cluster_N, config.inner_folds, config.seed + 1)
    known = np.arange(int(label_N.max()) + 1)
    losses: dict[str, float] = {}
    scores_NS: dict[str, Floats] = {}
    for name, make in makers.items():
        scores_NS[name] = np.zeros((len(label_N), 1 if len(known) == 2 else len(known)))
        parts = []
        for train, test in inner:
            model = make().fit(values_ND[train], label_N[train])
            scores_NS[name][test] = model.decision_function(values_ND[test]).reshape(len(test), -1)
            parts.append((len(test), log_loss(label_N[test], model.predict_proba(values_ND[test]), labels=known)))
        losses[name] = float(sum(size * loss for size, loss in parts) / len(label_N))
    chosen = min(losses, key=lambda name: losses[name])
    method = calibration_for(label_N, config)
    model = CalibratedClassifierCV(makers[chosen](), method=method, cv=inner, ensemble=False)
    model.fit(values_ND, label_N)
    if method == "temperature":
        _cap_temperature(model.calibrated_classifiers_[0].calibrators[0], scores_NS[chosen])
    return Fitted(model, chosen, losses, method)


def cross_validated(
    values_ND: Floats, label_N: Ints, cluster_N: Ints, config: FeatureConfig
) -> tuple[Floats, list[str]]:
    """Return probabilities [N, K] from outer folds, and what each chose.

    Each row's come from a classifier that was chosen, calibrated and trained without it and its cluster
    (Stone 1974; Cawley & Talbot 2010, JMLR 11:2079, on why choosing must happen inside).
    """
    proba = np.zeros((len(label_N), int(label_N.max()) + 1))
    chosen = []
    for train, test in splits(label_N, cluster_N, config.folds, config.seed):
        fitted = fit(values_ND[train], label_N[train], cluster_N[train], config)
        proba[test] = fitted.model.predict_proba(values_ND[test])
        chosen.append(fitted.chosen)
    return proba, chosen


def _cap_temperature(calibrator: Any, scores_NS: Floats) -> None:
    """Lower β until the mean confidence on rows out of fold is at most (n + 1) / (n + 2).

    Where all of them are right, likelihood grows with β without end and every probability becomes exactly 1. The cap is
    what Laplace's rule of succession says after n answers without an error; Platt's sigmoid has it in its targets.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    logits = np.concatenate([-scores_NS, scores_NS], axis=1) if scores_NS.shape[1] == 1 else scores_NS
    most = (len(logits) + 1) / (len(logits) + 2)

    def excess(log_beta: float) -> float:
        return float(softmax(np.exp(log_beta) * logits, axis=1).max(axis=1).mean()) - most

    fitted = float(np.log(calibrator.beta_))
    if excess(fitted) > 0 > excess(-10.0):
        calibrator.beta_ = np.exp(brentq(excess, -10.0, fitted))


def weights_of(fitted: Fitted) -> tuple[str, Weights]:
    """Return the classifier's kind and its numbers and its calibration's, as `predict.Predictor` reads them."""
    inside = fitted.model.calibrated_classifiers_[0]
    model = inside.estimator
    if fitted.chosen.startswith("logistic"):
        scaler, linear = model[0], model[-1]
        kind = "logistic"
        weights: Weights = {
            "centre_D": scaler.mean_,
            "scale_D": scaler.scale_,
            "weight_SD": linear.coef_,
            "bias_S": linear.intercept_,
        }
    else:
        kind, weights = "gradient_boosting", _trees(model)
    weights |= _calibration(inside.calibrators, fitted.calibration)
    return kind, {name: np.ascontiguousarray(values) for name, values in weights.items()}


def _calibration(calibrators: Sequence[Any], method: str) -> Weights:
    if method == "sigmoid":
        slopes, offsets = [part.a_ for part in calibrators], [part.b_ for part in calibrators]
        return {"slope_S": np.array(slopes, np.float64), "offset_S": np.array(offsets, np.float64)}
    if method == "temperature":
        return {"beta": np.array([calibrators[0].beta_], np.float64)}
    steps = [(part.X_thresholds_, part.y_thresholds_) for part in calibrators]
    return {
        "x": np.concatenate([x for x, _ in steps]).astype(np.float64),
        "y": np.concatenate([y for _, y in steps]).astype(np.float64),
        "size_S": np.array([len(x) for x, _ in steps], np.int64),
    }


def _trees(model: Any) -> Weights:
    """Lay the nodes of all trees end to end; a leaf's feature is -1, and scikit-learn puts children after parents."""
    trees = [[predictor.nodes for predictor in one_round] for one_round in model._predictors]
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("feature", "bound", "left", "right", "value")}
    starts: list[list[int]] = []
    at = 0
    for one_round in trees:
        starts.append([])
        for nodes in one_round:
            leaf = nodes["is_leaf"].astype(bool)
            parts["feature"].append(np.where(leaf, -1, nodes["feature_idx"]).astype(np.int64))
            parts["bound"].append(np.where(leaf, 0.0, nodes["num_threshold"]))
            parts["left"].append(np.where(leaf, 0, nodes["left"].astype(np.int64) + at))
            parts["right"].append(np.where(leaf, 0, nodes["right"].astype(np.int64) + at))
            parts["value"].append(nodes["value"].astype(np.float64))
            starts[-1].append(at)
            at += len(nodes)
    return {
        "start_SI": np.array(starts, np.int64).T,
        "base_S": np.asarray(model._baseline_prediction, np.float64).ravel(),
        **{name: np.concatenate(values) for name, values in parts.items()},
    }
