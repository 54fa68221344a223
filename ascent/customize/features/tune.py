"""Feature-based tuning from rows to artifact."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ascent.customize.features.cache import content_key
from ascent.customize.features.card import Abstention, FeatureCard, FeatureConfig, Reliability
from ascent.customize.features.classify import Fitted, cross_validated, fit, weights_of
from ascent.customize.features.extract import (
    Extractor,
    FeatureRow,
    extract_rows,
    place_of,
)
from ascent.customize.features.predict import CLASSIFIER, FILES, FORMAT, WEIGHTS, Predictor
from ascent.customize.features.reliability import choose_abstention, reliability
from ascent.inference.store import CARD
from ascent.records import digest
from ascent.records.errors import BadData, BadInput, Corrupt
from ascent.records.files import folder_atomic, sha256_file

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_AGREE = 1e-6


@dataclass(frozen=True)
class _Table:
    values_ND: Floats
    labels: list[str]
    cluster_N: Ints
    keys: set[tuple[str, str]]
    excluded: tuple[str, ...]


def tune_features(
    rows: Sequence[FeatureRow],
    extractor: Extractor,
    config: FeatureConfig | None = None,
    *,
    out: Path,
    held_out: Sequence[FeatureRow] = (),
) -> FeatureCard:
    """Train, calibrate, measure and export a classifier on frozen features.

    Nested cross-validation over `rows` measures the whole procedure; the exported classifier is then chosen, calibrated
    and trained on all of them. The threshold for abstaining comes from `held_out` where given: only then does its bound
    speak of the very classifier that is exported. Rows that hold the same item are kept in the same fold.

    Args:
        rows: labelled rows.
        extractor: what reads their items; wrap it in `Cached` to pay for each item once.
        config: settings; the default is `FeatureConfig()`.
        out: the artifact's folder; an artifact that is there is replaced whole.
        held_out: labelled rows that share neither group nor item with `rows`.

    Returns:
        The card, which also lies in `out`.

    Raises:
        BadData: a row has no label, or an item cannot be read; the message names row and file.
        BadInput: there are too few rows, labels or groups for the folds, or held-out rows overlap.
        MissingExtra: scikit-learn or Pillow is not installed.
    """
    config = config or FeatureConfig()
    started = time.monotonic()
    _check_labels(rows, "rows")
    _check_labels(held_out, "held_out")
    _check_counts(Counter(str(row.label) for row in rows), config)
    table = _table(rows, extractor, config)
    counts = Counter(table.labels)
    _check_counts(counts, config)
    names = sorted(counts)
    label_N = np.array([names.index(label) for label in table.labels])
    proba_NK, chosen_in_folds = cross_validated(table.values_ND, label_N, table.cluster_N, config)
    measured = reliability(proba_NK, label_N, table.cluster_N.tolist(), config.seed)
    abstention = _abstention(proba_NK, label_N, table.cluster_N, config)
    fitted = fit(table.values_ND, label_N, table.cluster_N, config)
    held = None
    if held_out:
        held, abstention = _on_held_out(held_out, table, extractor, names, fitted, config)
    card = FeatureCard(
        sha256="",
        extractor={"name": extractor.name, "identity": extractor.identity, "dimensions": extractor.dimensions},
        labels={name: counts[name] for name in names},
        groups=len(set(table.cluster_N.tolist())),
        excluded=table.excluded,
        chosen=fitted.chosen,
        candidates=fitted.losses,
        chosen_in_folds=tuple(chosen_in_folds),
        calibration=fitted.calibration,
        nested_cv=measured,
        held_out=held,
        majority=max(counts.values()) / counts.total(),
        abstention=abstention,
        config=config,
        versions={"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("numpy", "scikit-learn")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return _export(card, fitted, table.values_ND, out, started)


def _export(card: FeatureCard, fitted: Fitted, values_ND: Floats, out: Path, started: float) -> FeatureCard:
    """Write the artifact once its predictor has been seen to agree with scikit-learn on the training rows."""
    from safetensors.numpy import save_file

    kind, weights = weights_of(fitted)
    meta = {
        "format": FORMAT,
        "labels": list(card.labels),
        "threshold": card.abstention.threshold,
        "extractor": card.extractor,
        "classifier": kind,
        "calibration": fitted.calibration,
    }
    ours = Predictor(meta, weights).probabilities(values_ND, str(card.extractor["identity"]))
    gap = float(np.abs(ours - fitted.model.predict_proba(values_ND)).max())
    if not gap <= _AGREE:
        raise Corrupt(
            f"the exported classifier's probabilities differ from scikit-learn's by {gap:.1e}, so it was not written; "
            "this version of scikit-learn keeps its numbers otherwise, install the one that pyproject.toml names"
        )
    with folder_atomic(out) as folder:
        (folder / CLASSIFIER).write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        save_file(weights, folder / WEIGHTS)
        manifest = {name: sha256_file(folder / name) for name in (CLASSIFIER, WEIGHTS)}
        (folder / FILES).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        seconds = time.monotonic() - started
        card = card.model_copy(update={"sha256": digest(manifest), "seconds": seconds})
        (folder / CARD).write_text(card.to_json(indent=1), encoding="utf-8")
    return card


def _table(rows: Sequence[FeatureRow], extractor: Extractor, config: FeatureConfig) -> _Table:
    extracted = extract_rows(rows, extractor, exclude_unreadable=config.unreadable == "exclude")
    kept = [rows[place] for place in extracted.kept]
    keys = [_keys(row) for row in kept]
    return _Table(
        extracted.values_ND.astype(np.float64),
        [str(row.label) for row in kept],
        _clusters(keys),
        {key for pair in keys for key in pair},
        tuple(extracted.excluded),
    )


def _keys(row: FeatureRow) -> list[tuple[str, str]]:
    """Return what a row shares with others that must stay beside it: its item's content and its group."""
    return [("item", content_key(row.item)), *([("group", row.group)] if row.group is not None else [])]


def _clusters(keys: Sequence[Sequence[tuple[str, str]]]) -> Ints:
    """Number the sets of rows that hang together by a key, directly or through other rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    number: dict[tuple[str, str], int] = {}
    pairs = [(row, number.setdefault(key, len(number))) for row, own in enumerate(keys) for key in own]
    row, key = np.array(pairs, np.int64).reshape(-1, 2).T
    size = len(keys) + len(number)
    graph = coo_array((np.ones(len(row)), (row, key + len(keys))), shape=(size, size))
    labels: Ints = connected_components(graph, directed=False)[1][: len(keys)].astype(np.int64)
    return labels


def _on_held_out(
    rows: Sequence[FeatureRow],
    table: _Table,
    extractor: Extractor,
    names: Sequence[str],
    fitted: Fitted,
    config: FeatureConfig,
) -> tuple[Reliability, Abstention]:
    for index, row in enumerate(rows):
        if row.label not in names:
            raise BadInput(
                f"held-out {place_of(row, index)}: label {row.label!r} does not occur in the training rows "
                f"({', '.join(names)}); correct it, or move rows of that label over"
            )
    held = _table(rows, extractor, config)
    if shared := held.keys & table.keys:
        kind, value = min(shared)
        index = next(index for index, row in enumerate(rows) if (kind, value) in _keys(row))
        raise BadInput(
            f"held-out {place_of(rows[index], index)}: its {kind} is among the training rows too, so it would not show "
            "what new items will; hold out whole groups"
        )
    label_N = np.array([names.index(label) for label in held.labels])
    proba_NK = fitted.model.predict_proba(held.values_ND)
    measured = reliability(proba_NK, label_N, held.cluster_N.tolist(), config.seed)
    return measured, _abstention(proba_NK, label_N, held.cluster_N, config, evidence="held_out")


def _abstention(proba_NK: Floats, label_N: Ints, cluster_N: Ints, config: FeatureConfig, **more: Any) -> Abstention:
    correct = (proba_NK.argmax(axis=1) == label_N).astype(float)
    clusters = cluster_N.tolist()
    found = choose_abstention(proba_NK.max(axis=1), correct, clusters, config.risk, config.confidence, config.seed)
    return found.model_copy(update=more)


def _check_labels(rows: Sequence[FeatureRow], name: str) -> None:
    missing = [
        place_of(row, index)
        for index, row in enumerate(rows)
        if not isinstance(row.label, str) or not row.label.strip()
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BadData(
            f"no label in {name}: {'; '.join(missing[:3])}{more}; give each row a label (a text), or leave it out"
        )


def _check_counts(counts: Counter[str], config: FeatureConfig) -> None:
    """Refuse labels that cannot be in every training part of every fold, inner ones included."""
    if len(counts) < 2:
        seen = f"all {counts.total()} rows have the label {next(iter(counts))!r}" if counts else "there are no rows"
        raise BadInput(f"{seen}; a classifier needs rows of at least two labels")
    label, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    least = _least(config)
    if count < least:
        raise BadInput(
            f"the label {label!r} has {count} rows, but {config.folds} folds with {config.inner_folds} folds inside "
            f"need {least}; collect {least - count} more, merge it with another label, or set fewer folds"
        )


def _least(config: FeatureConfig) -> int:
    """Return the fewest rows of a label that leave one for each inner fold when an outer fold is taken out."""
    count = max(config.folds, config.inner_folds)
    while count - -(-count // config.folds) < config.inner_folds:
        count += 1
    return count
