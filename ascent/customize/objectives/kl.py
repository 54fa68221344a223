"""KL to the reference: the value of k3 with the gradient of the reverse KL.

k3 used as a loss has the expected gradient of the *forward* KL(ref ‖ π) (mended in TRL 6503 and NeMo-RL 2506).
The term below is straight-through: its value is k3 = e^d − d − 1 with d = ℓ_ref − ℓ (Schulman 2020, low variance, never
negative), its gradient is sg(ρ)·(ℓ − ℓ_ref)·∇ℓ, whose expectation under the sampler is exactly ∇KL(π ‖ ref).
"""

from __future__ import annotations

from torch import Tensor

from ascent.customize.objectives.surrogate import LOG_RATIO_LIMIT, ratio


def k3(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """e^d − d − 1 with d = ℓ_ref − ℓ."""
    d = (reference_logp - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return d.exp() - d - 1


def reverse_kl(logp: Tensor, reference_logp: Tensor, log_ratio: Tensor) -> Tensor:
    """Per-token estimate of KL(π ‖ ref) with the right gradient; `log_ratio` is ℓ − ℓ_old."""
    carrier = ratio(log_ratio).detach() * 0.5 * (logp - reference_logp).square()
    return k3(logp, reference_logp).detach() + carrier - carrier.detach()
