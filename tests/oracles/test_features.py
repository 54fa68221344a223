"""Feature-based tuning against scikit-learn, SciPy and transformers, and its guarantee against simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ascent.customize.features import (
    FeatureConfig,
    FeatureRow,
    HiddenStates,
    ImageEncoder,
    Predictor,
    TextEmbedding,
    VisionLanguageModel,
    classify,
    tune_features,
)
from ascent.customize.features.reliability import reliability
from ascent.evaluate.selective import lowest_threshold, needed, upper_bound

ROOT = Path(__file__).parents[2]
TEXTS = ["Take one tablet twice a day.", "naïve café", "x", "The quick brown fox jumps over the lazy dog; 0123456789."]


def blobs(rows: int, labels: int, dimensions: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds, one per label."""
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % labels
    return rng.normal(size=(rows, dimensions)) + rng.normal(size=(labels, dimensions))[label], label


def numbers(text: str) -> list[float]:
    """The numbers that a text spells out; other texts have none."""
    return json.loads(text) if text.startswith("[") else [0.0] * 6


@pytest.mark.parametrize("calibration", ["sigmoid", "isotonic", "temperature"])
@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.parametrize("kind", ["logistic", "gradient_boosting"])
def test_predictor_gives_scikit_learns_probabilities(
    kind: str, labels: int, calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rows that training did not see, some of them far outside, where clipping and saturation show."""
    monkeypatch.setattr(classify, "STRENGTHS", (0.1,) if kind == "logistic" else ())
    monkeypatch.setattr(classify, "LEAVES", (7,))
    values, label = blobs(160, labels)
    config = FeatureConfig(calibration=calibration, gradient_boosting=kind != "logistic", inner_folds=2)
    fitted = classify.fit(values, label, np.arange(len(label)), config)
    found, weights = classify.weights_of(fitted)
    meta = {
        "format": 1,
        "labels": [*"abcd"[:labels]],
        "threshold": 0.5,
        "classifier": found,
        "calibration": calibration,
    }
    predictor = Predictor(meta | {"extractor": {"name": "x", "identity": "x", "dimensions": 6}}, weights)
    fresh = np.concatenate([blobs(200, labels, seed=1)[0], 30 * blobs(50, labels, seed=2)[0]])
    assert found == kind
    np.testing.assert_allclose(predictor.probabilities(fresh, "x"), fitted.model.predict_proba(fresh), atol=1e-9)


@pytest.mark.parametrize("labels", [2, 3])
def test_temperature_stays_finite_where_all_is_right(labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far clouds: the mean confidence out of fold, found by scikit-learn's own cross-validation, is (n+1)/(n+2)."""
    from scipy.special import softmax
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setattr(classify, "STRENGTHS", (0.1,))
    values, label = blobs(60, labels)
    values += 40 * np.eye(6)[label]
    config = FeatureConfig(calibration="temperature", gradient_boosting=False)
    fitted = classify.fit(values, label, np.arange(60), config)
    inner = classify.splits(label, np.arange(60), config.inner_folds, config.seed + 1)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    scores = cross_val_predict(plain, values, label, cv=inner, method="decision_function").reshape(60, -1)
    logits = np.concatenate([-scores, scores], axis=1) if labels == 2 else scores
    beta = classify.weights_of(fitted)[1]["beta"]
    assert (logits.argmax(1) == label).all()
    assert softmax(beta * logits, axis=1).max(1).mean() == pytest.approx(61 / 62, abs=1e-6)


def test_artifact_predicts_without_scikit_learn_torch_and_scipy(tmp_path: Path) -> None:
    """A fresh process that cannot import them gives the probabilities that scikit-learn gave here."""
    values, label = blobs(60, 3)
    rows = [FeatureRow(json.dumps(value.tolist()), f"label {name}") for value, name in zip(values, label, strict=True)]
    extractor = TextEmbedding(lambda texts: np.array([numbers(text) for text in texts]), model_sha256="json")
    card = tune_features(
        rows, extractor, FeatureConfig(gradient_boosting=False, folds=2, risk=None), out=tmp_path / "a"
    )
    np.save(tmp_path / "values.npy", extractor.extract([row.item for row in rows]))
    code = (
        "import sys\n"
        "for name in ('sklearn', 'torch', 'scipy', 'transformers', 'PIL'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from ascent.customize.features.predict import Predictor\n"
        "folder, identity, sha256 = sys.argv[1:]\n"
        "predictor = Predictor.load(Path(folder) / 'a', sha256=sha256)\n"
        "found = predictor.probabilities(np.load(Path(folder) / 'values.npy'), identity)\n"
        "np.save(Path(folder) / 'found.npy', found)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), extractor.identity, card.sha256]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    features = np.load(tmp_path / "values.npy").astype(np.float64)
    config = FeatureConfig(gradient_boosting=False, folds=2, risk=None)
    again = classify.fit(features, label, np.arange(60), config).model.predict_proba(features)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), again, atol=1e-9)


def test_reliability_equals_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

    rng = np.random.default_rng(3)
    proba, label = rng.dirichlet([0.7] * 4, 80), rng.integers(0, 4, 80)
    found = reliability(proba, label, range(80))
    assert found.accuracy.value == pytest.approx(accuracy_score(label, proba.argmax(1)))
    assert found.log_loss.value == pytest.approx(log_loss(label, proba, labels=range(4)))
    assert found.brier.value == pytest.approx(brier_score_loss(label, proba, labels=range(4), scale_by_half=False))


def test_clopper_pearson_is_scipys_exact_interval() -> None:
    from scipy.stats import binomtest

    for errors, n in ((0, 1), (0, 59), (3, 50), (50, 50), (7, 9)):
        exact = binomtest(errors, n, alternative="less").proportion_ci(0.9, method="exact").high
        assert upper_bound(errors, n, 0.9) == pytest.approx(exact, abs=1e-12)
    assert needed(0.05, 0.95) == 59  # 0.95^59 = 0.0485, 0.95^58 = 0.0510
    assert needed(0.05, 0.95, 1) == 93  # 0.95^93 + 93 · 0.05 · 0.95^92 = 0.0500, one row less 0.0521


@pytest.mark.parametrize("copies", [1, 3])
def test_abstention_keeps_its_risk_as_often_as_it_says(copies: int) -> None:
    """Confidence c is uniform on [½, 1] and an answer right with chance c - 0.02, so P(wrong | c ≥ t) = 0.52 - t/2.

    A threshold breaks the risk of 15 % where t < 0.74. Of 600 searches at most 10 % may end there, plus three
    standard deviations. Copies of each row, in one cluster, must not make the search bolder.
    """
    rng = np.random.default_rng(0)
    broken = answered = 0
    for _ in range(600):
        confidence = rng.uniform(0.5, 1, 300)
        correct = (rng.random(300) < confidence - 0.02).astype(float)
        rows = np.repeat(np.arange(300), copies)
        threshold, _ = lowest_threshold(confidence[rows], correct[rows], rows.tolist(), 0.15, 0.9)
        answered += threshold is not None
        broken += threshold is not None and 0.52 - threshold / 2 > 0.15 + 1e-9
    assert broken / 600 <= 0.1 + 3 * (0.1 * 0.9 / 600) ** 0.5
    assert answered > 300, "it keeps the risk only by never answering"


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layers", [None, 1])
def test_hidden_states_equal_transformers(tiny_model: Path, pooling: str, layers: int | None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    extractor = HiddenStates(tiny_model, pooling=pooling, layers=layers, precision="fp32", token_budget=60)
    expected = []
    with torch.no_grad():
        for text in TEXTS:
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            # transformers' last entry is normed already, the ones before are not
            states = states[-1][0] if layers is None else model.model.norm(states[layers][0])
            expected.append(states.mean(0) if pooling == "mean" else states[-1])
    np.testing.assert_allclose(extractor.extract(TEXTS), torch.stack(expected).numpy(), atol=2e-5)


def tiny_vision(folder: Path, family: str) -> Path:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        SiglipVisionConfig,
        SiglipVisionModel,
        ViTImageProcessor,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": 32, "patch_size": 8}
    if family == "clip":
        CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **sizes)).save_pretrained(folder)
    elif family == "siglip":
        SiglipVisionModel(SiglipVisionConfig(intermediate_size=32, **sizes)).save_pretrained(folder)
    else:
        Dinov2Model(Dinov2Config(mlp_ratio=2, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def photos(folder: Path, count: int = 3) -> list[Path]:
    from PIL import Image

    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 255, (40, 30 + 7 * number, 3), np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
def test_image_encoder_equals_transformers(tmp_path: Path, family: str) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    folder, items = tiny_vision(tmp_path / "model", family), photos(tmp_path)
    extractor = ImageEncoder(folder, batch_size=2)
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = processor(images=[Image.open(path) for path in items], return_tensors="pt")
        expected = model(**inputs).pooler_output.numpy()
    assert extractor.dimensions == 16
    np.testing.assert_allclose(extractor.extract(items), expected, atol=1e-5)
    np.testing.assert_allclose(
        extractor.extract([path.read_bytes() for path in items[::-1]]), expected[::-1], atol=1e-5
    )


TEMPLATE = (
    "{% for part in messages[0]['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} A:"
)


def tiny_vlm(folder: Path, tiny_model: Path, template: str | None) -> Path:
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        ViTImageProcessor,
    )

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, image_seq_length=16)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        ViTImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "prompt"), [(TEMPLATE, "<image>Is it damaged? A:"), (None, "<image>\nIs it damaged?")]
)
def test_vision_language_model_equals_transformers(
    tmp_path: Path, tiny_model: Path, template: str | None, prompt: str
) -> None:
    """The last state is that which the language head reads, so that head @ features are transformers' last logits.

    Without a template of its own the processor falls back on the tokenizer's, which knows no images.
    """
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder, items = tiny_vlm(tmp_path / "model", tiny_model, template), photos(tmp_path)
    extractor = VisionLanguageModel(folder, question="Is it damaged?", precision="fp32")
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [
            model(**processor(images=Image.open(path), text=prompt, return_tensors="pt")).logits[0, -1].numpy()
            for path in items
        ]
    found = extractor.extract(items)
    head = model.lm_head.weight.detach().numpy()
    np.testing.assert_allclose(found @ head.T, np.stack(expected), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-4  # the image is looked at
    other = VisionLanguageModel(folder, question="Which fruit is this?", precision="fp32")
    assert other.identity != extractor.identity
    assert np.abs(other.extract(items) - found).max() > 1e-4  # and so is the question
