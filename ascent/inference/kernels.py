"""The decoder's small operations with hand-written backward passes: few passes over memory, nothing kept twice.

Between matrix products a processor waits for memory, so what counts here is how often a [T, ...] tensor is read or
written. Each class states its derivative; letters as in `decoder.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _RmsNorm(torch.autograd.Function):
    """y = x̂·w, x̂ = x·r, r = (mean x² + ε)^-½;  dx = r·(g·w − x̂·mean(g·w·x̂)),  dw = Σ_T g·x̂."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        length = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=wide)
        scale = length.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale)
        normed: Tensor = (x_TD * scale).to(x_TD.dtype).mul_(weight_D)
        return normed

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        straight = x * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_TD * straight).flatten(0, -2).sum(0).to(weight.dtype)
        grad = torch.mul(grad_TD, weight).to(scale.dtype)
        along = torch.linalg.vecdot(grad, straight).div_(x.shape[-1]).unsqueeze(-1)
        return grad.addcmul_(straight, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in fp32, in x's dtype."""
    normed: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return normed


class _Rotate(torch.autograd.Function):
    """A rotation; its derivative is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout of Hugging Face."""
    turned: Tensor = _Rotate.apply(x, *rope)  # type: ignore[no-untyped-call]
    return turned


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half])
    torch.mul(second, cos, out=out[..., half:])
    out[..., :half].addcmul_(second, sin, value=-1)
    out[..., half:].addcmul_(first, sin)
    return out


class _SwiGlu(torch.autograd.Function):
    """y = silu(a)·b for [.., 2F] = [a, b];  da = g·b·silu'(a),  db = g·silu(a); silu(a) is computed again."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        ctx.save_for_backward(both)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        to_gate, to_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return out


def swiglu(both: Tensor) -> Tensor:
    """The gate of SwiGLU (Shazeer 2020, arXiv 2002.05202) over [.., 2F]: silu of the first half times the second."""
    gated: Tensor = _SwiGlu.apply(both)  # type: ignore[no-untyped-call]
    return gated


class _Adapted(torch.autograd.Function):
    """y = x·Wᵀ + (x·Aᵀ)·Bᵀ on a frozen W;  dx = g·W + (g·B)·A,  dA = (g·B)ᵀ·x,  dB = gᵀ·(x·Aᵀ)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias)
        inner = F.linear(flat, down)
        y.addmm_(inner, up.T)
        ctx.save_for_backward(x, weight, down, up, inner)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        x, weight, down, up, inner = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        to_inner = g @ up
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ weight).addmm_(to_inner, down).view(x.shape)
        return grad_x, None, None, to_inner.T @ x.reshape(-1, x.shape[-1]), g.T @ inner


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """A frozen linear layer with a low-rank update: W [out, in], A = `down` [R, in], B = `up` [out, R], scale in B."""
    y: Tensor = _Adapted.apply(x, weight, bias, down, up)  # type: ignore[no-untyped-call]
    return y
