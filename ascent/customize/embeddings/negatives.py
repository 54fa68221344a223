"""Hard negatives: the documents that the present model wrongly finds near a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from ascent.customize.embeddings.embedder import Floats
from ascent.evaluate.retrieval import top

_BLOCK = 256
"""Queries scored at once."""


def mine(
    queries_ND: Floats,
    documents_CD: Floats,
    pairs: Sequence[tuple[int, int]],
    relevant: Mapping[int, AbstractSet[int]],
    *,
    count: int,
    margin: float,
) -> list[list[int]]:
    """Return for each pair the `count` documents nearest to its query that may count as wrong, nearest first.

    Left out are documents known to answer the query, and, because corpora hold answers that nobody has marked, those
    with a score above s⁺ − margin · |s⁺|, where s⁺ is the score of the pair's own positive: the positive-aware rule
    TopK-PercPos of Moreira et al. 2024 (arXiv 2407.15831, section 4.2), whose 95 % is a margin of 0.05.

    Args:
        queries_ND: the vector of each pair's query.
        documents_CD: the vectors of all documents.
        pairs: (query, positive) as indices; the positive is a row of `documents_CD`.
        relevant: query → documents that are known to answer it.
        count: how many negatives a pair gets at most.
        margin: how far below the positive a negative must lie, as a share of the positive's score.
    """
    found = []
    for start in range(0, len(pairs), _BLOCK):
        scores_BC = queries_ND[start : start + _BLOCK] @ documents_CD.T
        for scores_C, (query, positive) in zip(scores_BC, pairs[start : start + _BLOCK], strict=True):
            limit = scores_C[positive] - margin * abs(scores_C[positive])
            scores_C[scores_C > limit] = -np.inf
            scores_C[list(relevant[query])] = -np.inf
            found.append([at for at in top(scores_C, count) if scores_C[at] > -np.inf])
    return found
