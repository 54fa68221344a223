"""What rows become when their knobs are neutral: identities between rows, in float64, on log-probs and gradients."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ascent.customize.batch import Scored, TokenBatch, TrainSequence, collate
from ascent.customize.loops.credit import Annotated, credit
from ascent.customize.objectives.credit import gae, reward_to_go, whiten
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.ratio import corrections
from ascent.customize.objectives.rows import ROWS, Clip, OnlineRow, PreferenceRow, Row, row_with
from ascent.customize.rollout import Group
from ascent.inference.head import Distance, divergence
from ascent.records import Episode, Task
from ascent.records.errors import BadInput

ONLINE = [row for row in ROWS.values() if isinstance(row, OnlineRow)]


def sequence(targets: int, **streams: object) -> TrainSequence:
    return TrainSequence((1, *range(2, 2 + targets)), (False, *[True] * targets), **streams)  # type: ignore[arg-type]


def gradient(row: Row, batch: TokenBatch, logp: Tensor, head: Tensor | None = None) -> Tensor:
    leaf = logp.clone().requires_grad_()
    scored = Scored(leaf, torch.zeros_like(leaf), torch.empty(0) if head is None else head)
    objective(row)(scored, batch).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def online_batch(lengths: list[int], logp: Tensor, *, off: float = 0.0, seed: int = 0) -> TokenBatch:
    """Equal weights and fixed advantages; `off` is how far the behaviour policy is from the policy."""
    dice = random.Random(seed)
    made, start = [], 0
    for index, length in enumerate(lengths):
        old = (logp[start : start + length] + off * torch.randn(length, dtype=torch.float64)).tolist()
        start += length
        weight = 1 / (len(lengths) * length)
        made.append(sequence(length, rl_weight=weight, advantage=(-1) ** index * (0.5 + dice.random()), old_logps=old))
    return collate(made)


def rounded(size: int) -> Tensor:
    """Log-probs that fp32 holds exactly, since batches carry their streams in fp32."""
    generator = torch.Generator().manual_seed(size)
    return (-torch.rand(size, generator=generator)).double()


# ------------------------------------------------------------------------------------------------------------- online


@pytest.mark.parametrize("row", ONLINE, ids=lambda row: row.name)
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(row: OnlineRow) -> None:
    """At ρ = 1 the gradient is −w·A per token, whatever the clip, gate, pool or correction.

    A ratio of the whole answer sums its tokens' gradients: with equal weights each token then gets w·A·|y|, or, when
    pooled by the mean, w·A again.
    """
    lengths = [3, 1, 4]
    logp = rounded(8)
    batch = online_batch(lengths, logp)
    expected = -(batch.rl_weight_M * batch.advantage_M).double()
    if row.ratio == "sequence_sum":
        expected = expected * torch.tensor([n for n in lengths for _ in range(n)])
    neutral = replace(row, kl=0.0, entropy=0.0)
    value = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(gradient(neutral, batch, logp, value), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "rloo"])
def test_a_sequence_ratio_of_one_token_is_the_token_ratio(name: str) -> None:
    """|y| = 1: mean, sum and token are the same number."""
    row = ROWS[name]
    assert isinstance(row, OnlineRow)
    logp = rounded(6)
    batch = online_batch([1] * 6, logp, off=2e-4)
    token = replace(row, ratio="token")
    torch.testing.assert_close(gradient(row, batch, logp), gradient(token, batch, logp))


def test_gspo_token_with_one_advantage_a_sequence_is_gspo() -> None:
    """Eq. 14 has the value and, summed over an answer, the gradient of Eq. 7 when all tokens share one advantage."""
    logp = rounded(9)
    batch = online_batch([4, 5], logp, off=1e-4)
    torch.testing.assert_close(
        gradient(ROWS["gspo"], batch, logp), gradient(ROWS["gspo_token"], batch, logp), rtol=1e-9, atol=1e-12
    )


def test_ppo_keeps_a_clipped_token_still_and_cispo_moves_it() -> None:
    logp = torch.tensor([0.0], dtype=torch.float64)
    batch = collate([sequence(1, rl_weight=1.0, advantage=1.0, old_logps=[-1.0])])  # ρ = e
    assert gradient(ROWS["dapo"], batch, logp).item() == 0
    assert gradient(ROWS["cispo"], batch, logp).item() == pytest.approx(-math.e)


def test_dual_clip_bounds_what_a_bad_answer_costs() -> None:
    logp = torch.tensor([2.0], dtype=torch.float64)
    batch = collate([sequence(1, rl_weight=1.0, advantage=-1.0, old_logps=[0.0])])  # ρ = e² = 7.4
    row = ROWS["grpo"]
    assert isinstance(row, OnlineRow)
    assert gradient(replace(row, kl=0.0), batch, logp).item() == pytest.approx(math.e**2)
    assert gradient(replace(row, kl=0.0, clip=Clip(0.8, 1.2, dual=3.0)), batch, logp).item() == 0


def group(rewards: list[float], lengths: list[int], gap: int = 0) -> Group:
    """Episodes of a prompt of two tokens; with a `gap` the tokens of a tool stand in the middle of each answer."""
    episodes = []
    for index, n in enumerate(lengths):
        mask = [False, False, *[True] * (n // 2), *[False] * gap, *[True] * (n - n // 2)]
        dice = random.Random(index)
        logps = [-dice.random() if kept else 0.0 for kept in mask]
        ids = tuple(range(len(mask)))
        episodes.append(
            Episode(
                task_id="t", model="m", messages=(), text="", token_ids=ids, loss_mask=tuple(mask), logps=tuple(logps)
            )
        )
    return Group(Task(id="t"), tuple(episodes), tuple(rewards))


def test_ppo_without_a_critic_is_reward_to_go() -> None:
    """V = 0 and γ = λ = 1: A_t = Σ_{s≥t} r_s."""
    rewards = [0.1, -0.2, 0.0, 1.0]
    found, returns = gae(rewards, [0.0] * 4, 1.0, 1.0)
    assert found == pytest.approx([0.9, 0.8, 1.0, 1.0])
    assert found == pytest.approx(reward_to_go(rewards))
    assert returns == pytest.approx(found)


def test_gae_is_its_definition() -> None:
    """A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γV_{t+1} − V_t, summed term by term; returns are A + V."""
    dice = random.Random(0)
    rewards, values = ([dice.gauss(0, 1) for _ in range(7)] for _ in range(2))
    gamma, lam = 0.97, 0.9
    deltas = [r + gamma * (values[t + 1] if t + 1 < 7 else 0.0) - values[t] for t, r in enumerate(rewards)]
    wanted = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 7)) for t in range(7)]
    found, returns = gae(rewards, values, gamma, lam)
    assert found == pytest.approx(wanted)
    assert returns == pytest.approx([a + v for a, v in zip(wanted, values, strict=True)])


def test_tool_tokens_change_no_advantage() -> None:
    """Credit over episodes with tool output between their tokens equals that of the same tokens without it."""
    row = ROWS["ppo"]
    assert isinstance(row, OnlineRow)

    def said(sequences: object) -> Annotated:
        dice = random.Random(1)
        values = [[dice.gauss(0, 1) for _ in range(n)] for n in (6, 3)]
        reference = [[dice.gauss(-1, 0.3) for _ in range(n)] for n in (6, 3)]
        return Annotated(values=values, reference=reference)

    plain, with_tools = (
        credit(row, [group([1.0, 0.0], [6, 3], gap)], max_tokens=9, annotate=said)[0] for gap in (0, 11)
    )
    for a, b in zip(plain, with_tools, strict=True):
        assert a.advantage == b.advantage
        assert a.returns == b.returns
        assert sum(b.loss_mask) == sum(a.loss_mask)
        assert len(b.token_ids) == len(a.token_ids) + 11


def test_whitening_looks_at_all_tokens_of_the_rollout_and_not_at_minibatches() -> None:
    row = ROWS["reinforce++_baseline"]
    assert isinstance(row, OnlineRow)
    groups = [group([1.0, 0.0, 0.4], [2, 3, 6]), group([0.0, 0.7, 0.2], [5, 1, 4])]
    together = credit(row, groups, max_tokens=9)
    apart = credit(row, groups, max_tokens=9, minibatches=3)
    flat = [value for seq in together[0] for value in seq.advantage]  # type: ignore[union-attr]
    assert sum(flat) / len(flat) == pytest.approx(0, abs=1e-12)
    assert torch.tensor(flat).std().item() == pytest.approx(1, abs=1e-5)
    by_ids = {seq.token_ids: seq.advantage for chunk in apart for seq in chunk}
    assert by_ids == {seq.token_ids: seq.advantage for seq in together[0]}
    assert whiten([[1.0], [3.0]]) == [pytest.approx([-1 / math.sqrt(2)]), pytest.approx([1 / math.sqrt(2)])]


def test_k1_comes_off_the_reward_token_by_token_or_whole() -> None:
    """reinforce++ spreads −β(ℓ − ℓ_ref) over the tokens and sums from each on; rloo takes the answer's sum first."""
    one = group([1.0, 0.5], [2, 2])
    reference = [[-0.5, -0.25], [-1.0, -0.75]]
    old = [[logp for logp, kept in zip(e.logps, e.loss_mask, strict=True) if kept] for e in one.episodes]
    k1 = [[o - r for o, r in zip(a, b, strict=True)] for a, b in zip(old, reference, strict=True)]
    said = Annotated(reference=reference)
    plus = replace(ROWS["reinforce++"], reward_kl=0.5, scale="none")
    (chunk,) = credit(plus, [one], max_tokens=9, annotate=lambda sequences: said)  # type: ignore[arg-type]
    for seq, score, each in zip(chunk, (1.0, 0.5), k1, strict=True):
        assert seq.advantage == pytest.approx([score - 0.5 * sum(each), score - 0.5 * each[1]])
    loo = replace(ROWS["rloo"], reward_kl=0.5)
    (chunk,) = credit(loo, [one], max_tokens=9, annotate=lambda sequences: said)  # type: ignore[arg-type]
    total = [score - 0.5 * sum(each) for score, each in zip((1.0, 0.5), k1, strict=True)]
    assert chunk[0].advantage == pytest.approx([total[0] - total[1]] * 2)


def test_a_teacher_says_how_much_better_each_token_could_be() -> None:
    row = ROWS["opd"]
    assert isinstance(row, OnlineRow)
    one = group([math.nan, math.nan], [2, 3])
    teacher = [[-0.1, -0.2], [-0.3, -0.4, -0.5]]
    (chunk,) = credit(row, [one], max_tokens=9, annotate=lambda sequences: Annotated(teacher=teacher))
    for seq, better in zip(chunk, teacher, strict=True):
        assert seq.advantage == pytest.approx([t - o for t, o in zip(better, seq.old_logps, strict=True)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("truncate", [2.0, 0.5, 1.0]), ("token_mask", [math.e, 0.0, 1.0]), ("sequence_mask", [0.0, 0.0, 0.0])],
)
def test_corrections_of_a_sampler_that_is_not_the_trainer(kind: str, wanted: list[float]) -> None:
    """ρ = (e, ½, and 1 where the sampler gave nothing); bounds 2, [0.6, 5], [0.99, 1.01] of the mean e^0.1."""
    row = replace(ROWS["grpo"], correction=kind, correction_bounds=(0.6, 5.0) if kind == "token_mask" else None)  # type: ignore[arg-type]
    assert corrections([-1.0, -2.0, -3.0], [-2.0, -2.0 + math.log(2), math.nan], row) == pytest.approx(wanted)  # type: ignore[arg-type]
    same = corrections([-1.0, -2.0], [-1.0, -2.0], row)  # type: ignore[arg-type]
    assert same == [1.0, 1.0]


# --------------------------------------------------------------------------------------------------------- preference


def pairs(lengths: list[int], logp: Tensor, *, seed: int = 0, **streams: object) -> TokenBatch:
    dice = random.Random(seed)
    made = []
    for index, length in enumerate(lengths):
        reference = torch.tensor([-dice.random() for _ in range(length)]).tolist()
        own = {name: values[index] for name, values in streams.items()}  # type: ignore[index]
        made.append(sequence(length, reference_logps=reference, **own))
    return collate(made)


def with_axes(name: str, **axes: object) -> PreferenceRow:
    row = row_with(name, axes)
    assert isinstance(row, PreferenceRow)
    return row


def test_relative_preferences_of_one_pair_are_dpo() -> None:
    """Batch 1: ω = 1."""
    logp = rounded(7)
    batch = pairs([3, 4], logp, pair_weight=[1.0, 1.0])
    torch.testing.assert_close(gradient(ROWS["rpo_relative"], batch, logp), gradient(ROWS["dpo"], batch, logp))


def test_relative_preferences_by_hand() -> None:
    """Two pairs with orthogonal prompts, T = ½: ω_ii = 1/(1 + e^−2); loss = mean_ij −log σ(β ω_ij (s_w,i − s_l,j))."""
    logp = rounded(6)
    lengths = [1, 2, 2, 1]
    embedding = [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0)]
    batch = pairs(lengths, logp, pair_weight=[0.5] * 4, embedding=embedding)
    gaps = (logp - batch.reference_logp_M.double()).tolist()
    scores, start = [], 0
    for n in lengths:
        scores.append(sum(gaps[start : start + n]))
        start += n
    same, other = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))
    wanted = 0.0
    for i in range(2):
        for j in range(2):
            m = 0.1 * (same if i == j else other) * (scores[2 * i] - scores[2 * j + 1])
            wanted += math.log1p(math.exp(-m)) / 4
    out = objective(ROWS["rpo_relative"])(Scored(logp, torch.zeros_like(logp)), batch)
    assert out.loss.item() == pytest.approx(wanted, rel=1e-6)


def test_neutral_knobs_give_dpo_and_apo_zero() -> None:
    logp = rounded(12)
    lengths = [3, 4, 2, 3]
    batch = pairs(lengths, logp, pair_weight=[0.5] * 4)
    torch.testing.assert_close(gradient(with_axes("rpo_nll", nll=0.0), batch, logp), gradient(ROWS["dpo"], batch, logp))
    torch.testing.assert_close(
        gradient(with_axes("dpo", label_smoothing=0.0), batch, logp), gradient(ROWS["dpo"], batch, logp)
    )
    single = pairs(lengths, logp, pair_weight=[0.25] * 4, reward=[1.0, -1.0, -1.0, 1.0], anchor=[0.0] * 4)
    torch.testing.assert_close(gradient(ROWS["kto"], single, logp), gradient(ROWS["apo_zero"], single, logp))
    moved = pairs(lengths, logp, pair_weight=[0.25] * 4, reward=[1.0, -1.0, -1.0, 1.0], anchor=[2.0] * 4)
    assert not torch.allclose(gradient(ROWS["kto"], moved, logp), gradient(ROWS["kto"], single, logp))


@pytest.mark.parametrize(("score", "changes"), [("mean", False), ("sum", True)])
def test_saying_an_answer_twice_changes_only_summed_scores(score: str, changes: bool) -> None:
    """IPO on mean log-ratios does not see repeated tokens; summed, as two libraries have it, it scales."""
    row = with_axes("ipo", score=score)
    losses = []
    for times in (1, 2):
        logp = torch.tensor(([-0.5, -1.0] * times) + ([-2.0, -0.25] * times), dtype=torch.float64)
        reference = ([-1.0, -1.5] * times, [-0.5, -0.75] * times)
        batch = collate([sequence(2 * times, pair_weight=1.0, reference_logps=list(r)) for r in reference])
        losses.append(objective(row)(Scored(logp, torch.zeros_like(logp)), batch).loss.item())
    assert (abs(losses[0] - losses[1]) > 0.1) is changes


@pytest.mark.parametrize(("link", "lowest"), [("reward_squared", 0.0), ("reward_kl", 0.0)])
def test_reward_aware_links_are_lowest_where_the_margin_is_the_given_one(link: str, lowest: float) -> None:
    """(βh − ηΔr)² and KL(σ(ηΔr) ‖ σ(βh)) vanish, with their slope, at βh = ηΔr; elsewhere by the textbook formula."""
    row = with_axes("rpo_reward", link=link, eta=2.0)
    for h, delta in ((4.0, 0.2), (1.0, 0.5)):
        logp = torch.tensor([h, 0.0], dtype=torch.float64)
        batch = collate([sequence(1, pair_weight=1.0, reward=r) for r in (delta, 0.0)])
        leaf = logp.clone().requires_grad_()
        out = objective(row)(Scored(leaf, torch.zeros(2)), batch).loss
        m, g = 0.1 * h, 2.0 * delta
        p, q = 1 / (1 + math.exp(-g)), 1 / (1 + math.exp(-m))
        by_hand = (
            (m - g) ** 2 if link == "reward_squared" else p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        )
        assert out.item() == pytest.approx(by_hand, abs=1e-6)
        if m == pytest.approx(g):
            assert out.item() == pytest.approx(lowest, abs=1e-7)


def test_orpo_stays_finite_where_an_answer_is_certain() -> None:
    """log(1 − e^x) is −inf at x = 0: a mean log-prob of exactly 0 must not poison the step (TRL 1473)."""
    logp = torch.tensor([0.0, 0.0, -1e-9, -50.0], dtype=torch.float32)
    batch = collate([sequence(2, pair_weight=1.0), sequence(2, pair_weight=1.0)])
    assert torch.isfinite(gradient(ROWS["orpo"], batch, logp)).all()


# ------------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_student_that_is_its_teacher_has_no_divergence(kind: str) -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(30, 8)
    assert divergence(hidden, weight, hidden, weight, Distance(kind)).abs().max() < 1e-6  # type: ignore[arg-type]


def test_divergences_by_their_definition_and_the_limits_of_the_mixture() -> None:
    """KL by its sum; JSD(β)/β → KL(T‖S) for β → 0 and JSD(β)/(1−β) → KL(S‖T) for β → 1."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (0.4 * torch.randn(3, 6, generator=generator) for _ in range(2))
    weight = torch.randn(20, 6, generator=generator)
    s, t = ((h @ weight.T).double().softmax(-1) for h in (student, teacher))
    forward, reverse = (t * (t / s).log()).sum(-1), (s * (s / t).log()).sum(-1)
    for kind, wanted in (("forward", forward), ("reverse", reverse)):
        found = divergence(student, weight, teacher, weight, Distance(kind))  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    low = divergence(student, weight, teacher, weight, Distance("jsd", 1e-3)) / 1e-3
    high = divergence(student, weight, teacher, weight, Distance("jsd", 1 - 1e-3)) / 1e-3
    assert (low.double() - forward).abs().max() < 0.1 * forward.max()
    assert (high.double() - reverse).abs().max() < 0.1 * reverse.max()


# ----------------------------------------------------------------------------------- choices that do not go together


@pytest.mark.parametrize(
    ("name", "axes", "words"),
    [
        ("gspo", {"weights": "token_mean"}, "seq_mean_token_mean"),
        ("ppo", {"returns": "sequence"}, "to_go"),
        ("ppo", {"scale": "group_std"}, "whiten_tokens"),
        ("gmpo", {"surrogate": "min_clip"}, "geometric"),
        ("kto", {"link": "logistic"}, "sigmoid"),
        ("simpo", {"score": "log_odds", "reference": True}, "reference"),
        ("reward_model", {"nll": 1.0}, "nll"),
        ("distill_jsd", {"beta": 1.0}, "forward"),
        ("maxrl", {"baseline": "none"}, "group_mean"),
        ("ipo", {"label_smoothing": 0.1}, "logistic"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_with_a_remedy(name: str, axes: dict, words: str) -> None:
    with pytest.raises(BadInput, match=f"row {name.replace('+', '.')}") as caught:
        row_with(name, axes)
    assert words in str(caught.value)
