"""Attention over a prefix tree on CUDA: one fused kernel a layer, FlexAttention (Dong et al., arXiv 2412.05496).

A node sees its ancestors and itself. With nodes numbered in pre-order that is one comparison: j is above i when
place[j] <= place[i] < end[j], where end[j] is one past j's last descendant. `fold` lays segments out by depth, not in
pre-order, so the mask looks the numbers up and no tensor is moved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ascent.inference.attention import parted
from ascent.inference.tree import Tree

LEAST_HEAD = 16  # head size below which the kernels refuse
SHAPES = 64  # compiled kernels kept; they differ by head counts, dtype, whether gradients flow, and one block or more


def fits(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the fused kernels take such heads there."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    on_gpu = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return on_gpu and dtype in kinds and head_size >= LEAST_HEAD


def pre_order(tree: Tree) -> tuple[Tensor, Tensor]:
    """Each node's place [T] in pre-order, and one past the place of its last descendant [T]."""
    below = [*tree.lengths, 0]  # tokens of each segment and all under it; the entry at −1 stands above the roots
    for segment in reversed(range(len(tree.lengths))):
        below[tree.parents[segment]] += below[segment]
    free = [0] * len(below)  # the place of the next segment under each
    begins = []
    for segment, (length, parent) in enumerate(zip(tree.lengths, tree.parents, strict=True)):
        begins.append(free[parent])
        free[segment] = free[parent] + length
        free[parent] += below[segment]
    begin, start, lengths = (torch.tensor(x, dtype=torch.long) for x in (begins, tree.starts, tree.lengths))
    end = begin + torch.tensor(below[:-1], dtype=torch.long)
    return torch.arange(tree.nodes) + (begin - start).repeat_interleave(lengths), end.repeat_interleave(lengths)


def tree_mask(tree: Tree, size: int, device: torch.device) -> BlockMask:
    """The mask of a batch for all its layers; padding nodes from `tree.nodes` to `size` neither see nor are seen.

    Making it takes a few [size, size] tensors of booleans, once a batch.
    """
    place, end = pre_order(tree)
    spare = (0, size - tree.nodes)  # a padding node's place is past every end, and its end before every place
    place_T = F.pad(place, spare, value=size).to(device, torch.int32)
    end_T = F.pad(end, spare, value=0).to(device, torch.int32)

    def above(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (place_T[key] <= place_T[query]) & (place_T[query] < end_T[key])

    return create_block_mask(above, None, None, size, size, device)


def flex_tree_attention(qkv_TNE: Tensor, kv_heads: int, mask: BlockMask) -> Tensor:
    """Return [T, H, E] for queries, keys and values [T, H+2K, E]; padding nodes get zeros.

    Off CUDA the same is computed without a kernel, from all T² scores: for tests.
    """
    q, k, v = (part.transpose(0, 1)[None] for part in parted(qkv_TNE, kv_heads))
    attend = compiled() if qkv_TNE.is_cuda else cast("Callable[..., Tensor]", flex_attention)
    out = attend(q, k, v, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


@cache
def compiled() -> Callable[..., Tensor]:
    """`flex_attention` compiled for any T; past `SHAPES` it raises rather than silently computing T² scores."""
    attend: Callable[..., Tensor] = torch.compile(  # type: ignore[call-overload]  # its stubs lack the limit
        flex_attention, fullgraph=True, dynamic=True, recompile_limit=SHAPES
    )
    return attend
