"""Aggregation: the weight of each sequence's target tokens, one in sum over a batch (but for Dr. GRPO's constant).

They are computed before the batch is split, so micro-batching, packing and data parallelism cannot change the result
(the bug class of transformers issue 34191: a mean of means is not the global mean).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Weighting = Callable[[Sequence[int], int], list[float]]


def token_mean(lengths: Sequence[int], longest: int = 0) -> list[float]:
    """Every token counts the same: 1 / all tokens (DAPO, arXiv 2503.14476 §3.3)."""
    total = sum(lengths)
    return [1 / total] * len(lengths)


def seq_mean_token_mean(lengths: Sequence[int], longest: int = 0) -> list[float]:
    """Every sequence counts the same, its tokens share it: 1 / (N · |y|) (GRPO, arXiv 2402.03300 Eq. 3)."""
    return [1 / (len(lengths) * length) for length in lengths]


def seq_mean_token_sum(lengths: Sequence[int], longest: int) -> list[float]:
    """1 / (N · L_max): a constant instead of |y|, so that length moves nothing (Dr. GRPO, arXiv 2503.20783 §3.2).

    `longest` is the sampling limit, never the longest of a batch, or the step size would follow the batch.
    """
    return [1 / (len(lengths) * longest)] * len(lengths)


WEIGHTS: dict[str, Weighting] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
}
