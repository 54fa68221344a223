"""Prefix trees change what is computed twice and nothing else: layout, attention, log-probs, losses and gradients."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.helpers import Units, flatten, global_batch, loss_and_gradient, tiny_policy
from torch import Tensor

from ascent.customize import batch as batches
from ascent.customize.batch import TrainSequence, collate, micro_batches, pack
from ascent.customize.objectives.rows import ROWS, Row
from ascent.inference import attention, tree
from ascent.inference.attention import tree_attention
from ascent.inference.tree import Tree, fold

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
unfolded = partial(fold, min_shared=10**9)


def grown(dice: random.Random, count: int, longest: int = 60, words: int = 4) -> list[list[int]]:
    """Sequences of which many continue another one from a random place, or repeat it, or end inside it."""
    made: list[list[int]] = []
    for _ in range(count):
        stem = dice.choice(made) if made and dice.random() < 0.7 else []
        stem = stem[: dice.randint(0, len(stem))]
        fresh = dice.randint(0 if stem else 1, longest)
        made.append([*stem, *(dice.randrange(words) for _ in range(fresh))])
    return made


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: Tree) -> Tensor:
    """The definition: one mask [T, T] that is true where the key's node is on the query's path."""
    visible = torch.zeros(layout.nodes, layout.nodes, dtype=torch.bool)
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        path = layout.path(segment)
        for at in range(length):
            visible[start + at, path[: layout.depths[segment] + at + 1]] = True
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("the,she->hts", q, k.repeat_interleave(groups, 1)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hts,she->the", weights, v.repeat_interleave(groups, 1))


@given(seed=st.integers(0, 10**6), least=st.sampled_from([1, 4, 16, 10**9]))
@settings(max_examples=150, deadline=None)
def test_folding_keeps_every_token_in_its_place(seed: int, least: int) -> None:
    """Reading each path gives its sequence back, and with no least length shared every beginning is there once."""
    sequences = grown(random.Random(seed), 1 + seed % 9)
    layout, tokens, paths = fold(sequences, least)
    assert layout.nodes == len(tokens) <= sum(map(len, sequences))
    for sequence, path in zip(sequences, paths, strict=True):
        assert [tokens[node] for node in path] == sequence
        assert layout.positions_T[path].tolist() == list(range(len(sequence)))
    if least == 1:
        assert layout.nodes == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})


@given(seed=st.integers(0, 10**6), tile=st.sampled_from([1 << 20, 3000, 60]))
@settings(max_examples=60, deadline=None)
def test_attention_over_a_tree_is_attention_along_its_paths(seed: int, tile: int) -> None:
    """Values and all three gradients in float64, for any size of tile."""
    dice = random.Random(seed)
    layout, _, _ = fold(grown(dice, dice.randint(1, 8)), dice.choice([1, 4, 16]))
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(layout.nodes, heads, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (6, 2, 2)
    )
    wanted = dense_attention(q, k, v, layout)
    upstream = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "SCORES", tile)
        patch.setattr(attention, "SCORES", tile)
        found = tree_attention(torch.cat((q, k, v), 1), 2, list(layout.families(6)))
        got = torch.autograd.grad(found, (q, k, v), upstream)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (q, k, v), upstream))


def test_memory_grows_with_tokens_and_not_with_their_square() -> None:
    """A segment of 3,000 tokens: the largest tensor of both passes stays near the bound on a tile's scores."""
    layout = Tree.flat([3000])
    q, k, v = (torch.randn(3000, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    with Watch():
        tree_attention(torch.cat((q, k, v), 1), 2, list(layout.families(4))).sum().backward()
    assert largest <= 2 * attention.SCORES < 4 * 3000 * 3000


def rooted(units: Units, dice: random.Random) -> Units:
    """Put the same long beginning before all sequences, and one per unit after it, so that they fold into a tree."""
    common = tuple(dice.randrange(3, 200) for _ in range(24))
    for unit in units:
        own = tuple(dice.randrange(3, 200) for _ in range(20))
        for seq in unit:
            seq.token_ids = (*common, *own, *seq.token_ids)
            seq.loss_mask = (False,) * 44 + seq.loss_mask
    return units


@every_row
def test_a_tree_has_the_gradients_of_its_sequences(row: Row, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every row: loss and gradient within 1e-4, relative and in fp32, of the same batch laid end to end."""
    policy = tiny_policy(tiny_model, moved=0.05, row=row)
    for seed in range(3):
        units = rooted(global_batch(row, policy, seed=seed), random.Random(seed))
        folded = collate(flatten(units))
        assert folded.tree.nodes < 0.8 * sum(len(seq.token_ids) for seq in flatten(units))
        with monkeypatch.context() as patch:
            patch.setattr(batches, "fold", unfolded)
            plain = collate(flatten(units))
        assert plain.tree.nodes == sum(len(seq.token_ids) for seq in flatten(units))
        wanted, found = loss_and_gradient(policy, row, [plain]), loss_and_gradient(policy, row, [folded])
        assert found.loss == pytest.approx(wanted.loss, rel=1e-4, abs=1e-7)
        assert (found.gradient - wanted.gradient).norm() <= 1e-4 * wanted.gradient.norm()


def test_equal_samples_are_predicted_once(tiny_model: Path) -> None:
    seq = TrainSequence((5, 6, 7, 8, 9), (False, False, True, True, True), ce_weight=0.25)
    other = TrainSequence((5, 6, 7, 8, 4), (False, False, True, True, True), ce_weight=0.25)
    batch = collate([seq, other, seq])
    assert (len(batch.at_M), len(batch.at_U)) == (9, 6)  # 5 6 7 8 is laid out twice: fewer than 16 tokens
    policy = tiny_policy(tiny_model)
    logp = policy.score(batch)[0]
    torch.testing.assert_close(logp[:3], logp[6:], rtol=0, atol=0)
    torch.testing.assert_close(logp[3:6], policy.score(collate([other]))[0])


@given(seed=st.integers(0, 10**6), budget=st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_packing_keeps_units_and_the_budget(seed: int, budget: int) -> None:
    """Every unit is in one tree; one larger than the budget holds one unit, or is a quarter larger than its largest."""
    dice = random.Random(seed)
    units = [[tokens] for tokens in grown(dice, dice.randint(1, 24), longest=50)]
    bins = pack(units, budget)
    assert sorted(index for chosen in bins for index in chosen) == list(range(len(units)))
    for chosen in bins:
        tokens = [tokens for index in chosen for tokens in units[index]]
        assert len(chosen) == 1 or fold(tokens)[0].nodes <= max(budget, 1.25 * max(map(len, tokens)))


def test_best_fit_decreasing_fills_trees() -> None:
    """Sizes 7 6 5 4 3 2 of a budget of 9: 7+2, 6+3, 5+4, where first come first served needs four."""
    lengths = (2, 7, 3, 6, 4, 5)
    units = [[[100 * n + at for at in range(n)]] for n in lengths]
    assert sorted(sorted(lengths[i] for i in chosen) for chosen in pack(units, 9)) == [[2, 7], [3, 6], [4, 5]]


def test_what_begins_alike_goes_together() -> None:
    """Four prompts of 40 tokens with 4 answers of 10 each: with room for two such groups, no group is divided."""
    dice = random.Random(0)
    units = []
    for prompt in range(4):
        stem = [dice.randrange(500) for _ in range(40)]
        units += [(prompt, [[*stem, *(dice.randrange(500) for _ in range(10))]]) for _ in range(4)]
    dice.shuffle(units)
    bins = pack([unit for _, unit in units], 160)
    assert len(bins) == 2
    assert all(len({units[index][0] for index in chosen}) == 2 for chosen in bins)
    trees = micro_batches([[TrainSequence(tuple(u[0]), (False,) * 40 + (True,) * 10)] for _, u in units], 160)
    assert [batch.tree.nodes for batch in trees] == [160, 160]


def test_answers_to_a_prompt_larger_than_the_budget_share_it() -> None:
    """Eight answers of 10 tokens to a prompt of 400 that has no room: one tree; what shares little stays apart."""
    dice = random.Random(0)
    stem = [dice.randrange(500) for _ in range(400)]
    answers = [[[*stem, *(dice.randrange(500) for _ in range(10))]] for _ in range(8)]
    strangers = [[[*stem[:20], *(dice.randrange(500) for _ in range(300))]] for _ in range(3)]
    bins = pack([*answers, *strangers], 160)
    assert sorted(map(len, bins)) == [1, 1, 1, 8]
    assert sorted(max(bins, key=len)) == list(range(8))
