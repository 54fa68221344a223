from __future__ import annotations

import math

import numpy as np
import torch

from ascent.customize.embeddings.negatives import mine
from ascent.customize.embeddings.objective import contrastive_batch, info_nce


def test_loss_is_the_formula_written_out():
    """−log of the softmax share of the own positive, over the columns that are not excluded, in plain Python."""
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 5))
    targets, excluded = torch.tensor([0, 3, 1]), torch.zeros(3, 5, dtype=torch.bool)
    excluded[0, 4] = excluded[2, 0] = excluded[2, 3] = True
    terms = []
    for i in range(3):
        scores = [sum(a * b for a, b in zip(queries[i].tolist(), d, strict=True)) / 0.7 for d in documents.tolist()]
        total = sum(math.exp(score) for c, score in enumerate(scores) if not excluded[i, c])
        terms.append(-math.log(math.exp(scores[targets[i]]) / total))
    loss, right = info_nce(queries, documents, targets, excluded, 0.7)
    assert math.isclose(loss.item(), sum(terms) / 3, rel_tol=1e-12)
    scores = (queries @ documents.T).masked_fill(excluded, -math.inf).tolist()
    assert right == sum(row[target] == max(row) for row, target in zip(scores, targets.tolist(), strict=True))


def test_gradient_pulls_to_the_positive_and_pushes_from_the_expected_negative():
    """∂loss/∂q_i = (Σ_c p_ic d_c − d_t(i)) / (N τ), with p the softmax: derived from the formula."""
    generator = torch.Generator().manual_seed(1)
    queries, documents = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (4, 7))
    targets, excluded = torch.tensor([2, 0, 6, 6]), torch.zeros(4, 7, dtype=torch.bool)
    excluded[1, 6] = True
    queries.requires_grad_()
    info_nce(queries, documents, targets, excluded, 0.5)[0].backward()
    shares = torch.exp(queries.detach() @ documents.T / 0.5).masked_fill(excluded, 0)
    shares = shares / shares.sum(1, keepdim=True)
    torch.testing.assert_close(queries.grad, (shares @ documents - documents[targets]) / (4 * 0.5))


def test_equal_scores_cost_the_logarithm_of_the_columns():
    loss, _ = info_nce(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1]), torch.zeros(2, 5, dtype=bool), 0.1)
    assert math.isclose(loss.item(), math.log(5), rel_tol=1e-6)


def test_a_positive_is_never_its_own_or_its_querys_negative():
    """Query 7 is answered by 1 and 2, query 8 by 1: their shared document is one column, the other one is excluded."""
    batch = contrastive_batch([(7, 1), (7, 2), (8, 1), (9, 3)], [[5], [4], [], [2]], {7: {1, 2}, 8: {1}, 9: {3}})
    assert batch.queries == (7, 7, 8, 9)
    assert batch.documents == (1, 2, 3, 5, 4)
    assert batch.targets_N.tolist() == [0, 1, 0, 2]
    assert batch.excluded_NC.nonzero().tolist() == [[0, 1], [1, 0]]


def test_a_repeated_positive_changes_no_loss():
    """Two queries with one answer: each row's loss is what it is in a batch where the answer occurs once."""
    vectors = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(2)), dim=1)
    relevant = {0: {0}, 1: {0}, 2: {1}}
    both = contrastive_batch([(0, 0), (1, 0), (2, 1)], [[], [], []], relevant)
    documents = vectors[3:][list(both.documents)]
    together, _ = info_nce(vectors[:3], documents, both.targets_N, both.excluded_NC, 0.1)
    alone = []
    for query, positive in ((0, 0), (1, 0), (2, 1)):
        other = (2, 1) if query != 2 else (0, 0)
        batch = contrastive_batch([(query, positive), other], [[], []], relevant)
        columns = vectors[3:][list(batch.documents)]
        alone.append(info_nce(vectors[[query]], columns, batch.targets_N[:1], batch.excluded_NC[:1], 0.1)[0])
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_mined_negatives_lie_below_the_margin_and_are_not_known_answers():
    """One query along x, documents by their cosine. The positive has 0.8: with a margin of 10 % only ≤ 0.72 counts."""
    cosines = [0.99, 0.8, 0.73, 0.71, 0.95, 0.5, 0.6]
    documents = np.array([[c, math.sqrt(1 - c * c)] for c in cosines], dtype=np.float32)
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    assert mine(query, documents, [(0, 1)], {0: {1, 4}}, count=2, margin=0.1) == [[3, 6]]
    assert mine(query, documents, [(0, 1)], {0: {1, 3}}, count=9, margin=0.1) == [[6, 5]]
    assert mine(query, documents, [(0, 1)], {0: {1}}, count=1, margin=0.0) == [[2]]
    assert mine(-query, documents, [(0, 1)], {0: {1}}, count=9, margin=0.1) == [[4, 0]], "−0.8 − 0.08 is the limit"


def test_mining_agrees_with_a_full_sort():
    draw = np.random.default_rng(0)
    queries, documents = (draw.normal(size=(n, 8)).astype(np.float32) for n in (300, 90))
    pairs = [(i % 50, int(draw.integers(90))) for i in range(300)]
    relevant = {query: {p for q, p in pairs if q == query} for query in range(50)}
    vectors = queries[[query for query, _ in pairs]]
    found = mine(vectors, documents, pairs, relevant, count=5, margin=0.2)
    for (query, positive), vector, negatives in zip(pairs, vectors, found, strict=True):
        scores = documents @ vector
        limit = scores[positive] - 0.2 * abs(scores[positive])
        order = sorted(range(90), key=lambda at: -scores[at])
        assert negatives == [at for at in order if scores[at] <= limit and at not in relevant[query]][:5]
