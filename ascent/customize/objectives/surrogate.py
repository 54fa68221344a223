"""Surrogates ψ(log ρ, A): what an online row maximises per token. Clip bounds are absolute ratio intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """The interval in which the ratio ρ = π/π_old moves freely, for example [0.8, 1.28]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(f"a clip interval is absolute and contains 1, got [{self.low}, {self.high}]")


LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in fp32 and far outside every clip interval; verl clamps the same


def ratio(log_ratio: Tensor) -> Tensor:
    """ρ = exp(log ρ), with the exponent clamped before exp so that no inf meets a zero."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def min_clip(log_ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """min(ρA, clip(ρ)A) (PPO, arXiv 1707.06347 Eq. 7)."""
    rho = ratio(log_ratio)
    return torch.minimum(rho * advantage, rho.clamp(clip.low, clip.high) * advantage)


def policy_gradient(log_ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """A · log π, whose gradient is REINFORCE's (Williams 1992); the constant log π_old does not matter."""
    return log_ratio * advantage


SURROGATES: dict[str, Callable[[Tensor, Tensor, Clip], Tensor]] = {
    "min_clip": min_clip,
    "policy_gradient": policy_gradient,
}


def clip_fraction(log_ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """1 where clipping removes the gradient: A > 0 above the interval or A < 0 below it."""
    rho = ratio(log_ratio)
    return (((advantage > 0) & (rho > clip.high)) | ((advantage < 0) & (rho < clip.low))).float()
