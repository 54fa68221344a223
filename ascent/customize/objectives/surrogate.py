"""Surrogates ψ(r, A): what an online row maximises per token.

`log_ratio` is log r, r = π/π_old, as `ratio.pool` made it. At r = 1 every surrogate has the gradient A·∇ℓ, so on-policy
all rows with the same advantages take the same step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascent.customize.objectives.rows import Clip, OnlineRow

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in fp32 and far outside every clip interval; verl clamps the same


def ratio(log_ratio: Tensor) -> Tensor:
    """ρ = exp(log ρ), with the exponent clamped before exp so that no inf meets a zero."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def min_clip(log_ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """min(ρA, clip(ρ)A) (PPO, arXiv 1707.06347 Eq. 7), for A < 0 at least dual·A (arXiv 1912.09729 Eq. 5)."""
    rho = ratio(log_ratio)
    least = torch.minimum(rho * advantage, rho.clamp(clip.low, clip.high) * advantage)
    if clip.dual is None:
        return least
    return torch.where(advantage < 0, torch.maximum(least, clip.dual * advantage), least)


def policy_gradient(logp: Tensor, advantage: Tensor) -> Tensor:
    """A · log π, whose gradient is REINFORCE's (Williams 1992)."""
    return logp * advantage


def sg_clip(log_ratio: Tensor, logp: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """sg(clip(ρ))·A·log π (CISPO, arXiv 2506.13585 Eq. 4): clipped tokens keep a gradient."""
    return ratio(log_ratio).detach().clamp(clip.low, clip.high) * advantage * logp


def soft_gate(log_ratio: Tensor, advantage: Tensor, gate: tuple[float, float]) -> Tensor:
    """σ(τ(ρ−1))·4/τ·A with τ+ for A > 0 and τ− otherwise (SAPO, arXiv 2511.20347 Eq. 6); slope A at ρ = 1."""
    tau = torch.where(advantage > 0, gate[0], gate[1])
    return torch.sigmoid(tau * (ratio(log_ratio) - 1)) * 4 / tau * advantage


def surrogate(log_ratio: Tensor, logp: Tensor, advantage: Tensor, row: OnlineRow) -> Tensor:
    """ψ of a row, per token."""
    match row.surrogate:
        case "policy_gradient":
            return policy_gradient(logp, advantage)
        case "min_clip":
            return min_clip(log_ratio, advantage, row.clip)
        case "sg_clip":
            return sg_clip(log_ratio, logp, advantage, row.clip)
        case "soft_gate":
            return soft_gate(log_ratio, advantage, row.gate)
        case "plain":
            return ratio(log_ratio) * advantage


def clip_fraction(log_ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """1 where clipping removes the gradient: A > 0 above the interval or A < 0 below it."""
    rho = ratio(log_ratio)
    return (((advantage > 0) & (rho > clip.high)) | ((advantage < 0) & (rho < clip.low))).float()
