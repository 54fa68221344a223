"""Tuning on features: nothing leaks between folds, the artifact is checked, and every refusal names a remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ascent.customize.features import FeatureCard, FeatureConfig, FeatureRow, Item, Predictor, tune_features
from ascent.customize.features.reliability import calibration_error
from ascent.evaluate.selective import lowest_threshold
from ascent.records.errors import BadData, BadInput, Corrupt

QUICK = FeatureConfig(gradient_boosting=False, folds=2, inner_folds=2)


class Numbers:
    """The numbers that a text spells out."""

    name, dimensions, identity = "numbers", 4, "numbers-4"

    def extract(self, items: Sequence[Item]) -> np.ndarray:
        return np.array([json.loads(str(item)) for item in items], np.float32).reshape(len(items), self.dimensions)


def made(count: int, *, signal: float, seed: int = 0, labels: Sequence[str] = ("no", "yes")) -> list[FeatureRow]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        place = number % len(labels)
        values = rng.normal(size=4)
        values[place] += signal
        rows.append(FeatureRow(json.dumps(values.tolist()), labels[place], id=f"r{number}"))
    return rows


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCard, Path]:
    out = tmp_path_factory.mktemp("features") / "artifact"
    return tune_features(made(160, signal=3), Numbers(), QUICK, out=out), out


def test_card_and_artifact_tell_the_same(tuned: tuple[FeatureCard, Path]) -> None:
    """Two clouds 3√2 apart: the best possible accuracy is Φ(3√2/2) = 98.3 %."""
    card, out = tuned
    assert FeatureCard.from_json((out / "card.json").read_bytes()) == card
    assert card.labels == {"no": 80, "yes": 80}
    assert card.majority == 0.5
    assert 0.94 <= card.nested_cv.accuracy.value <= 1.0
    assert card.abstention.threshold is not None
    assert card.abstention.upper <= 0.05
    predictor = Predictor.load(out, sha256=card.sha256)
    assert predictor.threshold == card.abstention.threshold
    far, between = predictor.classify(["[0, 9, 0, 0]", "[1.5, 1.5, 0, 0]"], Numbers())
    assert far.label == "yes"
    assert far.confidence == far.probabilities["yes"] == max(far.probabilities.values())
    assert between.confidence < 0.9
    sure = between.confidence >= card.abstention.threshold
    assert (between.label is not None) == sure


def test_the_same_rows_give_the_same_artifact(tuned: tuple[FeatureCard, Path], tmp_path: Path) -> None:
    assert tune_features(made(160, signal=3), Numbers(), QUICK, out=tmp_path / "again").sha256 == tuned[0].sha256


@pytest.mark.parametrize("name", ["classifier.json", "weights.safetensors", "files.json"])
def test_a_damaged_artifact_is_refused(tuned: tuple[FeatureCard, Path], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tuned[1], folder)
    raw = bytearray((folder / name).read_bytes())
    raw[-3] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(Corrupt):
        Predictor.load(folder)
    (folder / name).unlink()
    with pytest.raises(Corrupt, match="not a whole feature classifier"):
        Predictor.load(folder)
    with pytest.raises(Corrupt, match="not 000000"):
        Predictor.load(tuned[1], sha256="0" * 64)


def test_features_of_another_extractor_are_refused(tuned: tuple[FeatureCard, Path]) -> None:
    predictor = Predictor.load(tuned[1])
    with pytest.raises(BadInput, match="made for numbers numbers-4; extract with that one"):
        predictor.predict(np.zeros((1, 4)), "another")
    with pytest.raises(BadInput, match=r"\[N, 4\] is needed"):
        predictor.predict(np.zeros((1, 5)), "numbers-4")
    with pytest.raises(BadInput, match="not finite"):
        predictor.predict([[0, np.inf, 0, 0]], "numbers-4")


LOGISTIC: dict[str, Any] = {
    "centre_D": np.zeros(2),
    "scale_D": np.ones(2),
    "weight_SD": np.ones((1, 2)),
    "bias_S": np.zeros(1),
    "slope_S": -np.ones(1),
    "offset_S": np.zeros(1),
}
TREE: dict[str, Any] = {
    "start_SI": np.zeros((1, 1), int),
    "base_S": np.zeros(1),
    "feature": np.array([0, -1, -1]),
    "bound": np.zeros(3),
    "left": np.array([1, 0, 0]),
    "right": np.array([2, 0, 0]),
    "value": np.array([0.0, -1.0, 1.0]),
    "slope_S": -np.ones(1),
    "offset_S": np.zeros(1),
}


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("logistic", {"bias_S": np.zeros(2)}, "2 labels"),
        ("logistic", {"scale_D": np.ones(3)}, "2 dimensions"),
        ("logistic", {"bias_S": np.array([np.nan])}, "not finite"),
        ("logistic", {"more": np.zeros(1)}, "instead of"),
        ("gradient_boosting", {"left": np.array([0, 0, 0])}, "outside itself"),
        ("gradient_boosting", {"right": np.array([3, 0, 0])}, "outside itself"),
        ("gradient_boosting", {"feature": np.array([2, -1, -1])}, "outside itself"),
        ("forest", {}, "not known"),
    ],
)
def test_parts_that_do_not_fit_are_refused(kind: str, change: dict[str, Any], fault: str) -> None:
    """A tree whose child is itself would never end."""
    extractor = {"name": "x", "identity": "x", "dimensions": 2}
    meta = {"format": 1, "labels": ["a", "b"], "threshold": None, "extractor": extractor, "calibration": "sigmoid"}
    whole = TREE if kind == "gradient_boosting" else LOGISTIC
    if kind != "forest":
        found = Predictor(meta | {"classifier": kind}, whole).probabilities([[1.0, 0.0]], "x")
        np.testing.assert_allclose(found, [[1 / (1 + np.e), np.e / (1 + np.e)]])
    with pytest.raises(Corrupt, match=fault):
        Predictor(meta | {"classifier": kind}, whole | change)


def test_equal_items_and_groups_do_not_leak(tmp_path: Path) -> None:
    """Labels are pure chance, each item stands there four times: a classifier that had seen the twin would know.

    With groups of two items it still may not know, though the pairs link items over several rows.
    """
    rng = np.random.default_rng(5)
    once = [FeatureRow(row.item, str(rng.integers(2))) for row in made(80, signal=0)]
    plain = tune_features([row for row in once for _ in range(4)], Numbers(), QUICK, out=tmp_path / "a")
    assert plain.groups == 80
    assert plain.nested_cv.accuracy.low <= 0.5 <= plain.nested_cv.accuracy.high
    paired = [
        FeatureRow(row.item, row.label, group=f"{index // 2}" if copy else None)
        for index, row in enumerate(once)
        for copy in range(2)
    ]
    linked = tune_features(paired, Numbers(), QUICK, out=tmp_path / "b")
    assert linked.groups == 40
    assert linked.nested_cv.accuracy.low <= 0.5 <= linked.nested_cv.accuracy.high


def test_without_signal_it_abstains_on_everything_and_says_so(tmp_path: Path) -> None:
    card = tune_features(made(160, signal=0), Numbers(), QUICK, out=tmp_path / "a")
    assert card.abstention.threshold is None
    assert card.abstention.accepted == 0
    assert "abstains on everything" in card.abstention.reason
    answer = Predictor.load(tmp_path / "a").classify(["[0, 99, 0, 0]"], Numbers())[0]
    assert answer.label is None
    always = tune_features(made(160, signal=0), Numbers(), QUICK.model_copy(update={"risk": None}), out=tmp_path / "b")
    assert always.abstention.coverage.value == 1.0
    assert Predictor.load(tmp_path / "b").classify(["[0, 99, 0, 0]"], Numbers())[0].label is not None


def test_held_out_rows_set_the_threshold_of_the_exported_classifier(tmp_path: Path) -> None:
    rows, held = made(120, signal=3), made(100, signal=3, seed=9)
    card = tune_features(rows, Numbers(), QUICK, out=tmp_path / "a", held_out=held)
    predictor = Predictor.load(tmp_path / "a")
    answers = predictor.classify([row.item for row in held], Numbers())
    given = [(answer.label, row.label) for answer, row in zip(answers, held, strict=True) if answer.label is not None]
    assert card.abstention.evidence == "held_out"
    assert card.abstention.accepted == len(given)
    assert card.abstention.errors == sum(got != right for got, right in given)
    right = sum(
        max(a.probabilities, key=a.probabilities.__getitem__) == r.label for a, r in zip(answers, held, strict=True)
    )
    assert card.held_out is not None
    assert card.held_out.accuracy.value == pytest.approx(right / 100)
    with pytest.raises(BadInput, match=r"held-out row 2.*item is among the training rows"):
        tune_features(rows, Numbers(), QUICK, out=tmp_path / "b", held_out=[held[0], rows[3]])
    with pytest.raises(BadInput, match=r"held-out row 1 .*label 'maybe' does not occur"):
        tune_features(rows, Numbers(), QUICK, out=tmp_path / "b", held_out=made(1, signal=0, labels=["maybe"]))


def test_too_little_to_learn_from_is_refused_with_a_remedy(tmp_path: Path) -> None:
    rows, out = made(40, signal=1), tmp_path / "a"
    unlabelled = [*rows, FeatureRow("[0,0,0,0]", None, "r40"), FeatureRow("[0,0,0,1]", " ")]
    with pytest.raises(BadData, match=r"no label in rows: row 41 \(r40\); row 42; give each row a label"):
        tune_features(unlabelled, Numbers(), QUICK, out=out)
    with pytest.raises(BadInput, match="all 20 rows have the label 'no'"):
        tune_features(rows[::2], Numbers(), QUICK, out=out)
    with pytest.raises(BadInput, match="no rows"):
        tune_features([], Numbers(), QUICK, out=out)
    rare = [*rows, *made(3, signal=1, seed=1, labels=["rare"])]
    with pytest.raises(BadInput, match=r"'rare' has 3 rows, but 5 folds with 3 folds inside need 5; collect 2 more"):
        tune_features(rare, Numbers(), FeatureConfig(), out=out)
    grouped = [FeatureRow(row.item, row.label, group=row.label) for row in rows]
    with pytest.raises(BadInput, match="keep groups whole"):
        tune_features(grouped, Numbers(), QUICK, out=out)
    assert not out.exists()


def test_calibration_error_by_hand() -> None:
    """Two bins by rank: (0.5, 0.6) with one right, gap |1 - 1.1|; (0.8, 0.9) with two right, gap |2 - 1.7|; over 4."""
    found = calibration_error(np.array([0.9, 0.5, 0.8, 0.6]), np.array([1.0, 1.0, 1.0, 0.0]), bins=2)
    assert found == pytest.approx((0.1 + 0.3) / 4)


def test_threshold_by_hand() -> None:
    """Risk 50 % at 90 %: 4 rows without error have the bound 1 - 0.1^¼ = 0.44, 3 have 0.54; 1 error of 5 has 0.58."""
    confidence = np.array([0.98, 0.97, 0.96, 0.95, 0.94, 0.3])
    all_right, fifth_wrong, first_wrong = np.ones(6), np.array([1.0, 1, 1, 1, 0, 1]), np.array([0.0, 1, 1, 1, 1, 1])
    assert lowest_threshold(confidence, all_right, range(6), 0.5, 0.9)[0] == 0.3
    assert lowest_threshold(confidence, fifth_wrong, range(6), 0.5, 0.9)[0] == 0.95
    threshold, why = lowest_threshold(confidence, first_wrong, range(6), 0.5, 0.9)
    assert threshold is None
    assert "at 0.95, the first with enough rows, 1 of 4 are wrong" in why
    threshold, why = lowest_threshold(confidence, all_right, [0, 0, 1, 1, 2, 2], 0.5, 0.9)
    assert threshold is None, "three pairs count as three rows"
    assert "no threshold accepts the 4 independent rows" in why
