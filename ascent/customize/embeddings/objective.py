"""InfoNCE with in-batch negatives, and the batches it is computed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ContrastiveBatch:
    """Queries and the documents that they are told apart from; both are indices into the run's texts.

    Attributes:
        queries: of length N.
        documents: of length C, each once: positives and hard negatives of all queries.
        targets_N: the column of each query's own positive.
        excluded_NC: columns left out of a query's sum, because the document answers the query too.
    """

    queries: tuple[int, ...]
    documents: tuple[int, ...]
    targets_N: Tensor
    excluded_NC: Tensor


def contrastive_batch(
    pairs: Sequence[tuple[int, int]], negatives: Sequence[Sequence[int]], relevant: Mapping[int, AbstractSet[int]]
) -> ContrastiveBatch:
    """Lay out one batch.

    A document that is positive of several pairs is one column, so it is never its own negative; any other document that
    is known to answer a query is excluded from its row. Both would be false negatives.

    Args:
        pairs: (query, positive) of each row.
        negatives: the hard negatives of each row; they are negatives of every other row too.
        relevant: query → all documents that are known to answer it.
    """
    column: dict[int, int] = {}
    for document in (*(positive for _, positive in pairs), *(text for row in negatives for text in row)):
        column.setdefault(document, len(column))
    targets_N = torch.tensor([column[positive] for _, positive in pairs])
    excluded_NC = torch.zeros(len(pairs), len(column), dtype=torch.bool)
    for row, (query, positive) in enumerate(pairs):
        for document in relevant[query] - {positive}:
            if document in column:
                excluded_NC[row, column[document]] = True
    return ContrastiveBatch(tuple(query for query, _ in pairs), tuple(column), targets_N, excluded_NC)


def info_nce(
    queries_ND: Tensor, documents_CD: Tensor, targets_N: Tensor, excluded_NC: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the mean InfoNCE loss and the number of queries whose own positive scores highest.

    loss = 1/N Σ_i −log( exp(s_i,t(i) / τ) / Σ_{c not excluded} exp(s_ic / τ) ) with s = q · d and t(i) the query's own
    positive (van den Oord et al. 2018, arXiv 1807.03748, equation 4). With other queries' positives as negatives it is
    the multiple-negatives ranking loss of Henderson et al. 2017 (arXiv 1705.00652, section 4.4), whose scale is 1/τ.
    """
    scores_NC = (queries_ND @ documents_CD.T / temperature).masked_fill(excluded_NC, -torch.inf)
    return F.cross_entropy(scores_NC, targets_N), (scores_NC.argmax(1) == targets_N).sum()
