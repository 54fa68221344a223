from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_embeddings_files import write_jsonl, write_retrieval_data, write_tiny_embedder

from ascent.customize.embeddings.data import load_corpus, load_pairs, load_retrieval_set
from ascent.customize.embeddings.embedder import Embedder
from ascent.customize.embeddings.objective import contrastive_batch
from ascent.customize.embeddings.tune import (
    CARD,
    EmbeddingCard,
    EmbeddingRecipe,
    EmbeddingTrainer,
    load_embedding_recipe,
    tune,
)
from ascent.records.errors import BadData, BadInput, BadRecipe
from ascent.records.files import sha256_file


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_tiny_embedder(folder / "start")
    write_retrieval_data(folder)
    return folder


def recipe(place: Path, **changes) -> EmbeddingRecipe:
    fields = {"batch_size": 16, "negatives": 1, "mine_every": 4, "checkpoint_every": 100, "optim": {"lr": 3e-3}}
    return EmbeddingRecipe(model="start", data=place / "pairs.jsonl", **{**fields, **changes})


def run(place: Path, out: Path, *, report=None, **changes) -> EmbeddingCard:
    pairs, corpus = load_pairs(place / "pairs.jsonl"), load_corpus(place / "corpus.jsonl")
    return tune(recipe(place, **changes), place / "start", pairs, out, corpus=corpus, report=report)


def gradient(embedder: Embedder, chunk: int) -> tuple[float, torch.Tensor]:
    texts = [f"what is the {word}" for word in ("wing", "heat flow", "shock shell noise", "crack")]
    texts += ["on lift", "on warmth of stream", "on wave of hull of sound", "on tear", "on panel of panel of wave"]
    batch = contrastive_batch(
        [(i, i) for i in range(4)], [[4], [], [], []], {0: {0, 3}} | {i: {i} for i in range(1, 4)}
    )
    for parameter in embedder.parameters:
        parameter.grad = None
    trainer = EmbeddingTrainer(embedder, recipe(Path()).optim.optim, 1)
    loss, _ = trainer.backward(batch, embedder.tokenise(texts), temperature=0.1, chunk=chunk)
    return loss, torch.cat([parameter.grad.flatten() for parameter in embedder.parameters])


def test_a_chunked_batch_has_the_gradient_of_the_whole_one(place, monkeypatch):
    """The chain rule, checked against plain backpropagation through all texts at once."""
    embedder = Embedder.load(place / "start")
    loss, whole = gradient(embedder, 100)
    held = []
    embed = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, ids: held.append(len(ids)) or embed(self, ids))
    for chunk in (1, 2, 4):
        held.clear()
        chunked_loss, chunked = gradient(embedder, chunk)
        assert max(held) == chunk, "no more texts than a chunk are ever in the encoder"
        assert abs(chunked_loss - loss) < 1e-6
        assert (chunked - whole).norm() / whole.norm() < 1e-5
    assert whole.norm() > 0.1


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(place, tmp_path):
    """Stopped after step 6: between two minings, so that negatives must come back from the checkpoint."""

    def stop(step: int, total: int, numbers: dict[str, float]) -> None:
        if step == 7:
            raise KeyboardInterrupt

    changes = {"epochs": 2, "checkpoint_every": 3}
    whole = run(place, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "cut", report=stop, **changes)
    assert (tmp_path / "cut" / "checkpoint").is_dir() and not (tmp_path / "cut" / "model").exists()
    resumed = run(place, tmp_path / "cut", **changes)
    assert whole.run.steps == 7 and resumed.weights == whole.weights
    for name in ("loss", "accuracy", "grad_norm"):
        curves = [
            [json.loads(line)[name] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
            for out in ("whole", "cut")
        ]
        assert curves[0] == curves[1] and len(curves[0]) == 7
    assert not (tmp_path / "cut" / "checkpoint").exists()


def test_tuning_finds_held_out_combinations_that_the_start_cannot(place, tmp_path):
    """Held-out queries use words of training in new combinations; nothing but the words' meaning helps to find them."""
    pairs, corpus = load_pairs(place / "pairs.jsonl"), load_corpus(place / "corpus.jsonl")
    test = load_retrieval_set(place / "queries.jsonl", place / "corpus.jsonl", place / "qrels.jsonl")
    start, out = place / "start", tmp_path / "run"
    card = tune(recipe(place, epochs=30), start, pairs, out, corpus=corpus, test=test)
    change = next(change for change in card.changes if change.metric == "ndcg@10")
    assert card.before["ndcg@10"].value < 0.4 < 0.8 < card.after["ndcg@10"].value
    assert change.low > 0.3 and change.p_value < 0.01 and change.n == len(test.queries)
    assert [source.sha256 for source in card.run.data] == [
        sha256_file(place / name) for name in ("pairs.jsonl", "corpus.jsonl")
    ]
    assert card.test.sha256 == sha256_file(place / "qrels.jsonl")
    assert card.weights == sha256_file(out / "model" / "model.safetensors")
    assert EmbeddingCard.from_json((out / "model" / CARD).read_bytes()) == card
    assert tune(recipe(place, epochs=30), start, pairs, out, corpus=corpus, test=test) == card, "it is read back"
    with pytest.raises(BadInput, match="holds the finished run embedding-"):
        tune(recipe(place, epochs=29), start, pairs, out, corpus=corpus, test=test)


def test_negatives_of_the_rows_come_before_mined_ones(place, tmp_path, monkeypatch):
    """Documents are numbered as they come: 0 lift, 1 warmth, 2 tear, 3 wave. What is mined is checked by hand."""
    rows = [
        {"query": "the wing", "positive": "on lift", "negatives": ["on tear"]},
        {"query": "the heat", "positive": "on warmth"},
    ]
    pairs = load_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))
    corpus = load_corpus(write_jsonl(tmp_path / "corpus.jsonl", [{"id": "w", "text": "on wave"}]))
    embedder = Embedder.load(place / "start")
    scores = (
        embedder.encode(["the wing", "the heat"]) @ embedder.encode(["on lift", "on warmth", "on tear", "on wave"]).T
    )
    expected = {}
    for query, own in ((0, [2]), (1, [])):
        below = [at for at in range(4) if at != query and scores[query, at] <= scores[query, query]]
        expected[query] = [*own, *sorted(set(below) - set(own), key=lambda at, q=query: -scores[q, at])][:2]
    seen = {}

    def spy(indexed, negatives, relevant):
        seen.update({query: list(row) for (query, _), row in zip(indexed, negatives, strict=True)})
        return contrastive_batch(indexed, negatives, relevant)

    monkeypatch.setattr("ascent.customize.embeddings.tune.contrastive_batch", spy)
    one_step = recipe(place, batch_size=2, epochs=1, margin=0, negatives=2)
    tune(one_step, place / "start", pairs, tmp_path / "run", corpus=corpus)
    assert seen == expected and seen[0][0] == 2


def test_test_queries_in_the_pairs_are_refused(place, tmp_path):
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    leaked = json.loads((place / "queries.jsonl").read_text().splitlines()[0])["query"]
    rows.insert(2, {"query": leaked.upper(), "positive": "on lift"})
    pairs = load_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))
    test = load_retrieval_set(place / "queries.jsonl", place / "corpus.jsonl", place / "qrels.jsonl")
    with pytest.raises(BadData, match="the score would measure memory") as caught:
        tune(recipe(place), place / "start", pairs, tmp_path / "run", test=test)
    assert caught.value.line == 3
    one = load_pairs(write_jsonl(tmp_path / "one.jsonl", rows[:1]))
    with pytest.raises(BadInput, match="two different positives"):
        tune(recipe(place), place / "start", one, tmp_path / "run")


def test_a_recipe_file_is_checked_and_its_paths_are_relative_to_it(place):
    (place / "r.yaml").write_text("model: start\ndata: pairs.jsonl\ncorpus: corpus.jsonl\noptim: {lr: 1e-4}\n")
    loaded = load_embedding_recipe(place / "r.yaml")
    assert (loaded.model, loaded.data, loaded.corpus) == (
        str(place / "start"),
        place / "pairs.jsonl",
        place / "corpus.jsonl",
    )
    (place / "r.yaml").write_text("model: start\ndata: pairs.jsonl\ntemprature: 0.1\n")
    with pytest.raises(BadRecipe, match="did you mean 'temperature'") as caught:
        load_embedding_recipe(place / "r.yaml")
    assert caught.value.line == 3
