"""Attention over a prefix tree: each token sees the path above its segment and its segment up to itself.

Scores live only inside one tile (a family of siblings, or a stretch of a long segment) and the backward pass computes
them again, so memory grows with the tokens and never with their square, and no mask over the whole tree exists.

Letters beside those of `decoder.py`: N siblings of L padded places, P nodes above them, b query places of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ascent.inference import native
from ascent.inference.tree import ROUND, SCORES, Family, Tree, dealt

if TYPE_CHECKING:
    from ascent.inference.decoder import DecoderConfig


Plan = Sequence[Family] | native.Schedule
STRETCH = 256  # tokens of a segment that one thread attends for at a time: long segments are shared among threads


class _TreeAttention(torch.autograd.Function):
    """softmax(q·kᵀ/√E)·v over what a node may see, tile by tile.

    Scores and weights are held in the compute type; the softmax itself and its gradient run in fp32 inside.
    """

    @staticmethod
    def forward(ctx: Any, qkv_TNE: Tensor, kv_heads: int, families: Sequence[Family]) -> Tensor:
        q_THE, k_TKE, v_TKE = parted(qkv_TNE, kv_heads)
        out_THE = torch.zeros_like(q_THE, memory_format=torch.contiguous_format)
        for family in families:
            tiles = _Tiles(family, q_THE, k_TKE, v_TKE)
            parts = [tiles.attend(begin, end) for begin, end in tiles.stretches()]
            tiles.scatter(out_THE, parts[0] if len(parts) == 1 else torch.cat(parts, 3))
        ctx.save_for_backward(qkv_TNE)
        ctx.kv_heads, ctx.families = kv_heads, families
        return out_THE

    @staticmethod
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor, None, None]:
        (qkv_TNE,) = ctx.saved_tensors
        q_THE, k_TKE, v_TKE = parted(qkv_TNE, ctx.kv_heads)
        wide = torch.promote_types(k_TKE.dtype, torch.float32)  # keys of a prefix gather gradients from many tiles
        grad_q = torch.zeros_like(q_THE, memory_format=torch.contiguous_format)
        grad_k = k_TKE.new_zeros(k_TKE.shape, dtype=wide)
        grad_v = torch.zeros_like(grad_k)
        for family in ctx.families:
            tiles = _Tiles(family, q_THE, k_TKE, v_TKE)
            grad_KNGLE = tiles.gather(grad_THE, real=True)
            parts = [tiles.differentiate(begin, end, grad_KNGLE) for begin, end in tiles.stretches()]
            tiles.scatter(grad_q, parts[0] if len(parts) == 1 else torch.cat(parts, 3))
            tiles.add_key_gradients(grad_k, grad_v)
        return torch.cat((grad_q, grad_k.to(k_TKE.dtype), grad_v.to(v_TKE.dtype)), 1), None, None


class _NativeAttention(torch.autograd.Function):
    """The same by the kernels of `native`."""

    @staticmethod
    def forward(ctx: Any, qkv_TNE: Tensor, kv_heads: int, schedule: native.Schedule) -> Tensor:
        out_THE, lse_TH = native.attention(qkv_TNE, kv_heads, schedule)
        ctx.save_for_backward(qkv_TNE, out_THE, lse_TH)
        ctx.kv_heads, ctx.schedule = kv_heads, schedule
        return out_THE

    @staticmethod
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor, None, None]:
        qkv_TNE, out_THE, lse_TH = ctx.saved_tensors
        grad = native.attention_slope(qkv_TNE, out_THE, lse_TH, grad_THE.contiguous(), ctx.kv_heads, ctx.schedule)
        return grad, None, None


def parted(qkv_TNE: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Part [.., H+2K, E] into q [.., H, E], k and v [.., K, E]."""
    q, k, v = torch.split(qkv_TNE, [qkv_TNE.shape[-2] - 2 * kv_heads, kv_heads, kv_heads], -2)
    return q, k, v


class _Tiles:
    """One family's queries [K, N, G, L, E], keys and values, in the layout of batched products, tile by tile."""

    def __init__(self, family: Family, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> None:
        self.family, self.kv_heads = family, k_TKE.shape[1]
        self.scale = q_THE.shape[-1] ** -0.5
        self.q = self.gather(q_THE) * self.scale
        self.k, self.v = (self.gather(x)[:, :, 0] for x in (k_TKE, v_TKE))
        self.prefix = family.prefix
        if self.prefix:
            parts = ([x[start:end] for start, end in family.above] for x in (k_TKE, v_TKE))
            self.k_prefix, self.v_prefix = (torch.cat(part).transpose(0, 1).contiguous() for part in parts)
        self._grads: dict[str, Tensor] = {}

    def gather(self, x_TXE: Tensor, *, real: bool = False) -> Tensor:
        """Return [K, N, X/K, L, E]; padding repeats a token, or is zero for `real` places only."""
        f = self.family
        padded = len(f.places) < len(f.view_NL)
        if real and padded:
            picked = x_TXE.new_zeros(len(f.view_NL), *x_TXE.shape[1:])
            picked.index_copy_(0, f.places, x_TXE.index_select(0, f.nodes))
        else:
            picked = x_TXE.index_select(0, f.view_NL)
        spread = picked.view(f.rows, f.longest, self.kv_heads, -1, x_TXE.shape[-1])
        return spread.permute(2, 0, 3, 1, 4).contiguous()

    def scatter(self, into_THE: Tensor, x_KNGLE: Tensor) -> None:
        """Write the real places of [K, N, G, L, E] to their nodes."""
        f = self.family
        flat = x_KNGLE.permute(1, 3, 0, 2, 4).reshape(f.rows * f.longest, *into_THE.shape[1:])
        into_THE.index_copy_(0, f.nodes, flat.index_select(0, f.places) if len(f.places) < len(flat) else flat)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Cut the L query places so that a tile's scores stay in cache."""
        f, groups = self.family, self.q.shape[2]
        across = self.kv_heads * f.rows * groups * (f.longest + self.prefix)
        step = max(ROUND, SCORES // across // ROUND * ROUND)
        for begin in range(0, f.longest, step):
            yield begin, min(begin + step, f.longest)

    def attend(self, begin: int, end: int) -> Tensor:
        """Attention of query places begin to end: [K, N, G, b, E]."""
        q = self.q[:, :, :, begin:end]
        own, above = self._split(self._weights(q, begin, end), end)
        out = (own @ self.v[:, :, :end].flatten(0, 1)).view(self.kv_heads, -1, q.shape[-1])
        if above is not None:
            out = torch.baddbmm(out, above, self.v_prefix)
        return out.view(q.shape)

    def differentiate(self, begin: int, end: int, grad_KNGLE: Tensor) -> Tensor:
        """Gather the gradients of keys and values from a tile; return that of its queries [K, N, G, b, E]."""
        q, grad = self.q[:, :, :, begin:end], grad_KNGLE[:, :, :, begin:end]
        kv, rows, size = self.kv_heads, q.shape[1], q.shape[-1]
        weights = self._weights(q, begin, end)
        own, above = self._split(weights, end)
        q_own, grad_own = q.reshape(kv * rows, -1, size), grad.reshape(kv * rows, -1, size)
        q_all, grad_all = q_own.view(kv, -1, size), grad_own.view(kv, -1, size)
        k, v = (x[:, :, :end].flatten(0, 1) for x in (self.k, self.v))
        grad_weights = (grad_own @ v.transpose(1, 2)).view(kv, -1, end)
        if above is not None:
            grad_weights = torch.cat((grad_all @ self.v_prefix.transpose(1, 2), grad_weights), -1)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        scores_own, scores_above = self._split(grad_scores, end)
        self._add("k", scores_own.transpose(1, 2) @ q_own, end)
        self._add("v", own.transpose(1, 2) @ grad_own, end)
        grad_q = (scores_own @ k).view(kv, -1, size)
        if above is not None and scores_above is not None:
            grad_q = torch.baddbmm(grad_q, scores_above, self.k_prefix)
            self._add("k_prefix", scores_above.transpose(1, 2) @ q_all, self.prefix)
            self._add("v_prefix", above.transpose(1, 2) @ grad_all, self.prefix)
        turned: Tensor = grad_q.view(q.shape) * self.scale
        return turned

    def add_key_gradients(self, grad_k: Tensor, grad_v: Tensor) -> None:
        """Add what the tiles gathered to their nodes' gradients [T, K, E]."""
        f = self.family
        for name, into in (("k", grad_k), ("v", grad_v)):
            own = self._grads[name].view(self.kv_heads, f.rows * f.longest, -1).transpose(0, 1)
            into[f.nodes] += own.index_select(0, f.places)  # no node is there twice
            if self.prefix:
                above = self._grads[f"{name}_prefix"].transpose(0, 1)
                parts = torch.split(above, [end - start for start, end in f.above])
                for (start, end), part in zip(f.above, parts, strict=True):
                    into[start:end] += part

    def _weights(self, q: Tensor, begin: int, end: int) -> Tensor:
        """Softmax weights [K, N·G·b, P + end]: of the nodes above, then of the segment's own places."""
        kv, rows, groups, size = self.kv_heads, q.shape[1], q.shape[2], q.shape[-1]
        flat = q.reshape(kv, rows * groups * (end - begin), size)
        own = flat.view(kv * rows, -1, size) @ self.k[:, :, :end].flatten(0, 1).transpose(1, 2)
        own.view(kv * rows, groups, end - begin, end)[..., begin:].add_(future(end - begin, q.dtype, q.device))
        scores = own.view(kv, -1, end)
        if self.prefix:
            scores = torch.cat((flat @ self.k_prefix.transpose(1, 2), scores), -1)
        return scores.softmax(-1)

    def _split(self, weights: Tensor, end: int) -> tuple[Tensor, Tensor | None]:
        """Weights of own places [K·N, G·b, end] and of those above [K, N·G·b, P]."""
        own = weights[..., self.prefix :].contiguous().view(self.kv_heads * self.q.shape[1], -1, end)
        return own, weights[..., : self.prefix].contiguous() if self.prefix else None

    def _add(self, name: str, gradient: Tensor, end: int) -> None:
        """Gather a gradient over tiles: [K·N, end, E] of own places, [K, P, E] of those above."""
        if name not in self._grads:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            places = self.prefix if name.endswith("prefix") else self.family.longest
            self._grads[name] = gradient.new_zeros(gradient.shape[0], places, gradient.shape[2], dtype=wide)
        self._grads[name][:, :end] += gradient


@cache
def future(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A [size, size] bias that hides what comes after each query."""
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)


def attention_plan(tree: Tree, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> Plan:
    """How the attention of a tree's nodes is computed: the families of siblings, or the kernels' schedule."""
    like = torch.empty(native.COLUMNS, dtype=dtype, device=device)
    if config.head_size % native.COLUMNS == 0 and native.fits(like):
        return schedule(tree, config.kv_heads, torch.get_num_threads())
    return [family.to(device) for family in tree.families(config.heads)]


def schedule(tree: Tree, kv_heads: int, parts: int) -> native.Schedule:
    """Deal a tree's segments out to threads, by the scores that each task computes."""
    tasks: list[list[int]] = []
    stretches: list[tuple[int, int]] = []
    costs: list[float] = []
    known: dict[int, tuple[int, int]] = {}
    for segment, (start, length, parent) in enumerate(zip(tree.starts, tree.lengths, tree.parents, strict=True)):
        if parent not in known:
            path = tree.above(parent)
            known[parent] = (len(stretches), len(path))
            stretches += path
        for begin in range(0, length, STRETCH):
            end = min(begin + STRETCH, length)
            tasks.append([start, begin, end, *known[parent]])
            costs.append((end - begin) * (tree.depths[segment] + (begin + end) / 2))
    shares = dealt([cost for cost in costs for _ in range(kv_heads)], parts)
    bounds = [0, *itertools.accumulate(map(len, shares))]
    return native.Schedule(
        tasks=torch.tensor(tasks),
        stretches=torch.tensor(stretches, dtype=torch.long).view(-1, 2),
        items=torch.tensor([item for share in shares for item in share], dtype=torch.long),
        bounds=torch.tensor(bounds),
        nodes=tree.nodes,
    )


def tree_attention(qkv_TNE: Tensor, kv_heads: int, plan: Plan) -> Tensor:
    """Return [T, H, E] for queries, keys and values [T, H+2K, E]; nodes in no segment get zeros."""
    kind = _NativeAttention if isinstance(plan, native.Schedule) else _TreeAttention
    out: Tensor = kind.apply(qkv_TNE, kv_heads, plan)  # type: ignore[no-untyped-call]
    return out
