from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_embeddings_files import ASKED, write_tiny_embedder

from ascent.customize.embeddings.embedder import Embedder
from ascent.records.errors import BadInput, Corrupt

TEXTS = ["wing", "what is the heat of the shock plate", "shell.", "flow on the crack of the noise", "zzz", "is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_embedder(tmp_path_factory.mktemp("embedder") / "tiny", prompts={"query": "what is "})


def states(folder: Path, text: str, limit: int = 16) -> np.ndarray:
    """The last layer's states of one text alone, [tokens, width]: no padding, no batch."""
    from transformers import BertModel, BertTokenizerFast

    ids = BertTokenizerFast.from_pretrained(folder)(text, truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        return BertModel.from_pretrained(folder).eval()(**ids).last_hidden_state[0].numpy()


def test_vectors_are_normalised_means_over_a_texts_own_tokens(folder):
    """Derivation: for each text alone, v = mean over its tokens of the last layer, then v / |v|."""
    embedder = Embedder.load(folder)
    by_hand = np.stack([states(folder, text).mean(0) for text in TEXTS])
    by_hand /= np.linalg.norm(by_hand, axis=1, keepdims=True)
    for batch_size in (1, 4, 32):
        found = embedder.encode(TEXTS, batch_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, by_hand, atol=1e-5)
    assert embedder.encode([]).shape == (0, embedder.width)


def test_first_token_pooling_without_normalising(tmp_path):
    plain = write_tiny_embedder(tmp_path / "m", pooling="cls", normalise=False)
    by_hand = np.stack([states(plain, text)[0] for text in TEXTS])
    np.testing.assert_allclose(Embedder.load(plain).encode(TEXTS), by_hand, atol=1e-5)
    assert np.abs(np.linalg.norm(by_hand, axis=1) - 1).min() > 0.1


def test_roles_put_the_folders_prompt_before_the_text(folder):
    embedder = Embedder.load(folder)
    np.testing.assert_array_equal(embedder.encode(["the wing"], role="query"), embedder.encode(["what is the wing"]))
    np.testing.assert_array_equal(embedder.encode(["the wing"], role="document"), embedder.encode(["the wing"]))


def test_texts_are_cut_off_at_the_folders_length(folder):
    embedder = Embedder.load(folder)
    words = " ".join(ASKED * 3)
    kept = " ".join((ASKED * 3)[: 16 - 2])  # two places are for [CLS] and [SEP]
    np.testing.assert_array_equal(embedder.encode([words]), embedder.encode([kept]))


def test_bf16_vectors_point_the_same_way(folder):
    fine, coarse = Embedder.load(folder).encode(TEXTS), Embedder.load(folder, "bf16").encode(TEXTS)
    cosines = (fine * coarse).sum(1)
    assert cosines.min() > 0.999 and not np.array_equal(fine, coarse)


def test_what_is_saved_loads_with_the_same_vectors_and_nothing_else_of_the_start(folder, tmp_path):
    (folder / "README.md").write_text("about the start")
    embedder = Embedder.load(folder)
    with torch.no_grad():
        for parameter in embedder.parameters:
            parameter += 0.01
    (tmp_path / "out").mkdir()
    embedder.save(folder, tmp_path / "out")
    again = Embedder.load(tmp_path / "out")
    np.testing.assert_array_equal(again.encode(TEXTS), embedder.encode(TEXTS))
    assert again.config == embedder.config
    assert not (tmp_path / "out" / "README.md").exists()
    assert np.abs(again.encode(TEXTS) - Embedder.load(folder).encode(TEXTS)).max() > 1e-3


def test_only_what_the_vectors_depend_on_trains(folder):
    embedder = Embedder.load(folder)
    embedder.embed(embedder.tokenise(TEXTS)).sum().backward()
    assert all(parameter.grad is not None for parameter in embedder.parameters)
    frozen = {name for name, p in embedder.model.named_parameters() if not p.requires_grad}
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}


def test_other_folders_are_refused(folder, tiny_model, tmp_path):
    with pytest.raises(BadInput, match=r"no modules\.json; fetch one with: ascent models pull"):
        Embedder.load(tiny_model)
    with pytest.raises(BadInput, match=r"pools by \['max_tokens'\]"):
        Embedder.load(write_tiny_embedder(tmp_path / "m", pooling="max"))
    cut = write_tiny_embedder(tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(Corrupt, match="bytes long but its header describes"):
        Embedder.load(cut)
    dense = write_tiny_embedder(tmp_path / "dense")
    modules = json.loads((dense / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (dense / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(BadInput, match="the modules are Transformer, Pooling, Dense"):
        Embedder.load(dense)
