"""Retrieval before and after tuning the catalogue's embedder, on queries that it was not tuned on.

Two test collections: Cranfield (1,400 abstracts, 150 queries with judgements) and a television's manual (its sections,
50 questions with the section that answers each). The queries are split once; those of training become pairs with each
document judged relevant, the others are measured before and after on the whole corpus. Documents are shared by both
parts, as in any real corpus; no query is. Hard negatives come from the pairs' own documents. Intervals and tests are
over queries. The settings were fixed before the first run.

    python benchmarks/embeddings.py DATA --json OUT.json [--set manual] [--seed 0]

DATA holds the collections' files: cranfield_cran.all.1400.xml.gz, cranfield_queries_1_150.xml,
cranfield_qrels_1_150.txt, emanual_smart_tv_remote_manual_corpus.json.gz, emanual_smart_tv_remote_50_questions.csv.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "all-minilm-l6-v2"


@dataclass(frozen=True)
class Collection:
    """Texts by id, and for each query the documents judged relevant."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, list[str]]


def cranfield(data: Path) -> Collection:
    """The Cranfield collection. Judgements number the queries by their place in the file, not by their `num`."""
    whole = gzip.decompress((data / "cranfield_cran.all.1400.xml.gz").read_bytes()).decode()
    found = re.findall(r"<docno>(.*?)</docno>.*?<text>(.*?)</text>", whole, re.DOTALL)
    documents = {name.strip(): " ".join(text.split()) for name, text in found if text.strip()}
    asked = re.findall(r"<title>(.*?)</title>", (data / "cranfield_queries_1_150.xml").read_text(), re.DOTALL)
    queries = {str(place): " ".join(text.split()) for place, text in enumerate(asked, 1)}
    relevant: dict[str, list[str]] = {}
    for line in (data / "cranfield_qrels_1_150.txt").read_text().splitlines():
        query, _, document, grade = line.split()
        if int(grade) > 0 and document in documents:
            relevant.setdefault(query, []).append(document)
    return Collection(documents, queries, relevant)


def manual(data: Path) -> Collection:
    """The manual's sections; a question's section is the one whose title ends its path."""
    sections = json.loads(gzip.decompress((data / "emanual_smart_tv_remote_manual_corpus.json.gz").read_bytes()))
    documents = {name: f"{part['title']} {' '.join(part['text'])}" for name, part in sections.items()}
    by_title = {part["title"].strip().lower(): name for name, part in sections.items()}
    queries, relevant = {}, {}
    with (data / "emanual_smart_tv_remote_50_questions.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            section = by_title.get(row["section_path"].rpartition(">")[2].strip().lower())
            if section is not None:
                queries[row["question_id"]] = row["question"]
                relevant[row["question_id"]] = [section]
    return Collection(documents, queries, relevant)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(collection: Collection, folder: Path, seed: int, **settings: Any) -> dict[str, Any]:
    """Split, tune, and return the numbers before and after."""
    from ascent.customize.data import split_by_group
    from ascent.customize.embeddings.data import load_pairs, load_queries, load_retrieval_set
    from ascent.customize.embeddings.tune import EmbeddingRecipe, tune
    from ascent.inference.pull import pull
    from ascent.inference.store import Store

    start = pull(MODEL, Store())
    asked = [{"id": name, "query": text} for name, text in collection.queries.items() if collection.relevant.get(name)]
    parts = split_by_group(load_queries(write(folder, "all", asked)), {"train": 2 / 3, "test": 1 / 3}, seed)
    corpus = write(folder, "corpus", [{"id": name, "text": text} for name, text in collection.documents.items()])
    held_out = write(folder, "queries", [{"id": query.id, "query": query.query} for query in parts["test"]])
    judged = [{"query": q.id, "document": name} for q in parts["test"] for name in collection.relevant[q.id]]
    test = load_retrieval_set(held_out, corpus, write(folder, "qrels", judged))
    learned = [
        {"query": query.query, "positive": collection.documents[name]}
        for query in parts["train"]
        for name in collection.relevant[query.id]
    ]
    pairs = load_pairs(write(folder, "pairs", learned))
    recipe = EmbeddingRecipe(model=MODEL, data=pairs.source.path, seed=seed, **settings)
    started = time.monotonic()
    card = tune(recipe, start, pairs, folder / "run", test=test)
    return {
        "documents": len(test.corpus),
        "train queries": len(parts["train"]),
        "pairs": len(pairs),
        "test queries": len(test.queries),
        "steps": card.run.steps,
        "training seconds": card.run.seconds,
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_mb": card.run.peak_rss_mb,
        "recipe": recipe.model_dump(mode="json", exclude={"data", "model"}),
        "machine": card.run.machine,
        "before": {name: [round(e.value, 4), round(e.low, 4), round(e.high, 4)] for name, e in card.before.items()},
        "after": {name: [round(e.value, 4), round(e.low, 4), round(e.high, 4)] for name, e in card.after.items()},
        "changes": [
            {"metric": c.metric, "difference": round(c.difference, 4), "low": round(c.low, 4), "high": round(c.high, 4)}
            | {"p": round(c.p_value, 4), "better": len(c.fixed), "worse": len(c.broken), "test": c.test}
            for c in card.changes
        ],
    }


def main() -> None:
    """Run one collection and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the collections' files")
    parser.add_argument("--set", choices=("cranfield", "manual"), default="cranfield")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", type=json.loads, default={}, help="settings as JSON, over those of this benchmark")
    options = parser.parse_args()
    collection = {"cranfield": cranfield, "manual": manual}[options.set](options.data)
    settings = {
        "precision": "bf16",
        "epochs": 1,
        "batch_size": 32,
        "chunk": 128,
        "optim": {"lr": 5e-5},
    } | options.recipe
    with tempfile.TemporaryDirectory() as folder:
        found = {"set": options.set, "seed": options.seed} | run(collection, Path(folder), options.seed, **settings)
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
