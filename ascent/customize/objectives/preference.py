"""Preference losses on sequence scores. Rows choose the score's norm, the link, the NLL share and the label noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.customize.batch import TokenBatch


def sequence_scores(logp_M: Tensor, reference_M: Tensor, batch: TokenBatch, norm: str) -> Tensor:
    """s(x, y) [N] = Σ_t (ℓ_t − ℓ_ref,t), divided by |y| when `norm` is "mean"."""
    total = torch.zeros(batch.sequences, dtype=logp_M.dtype, device=logp_M.device)
    total = total.index_add(0, batch.sequence_M, logp_M - reference_M)
    if norm == "sum":
        return total
    return total / sequence_lengths(batch).to(logp_M.dtype)


def sequence_lengths(batch: TokenBatch) -> Tensor:
    """Target tokens per sequence [N]."""
    return torch.bincount(batch.sequence_M, minlength=batch.sequences)


def logistic(margin: Tensor) -> Tensor:
    """−log σ(m) (DPO, arXiv 2305.18290 Eq. 7)."""
    return -F.logsigmoid(margin)


LINKS: dict[str, Callable[[Tensor], Tensor]] = {"logistic": logistic}


def pair_loss(margin: Tensor, link: str, label_smoothing: float) -> Tensor:
    """(1−ε)·link(m) + ε·link(−m): with ε the share of flipped labels (cDPO, Mitchell 2023, Eq. 3)."""
    loss = LINKS[link](margin)
    return loss if label_smoothing == 0 else (1 - label_smoothing) * loss + label_smoothing * LINKS[link](-margin)
