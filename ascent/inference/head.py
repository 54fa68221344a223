"""The one place that touches the vocabulary: hidden states in, log-prob and entropy of each target out, in fp32.

Logits of the whole batch are never stored: rows go through in chunks that fit the processor's cache. Only the positions
given reach the head.

With bf16 weights a logit is rounded to 8 bits, 0.03 at |logit| 8, which is more than a PPO ratio can bear. The target's
own logit is therefore computed again in fp32 and put back before the softmax: the dominant term of a confident
prediction is exact and the rounding of the rest averages out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ascent.inference import native

Buffers = tuple[Tensor, Tensor, Tensor]
CHUNK = 128  # rows: 128 × 49,152 fp32 logits are 25 MB, about one L3 cache
NATIVE_CHUNK = 256  # the same in bf16


class _LogpEntropy(torch.autograd.Function):
    """d logp_t/d z = onehot − p;  d H/d z = −p (log p + H);  both divided by the temperature.

    The gradient of a row's log-prob in its hidden state, (onehot − p)·W, depends on nothing that comes later but one
    factor. Where the head is frozen it is therefore taken in the forward pass, while the row's logits are at hand, and
    the backward pass computes no logits again, unless a loss asks for the entropy's gradient too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        temperature: float,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        early = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        whole = native.fits(hidden_MD, weight_VD) and len(weight_VD) % native.LANES == 0
        measure = _native_chunks if whole else _chunks_in_fp32
        logp, entropy, slope_MD = measure(hidden_MD, weight_VD, targets_M, temperature, want_entropy, early)
        ctx.save_for_backward(hidden_MD, weight_VD, targets_M, entropy, slope_MD)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, entropy, slope_MD = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros_like(entropy)
        if slope_MD is not None and grad_entropy is None:
            factor_M = grad_logp.div(-ctx.temperature)
            return (slope_MD * factor_M[:, None]).to(hidden.dtype), None, None, None, None
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        buffers = _buffers(hidden, weight)
        for rows in _chunks(len(hidden)):
            logp_cV = target_log_softmax(hidden[rows], weight, targets[rows], ctx.temperature, buffers)
            p_cV = torch.exp(logp_cV, out=buffers[1][: len(logp_cV)])
            factor = -grad_logp[rows, None]
            if grad_entropy is not None:
                logp_cV.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None]).add_(factor)
                grad = p_cV.mul_(logp_cV)
            else:
                grad = p_cV.mul_(factor)
            grad.scatter_add_(1, targets[rows, None], grad_logp[rows, None])
            grad = grad.div_(ctx.temperature)
            grad_hidden[rows] = grad.to(hidden.dtype) @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows].float()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks_in_fp32(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float, want_entropy: bool, want_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs and entropies [M], and the gradient of each row's negative log-prob in its hidden state [M, D]."""
    logp = torch.empty(len(hidden_MD), dtype=torch.float32, device=hidden_MD.device)
    entropy = torch.zeros_like(logp)
    slope_MD = torch.empty_like(hidden_MD) if want_slope else None
    buffers = _buffers(hidden_MD, weight_VD)
    for rows in _chunks(len(hidden_MD)):
        logp_cV = target_log_softmax(hidden_MD[rows], weight_VD, targets_M[rows], temperature, buffers)
        logp[rows] = logp_cV.gather(1, targets_M[rows, None]).squeeze(1)
        if not (want_entropy or want_slope):
            continue
        p_cV = torch.exp(logp_cV, out=buffers[1][: len(logp_cV)])
        if want_entropy:
            entropy[rows] = -(p_cV[:, None] @ logp_cV[:, :, None]).flatten()
        if slope_MD is not None:
            p_cV[torch.arange(len(p_cV)), targets_M[rows]] -= 1
            slope_MD[rows] = buffers[0][: len(p_cV)].copy_(p_cV) @ weight_VD
    return logp, entropy, slope_MD


def _native_chunks(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float, want_entropy: bool, want_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same by a kernel that works on the logits where they lie."""
    logp = torch.empty(len(hidden_MD), dtype=torch.float32)
    entropy = torch.zeros_like(logp)
    slope_MD = torch.empty_like(hidden_MD) if want_slope else None
    buffer = hidden_MD.new_empty(min(NATIVE_CHUNK, len(hidden_MD)), len(weight_VD))
    for rows in _chunks(len(hidden_MD), NATIVE_CHUNK):
        logits_cV = torch.mm(hidden_MD[rows], weight_VD.T, out=buffer[: rows.stop - rows.start])
        exact_c = _exact_logit(hidden_MD[rows], weight_VD, targets_M[rows])
        logp[rows], found = native.target_logp(
            logits_cV, targets_M[rows], exact_c, temperature, entropy=want_entropy, slope=want_slope
        )
        if found is not None:
            entropy[rows] = found
        if slope_MD is not None:
            torch.mm(logits_cV, weight_VD, out=slope_MD[rows])
    return logp, entropy, slope_MD


def logp_and_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, *, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (logp_M, entropy_M) in fp32 of `targets_M` under softmax(hidden · weightᵀ / temperature).

    The trainer must pass the sampling temperature, or its ratios to the sampler are wrong from the first token.
    With `entropy=False` the second result is zeros and costs nothing.
    """
    spare = -len(targets_M) % 32  # matrix products are compiled per shape: few shapes serve all batches
    hidden, targets = F.pad(hidden_MD, (0, 0, 0, spare)), F.pad(targets_M, (0, spare))
    logp, ent = _LogpEntropy.apply(hidden, weight_VD, targets, temperature, entropy)  # type: ignore[no-untyped-call]
    return logp[: len(targets_M)], ent[: len(targets_M)]


def target_log_softmax(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float, buffers: Buffers | None = None
) -> Tensor:
    """Return log-softmax [M, V] in fp32 in which each row's target logit was computed in fp32.

    With `buffers` the result lies in the last of them.
    """
    low, wide, result = (buffer[: len(hidden_MD)] for buffer in buffers or _buffers(hidden_MD, weight_VD))
    logits_MV = wide.copy_(torch.mm(hidden_MD, weight_VD.T, out=low))
    if hidden_MD.dtype != torch.float32:
        logits_MV.scatter_(1, targets_M[:, None], _exact_logit(hidden_MD, weight_VD, targets_M)[:, None])
    if temperature != 1.0:
        logits_MV.div_(temperature)
    logp_MV: Tensor = torch.ops.aten._log_softmax.out(logits_MV, -1, False, out=result)
    return logp_MV


def _buffers(hidden_MD: Tensor, weight_VD: Tensor) -> Buffers:
    """Logits of one chunk in the compute type and, twice, in fp32: fresh memory costs a page fault every 4 KB."""
    shape = (min(CHUNK, len(hidden_MD)), len(weight_VD))
    wide = hidden_MD.new_empty((2, *shape), dtype=torch.float32)
    return hidden_MD.new_empty(shape), wide[0], wide[1]


def exact_logp(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, rounded_M: Tensor, lse_M: Tensor, temperature: float
) -> Tensor:
    """The same log-probs as `target_log_softmax` gives the targets, from logits that are already at hand.

    Replaces the target's share of the normaliser: log(e^lse - e^rounded + e^exact), written around `lse_M`. Both
    `rounded_M` and `lse_M` are those of the logits divided by the temperature.
    """
    if hidden_MD.dtype == torch.float32:
        return rounded_M - lse_M
    exact_M = _exact_logit(hidden_MD, weight_VD, targets_M) / temperature
    share = (exact_M - lse_M).exp() - (rounded_M - lse_M).exp()
    return exact_M - lse_M - torch.log1p(share.clamp(min=-1 + 1e-6))


@dataclass(frozen=True)
class Distance:
    """How far the student's distribution S is from the teacher's T.

    forward KL(T‖S), reverse KL(S‖T), or jsd: β·KL(T‖M) + (1−β)·KL(S‖M) with M = β·T + (1−β)·S (GKD, arXiv 2306.13649
    Eq. 1); divided by β or 1−β, its limits are the two KLs.
    """

    kind: Literal["forward", "reverse", "jsd"]
    beta: float = 0.5


def divergence(
    student_MD: Tensor, student_VD: Tensor, teacher_MW: Tensor, teacher_VW: Tensor, distance: Distance
) -> Tensor:
    """Return D(T, S) [M] over the whole vocabulary in fp32; the backward pass computes each chunk again."""
    parts = [
        checkpoint(_distance, student_MD[c], student_VD, teacher_MW[c], teacher_VW, distance, use_reentrant=False)
        for c in _chunks(len(student_MD))
    ]
    return torch.cat(parts) if parts else student_MD.new_zeros(0, dtype=torch.float32)


def _distance(
    student_cD: Tensor, student_VD: Tensor, teacher_cW: Tensor, teacher_VW: Tensor, distance: Distance
) -> Tensor:
    s = torch.log_softmax((student_cD @ student_VD.T).float(), -1)
    with torch.no_grad():
        t = torch.log_softmax((teacher_cW @ teacher_VW.T).float(), -1)
    if distance.kind == "forward":
        return _kl(t, s)
    if distance.kind == "reverse":
        return _kl(s, t)
    beta = torch.tensor(distance.beta, device=s.device)
    mixture = torch.logaddexp(t + beta.log(), s + torch.log1p(-beta))
    return beta * _kl(t, mixture) + (1 - beta) * _kl(s, mixture)


def _kl(p_cV: Tensor, q_cV: Tensor) -> Tensor:
    """KL(p‖q) of log-probabilities."""
    return (p_cV.exp() * (p_cV - q_cV)).sum(-1)


def _exact_logit(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    return (hidden_MD.float() * weight_VD[targets_M].float()).sum(-1)


def _chunks(count: int, size: int = CHUNK) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
