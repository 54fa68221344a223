"""Extractors and their cache: what is remembered, what is computed again, what is refused and in which words."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ascent.customize.features import (
    BadItem,
    Cached,
    FeatureRow,
    HiddenStates,
    Item,
    Joined,
    PixelStatistics,
    Question,
    RubricAnswers,
    TextEmbedding,
)
from ascent.customize.features.extract import extract_rows, model_sha256
from ascent.customize.features.rubric import answer_place
from ascent.inference.engine import Completion, Prompt
from ascent.inference.engines.scripted import ScriptedEngine
from ascent.records.errors import BadData, BadInput, Unavailable


class Lengths:
    """Length and number of vowels of a text; remembers what it was asked."""

    name, dimensions = "lengths", 2

    def __init__(self, identity: str = "lengths") -> None:
        self.identity = identity
        self.asked: list[Item] = []

    def extract(self, items: Sequence[Item]) -> np.ndarray:
        for index, item in enumerate(items):
            if item == "bad":
                raise BadItem(index, "is bad", item)
        self.asked += items
        return np.array([[len(item), sum(c in "aeiou" for c in str(item))] for item in items], np.float32).reshape(
            -1, 2
        )


def test_cache_computes_each_content_once_per_identity(tmp_path: Path) -> None:
    inner = Lengths()
    texts = ["one", "two", "one", "three"]
    first = Cached(inner, tmp_path).extract(texts)
    again = Cached(inner, tmp_path)
    np.testing.assert_array_equal(again.extract(texts[::-1]), first[::-1])
    np.testing.assert_array_equal(first, [[3, 2], [3, 1], [3, 2], [5, 2]])
    assert inner.asked == ["one", "two", "three"]
    assert (again.hits, again.computed) == (4, 0)
    other = Lengths("another model")
    Cached(other, tmp_path).extract(["one"])
    assert other.asked == ["one"]
    assert again.extract([]).shape == (0, 2)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"\x01", lambda raw: b"", lambda raw: raw * 2]
)
def test_cache_computes_a_damaged_entry_again(tmp_path: Path, damage: object) -> None:
    inner = Lengths()
    expected = Cached(inner, tmp_path).extract(["one", "seven"])
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    np.testing.assert_array_equal(Cached(inner, tmp_path).extract(["one", "seven"]), expected)
    assert inner.asked == ["one", "seven"] * 2
    assert Cached(inner, tmp_path).extract(["one"]).tolist() == [[3, 2]]
    assert len(inner.asked) == 4  # the repair was stored


def test_an_entry_under_another_items_name_is_not_believed(tmp_path: Path) -> None:
    inner = Lengths()
    cached = Cached(inner, tmp_path)
    cached.extract(["one", "seven"])
    one, seven = sorted(
        (path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.read_bytes()[32:]
    )
    seven.write_bytes(one.read_bytes())
    np.testing.assert_array_equal(cached.extract(["one", "seven"]), [[3, 2], [5, 2]])


def fill(folder: Path, gate: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    Cached(Lengths(), folder).extract([f"text {number}" for number in range(150)])


def test_two_processes_may_fill_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    workers = [context.Process(target=fill, args=(tmp_path, gate)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 150, "one whole file per text, no temporary ones left"
    after = Cached(Lengths(), tmp_path)
    after.extract([f"text {number}" for number in range(150)])
    assert (after.hits, after.computed) == (150, 0)


def test_unreadable_images_name_file_and_row_or_are_excluded(tmp_path: Path) -> None:
    good, torn, text = tmp_path / "good.png", tmp_path / "torn.png", tmp_path / "text.png"
    Image.effect_noise((64, 64), 50).save(good)
    torn.write_bytes(good.read_bytes()[:-200])
    text.write_text("not an image")
    gone = tmp_path / "gone.png"
    rows = [FeatureRow(path, id=path.stem) for path in (good, torn, text, gone, good)]
    for extractor in (PixelStatistics(), Cached(PixelStatistics(), tmp_path / "cache")):
        with pytest.raises(BadData, match=r"torn\.png.*row 2 \(torn\): the image does not decode"):
            extract_rows(rows[:2], extractor)
        found = extract_rows(rows, extractor, exclude_unreadable=True, chunk=2)
        assert found.kept == [0, 4]
        assert [line.split(",")[0] for line in found.excluded] == ["row 2 (torn)", "row 3 (text)", "row 4 (gone)"]
        np.testing.assert_array_equal(found.values_ND[0], found.values_ND[1])


def test_an_item_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(BadItem, match=r"item 2.*pathlib\.Path"):
        PixelStatistics().extract([_png((9, 9, 9)), "photo.jpg"])
    embedding = TextEmbedding(lambda texts: np.ones((len(texts), 3)), model_sha256="x")
    with pytest.raises(BadItem, match="item 1: a text is needed"):
        embedding.extract([b"..."])
    with pytest.raises(BadItem, match="empty"):
        embedding.extract(["a", " "])
    with pytest.raises(BadInput, match="model_sha256"):
        TextEmbedding(lambda texts: np.ones((len(texts), 3)), model_sha256="")


def test_features_that_are_not_finite_name_their_row() -> None:
    embedding = TextEmbedding(
        lambda texts: np.array([[1.0 if text != "odd" else np.nan] for text in texts]), model_sha256="x"
    )
    with pytest.raises(BadData, match=r"row 3 \(c\).*not finite"):
        extract_rows([FeatureRow("x", id="a"), FeatureRow("y", id="b"), FeatureRow("odd", id="c")], embedding)


def test_embedder_is_called_in_batches_in_order() -> None:
    sizes: list[int] = []

    def encode(texts: list[str]) -> np.ndarray:
        sizes.append(len(texts))
        return np.array([[float(text == "a" or int(text)), 1.0] for text in texts])

    embedding = TextEmbedding(encode, model_sha256="x", batch_size=4)
    found = Joined([embedding, Lengths()]).extract([str(number) for number in range(1, 11)])
    np.testing.assert_array_equal(found[:, 0], range(1, 11))
    np.testing.assert_array_equal(found[:, 2], [1] * 9 + [2])
    assert sizes == [1, 4, 4, 2]


def test_hidden_states_do_not_depend_on_neighbours_and_refuse_long_texts(tiny_model: Path) -> None:
    texts = ["Take one tablet.", "a", "Apply a thin layer to the skin at night, twice."]
    extractor = HiddenStates(tiny_model, precision="fp32")
    alone = np.concatenate([extractor.extract([text]) for text in texts])
    np.testing.assert_allclose(extractor.extract(texts), alone, atol=1e-5)
    with pytest.raises(BadItem, match=r"item 2: the text has \d+ tokens, the model reads 256"):
        extractor.extract(["a", "many words " * 200])
    cut = HiddenStates(tiny_model, precision="fp32", truncate=True)
    assert np.isfinite(cut.extract(["many words " * 200])).all()
    assert len({extractor.identity, cut.identity, HiddenStates(tiny_model, layers=1).identity}) == 3
    with pytest.raises(BadInput, match="2 layers"):
        HiddenStates(tiny_model, layers=3)


def test_identity_follows_the_models_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = model_sha256(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert model_sha256(tmp_path) != before


QUESTIONS = (Question("Is it a fruit?"), Question("Which size?", ("small", "large", "large enough")))


def test_rubric_answers_become_shares() -> None:
    """Four samples: yes, "Yes.", no, and no answer; sizes: three of one, one of the longer one."""

    def answer(prompt: Prompt) -> list[str]:
        asked = prompt.messages[-1].content
        if "Is it a fruit?" in asked:
            return ["yes", '"Yes."', "No!", "yesterday"] if "apple" in asked else ["no"]
        return ["large", "Large", "large, surely", "large enough"]

    rubric = RubricAnswers(ScriptedEngine(answer), QUESTIONS, samples=4)
    expected = [[0.5, 0.25, 0.25, 0, 0.75, 0.25, 0], [0, 1, 0, 0, 0.75, 0.25, 0]]
    np.testing.assert_array_equal(rubric.extract(["an apple", "a brick"]), expected)
    assert len(rubric.columns) == rubric.dimensions == 7
    once = RubricAnswers(ScriptedEngine(answer), QUESTIONS)
    np.testing.assert_array_equal(once.extract(["a brick"]), [[0, 1, 0, 0, 1, 0, 0]])
    assert once.identity != rubric.identity
    assert answer_place("none of it", ("no", "yes")) == 2


def test_a_failed_answer_is_no_answer() -> None:
    class Broken:
        model = "broken"

        def generate(self, prompts: object, sampling: object, *hearers: object) -> list[list[Completion]]:
            return [[Completion(text="", error="timeout")]]

    with pytest.raises(Unavailable, match="timeout"):
        RubricAnswers(Broken(), [Question("Is it?")]).extract(["a"])
    with pytest.raises(BadInput, match="two or more different"):
        RubricAnswers(Broken(), [Question("Is it?", ("yes", "Yes"))])


def test_pixel_statistics_of_plain_images_are_as_derived() -> None:
    """A pure colour fills one bin of each histogram: red is hue 0, full saturation and value; grey has neither."""
    red, grey = PixelStatistics().extract([_png((255, 0, 0)), _png((0, 0, 0))])
    assert np.flatnonzero(red[:144]).tolist() == [(0 * 4 + 3) * 3 + 2]
    assert np.flatnonzero(grey[:144]).tolist() == [0]
    np.testing.assert_allclose(red[144:192].reshape(16, 3), [[1, 0, 0]] * 16)
    assert not red[192:240].any()  # no deviation
    assert red[240 + 57] == 1  # every neighbour equals the centre: byte 255, the last uniform one
    assert not red[299:].any()  # no gradient


def test_gradients_lie_in_the_bin_of_their_direction() -> None:
    """Grey rising to the right has angle 0, downwards 90°: between two of the nine bins of 20°."""
    ramp = np.tile(np.arange(96, dtype=np.uint8) * 2, (96, 1))
    right, down = (
        PixelStatistics().extract([_encoded(np.stack([plane] * 3, -1))])[0][299:].reshape(16, 9) ** 2
        for plane in (ramp, ramp.T)
    )
    np.testing.assert_allclose(right.sum(0), [1] + [0] * 8, atol=1e-6)
    np.testing.assert_allclose(down.sum(0), [0] * 4 + [0.5, 0.5] + [0] * 3, atol=1e-6)


def test_transparency_is_white_and_exif_turns() -> None:
    import io

    clear = io.BytesIO()
    Image.new("RGBA", (20, 20), (10, 200, 30, 0)).save(clear, "PNG")
    pixels = PixelStatistics()
    np.testing.assert_array_equal(pixels.extract([clear.getvalue()]), pixels.extract([_png((255, 255, 255))]))
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees clockwise"
    stored = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(stored, "PNG", exif=exif)
    plain = io.BytesIO()
    upright.save(plain, "PNG")
    np.testing.assert_array_equal(pixels.extract([stored.getvalue()]), pixels.extract([plain.getvalue()]))


def _png(colour: tuple[int, int, int]) -> bytes:
    return _encoded(np.full((50, 30, 3), colour, np.uint8))


def _encoded(pixels: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
