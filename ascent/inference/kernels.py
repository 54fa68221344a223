"""The decoder's small operations with hand-written backward passes: few passes over memory, nothing kept twice.

Between matrix products a processor waits for memory, so what counts here is how often a [T, ...] tensor is read or
written. Each class states its derivative; letters as in `decoder.py`. Where the kernels of `native` fit they do the
same in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference import native


class _AddNorm(torch.autograd.Function):
    """s = x + a, y = ŝ·w, ŝ = s·r, r = (mean s² + ε)^-½;  ds = r·(g·w − ŝ·mean(g·w·ŝ)) + gradient of s,  dw = Σ_T g·ŝ.

    The gradients of x and a are ds.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, added: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, y, scale = _normed(x_TD, added, weight_D, eps)
        ctx.save_for_backward(total, weight_D, scale)
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(
        ctx: Any, passed: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return passed, passed, None, None
        slope = _norm_slope(grad, passed, *ctx.saved_tensors)
        return slope, slope, _weight_slope(ctx.needs_input_grad[2], grad, *ctx.saved_tensors), None


class _RmsNorm(torch.autograd.Function):
    """`_AddNorm` without anything added."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        _, y, scale = _normed(x_TD, None, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        slope = _norm_slope(grad, None, *ctx.saved_tensors)
        return slope, _weight_slope(ctx.needs_input_grad[1], grad, *ctx.saved_tensors), None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in fp32, in x's dtype."""
    normed: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return normed


def add_norm(x_TD: Tensor, added: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + added (x itself without) and its `rms_norm`: the sum is read once for both."""
    if added is None:
        return x_TD, rms_norm(x_TD, weight_D, eps)
    total, normed = _AddNorm.apply(x_TD, added, weight_D, eps)  # type: ignore[no-untyped-call]
    return total, normed


def _normed(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm, and 1/rms with a last size of 1."""
    if native.fits(x, added, weight):
        total, y, scale = native.add_norm(x, added, weight, eps)
        return total, y, scale.unsqueeze(-1)
    total = x if added is None else x + added
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=wide)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return total, (total * scale).to(x.dtype).mul_(weight), scale


def _norm_slope(grad: Tensor, passed: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if native.fits(grad, passed, total, weight):
        return native.add_norm_slope(grad, passed, total, weight, scale)
    straight = total * scale
    slope = torch.mul(grad, weight).to(scale.dtype)
    along = torch.linalg.vecdot(slope, straight).div_(total.shape[-1]).unsqueeze(-1)
    slope = slope.addcmul_(straight, along, value=-1).mul_(scale).to(total.dtype)
    return slope if passed is None else slope.add_(passed)


def _weight_slope(wanted: bool, grad: Tensor, total: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
    return (grad * (total * scale)).flatten(0, -2).sum(0).to(weight.dtype) if wanted else None


class _Rotate(torch.autograd.Function):
    """A rotation; its derivative is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _turned(x, cos, sin, heads, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, ctx.heads, back=True), None, None, None


def rotate(x_TNE: Tensor, rope: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of the first heads, in Hugging Face's half-split layout."""
    turned: Tensor = _Rotate.apply(x_TNE, *rope, heads)  # type: ignore[no-untyped-call]
    return turned


def _turned(x: Tensor, cos: Tensor, sin: Tensor, heads: int, *, back: bool) -> Tensor:
    if native.fits(x, cos, sin):
        return native.rotate(x, cos, sin, heads, back=back)
    half, sign = x.shape[-1] // 2, -1 if back else 1
    first, second = x[:, :heads, :half], x[:, :heads, half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[:, :heads, :half])
    torch.mul(second, cos, out=out[:, :heads, half:])
    out[:, :heads, :half].addcmul_(second, sin, value=-sign)
    out[:, :heads, half:].addcmul_(first, sin, value=sign)
    out[:, heads:] = x[:, heads:]
    return out


class _SwiGlu(torch.autograd.Function):
    """y = silu(a)·b for [.., 2F] = [a, b];  da = g·b·silu'(a),  db = g·silu(a); silu(a) is computed again."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        if native.fits(both) and both.shape[-1] % (2 * native.LANES) == 0:
            return native.swiglu(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        if native.fits(both, grad):
            return native.swiglu_slope(both, grad)
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
