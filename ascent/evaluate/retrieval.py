"""How well a ranking of documents answers queries: recall, reciprocal rank and nDCG, as a report like any other.

A query is one item of the report, so intervals, clusters by group and paired tests between two embedders are those of
`ascent.evaluate.statistics`: `compare(before, after, "ndcg@10")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from ascent.evaluate.suite import estimate
from ascent.records import DataSource, Episode, Message, Report, Score, Unscored, digest
from ascent.records.errors import BadInput, UnknownName

Floats = npt.NDArray[np.float32]
Qrels = Mapping[str, Mapping[str, float]]
"""Query id → document id → graded relevance; above 0 is relevant, and what is not named has 0."""

_BLOCK = 256
"""Queries scored at once."""


def rank(queries_QD: Floats, documents_CD: Floats, documents: Sequence[str], k: int) -> list[tuple[str, ...]]:
    """Return, for each query vector, the ids of the k documents with the largest inner product, best first.

    Exact: every document is scored. Equal scores keep the order of the documents.
    """
    found = []
    for start in range(0, len(queries_QD), _BLOCK):
        scores_BC = queries_QD[start : start + _BLOCK] @ documents_CD.T
        found += [tuple(documents[at] for at in top(row, k)) for row in scores_BC]
    return found


def top(scores_C: Floats, k: int) -> list[int]:
    """Return the positions of the k largest scores, largest first; of equal ones the earlier."""
    k = min(k, len(scores_C))
    if k == 0:
        return []
    least = np.partition(scores_C, len(scores_C) - k)[len(scores_C) - k]
    candidates = np.flatnonzero(scores_C >= least)
    order = np.argsort(-scores_C[candidates], kind="stable")[:k]
    return [int(at) for at in candidates[order]]


def recall(ranked: Sequence[str], relevance: Mapping[str, float], k: int) -> float:
    """Return the share of the relevant documents that are among the first k.

    A query with more than k relevant documents cannot reach 1.
    """
    relevant = {name for name, grade in relevance.items() if grade > 0}
    return len(relevant.intersection(ranked[:k])) / len(relevant)


def reciprocal_rank(ranked: Sequence[str], relevance: Mapping[str, float], k: int) -> float:
    """Return 1 / rank of the first relevant document, or 0 when it is not among the first k; its mean is MRR@k."""
    return next((1 / place for place, name in enumerate(ranked[:k], 1) if relevance.get(name, 0) > 0), 0.0)


def ndcg(ranked: Sequence[str], relevance: Mapping[str, float], k: int) -> float:
    """Return the normalised discounted cumulated gain at k (Järvelin and Kekäläinen 2002, ACM TOIS 20:422, section 3).

    DCG = Σ_{i ≤ k} grade_i / log2(i + 1), divided by the DCG of the best possible ranking. The gain is the grade
    itself; the discount begins at rank 2, as in trec_eval, where the paper's own begins at the logarithm's base.
    """
    gains = [relevance.get(name, 0.0) for name in ranked[:k]]
    ideal = sorted((grade for grade in relevance.values() if grade > 0), reverse=True)[:k]
    return _dcg(gains) / _dcg(ideal)


METRICS: Mapping[str, Callable[[Sequence[str], Mapping[str, float], int], float]] = {
    "ndcg": ndcg,
    "recall": recall,
    "mrr": reciprocal_rank,
}


def retrieval_report(
    queries: Mapping[str, str],
    ranked: Mapping[str, Sequence[str]],
    qrels: Qrels,
    *,
    model: str,
    data: DataSource,
    stage: str = "retrieval",
    metrics: Sequence[str] = ("ndcg@10", "recall@10", "mrr@10"),
    groups: Mapping[str, str] | None = None,
    seconds: float = 0.0,
) -> Report:
    """Return the report of one ranking: each metric for each query, and means with their intervals.

    A query without a relevant document says nothing about the ranking; it is in the report as not applicable.

    Args:
        queries: query id → text.
        ranked: query id → document ids, best first, at least as many as the largest k.
        qrels: the judgements.
        model: what ranked, for the report.
        data: the judgements' file; two reports are compared only when it is the same.
        stage: what was measured, for the report.
        metrics: `ndcg@k`, `recall@k` or `mrr@k`.
        groups: query id → what it belongs to; intervals and tests are then clustered.
        seconds: how long the ranking took.

    Raises:
        UnknownName: no such metric.
        BadInput: a query was not ranked.
    """
    wanted = {name: _parse(name) for name in metrics}
    items = []
    for name, text in queries.items():
        if name not in ranked:
            raise BadInput(f"query {name!r} has no ranking; rank every query that is to be measured")
        relevance = qrels.get(name, {})
        known = any(grade > 0 for grade in relevance.values())
        scores = tuple(
            Score(name=metric, value=METRICS[kind](ranked[name], relevance, k))
            if known
            else Score(name=metric, unscored=Unscored.not_applicable, reason="no document is judged relevant")
            for metric, (kind, k) in wanted.items()
        )
        asked = (Message(role="user", content=text),)
        items.append(Episode(task_id=name, model=model, messages=asked, text="\n".join(ranked[name]), scores=scores))
    report = Report(
        id="",
        model=model,
        stage=stage,
        data=data,
        metrics={metric: estimate(metric, items, groups) for metric in wanted},
        items=tuple(items),
        groups=dict(groups or {}),
    )
    return report.model_copy(
        update={
            "id": digest(report.model_dump(mode="json"))[:16],
            "seconds": seconds,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def _parse(metric: str) -> tuple[str, int]:
    kind, _, k = metric.partition("@")
    if kind not in METRICS or not k.isdigit() or int(k) < 1:
        raise UnknownName("retrieval metric", metric, [f"{name}@10" for name in METRICS])
    return kind, int(k)


def _dcg(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))
