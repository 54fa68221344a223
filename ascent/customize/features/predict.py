"""A feature classifier at work: reads the artifact, needs NumPy and safetensors, runs no code from the file.

classifier.json      labels, threshold, extractor, which classifier and which calibration
weights.safetensors  their numbers
files.json           the sha256 of these two; its digest names the artifact
card.json            how it came about (`FeatureCard`); not part of the digest
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ascent.records import digest
from ascent.records.errors import BadInput, Corrupt
from ascent.records.files import sha256_file

Floats = npt.NDArray[np.float64]
Weights = dict[str, npt.NDArray[Any]]

CLASSIFIER, WEIGHTS, FILES, FORMAT = "classifier.json", "weights.safetensors", "files.json", 1
LINEAR = ("centre_D", "scale_D", "weight_SD", "bias_S")
TREES = ("start_SI", "feature", "bound", "left", "right", "value", "base_S")
CALIBRATION = {"sigmoid": ("slope_S", "offset_S"), "isotonic": ("x", "y", "size_S"), "temperature": ("beta",)}
"""Tensors of each part. S is the number of scores: 1 for two labels, else one per label; I counts boosting rounds."""


class _Extractor(Protocol):
    identity: str

    def extract(self, items: Sequence[Any]) -> npt.NDArray[np.float32]:
        """Return features [N, D]."""
        ...


@dataclass(frozen=True)
class Prediction:
    """One answer: `label` is None where the classifier abstains; `probabilities` has all labels."""

    label: str | None
    confidence: float
    probabilities: dict[str, float]


class Predictor:
    """A classifier as it was exported.

    Attributes:
        labels: in the order of the columns of `probabilities`.
        threshold: it answers where the highest probability is at least this; None abstains on everything.
        extractor: name, identity and dimensions of the features that it was made for.
        sha256: names the artifact's content.
    """

    def __init__(self, meta: dict[str, Any], weights: Weights, sha256: str = "") -> None:
        """Take what `load` read. Raises `Corrupt` when the parts do not fit together."""
        try:
            self.labels = tuple(str(label) for label in meta["labels"])
            self.threshold = None if meta["threshold"] is None else float(meta["threshold"])
            self.extractor: dict[str, Any] = dict(meta["extractor"])
            self._kind, self._calibration = str(meta["classifier"]), str(meta["calibration"])
            version, self._dimensions = int(meta["format"]), int(self.extractor["dimensions"])
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{CLASSIFIER} lacks or garbles a field ({error}); export the classifier again") from error
        if version != FORMAT:
            raise Corrupt(f"{CLASSIFIER} has format {version}, this Ascent reads {FORMAT}; upgrade, or export again")
        self._weights, self.sha256 = weights, sha256
        self._check()

    @classmethod
    def load(cls, folder: Path, *, sha256: str | None = None) -> Predictor:
        """Read an artifact.

        Args:
            folder: the artifact.
            sha256: what its content must be, where you noted it.

        Raises:
            Corrupt: a file is missing, fails its checksum or is malformed, or the content is another.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        again = "export the classifier again, or restore the folder"
        try:
            manifest = dict(json.loads((folder / FILES).read_text(encoding="utf-8")))
            for name in (CLASSIFIER, WEIGHTS):
                if sha256_file(folder / name) != manifest.get(name):
                    raise Corrupt(f"{folder / name} does not match its checksum in {FILES}; {again}")
            meta = json.loads((folder / CLASSIFIER).read_text(encoding="utf-8"))
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise Corrupt(f"{folder} is not a whole feature classifier ({error}); {again}") from error
        content = digest(manifest)
        if sha256 not in (None, content):
            raise Corrupt(
                f"{folder} holds the classifier {content[:12]}, not {str(sha256)[:12]}; give the right folder"
            )
        return cls(meta, weights, content)

    def classify(self, items: Sequence[Any], extractor: _Extractor) -> list[Prediction]:
        """Extract features and answer. Raises as `predict` and the extractor do."""
        self._check_identity(extractor.identity)
        return self.predict(extractor.extract(items), extractor.identity)

    def predict(self, features_ND: npt.ArrayLike, identity: str) -> list[Prediction]:
        """Answer, or abstain below the threshold.

        Args:
            features_ND: the features.
            identity: `identity` of the extractor that made them.

        Raises:
            BadInput: the features are another extractor's, have another width, or are not finite.
        """
        found = []
        for row in self.probabilities(features_ND, identity):
            best = int(row.argmax())
            sure = self.threshold is not None and row[best] >= self.threshold
            shares = dict(zip(self.labels, row.tolist(), strict=True))
            found.append(Prediction(self.labels[best] if sure else None, float(row[best]), shares))
        return found

    def probabilities(self, features_ND: npt.ArrayLike, identity: str) -> Floats:
        """Return calibrated probabilities [N, K] in the order of `labels`. Raises as `predict` does."""
        self._check_identity(identity)
        values = np.asarray(features_ND, np.float64)
        if values.ndim != 2 or values.shape[1] != self._dimensions:
            raise BadInput(f"features of shape {values.shape} cannot be used; [N, {self._dimensions}] is needed")
        if not np.isfinite(values).all():
            raise BadInput("the features hold values that are not finite; look at the items or run the model in fp32")
        return self._calibrated(self._scores(values))

    def _scores(self, values_ND: Floats) -> Floats:
        """Return uncalibrated scores [N, S]: log-odds for two labels, logits for more."""
        w = self._weights
        if self._kind == "logistic":
            scores: Floats = (values_ND - w["centre_D"]) / w["scale_D"] @ w["weight_SD"].T + w["bias_S"]
            return scores
        scores = np.tile(w["base_S"], (len(values_ND), 1))
        for score, starts in enumerate(w["start_SI"]):
            for start in starts:
                scores[:, score] += self._tree(values_ND, int(start))
        return scores

    def _tree(self, values_ND: Floats, start: int) -> Floats:
        """Return a tree's value for each row: go left where the feature is at most the bound. A leaf has no feature."""
        w = self._weights
        rows, at = np.arange(len(values_ND)), np.full(len(values_ND), start)
        while True:
            feature = w["feature"][at]
            inner = feature >= 0
            if not inner.any():
                value: Floats = w["value"][at]
                return value
            low = values_ND[rows, np.maximum(feature, 0)] <= w["bound"][at]
            at = np.where(inner, np.where(low, w["left"][at], w["right"][at]), at)

    def _calibrated(self, scores_NS: Floats) -> Floats:
        """Turn scores into probabilities [N, K].

        Sigmoid (Platt 1999) and isotonic act on each score, one label against the rest, and are then normalised;
        where all labels get 0 they share evenly. Temperature (Guo et al. 2017, equation 9) is softmax(β · scores).
        """
        w, labels = self._weights, len(self.labels)
        if self._calibration == "temperature":
            # One score s of two labels stands for the logits (-s, s).
            scores = w["beta"] * (np.concatenate([-scores_NS, scores_NS], axis=1) if labels == 2 else scores_NS)
            raised = np.exp(scores - scores.max(axis=1, keepdims=True))
            softmax: Floats = raised / raised.sum(axis=1, keepdims=True)
            return softmax
        if self._calibration == "sigmoid":
            share = _expit(-(w["slope_S"] * scores_NS + w["offset_S"]))
        else:
            edges = np.concatenate([[0], np.cumsum(w["size_S"])])
            parts = [slice(int(edges[score]), int(edges[score + 1])) for score in range(scores_NS.shape[1])]
            columns = zip(scores_NS.T, parts, strict=True)
            share = np.stack([np.interp(column, w["x"][part], w["y"][part]) for column, part in columns], axis=1)
        if labels == 2:
            return np.concatenate([1 - share, share], axis=1)
        total = share.sum(axis=1, keepdims=True)
        normalised: Floats = np.divide(share, total, out=np.full_like(share, 1 / labels), where=total > 0)
        return normalised

    def _check_identity(self, identity: str) -> None:
        if identity != self.extractor["identity"]:
            raise BadInput(
                f"the features come from the extractor {identity[:12]}, but this classifier was made for "
                f"{self.extractor['name']} {self.extractor['identity'][:12]}; extract with that one (same model, same "
                "settings), or tune again"
            )

    def _check(self) -> None:
        """Check that all tensors are there and fit, and that every walk down a tree ends."""
        names = {"logistic": LINEAR, "gradient_boosting": TREES}.get(self._kind, ())
        names += CALIBRATION.get(self._calibration, ())
        w, count, scores = self._weights, len(self.labels), 1 if len(self.labels) == 2 else len(self.labels)
        fault = None
        if self._kind not in ("logistic", "gradient_boosting") or self._calibration not in CALIBRATION:
            fault = f"the classifier {self._kind!r} with calibration {self._calibration!r} is not known"
        elif set(names) != set(w):
            fault = f"tensors {sorted(w)} instead of {sorted(names)}"
        elif count < 2 or len(set(self.labels)) != count or not 0 <= (self.threshold or 0) <= 1:
            fault = "labels must be two or more different ones, and the threshold between 0 and 1"
        elif any(len(w[name]) != scores for name in names if name.endswith(("_S", "_SD", "_SI"))):
            fault = f"the tensors do not fit {count} labels"
        elif any(w[name].shape[-1] != self._dimensions for name in names if name.endswith("D")):
            fault = f"the tensors do not fit {self._dimensions} dimensions"
        elif not all(np.isfinite(w[name]).all() for name in names):
            fault = "a tensor holds values that are not finite"
        elif self._calibration == "isotonic" and not len(w["x"]) == len(w["y"]) == w["size_S"].sum():
            fault = "the isotonic steps do not fit their sizes"
        elif self._kind == "gradient_boosting" and not _walkable(w, self._dimensions):
            fault = "a tree points outside itself"
        if fault:
            raise Corrupt(f"the classifier's parts do not fit together: {fault}; export it again")


def _walkable(w: Weights, dimensions: int) -> bool:
    """Say whether all nodes have all fields, all features exist, and children come after parents, so walks end."""
    nodes = len(w["feature"])
    if any(len(w[name]) != nodes for name in ("bound", "left", "right", "value")):
        return False
    inner = np.flatnonzero(w["feature"] >= 0)
    children = np.stack([w["left"][inner], w["right"][inner]])
    starts = w["start_SI"]
    return bool(
        (w["feature"] < dimensions).all()
        and (children > inner).all()
        and (children < nodes).all()
        and ((starts >= 0) & (starts < nodes)).all()
    )


def _expit(x: Floats) -> Floats:
    """1 / (1 + e^-x) without overflow."""
    small = np.exp(-np.abs(x))
    result: Floats = np.where(x >= 0, 1, small) / (1 + small)
    return result
