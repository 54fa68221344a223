"""Aggregation: the weight of each sequence's target tokens. Weights of a whole global batch sum to one.

They are computed before the batch is split, so micro-batching, packing and data parallelism cannot change the result
(the bug class of transformers issue 34191: a mean of means is not the global mean).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def token_mean(lengths: Sequence[int]) -> list[float]:
    """Every token counts the same: 1 / all tokens (DAPO, arXiv 2503.14476 §3.3)."""
    total = sum(lengths)
    return [1 / total] * len(lengths)


def seq_mean_token_mean(lengths: Sequence[int]) -> list[float]:
    """Every sequence counts the same, its tokens share it: 1 / (N · |y|) (GRPO, arXiv 2402.03300 Eq. 3)."""
    return [1 / (len(lengths) * length) for length in lengths]


WEIGHTS: dict[str, Callable[[Sequence[int]], list[float]]] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
}
