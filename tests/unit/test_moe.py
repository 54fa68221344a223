"""The mixture-of-experts benchmark: its routing measure, its spreads, and our rows on a model of transformers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "moe.py"


@pytest.fixture(scope="module")
def moe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_moe", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def drawn(moe: ModuleType, model: torch.nn.Module, prompts: int = 2):
    return moe.sample(model, torch.Generator().manual_seed(6), prompts, 4)


def test_equal_weights_and_precision_route_alike(moe: ModuleType) -> None:
    """The sampler decodes with a cache, the trainer reads whole answers: same experts, same log-probs."""
    model = moe.build(0)
    samples = drawn(moe, moe.sampler_of(model))
    with torch.no_grad():
        logp, _, experts = moe.score(model, samples.tokens)
    assert experts.shape == (8, moe.PROMPT + moe.ANSWER - 1, moe.LAYERS, 2)
    assert not moe.routing_change(samples.experts, experts).any()
    torch.testing.assert_close(logp, samples.logp, atol=2e-5, rtol=0)


def test_a_negated_router_changes_every_choice(moe: ModuleType) -> None:
    """Of four experts, the two best by −W x are the two worst by W x, so in the first layer every set differs.

    Sets only: swapping the two names of a choice is no change.
    """
    model = moe.build(1, experts=4)
    negated = moe.sampler_of(model)
    negated.model.layers[0].mlp.gate.weight.data.neg_()
    tokens = drawn(moe, model, 1).tokens
    with torch.no_grad():
        ours, theirs = moe.score(model, tokens)[2], moe.score(negated, tokens)[2]
    assert moe.routing_change(ours, theirs)[:, :, 0].float().mean() == 1.0
    assert torch.equal(
        torch.cat([ours, theirs], -1)[:, :, 0].sort(-1).values, torch.arange(4).expand(4, ours.shape[1], 4)
    )
    assert not moe.routing_change(ours, ours.flip(-1)).any()
    assert moe.routing_change(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 1]])).tolist() == [False, True]


def test_forced_routing_moves_tokens_more_than_sequences(moe: ModuleType) -> None:
    """Replaying a model's own routing gives its own log-probs; a forced change acts from its token on, not before.

    By the law of total variance tokens spread at least as much as their sequences' means; the numbers are numpy's.
    """
    model = moe.build(2)
    samples = drawn(moe, model, 4)
    at = moe.PROMPT - 1 + 10  # the position that predicts answer token 10
    forced = samples.experts.clone()
    forced[:, at:, 0] = (forced[:, at:, 0] + 1) % 8
    with torch.no_grad():
        own = moe.score(model, samples.tokens, samples.experts)[0]
        moved = moe.score(model, samples.tokens, forced)[0]
    torch.testing.assert_close(own, samples.logp, atol=2e-5, rtol=0)
    log_ratio = (moved - own).double()
    assert log_ratio[:, :10].abs().max() < 1e-5
    assert log_ratio[:, 10].abs().min() > 1e-4
    found, values = moe.spread(log_ratio), log_ratio.numpy()
    assert found["token_std"] == pytest.approx(values.std(ddof=1))
    assert found["sequence_std"] == pytest.approx(values.mean(1).std(ddof=1))
    assert found["token_outside"] == np.mean((np.exp(values) < 0.8) | (np.exp(values) > 1.2))
    assert found["token_q999"] == pytest.approx(np.quantile(np.abs(values), 0.999))
    assert found["token_std"] > 2 * found["sequence_std"]


def test_averaging_is_one_for_independent_tokens_and_root_t_for_equal_ones(moe: ModuleType) -> None:
    noise = torch.randn(4000, 25, generator=torch.Generator().manual_seed(0)) * 0.1
    assert moe.spread(noise)["averaging"] == pytest.approx(1.0, abs=0.05)
    assert moe.spread(noise[:, :1].expand(-1, 25))["averaging"] == pytest.approx(5.0, rel=0.01)


def test_both_rows_take_the_on_policy_step(moe: ModuleType) -> None:
    """At ρ = 1 the gradient of either row is that of −Σ A_i ℓ_it/(N T), A centred and scaled in its group of four."""
    model = moe.build(3)
    samples = drawn(moe, model)
    with torch.no_grad():
        samples = moe.Samples(samples.tokens, moe.score(model, samples.tokens)[0], samples.experts)
    reward = (samples.tokens[:, moe.PROMPT :] < moe.VOCAB // 4).double().mean(1).view(2, 4)
    advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()
    expected = gradient(model, -(advantage[:, None] * moe.score(model, samples.tokens)[0]).mean())
    assert expected.abs().max() > 1e-3
    for name in ("grpo", "gspo"):
        [chunk] = moe.credit(moe.ROWS[name], moe.groups_of(samples, 4), max_tokens=moe.ANSWER)
        found = gradient(model, moe.loss_of(model, moe.ROWS[name], chunk).loss)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
        trained = moe.sampler_of(model)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
        before = moe.update(trained, optimizer, moe.ROWS[name], chunk).loss.item()
        assert all(torch.isfinite(weight.grad).all() for weight in trained.parameters() if weight.grad is not None)
        assert moe.loss_of(trained, moe.ROWS[name], chunk).loss.item() < before


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten().float() for grad in grads if grad is not None])
