"""FlexAttention with the ancestors' mask is `tree_attention`, in values and in gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.test_tree import grown
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as fused

from ascent.inference import flex
from ascent.inference.attention import tree_attention
from ascent.inference.tree import Tree, fold, rounded_up

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 6, 2, 16
unfused = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    flex.compiled.cache_clear()
    yield
    torch._dynamo.reset()
    flex.compiled.cache_clear()


def drawn(seed: int, dtype: torch.dtype, count: int = 8, padded: bool = True) -> tuple[Tree, Tensor, Tensor]:
    """A tree, its q, k and v [T, H+2K, E] and an upstream gradient [T, H, E], padding nodes included."""
    dice = random.Random(seed)
    layout, _, _ = fold(grown(dice, dice.randint(1, count)), dice.choice([1, 4, 16]))
    size = rounded_up(layout.nodes, 64) if padded else layout.nodes
    generator = torch.Generator().manual_seed(seed)
    qkv, upstream = (
        torch.randn(size, heads, SIZE, dtype=dtype, generator=generator) for heads in (HEADS + 2 * KV_HEADS, HEADS)
    )
    return layout, qkv.requires_grad_(), upstream


def in_tiles(layout: Tree, qkv: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    out = tree_attention(qkv, KV_HEADS, list(layout.families(HEADS)))
    return out.detach(), torch.autograd.grad(out, qkv, upstream)[0]


def near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def test_places_of_a_forest_drawn_by_hand() -> None:
    """Roots A (2 tokens) and B (2), laid out before their children a (1), b (1) and a's child c (2): A a c B b."""
    layout = Tree((2, 2, 1, 1, 2), (-1, -1, 0, 1, 2))
    place, end = flex.pre_order(layout)
    assert place.tolist() == [0, 1, 5, 6, 2, 7, 3, 4]
    assert end.tolist() == [5, 5, 8, 8, 5, 8, 5, 5]


@unfused
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@given(seed=st.integers(0, 10**6), padded=st.booleans())
@settings(max_examples=25, deadline=None)
def test_flex_attention_is_tree_attention(dtype: torch.dtype, tolerance: float, seed: int, padded: bool) -> None:
    """Over random trees. On CPU torch lets the unfused one differentiate only where its check of devices is out."""
    layout, qkv, upstream = drawn(seed, dtype, padded=padded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_validate_device", lambda *_: None)
        found = flex.flex_tree_attention(qkv, KV_HEADS, flex.tree_mask(layout, len(qkv), CPU))
        slope = torch.autograd.grad(found, qkv, upstream)[0]
    wanted, wanted_slope = in_tiles(layout, qkv, upstream)
    assert near(found, wanted, tolerance) and near(slope, wanted_slope, tolerance)
    assert not found[layout.nodes :].any() and not slope[layout.nodes :].any()


@pytest.mark.slow
def test_one_compiled_kernel_serves_every_tree() -> None:
    """The C++ kernel walks the block tables, as the CUDA one does, and the unfused sum does not.

    A second kernel is made at most, if the first tree has as many blocks as there are heads: the compiler takes equal
    sizes for one, and heads are fixed.
    """
    blocks = set()
    for seed in range(8):
        layout, qkv, upstream = drawn(seed, torch.float32, count=40)
        if len(qkv) <= fused._DEFAULT_SPARSE_BLOCK_SIZE:
            continue  # a single block is compiled apart
        mask = flex.tree_mask(layout, len(qkv), CPU)
        blocks.add(mask.kv_indices.shape[-1])
        q, k, v = (x.transpose(0, 1)[None] for x in qkv.detach().split((HEADS, KV_HEADS, KV_HEADS), 1))
        found = flex.compiled()(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        assert near(found, in_tiles(layout, qkv, upstream)[0], 1e-5)
    assert len(blocks) > 3 and counters["stats"]["unique_graphs"] <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_compiled_on_cuda(dtype: torch.dtype, tolerance: float) -> None:
    """Values and gradients of a dozen sizes, beside those in float64 on the CPU."""
    device = torch.device("cuda")
    assert flex.fits(SIZE, dtype, device)
    for seed in range(12):
        layout, qkv, upstream = drawn(seed, dtype, count=40)
        moved = qkv.detach().to(device).requires_grad_()
        found = flex.flex_tree_attention(moved, KV_HEADS, flex.tree_mask(layout, len(qkv), device))
        slope = torch.autograd.grad(found, moved, upstream.to(device))[0]
        wanted, wanted_slope = in_tiles(layout, qkv.detach().double().requires_grad_(), upstream.double())
        assert near(found.cpu().double(), wanted, tolerance) and near(slope.cpu().double(), wanted_slope, tolerance)
        assert not found[layout.nodes :].any() and not slope[layout.nodes :].any()
