from __future__ import annotations

import math

import numpy as np
import pytest

from ascent.evaluate.retrieval import ndcg, rank, recall, reciprocal_rank, retrieval_report, top
from ascent.evaluate.statistics import clustered_bootstrap, compare, paired_bootstrap
from ascent.records import DataSource
from ascent.records.errors import BadInput, UnknownName

DATA = DataSource(name="qrels", path="qrels.jsonl", rows=3, sha256="0" * 64)


def test_ndcg_equals_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for k in (1, 3, 10, 50):
        for _ in range(20):
            grades, scores = draw.integers(0, 4, 30).astype(float), draw.permutation(30) / 30
            grades[0] = max(grades[0], 1)
            ranked = [str(at) for at in np.argsort(-scores)]
            relevance = {str(at): grade for at, grade in enumerate(grades)}
            expected = metrics.ndcg_score(grades[None], scores[None], k=k)
            assert math.isclose(ndcg(ranked, relevance, k), expected, rel_tol=1e-9)


def test_metrics_on_an_example_by_hand():
    """Ranks: x (0), a (3), y (not judged), b (1); c (2) was not found.

    DCG@4 = 3/log2(3) + 1/log2(5), ideal = 3/log2(2) + 2/log2(3) + 1/log2(4).
    """
    ranked, relevance = ["x", "a", "y", "b"], {"a": 3, "b": 1, "c": 2, "x": 0}
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert math.isclose(ndcg(ranked, relevance, 4), (3 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert math.isclose(ndcg(ranked, relevance, 2), 3 / math.log2(3) / (3 + 2 / math.log2(3)))
    assert [recall(ranked, relevance, k) for k in (1, 2, 4)] == [0, 1 / 3, 2 / 3]
    assert [reciprocal_rank(ranked, relevance, k) for k in (1, 2, 4)] == [0, 1 / 2, 1 / 2]
    assert ndcg(["a", "c", "b"], relevance, 10) == 1


def test_ranking_is_the_full_sort_and_ties_keep_the_order_of_documents():
    draw = np.random.default_rng(1)
    queries, documents = (draw.normal(size=(n, 5)).astype(np.float32) for n in (600, 40))
    names = [f"d{at}" for at in range(40)]
    expected = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :7]
    assert rank(queries, documents, names, 7) == [tuple(names[at] for at in row) for row in expected]
    assert top(np.array([1, 3, 2, 3, 3, 0], dtype=np.float32), 2) == [1, 3]
    assert top(np.array([1, 3, 2, 3, 3, 0], dtype=np.float32), 4) == [1, 3, 4, 2]
    assert top(np.array([1, 2], dtype=np.float32), 9) == [1, 0]


def reports(groups=None):
    draw = np.random.default_rng(2)
    queries = {f"q{i}": f"text {i}" for i in range(30)}
    names = [f"d{i}" for i in range(50)]
    qrels = {query: {str(name): 1.0 for name in draw.choice(names, 3, replace=False)} for query in queries}
    worse = {query: tuple(draw.permutation(names)) for query in queries}
    better = {query: (next(iter(qrels[query])), *worse[query]) for query in queries}
    return [
        retrieval_report(queries, ranked, qrels, model=model, data=DATA, groups=groups)
        for model, ranked in (("worse", worse), ("better", better))
    ]


def test_a_report_has_means_with_bootstrap_intervals_and_can_be_compared_in_pairs():
    worse, better = reports()
    ids = sorted(worse.values("ndcg@10"))
    a, b = ([report.values("ndcg@10")[name] for name in ids] for report in (worse, better))
    estimate = better.metrics["ndcg@10"]
    mean, low, high = clustered_bootstrap(b)
    assert (estimate.n, estimate.method) == (30, "bootstrap")
    assert estimate.value == pytest.approx(mean) and (estimate.low, estimate.high) == pytest.approx((low, high))
    change = compare(worse, better, "ndcg@10")
    assert (change.difference, change.low, change.high, change.p_value) == pytest.approx(paired_bootstrap(a, b))
    assert change.low > 0 and better.metrics["mrr@10"].value == 1


def test_queries_of_one_group_are_one_cluster():
    _, plain = reports()
    _, grouped = reports({f"q{i}": f"g{i // 10}" for i in range(30)})
    assert grouped.metrics["ndcg@10"].method == "clustered-bootstrap"
    assert grouped.metrics["ndcg@10"].value == plain.metrics["ndcg@10"].value
    assert grouped.metrics["ndcg@10"].low != plain.metrics["ndcg@10"].low


def test_queries_without_an_answer_do_not_count():
    queries, ranked = {"a": "x", "b": "y", "c": "z"}, {"a": ["d"], "b": ["d"], "c": ["e"]}
    report = retrieval_report(queries, ranked, {"a": {"d": 1}, "b": {"d": 0}, "c": {"d": 1}}, model="m", data=DATA)
    estimate = report.metrics["recall@10"]
    assert (estimate.value, estimate.n, estimate.not_applicable, estimate.unscored) == (0.5, 2, 1, 0)


def test_unknown_metrics_and_missing_rankings_are_refused():
    for metric in ("ndgc@10", "ndcg", "ndcg@0", "mrr@x"):
        with pytest.raises(UnknownName, match="unknown retrieval metric"):
            retrieval_report({}, {}, {}, model="m", data=DATA, metrics=(metric,))
    with pytest.raises(BadInput, match="query 'a' has no ranking"):
        retrieval_report({"a": "x"}, {}, {}, model="m", data=DATA)
