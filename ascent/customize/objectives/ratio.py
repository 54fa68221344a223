"""Ratios: how the tokens' log-ratios are pooled over a sequence, and how the rollout's mismatch is corrected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ascent.customize.batch import TokenBatch
from ascent.customize.objectives.rows import OnlineRow

USUAL_BOUNDS = {"truncate": (0.0, 2.0), "token_mask": (0.5, 5.0), "sequence_mask": (0.99, 1.01)}


def sequence_sum(x_M: Tensor, batch: TokenBatch) -> Tensor:
    """Σ_t x_t of every sequence, [N]."""
    return torch.zeros(batch.sequences, dtype=x_M.dtype, device=x_M.device).index_add(0, batch.sequence_M, x_M)


def sequence_mean(x_M: Tensor, batch: TokenBatch) -> Tensor:
    """Σ_t x_t / |y| of every sequence, [N]; 0 for a sequence without targets."""
    lengths = torch.bincount(batch.sequence_M, minlength=batch.sequences).clamp(min=1)
    return sequence_sum(x_M, batch) / lengths.to(x_M.dtype)


def pool(logp_M: Tensor, old_M: Tensor, advantage_M: Tensor, batch: TokenBatch, row: OnlineRow) -> Tensor:
    """Return log r per token, [M].

    | row.ratio | log r_t | source |
    |---|---|---|
    | token | ℓ_t − ℓ°_t | PPO |
    | sequence | mean_t (ℓ_t − ℓ°_t) | GSPO, arXiv 2507.18071 Eq. 7 |
    | sequence_token | sg(mean) + ℓ_t − sg(ℓ_t) | GSPO-token, Eq. 14 |
    | sequence_sum | Σ_t (ℓ_t − ℓ°_t) | the answer as one action |
    | geometric | mean_t of ℓ_t − ℓ°_t clipped on the side that A moves to | GMPO, arXiv 2507.20673 Eq. 4 |
    """
    log_ratio = logp_M - old_M
    if row.ratio == "token":
        return log_ratio
    if row.ratio == "sequence_sum":
        return sequence_sum(log_ratio, batch)[batch.sequence_M]
    if row.ratio == "geometric":
        low, high = math.log(row.clip.low), math.log(row.clip.high)
        log_ratio = torch.where(advantage_M > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    mean = sequence_mean(log_ratio, batch)[batch.sequence_M]
    return mean.detach() + logp_M - logp_M.detach() if row.ratio == "sequence_token" else mean


def mismatch(trainer: Sequence[Sequence[float]], sampler: Sequence[float | Sequence[float]]) -> float:
    """Mean of k3 = e^{s−t} − (s − t) − 1 over tokens, the sampler's log-prob s and the trainer's t; NaN without any."""
    terms = []
    for ours, theirs in zip(trainer, sampler, strict=True):
        assert isinstance(theirs, Sequence)
        gaps = [s - t for t, s in zip(ours, theirs, strict=True) if not math.isnan(s)]
        terms += [math.expm1(min(gap, 20.0)) - gap for gap in gaps]
    return sum(terms) / len(terms) if terms else math.nan


def corrections(trainer: Sequence[float], sampler: Sequence[float], row: OnlineRow) -> list[float]:
    """Weights c_t of one sequence that correct for a sampler whose log-probs are not the trainer's.

    With ρ_t = exp(ℓ_trainer − ℓ_sampler) and the interval [lo, hi]:

    | row.correction | c_t | source |
    |---|---|---|
    | truncate | min(ρ_t, hi) | truncated importance sampling, Ionides 2008; Yao et al. 2025 |
    | token_mask | ρ_t inside the interval, else 0 | IcePop, Ling team 2025 |
    | sequence_mask | 1 if exp(mean log ρ) is inside, else 0 for the whole sequence | Liu et al. 2025, geometric form |

    A log-prob that the sampler did not give (NaN) counts as equal to the trainer's.
    """
    low, high = row.correction_bounds or USUAL_BOUNDS[row.correction]
    gaps = [0.0 if math.isnan(s) else t - s for t, s in zip(trainer, sampler, strict=True)]
    if row.correction == "sequence_mask":
        mean = math.exp(sum(gaps) / max(1, len(gaps)))
        return [float(low <= mean <= high)] * len(gaps)
    rho = [math.exp(min(gap, 20.0)) for gap in gaps]
    if row.correction == "truncate":
        return [min(value, high) for value in rho]
    return [value if low <= value <= high else 0.0 for value in rho]
