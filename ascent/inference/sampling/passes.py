"""The two passes over the caches: whole prompts at once, and one new token for every row in flight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference import native
from ascent.inference.attention import parted
from ascent.inference.cache import Cache, Common, Reach
from ascent.inference.sampling.weights import Weights
from ascent.inference.tree import rounded_up

TOKENS = 32  # the tokens of a prefill are rounded up to a multiple: products are compiled per shape
QUERIES = 64  # places of a prompt scored at a time: the scores fit the cache, and half of the products fall away
NOTHING = Common([], [])
Sink = Callable[[int, Tensor, Tensor], None]


def prefill_common(weights: Weights, tokens: Sequence[int]) -> Common:
    """Compute the prefix of all prompts once."""
    if not tokens:
        return NOTHING
    common = Common([], [], len(tokens))

    def keep(_: int, keys_NKES: Tensor, values_NKSE: Tensor) -> None:
        common.keys.append(keys_NKES[0].contiguous())
        common.values.append(values_NKSE[0].contiguous())

    prefill(weights, [tokens], NOTHING, keep)
    return common


def prefill(weights: Weights, tails: Sequence[Sequence[int]], common: Common, sink: Sink) -> Tensor:
    """Run prompts that follow the common prefix and return the last hidden state of each [N, D].

    `sink(layer, keys [N, K, E, P+L], values [N, K, P+L, E])` gets what was computed: the prefix, each prompt, and on
    the right padding, which causality hides from the prompt.
    """
    model = weights.model
    count, longest = len(tails), max(map(len, tails))
    spare = rounded_up(count * longest, TOKENS) - count * longest
    filled = torch.tensor([[*tail, *[0] * (longest - len(tail))] for tail in tails], device=model.device)
    x, added = model.embed(F.pad(filled.flatten(), (0, spare))), None
    positions_L = torch.arange(common.length, common.length + longest, device=model.device)
    rope = model.rope(F.pad(positions_L.repeat(count), (0, spare)))
    causal = _causal(weights, longest, common.length)
    for index, layer in enumerate(weights.layers):
        x, qkv = layer.attend(x, added, rope)
        q, k, v = parted(qkv[: count * longest].view(count, longest, *qkv.shape[1:]), model.config.kv_heads)
        keys, values = k.permute(0, 2, 3, 1), v.transpose(1, 2)
        if common.length:
            keys = torch.cat((common.keys[index].expand(count, -1, -1, -1), keys), -1)
            values = torch.cat((common.values[index].expand(count, -1, -1, -1), values), -2)
        sink(index, keys, values)
        attended_NLD = _attend_prompts(q, keys, values, causal).flatten(2)
        x, added = layer.finish(F.pad(attended_NLD.flatten(0, 1), (0, 0, 0, spare)), x)
    last = torch.tensor([at * longest + len(tail) - 1 for at, tail in enumerate(tails)], device=model.device)
    if added is not None:
        x = x.index_select(0, last) + added.index_select(0, last)
    final: Tensor = model.norm(x)
    return final


def _causal(weights: Weights, length: int, prefix: int) -> list[tuple[int, int, Tensor]]:
    """Stretches of query places (begin, end), each with its bias [1, G·(end−begin), P+end] of zeros and −∞."""
    c, found = weights.model.config, []
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        bias = torch.zeros(end - begin, prefix + end, dtype=weights.model.dtype, device=weights.model.device)
        future = torch.ones_like(bias, dtype=torch.bool).triu_(prefix + begin + 1)
        found.append((begin, end, bias.masked_fill_(future, float("-inf")).repeat(1, c.heads // c.kv_heads, 1)))
    return found


def _attend_prompts(
    q_NLHE: Tensor, keys_NKES: Tensor, values_NKSE: Tensor, causal: Sequence[tuple[int, int, Tensor]]
) -> Tensor:
    """Causal attention of whole prompts [N, L, H, E], a stretch of queries at a time over what it may see."""
    count, _, heads, size = q_NLHE.shape
    kv_heads, prefix = keys_NKES.shape[1], keys_NKES.shape[-1] - q_NLHE.shape[1]
    grouped = q_NLHE.view(*q_NLHE.shape[:2], kv_heads, -1, size).permute(0, 2, 3, 1, 4)
    keys, values = keys_NKES.flatten(0, 1), values_NKSE.flatten(0, 1)
    out_NLHE = torch.empty_like(q_NLHE, memory_format=torch.contiguous_format)
    for begin, end, bias in causal:
        q = grouped[..., begin:end, :].reshape(count * kv_heads, -1, size)
        scores = torch.baddbmm(bias, q, keys[..., : prefix + end], alpha=size**-0.5)
        attended = torch.bmm(scores.softmax(-1), values[:, : prefix + end])
        out_NLHE[:, begin:end] = attended.view(count, heads, -1, size).transpose(1, 2)
    return out_NLHE


def step(weights: Weights, cache: Cache, tokens_B: Tensor) -> Tensor:
    """Add one token to every row in flight and return the final hidden states [B, D], padding rows included."""
    reach = cache.advance()
    rope = weights.model.rope(reach.positions_B)
    x, added = weights.model.embed(F.pad(tokens_B, (0, reach.rows - len(tokens_B)))), None
    for index, layer in enumerate(weights.layers):
        x, qkv = layer.attend(x, added, rope)
        x, added = layer.finish(_attend(qkv, cache, index, reach), x)
    return weights.model.norm.after(x, added)[1]


def _attend(qkv_BNE: Tensor, cache: Cache, index: int, reach: Reach) -> Tensor:
    """Store each row's new key and value, and attend over its own places, its group's prompt and the common prefix.

    Returns:
        What the heads attend to [B, H·E].
    """
    config, own, groups, common = cache.config, cache.own, cache.groups, cache.common
    if native.fits(qkv_BNE) and config.head_size % native.WIDE == 0:
        group = reach.group
        return native.decode_attention(
            qkv_BNE,
            config.kv_heads,
            reach.column,
            (own.keys[index], own.values[index], reach.seen),
            None if groups is None or group is None else (groups.keys[index], groups.values[index], group.seen),
            reach.positions_B if group is None else group.of_row,
            None if common is None else (common.keys[index], common.values[index], None),
        ).flatten(1)
    q, k, v = parted(qkv_BNE, config.kv_heads)
    own.keys[index][: reach.rows, ..., reach.column] = k
    own.values[index][: reach.rows, :, reach.column] = v
    return _attend_by_products(q, cache, index, reach)


def _attend_by_products(q_BHE: Tensor, cache: Cache, index: int, reach: Reach) -> Tensor:
    """Attention of one new token a row, as `_attend` returns it.

    The queries of a group stand in one product, so that its keys are read once; likewise all queries for the prefix.
    """
    count, heads, size = q_BHE.shape
    kv_heads = cache.config.kv_heads
    rows, block = count * kv_heads, heads // kv_heads
    q = (q_BHE * size**-0.5).reshape(rows, block, size)
    scores = [torch.baddbmm(reach.bias, q, reach.keys[index])]
    group, common = reach.group, cache.common
    if group is not None:
        gathered = _regroup(q, group.to_group, len(group.bias), block)
        scores.append(_regroup(torch.baddbmm(group.bias, gathered, group.keys[index]), group.to_row, rows, block))
    if common is not None:
        by_head = q.view(count, kv_heads, -1, size).transpose(0, 1).reshape(kv_heads, -1, size)
        on_common = (by_head @ common.keys[index]).view(kv_heads, count, -1, common.length)
        scores.append(on_common.transpose(0, 1).reshape(rows, -1, common.length))
    joint = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    shares = torch.split(joint.softmax(-1), [part.shape[-1] for part in scores], -1)
    attended = torch.bmm(shares[0], reach.values[index])
    if group is not None:
        gathered = _regroup(shares[1], group.to_group, len(group.bias), block)
        attended += _regroup(torch.bmm(gathered, group.values[index]), group.to_row, rows, block)
    if common is not None:
        by_head = shares[-1].view(count, kv_heads, -1, common.length).transpose(0, 1)
        on_common = by_head.reshape(kv_heads, -1, common.length) @ common.values[index]
        attended += on_common.view(kv_heads, count, -1, size).transpose(0, 1).reshape(rows, -1, size)
    return attended.view(count, -1)


def _regroup(x: Tensor, index: Tensor, batches: int, block: int) -> Tensor:
    """Gather blocks of `block` queries, one for each (row, head) pair, into `batches` products."""
    return x.reshape(-1, block, x.shape[-1]).index_select(0, index).view(batches, -1, x.shape[-1])
