"""Data files for retrieval, and the tiny real embedder and data that all embedding tests share."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ascent.customize.embeddings.data import load_corpus, load_pairs, load_queries, load_retrieval_set
from ascent.records.errors import BadData

ASKED = ["wing", "flow", "heat", "shock", "plate", "shell", "noise", "crack"]
TOLD = ["lift", "stream", "warmth", "wave", "panel", "hull", "sound", "tear"]
"""What a query calls a thing and what documents call it; an untrained encoder cannot know that they are the same."""


def write_tiny_embedder(
    folder: Path,
    *,
    pooling: str = "mean",
    normalise: bool = True,
    max_tokens: int = 16,
    prompts: dict[str, str] | None = None,
) -> Path:
    """Write a random two-layer BERT with its own vocabulary in the layout that sentence-transformers 2 to 5 write."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz.:"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ASKED, *TOLD, "what", "is", "the", "of", "on"]
    vocabulary += [*letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalise
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds)
    ]
    names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {"__version__": {}, "prompts": prompts or {}},
        "1_Pooling/config.json": {"word_embedding_dimension": 32}
        | {f"pooling_mode_{name}": kind == pooling for kind, name in names.items()},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_retrieval_data(folder: Path) -> dict[str, Path]:
    """Write queries of two or three words and the one document each that says the same in other words.

    Every third combination is held out: it can only be found by having learnt what the single words mean.
    """
    things = [c for size in (2, 3) for c in itertools.combinations(range(len(ASKED)), size)]
    random.Random(0).shuffle(things)
    asked = {i: "what is the " + " ".join(ASKED[k] for k in thing) for i, thing in enumerate(things)}
    told = {i: "on " + " of ".join(TOLD[k] for k in reversed(thing)) for i, thing in enumerate(things)}
    held = [i for i in asked if i % 3 == 0]
    pairs = [{"query": asked[i], "positive": told[i]} for i in asked if i not in held]
    return {
        "pairs": write_jsonl(folder / "pairs.jsonl", pairs),
        "corpus": write_jsonl(folder / "corpus.jsonl", [{"id": f"d{i}", "text": text} for i, text in told.items()]),
        "queries": write_jsonl(folder / "queries.jsonl", [{"id": f"q{i}", "query": asked[i]} for i in held]),
        "qrels": write_jsonl(folder / "qrels.jsonl", [{"query": f"q{i}", "document": f"d{i}"} for i in held]),
    }


def test_pairs_keep_text_negatives_group_and_an_id_that_follows_the_content(tmp_path):
    rows = [
        {"query": "a?", "positive": "A", "negatives": ["B", "C"], "group": 7},
        {"query": "b?", "positive": "B"},
        {"query": "b?", "positive": "B"},
    ]
    loaded = load_pairs(write_jsonl(tmp_path / "p.jsonl", rows))
    first, second, twin = loaded
    assert (first.query, first.positive, first.negatives, first.group) == ("a?", "A", ("B", "C"), "7")
    assert twin.id.startswith(second.id) and len({row.id for row in loaded}) == 3
    moved = load_pairs(write_jsonl(tmp_path / "q.jsonl", rows[1:]))
    assert moved.rows[0].id == second.id
    assert list(loaded.lines.values()) == [1, 2, 3]


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"positive": "A"}, "query", "is missing"),
        ({"query": "a?", "positive": "  "}, "positive", "is empty"),
        ({"query": "a?", "positive": ["A"]}, "positive", "must be text, is array"),
        ({"query": "a?", "positve": "A"}, "positve", "did you mean 'positive'"),
        ({"query": "a?", "positive": "A", "negatives": "B"}, "negatives", "must be a list of texts, is string"),
        ({"query": "a?", "positive": "A", "negatives": ["B", ""]}, "negatives[1]", "must be a text that is not empty"),
        ({"query": "a?", "positive": "A", "negatives": ["A"]}, "negatives", "holds the row's own positive"),
        ({"query": "a?", "positive": "A", "id": "x"}, "id", "already used on line 1"),
        ("{", None, "malformed JSON at column"),
    ],
)
def test_a_faulty_pair_is_told_with_its_line(tmp_path, row, field, message):
    good = {"id": "x", "query": "z?", "positive": "Z"}
    with pytest.raises(BadData, match=message.replace("[", r"\[")) as caught:
        load_pairs(write_jsonl(tmp_path / "p.jsonl", [good, row]))
    assert (caught.value.line, caught.value.field) == (2, field)


def test_titles_begin_the_text_and_ids_are_needed_where_judgements_refer_to_them(tmp_path):
    corpus = load_corpus(write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "title": "T", "text": "x"}]))
    assert [(row.id, row.text) for row in corpus] == [("1", "T x")]
    with pytest.raises(BadData, match="judgements refer to rows by their ids"):
        load_queries(write_jsonl(tmp_path / "q.jsonl", [{"query": "a?"}]))


def test_judgements_may_be_a_table_and_must_name_what_is_there(tmp_path):
    queries = write_jsonl(tmp_path / "q.jsonl", [{"id": "q1", "query": "a?"}, {"id": "q2", "query": "b?"}])
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": f"d{i}", "text": str(i)} for i in range(3)])
    table = tmp_path / "qrels.tsv"
    table.write_text("query\tdocument\trelevance\nq1\td0\t2\nq1\td1\t0\nq2\td2\t0.5\n")
    test = load_retrieval_set(queries, corpus, table)
    assert test.qrels == {"q1": {"d0": 2.0, "d1": 0.0}, "q2": {"d2": 0.5}}
    rows = [{"query": "q1", "document": "d0"}, {"query": "q3", "document": "d0"}, {"query": "q1", "document": "d0"}]
    rows += [{"query": "q2", "document": "d1", "relevance": -1}, {"document": "d1"}]
    with pytest.raises(BadData) as caught:
        load_retrieval_set(queries, corpus, write_jsonl(tmp_path / "r.jsonl", rows))
    assert caught.value.line == 2 and "there is no query 'q3'" in str(caught.value)
    for part in ("line 3 [document]: document 'd0' was judged", "line 4 [relevance]", "line 5 [query]: is missing"):
        assert part in str(caught.value)
