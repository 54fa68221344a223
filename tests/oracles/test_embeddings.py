"""Vectors, the export and the loss against sentence-transformers (installed without its dependencies)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from unit.test_embeddings_files import write_retrieval_data, write_tiny_embedder

from ascent.customize.embeddings.data import load_pairs
from ascent.customize.embeddings.embedder import Embedder
from ascent.customize.embeddings.objective import info_nce
from ascent.customize.embeddings.tune import EmbeddingRecipe, tune
from ascent.inference.store import Store
from ascent.records.errors import UnknownName

TEXTS = ["wing", "what is the heat of the shock plate", "", "crack " * 40, "Naïve café: flow!", "the shell"]


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("sentence_transformers")


@pytest.mark.parametrize(
    "form", [{}, {"pooling": "cls", "normalise": False}, {"prompts": {"query": "what is ", "document": "on "}}]
)
def test_vectors_are_those_of_sentence_transformers(reference, tmp_path, form):
    folder = write_tiny_embedder(tmp_path / "m", **form)
    theirs, ours = reference.SentenceTransformer(str(folder), device="cpu"), Embedder.load(folder)
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode(TEXTS, role="query"), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode(TEXTS, role="document"), theirs.encode_document(TEXTS), atol=1e-5)


def test_what_sentence_transformers_writes_is_read(reference, tmp_path):
    theirs = reference.SentenceTransformer(str(write_tiny_embedder(tmp_path / "m")), device="cpu")
    theirs.save(str(tmp_path / "saved"))
    np.testing.assert_allclose(Embedder.load(tmp_path / "saved").encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)


def test_a_tuned_embedder_loads_in_sentence_transformers(reference, tmp_path):
    start = write_tiny_embedder(tmp_path / "start")
    pairs = load_pairs(write_retrieval_data(tmp_path)["pairs"])
    recipe = EmbeddingRecipe(model="start", data=pairs.source.path, epochs=0.5, batch_size=8, optim={"lr": 1e-3})
    tune(recipe, start, pairs, tmp_path / "run")
    theirs = reference.SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(Embedder.load(tmp_path / "run" / "model").encode(TEXTS), theirs, atol=1e-5)
    assert np.abs(theirs - Embedder.load(start).encode(TEXTS)).max() > 1e-3


def test_the_loss_is_multiple_negatives_ranking(reference, tmp_path):
    """Their batch of (query, positive, negative) columns is ours without repeated or excluded documents."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    theirs = MultipleNegativesRankingLoss(
        reference.SentenceTransformer(str(write_tiny_embedder(tmp_path / "m")), device="cpu"), scale=20.0
    )
    draw = torch.Generator().manual_seed(0)
    columns = [torch.nn.functional.normalize(torch.randn(5, 8, generator=draw), dim=1) for _ in range(3)]
    expected = theirs.compute_loss_from_embeddings(columns, None)
    documents = torch.cat(columns[1:])
    ours, _ = info_nce(columns[0], documents, torch.arange(5), torch.zeros(5, 10, dtype=torch.bool), 1 / 20)
    torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_the_catalogues_embedder_agrees_on_real_text(reference):
    try:
        folder = Store().resolve("all-minilm-l6-v2")
    except UnknownName:
        pytest.skip("all-minilm-l6-v2 is not in the store")
    source = Path(__file__).read_text(encoding="utf-8")
    texts = [source[start : start + 40 * (1 + start % 9)] for start in range(0, 3000, 97)]
    theirs = reference.SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(Embedder.load(folder).encode(texts), theirs, atol=1e-5)
