"""Losses and their gradients against derivations by hand, in float64. No formula here is taken from the code."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.helpers import flatten, global_batch, tiny_policy
from torch import Tensor

from ascent.customize.batch import Scored, TokenBatch, TrainSequence, collate
from ascent.customize.loops.credit import credit
from ascent.customize.objectives.credit import (
    episode_advantages,
    group_mean,
    is_informative,
    leave_one_out,
    overlong_punishment,
)
from ascent.customize.objectives.kl import k3, reverse_kl
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.preference import pair_loss
from ascent.customize.objectives.rows import ROWS, Clip, Row, row_named
from ascent.customize.objectives.surrogate import clip_fraction, min_clip, policy_gradient, ratio
from ascent.customize.objectives.weights import WEIGHTS
from ascent.customize.rollout import Group
from ascent.records import Episode, Task
from ascent.records.errors import UnknownName

GRPO, DAPO, DPO = ROWS["grpo"], ROWS["dapo"], ROWS["dpo"]


def advantages(rewards: list[float], baseline: str, scale: str) -> list[float]:
    """The advantages of one group under these choices."""
    return episode_advantages([rewards], replace(GRPO, baseline=baseline, scale=scale))[0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def sequence(targets: int, **streams) -> TrainSequence:
    return TrainSequence((1, *range(2, 2 + targets)), (False, *[True] * targets), **streams)


def run(
    row: Row, batch: TokenBatch, logp: list[float], entropy: list[float] | None = None
) -> tuple[float, list[float]]:
    """The row's loss and dL/dℓ in float64."""
    leaf = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    scored = Scored(leaf, torch.tensor(entropy or [0.0] * len(logp), dtype=torch.float64))
    out = objective(row)(scored, batch)
    out.loss.backward()
    return out.loss.item(), leaf.grad.tolist()


def exact(values) -> list[float]:
    """What float32 makes of these numbers: batches carry their streams in float32."""
    return torch.tensor(values, dtype=torch.float32).double().tolist()


# ---------------------------------------------------------------------------------------------------- supervised


def test_sft_is_the_mean_over_all_target_tokens() -> None:
    """L = −Σ ℓ / M over the M targets of all sequences, so dL/dℓ = −1/M for each, long sequence or short."""
    lengths = [1, 4, 3]
    weights = WEIGHTS["token_mean"](lengths, 0)
    batch = collate([sequence(n, ce_weight=w) for n, w in zip(lengths, weights, strict=True)])
    logp = [-random.Random(0).random() for _ in range(8)]
    loss, gradient = run(ROWS["sft"], batch, logp)
    assert loss == pytest.approx(-sum(logp) / 8, rel=1e-7)
    assert gradient == pytest.approx([-1 / 8] * 8, rel=1e-7)


# ---------------------------------------------------------------------------------------------------- preference


def dpo_by_hand(lengths, logp, reference, beta, epsilon, alpha) -> tuple[float, list[float]]:
    """DPO with label noise ε and an NLL share α, over n pairs that lie chosen, rejected, chosen, rejected, …

    S(y) = Σ_t (ℓ_t − ℓref_t) and m = β(S_w − S_l). Then
        L = 1/n Σ [ (1−ε)·log(1 + e^−m) + ε·log(1 + e^m) − α/|y_w| Σ_t ℓ_t(y_w) ].
    With d log(1 + e^−m)/dm = −σ(−m) and d log(1 + e^m)/dm = σ(m), each token of y_w gets
        dL/dℓ = β/n [ −(1−ε) σ(−m) + ε σ(m) ] − α/(n |y_w|),
    and each token of y_l the negative of the first part. ε = α = 0 leaves −β σ(−m)/n.
    """
    pieces, start = [], 0
    for length in lengths:
        pieces.append((logp[start : start + length], reference[start : start + length]))
        start += length
    n = len(lengths) // 2
    loss, gradient = 0.0, []
    for (win, win_ref), (lose, lose_ref) in zip(pieces[0::2], pieces[1::2], strict=True):
        m = beta * ((sum(win) - sum(win_ref)) - (sum(lose) - sum(lose_ref)))
        loss += ((1 - epsilon) * math.log1p(math.exp(-m)) + epsilon * math.log1p(math.exp(m))) / n
        loss -= alpha * sum(win) / len(win) / n
        slope = beta / n * (-(1 - epsilon) * sigmoid(-m) + epsilon * sigmoid(m))
        gradient += [slope - alpha / (n * len(win))] * len(win) + [-slope] * len(lose)
    return loss, gradient


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.1, 2.5])
def test_dpo_loss_and_gradient(beta: float, epsilon: float, alpha: float) -> None:
    dice = random.Random(3)
    lengths = [3, 5, 1, 2, 7, 4]
    logp = [-3 * dice.random() for _ in range(sum(lengths))]
    reference = exact([-3 * dice.random() for _ in logp])
    rows, start = [], 0
    for length in lengths:
        rows.append(sequence(length, pair_weight=1 / 3, reference_logps=reference[start : start + length]))
        start += length
    row = replace(DPO, beta=beta, label_smoothing=epsilon, nll=alpha)
    loss, gradient = run(row, collate(rows), logp)
    wanted_loss, wanted = dpo_by_hand(lengths, logp, reference, beta, epsilon, alpha)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert gradient == pytest.approx(wanted, rel=1e-6)


def test_smoothing_zero_and_nll_zero_are_plain_dpo() -> None:
    margin = torch.linspace(-40, 40, 41, dtype=torch.float64)
    assert torch.equal(pair_loss(margin, DPO), -torch.nn.functional.logsigmoid(margin))
    assert (DPO.label_smoothing, DPO.nll, DPO.score, DPO.beta) == (0.0, 0.0, "sum", 0.1)


def test_smoothing_moves_the_optimum_to_the_log_odds_of_the_noise() -> None:
    """d/dm [(1−ε) log(1+e^−m) + ε log(1+e^m)] = 0 where σ(m) = 1−ε, so at m = log((1−ε)/ε)."""
    best = torch.tensor(math.log(0.9 / 0.1), dtype=torch.float64, requires_grad=True)
    pair_loss(best, replace(DPO, label_smoothing=0.1)).backward()
    assert abs(best.grad.item()) < 1e-12


# ---------------------------------------------------------------------------------------------------------- online


def online_by_hand(weights, credits, logp, old, reference, low, high, beta) -> tuple[float, list[float]]:
    """Clipped policy gradient with a KL term, token by token.

    ρ = e^(ℓ − ℓ_old). The surrogate min(ρA, clip(ρ)A) is ρA, with slope ρA in ℓ, unless A > 0 and ρ > high, or A < 0
    and ρ < low: there it is the constant bound·A, with slope 0. The KL term has the value e^d − d − 1 with
    d = ℓ_ref − ℓ, and the slope ρ(ℓ − ℓ_ref). Hence, with token weight w,
        L = Σ w (−min(ρA, clip(ρ)A) + β(e^d − d − 1)),   dL/dℓ = −w A ρ [inside the clip] + β w ρ (ℓ − ℓ_ref).
    """
    loss, gradient = 0.0, []
    for w, a, now, was, ref in zip(weights, credits, logp, old, reference, strict=True):
        rho = math.exp(now - was)
        bound = high if a > 0 else low
        clipped = (a > 0 and rho > high) or (a < 0 and rho < low)
        d = ref - now
        loss += w * (-(bound if clipped else rho) * a + beta * (math.exp(d) - d - 1))
        gradient.append(w * (0.0 if clipped else -a * rho) + beta * w * rho * (now - ref))
    return loss, gradient


@pytest.mark.parametrize(("name", "low", "high", "beta"), [("grpo", 0.8, 1.2, 0.04), ("dapo", 0.8, 1.28, 0.0)])
def test_online_loss_and_gradient(name: str, low: float, high: float, beta: float) -> None:
    dice = random.Random(5)
    lengths, credits = [4, 9, 1, 30], exact([1.3, -0.7, 0.0, 0.4])
    rows, spread = [], []
    for length, credit_ in zip(lengths, credits, strict=True):
        logp = [-4 * dice.random() for _ in range(length)]
        old = exact([value + dice.gauss(0, 0.3) for value in logp])
        reference = exact([value + dice.gauss(0, 0.5) for value in logp])
        spread += [(credit_, *triple) for triple in zip(logp, old, reference, strict=True)]
        rows.append(sequence(length, advantage=credit_, old_logps=old, reference_logps=reference))
    row = ROWS[name]
    by_sequence = (
        [1 / (len(lengths) * n) for n in lengths] if name == "grpo" else [1 / sum(lengths)] * len(lengths)
    )  # 1/(N·|y|) or 1/Σ|y|
    for seq, weight in zip(rows, by_sequence, strict=True):
        seq.rl_weight = seq.kl_weight = weight
    weights = [w for w, n in zip(exact(by_sequence), lengths, strict=True) for _ in range(n)]
    columns = [list(column) for column in zip(*spread, strict=True)]
    wanted_loss, wanted = online_by_hand(weights, *columns, low, high, beta)
    assert any(math.exp(now - was) > high for a, now, was, _ in spread if a > 0), "some tokens must be clipped"
    loss, gradient = run(row, collate(rows), columns[1])
    assert loss == pytest.approx(wanted_loss, rel=1e-7)
    assert gradient == pytest.approx(wanted, rel=1e-6, abs=1e-15)


def test_on_policy_clip_and_policy_gradient_have_the_same_gradient() -> None:
    """At ρ = 1 both have slope A·∇ℓ (identity F.4-1); their values differ: ΣA against ΣA·0."""
    logp = -torch.rand(50, dtype=torch.float64)
    advantage = torch.randn(50, dtype=torch.float64)
    slopes = []
    for surrogate in (lambda gap, a: min_clip(gap, a, Clip(0.8, 1.2)), policy_gradient):
        leaf = logp.clone().requires_grad_()
        surrogate(leaf - logp, advantage).sum().backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=0)
    torch.testing.assert_close(slopes[0], advantage, rtol=0, atol=0)


def test_extreme_ratios_stay_finite_and_clip_fraction_counts_what_lost_its_gradient() -> None:
    log_ratio = torch.tensor([-500.0, -0.5, -0.1, 0.0, 0.1, 0.5, 500.0]).double().requires_grad_()
    for a in (1.0, -1.0):
        advantage = torch.full((7,), a, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(min_clip(log_ratio, advantage, Clip(0.8, 1.2)).sum(), log_ratio)
        assert torch.isfinite(gradient).all()
        inside = slice(1, 6)  # the two outermost ratios are held by the overflow clamp
        clipped = clip_fraction(log_ratio.detach(), advantage, Clip(0.8, 1.2)).bool()
        assert torch.equal(clipped[inside], gradient[inside] == 0)
    assert ratio(torch.tensor(500.0)).isfinite()
    with pytest.raises(ValueError, match="absolute"):
        Clip(-0.2, 0.2)


def enumerated(term, logits: Tensor, sampler: Tensor) -> Tensor:
    """Gradient of Σ_y sampler(y)·term(ℓ(y)) in the logits: the expectation over samples, without sampling."""
    leaf = logits.clone().requires_grad_()
    (sampler * term(leaf.log_softmax(-1))).sum().backward()
    return leaf.grad


def kl_gradient(first_is_policy: bool, logits: Tensor, reference: Tensor) -> Tensor:
    """∇ KL(π‖ref) or ∇ KL(ref‖π) of a categorical by its definition."""
    leaf = logits.clone().requires_grad_()
    policy = leaf.log_softmax(-1)
    a, b = (policy, reference) if first_is_policy else (reference, policy)
    (a.exp() * (a - b)).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("drift", [0.0, 0.6])
def test_kl_term_has_the_gradient_of_the_reverse_kl_and_k3_does_not(drift: float) -> None:
    """Full enumeration of a five-way categorical; `drift` makes the sampler another policy than the trained one."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    sampler = (logits + drift * torch.randn(5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    reverse, forward = kl_gradient(True, logits, reference), kl_gradient(False, logits, reference)
    ours = enumerated(lambda logp: reverse_kl(logp, reference, logp - sampler), logits, sampler.exp())
    torch.testing.assert_close(ours, reverse, rtol=1e-12, atol=1e-14)
    if drift == 0:
        plain = enumerated(lambda logp: k3(logp, reference), logits, sampler.exp())
        torch.testing.assert_close(plain, forward, rtol=1e-12, atol=1e-14)
        assert (plain - reverse).norm() > 0.1 * reverse.norm()
    value = (sampler.exp() * reverse_kl(logits.log_softmax(-1), reference, logits.log_softmax(-1) - sampler)).sum()
    if drift == 0:
        exact_value = (sampler.exp() * (sampler - reference)).sum()
        torch.testing.assert_close(value, exact_value, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------- credit


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=16))
def test_leave_one_out_is_the_scaled_group_mean(rewards: list[float]) -> None:
    """R_i − mean of the others = G/(G−1) (R_i − mean of all) (identity F.4-3)."""
    size = len(rewards)
    mean = sum(rewards) / size
    others = [r - (sum(rewards[:i] + rewards[i + 1 :]) / (size - 1)) for i, r in enumerate(rewards)]
    assert leave_one_out(rewards) == pytest.approx(others, abs=1e-12)
    assert leave_one_out(rewards) == pytest.approx([size / (size - 1) * (r - mean) for r in rewards], abs=1e-12)


@pytest.mark.parametrize(("correct", "std", "population", "rloo", "dr"), [
    (1, 2.47, 2.65, 1.0, 0.875),
    (4, 0.94, 1.0, 0.57, 0.5),
    (7, 0.35, 0.38, 0.14, 0.125),
])  # fmt: skip
def test_published_advantages_of_binary_rewards(correct, std, population, rloo, dr) -> None:
    """Advantage of a correct sample of eight: the sample deviation (ddof 1) is meant, not the population's."""
    rewards = [1.0] * correct + [0.0] * (8 - correct)
    assert advantages(rewards, "group_mean", "group_std")[0] == pytest.approx(std, abs=0.006)
    assert advantages(rewards, "group_mean", "group_std")[0] != pytest.approx(population, abs=0.02)
    assert advantages(rewards, "leave_one_out", "none")[0] == pytest.approx(rloo, abs=0.006)
    assert advantages(rewards, "group_mean", "none")[0] == pytest.approx(dr, abs=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=10), st.sets(st.integers(0, 9)))
def test_ungraded_episodes_leave_the_statistics_of_the_rest(rewards: list[float], missing: set[int]) -> None:
    holes = [math.nan if i in missing else r for i, r in enumerate(rewards)]
    known = [r for r in holes if not math.isnan(r)]
    found = advantages(holes, "group_mean", "group_std")
    assert all(math.isfinite(value) for value in found)
    assert all(value == 0 for value, r in zip(found, holes, strict=True) if math.isnan(r))
    if len(known) >= 2:
        deviation = statistics.stdev(known)
        wanted = [(r - statistics.fmean(known)) / (deviation + 1e-4) for r in known]
        assert [a for a, r in zip(found, holes, strict=True) if not math.isnan(r)] == pytest.approx(wanted, abs=1e-6)
    elif known:
        assert found == [0.0] * len(holes)
    assert group_mean([math.nan, math.nan]) == leave_one_out([math.nan, 3.0]) == [0.0, 0.0]


def test_a_group_without_spread_is_not_informative() -> None:
    assert not is_informative([0.3] * 8)
    assert not is_informative([0.3, 0.3 + 1e-8])
    assert not is_informative([math.nan, 1.0])
    assert is_informative([math.nan, 1.0, 0.0])
    assert advantages([0.1] * 7, "group_mean", "group_std") == pytest.approx([0.0] * 7, abs=1e-9)


@pytest.mark.parametrize(
    ("length", "punishment"),
    [(1, 0.0), (84, 0.0), (85, -1 / 16), (92, -0.5), (99, -15 / 16), (100, -1.0), (101, -1.0), (500, -1.0)],
)
def test_overlong_punishment_on_each_piece(length: int, punishment: float) -> None:
    """DAPO Eq. 13 with L_max = 100, L_cache = 16: 0 to 84, (84 − |y|)/16 to 100, then −1."""
    assert overlong_punishment(length, 100, 16) == pytest.approx(punishment, abs=1e-15)


# ------------------------------------------------------------------------------------------------- DAPO against GRPO


def group(rewards: list[float], lengths: list[int]) -> Group:
    """Episodes with a prompt of two tokens and answers of these lengths."""
    episodes = tuple(
        Episode(
            task_id="t",
            model="m",
            messages=(),
            text="",
            token_ids=(7, 8, *range(n)),
            loss_mask=(False, False, *[True] * n),
            logps=(0.0, 0.0, *[-1.0] * n),
        )
        for n in lengths
    )
    return Group(Task(id="t"), episodes, tuple(rewards))


def test_dapo_differs_from_grpo_in_clip_weights_overlong_and_kl() -> None:
    settings_ = {"max_tokens": 20, "overlong_cache": 8}
    graded = [group([1.0, 0.0], [4, 20]), group([0.0, 1.0], [4, 16])]
    (grpo,), (dapo,) = credit(GRPO, graded, **settings_), credit(DAPO, graded, **settings_)
    # token mean: every token of DAPO weighs 1/44, GRPO's weigh 1/(4·|y|)
    assert [seq.rl_weight for seq in dapo] == pytest.approx([1 / 44] * 4)
    assert [seq.rl_weight for seq in grpo] == pytest.approx([1 / (4 * n) for n in (4, 20, 4, 16)])
    # soft overlong punishment: L_max 20, cache 8, so 20 tokens cost 1 and 16 tokens cost (12 − 16)/8 = −½
    punished = [[1.0, -1.0], [0.0, 0.5]]
    wanted = [(r - statistics.fmean(g)) / (statistics.stdev(g) + 1e-4) for g in punished for r in g]
    assert [seq.advantage[0] for seq in dapo] == pytest.approx(wanted)
    plain = [(r - 0.5) / (math.sqrt(0.5) + 1e-4) for r in (1.0, 0.0, 0.0, 1.0)]
    assert [seq.advantage[0] for seq in grpo] == pytest.approx(plain)
    assert all(len(set(seq.advantage)) == 1 for seq in grpo + dapo)
    assert all(seq.old_logps == [-1.0] * seq.targets for seq in dapo)
    # clip-higher: at ρ = 1.25 and A > 0 DAPO still has a gradient; at ρ = 1.3 neither has
    for log_ratio, moves in ((math.log(1.25), (False, True)), (math.log(1.3), (False, False))):
        for row, has in zip((replace(GRPO, kl=0.0), DAPO), moves, strict=True):
            batch = collate([sequence(1, rl_weight=1.0, advantage=1.0, old_logps=[-2.0])])
            assert (run(row, batch, [-2.0 + log_ratio])[1][0] != 0) is has
    # no KL: moving the reference changes GRPO's loss only
    for row, changes in ((GRPO, True), (DAPO, False)):
        losses = []
        for reference in (-2.0, -1.0):
            seq = sequence(1, rl_weight=1.0, kl_weight=1.0, old_logps=[-2.0], reference_logps=[reference])
            losses.append(run(row, collate([seq]), [-2.0])[0])
        assert (losses[0] != losses[1]) is changes


def test_minibatches_partition_the_groups_and_each_has_weight_one() -> None:
    graded = [group([1.0, 0.0, 0.5], [2, 3, 4]), group([0.0, 1.0, math.nan], [5, 6, 7])]
    for row in (GRPO, DAPO):
        chunks = credit(row, graded, minibatches=4, max_tokens=20)
        assert sorted(seq.targets for chunk in chunks for seq in chunk) == [2, 3, 4, 5, 6], (
            "what has no grade is left out"
        )
        for chunk in chunks:
            assert sum(seq.rl_weight * seq.targets for seq in chunk) == pytest.approx(1)


def test_entropy_bonus_enters_with_the_tokens_weights() -> None:
    batch = collate([sequence(2, rl_weight=0.25, advantage=0.0, old_logps=[-1.0, -1.0])])
    loss, _ = run(replace(DAPO, entropy=0.1), batch, [-1.0, -1.0], [2.0, 3.0])
    assert loss == pytest.approx(-0.1 * 0.25 * 5)


def test_unknown_rows_are_refused_with_help() -> None:
    with pytest.raises(UnknownName, match="did you mean 'dapo'"):
        row_named("dappo")
    with pytest.raises(UnknownName) as caught:
        row_named("rpo")
    for meaning in ("relative preference optimization", "NLL", "reward-aware"):
        assert meaning in str(caught.value)


def test_metrics_are_sums_and_counts(tiny_model) -> None:
    """Rates over micro-batches add up to the rate of the whole: numerator and denominator, never a mean of means."""
    for row in ROWS.values():
        policy = tiny_policy(tiny_model, moved=0.05, row=row)
        units = global_batch(row, policy)
        everything = collate(flatten(units))
        whole = objective(row)(policy.measure(everything, entropy=True), everything)
        parts = [objective(row)(policy.measure(collate(unit), entropy=True), collate(unit)) for unit in units]
        for name, (top, bottom) in whole.metrics.items():
            assert sum(p.metrics[name][1].item() for p in parts) == pytest.approx(bottom.item(), rel=1e-6)
            assert sum(p.metrics[name][0].item() for p in parts) == pytest.approx(top.item(), rel=1e-4, abs=1e-5)
