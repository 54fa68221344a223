"""The kernels in C against the tensor operations beside them, in float64 from the same bf16 numbers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.test_tree import grown
from torch import Tensor

from ascent.inference import native
from ascent.inference.attention import schedule, tree_attention
from ascent.inference.kernels import add_norm, rms_norm, rotate, swiglu
from ascent.inference.sampling.draw import draw
from ascent.inference.tree import Tree, fold

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.problem() or "kernels are there")
ROUNDING = 2**-8  # bf16 keeps eight bits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def away(found: Tensor, wanted: Tensor) -> float:
    """Distance by norm, as a share of what was wanted."""
    with torch.no_grad():
        return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_near_float64(function, *inputs: Tensor) -> None:  # type: ignore[no-untyped-def]
    """Values and gradients of all outputs, in bf16 by the kernels, are within rounding of those in float64 without."""
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [drawn(*out.shape, seed=9 + i).to(dtype) for i, out in enumerate(outputs)]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    for mine, wanted in zip(*found, strict=True):
        assert away(mine, wanted) < ROUNDING


def test_norms() -> None:
    x, added, weight = drawn(37, 96), drawn(37, 96, seed=1), drawn(96, seed=2)
    assert_near_float64(lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    assert_near_float64(lambda x, a, w: add_norm(x, a, w, 1e-5), x, added, weight)


def test_swiglu() -> None:
    assert_near_float64(swiglu, 4 * drawn(37, 192))


def test_rotation_turns_the_first_heads_and_back() -> None:
    x, angles = drawn(37, 5, 64), drawn(37, 1, 32, seed=1).float()
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    assert_near_float64(lambda x: rotate(x, (cos.to(x.dtype), sin.to(x.dtype)), 4), x)
    assert torch.equal(rotate(x, (cos, sin), 4)[:, 4], x[:, 4])


@given(
    seed=st.integers(0, 10**6),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 5, 50]),
    size=st.sampled_from([64, 128]),
    parts=st.integers(1, 5),
)
@settings(max_examples=30, deadline=None)
def test_attention_over_trees(seed: int, kv_heads: int, group: int, size: int, parts: int) -> None:
    dice = random.Random(seed)
    tree, _, _ = fold(grown(dice, dice.randint(1, 8)), dice.choice([1, 4, 16]))
    if seed % 3 == 0:  # long enough for several tasks and blocks of keys
        tree = Tree((*tree.lengths, 300, 70), (*tree.parents, -1, len(tree.lengths)))
    heads, padded = kv_heads * group, tree.nodes + 5
    qkv = drawn(padded, heads + 2 * kv_heads, size, seed=seed)
    upstream = drawn(padded, heads, size, seed=seed + 1)
    upstream[tree.nodes :] = 0
    found = []
    for plan, dtype in ((schedule(tree, kv_heads, parts), torch.bfloat16), (list(tree.families(heads)), torch.float64)):
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        out = tree_attention(leaf, kv_heads, plan)
        found.append((out, *torch.autograd.grad(out, leaf, upstream.to(dtype))))
    for mine, wanted in zip(*found, strict=True):
        assert away(mine, wanted) < ROUNDING
        assert not mine[tree.nodes :].any()


def test_attention_comes_out_the_same_with_any_number_of_threads() -> None:
    tree = Tree((90, 40, 33, 300), (-1, 0, 0, -1))
    plan, qkv = schedule(tree, 2, 2), drawn(tree.nodes, 8, 64).requires_grad_()
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad(tree_attention(qkv, 2, plan).float().square().sum(), qkv)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([16, 32, 80]),
    st.sampled_from([0, 16, 48]),
    st.sampled_from([0, 1, 31, 70]),
)
def test_decoding_attends_over_three_levels(
    seed: int, kv_heads: int, group: int, size: int, own: int, grouped: int, common: int
) -> None:
    """Beside one softmax in float64 over what a row's own slot, its group's and the common one show."""
    dice = torch.Generator().manual_seed(seed)
    rows, heads = 5, kv_heads * group

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice).to(torch.bfloat16)

    def level(slots: int, places: int) -> tuple[Tensor, Tensor, Tensor]:
        seen = torch.rand(slots, places, generator=dice) < 0.6
        return numbers(slots, kv_heads, size, places), numbers(slots, kv_heads, places, size), seen

    qkv, column = numbers(rows, heads + 2 * kv_heads, size), own - 3
    mine, of_row = level(rows, own), torch.randint(0, 2, (rows,), generator=dice)
    mine[2][:, column] = True
    theirs = level(2, grouped) if grouped else None
    ours = (*level(1, common)[:2], None) if common else None
    out = native.decode_attention(qkv, kv_heads, column, mine, theirs, of_row, ours)
    q, k, v = qkv.double().split([heads, kv_heads, kv_heads], 1)
    assert torch.equal(mine[0][..., column].double(), k) and torch.equal(mine[1][:, :, column].double(), v)
    parts: list[tuple[Tensor, ...]] = [mine]
    if theirs is not None:
        parts.append(tuple(x[of_row] for x in theirs))
    if ours is not None:
        parts.append((*(x.expand(rows, -1, -1, -1) for x in ours[:2]), torch.ones(rows, common, dtype=torch.bool)))
    keys, values = (torch.cat([part[at].double() for part in parts], -1 - at) for at in (0, 1))
    scores = torch.einsum("bkge,bkes->bkgs", q.view(rows, kv_heads, group, size), keys) * size**-0.5
    hidden = ~torch.cat([part[2] for part in parts], 1)[:, None, None]
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = torch.einsum("bkgs,bkse->bkge", shares, values).flatten(1, 2)
    assert (out.double() - expected).abs().max() < 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_target_logp(temperature: float) -> None:
    logits, targets = 8 * drawn(9, 1024), torch.randint(0, 1024, (9,), generator=torch.Generator().manual_seed(1))
    exact = logits.gather(1, targets[:, None]).squeeze(1).float() + 0.01 * torch.arange(9)
    wide = logits.double().scatter_(1, targets[:, None], exact.double()[:, None]) / temperature
    logp, p = wide.log_softmax(-1), wide.softmax(-1)
    low = logits.clone()
    found, entropy = native.target_logp(low, targets, exact, temperature, entropy=True, slope=True)
    torch.testing.assert_close(found.double(), logp.gather(1, targets[:, None]).squeeze(1), rtol=1e-5, atol=1e-5)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), -(p * logp).sum(-1), rtol=1e-5, atol=1e-5)
    p[torch.arange(9), targets] -= 1
    torch.testing.assert_close(low.double(), p, rtol=ROUNDING, atol=1e-6)


def test_tokens_are_drawn_by_the_inverse_of_the_cumulative_distribution() -> None:
    rows, vocab = 300, 1040  # the last block is not full
    logits, uniform = 3 * drawn(rows, vocab), torch.rand(rows, generator=torch.Generator().manual_seed(1))
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    tokens, chosen, lse = native.pick_tokens(logits, uniform, 0.8)
    wide = logits.double() / 0.8
    cumulative = wide.softmax(-1).cumsum(-1)
    above = cumulative.gather(1, tokens[:, None]).squeeze(1)
    below = above - wide.softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert ((below <= uniform + 1e-6) & (uniform <= above + 1e-6)).all()
    torch.testing.assert_close(lse.double(), wide.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chosen.double(), wide.gather(1, tokens[:, None]).squeeze(1), rtol=1e-6, atol=1e-6)


def test_greedy_takes_the_first_of_the_highest() -> None:
    logits = torch.randint(-9, 9, (50, 512), generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, _, _ = native.pick_tokens(logits, None, 1.0)
    assert tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_numbers_that_are_none_stay_none() -> None:
    """A broken model must show in its log-probs."""
    logits, targets = drawn(2, 64), torch.tensor([3, 3])
    logits[0, 7] = float("nan")
    logp, _ = native.target_logp(logits, targets, torch.zeros(2), 1.0, entropy=False, slope=False)
    assert logp.isnan().tolist() == [True, False]


def test_sampled_log_probs_are_those_of_the_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, uniform = drawn(20, 64), drawn(512, 64, seed=1), torch.rand(20)
    found = draw(hidden, head, 0.9, 1.0, uniform)
    monkeypatch.setattr(native, "fits", lambda *tensors: False)
    wanted = draw(hidden, head, 0.9, 1.0, uniform)
    assert (found[0] == wanted[0]).float().mean() > 0.9  # rounding moves a border now and then
    same = found[0] == wanted[0]
    torch.testing.assert_close(found[1][same], wanted[1][same], rtol=1e-3, atol=1e-3)


def test_code_that_others_could_have_written_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path))
    place = tmp_path / "native"
    native._built.cache_clear()
    try:
        assert native.problem() == ""  # compiled into the empty folder
        assert len(list(place.glob("*.so"))) == 1
        assert place.stat().st_mode & 0o777 == 0o700
        place.chmod(0o777)
        native._built.cache_clear()
        assert "others could write" in native.problem()
    finally:
        native._built.cache_clear()
