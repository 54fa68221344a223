"""Laws that every registered row keeps: a new row joins these tests by being registered."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from laws.helpers import (
    LONGEST,
    Result,
    Units,
    flatten,
    global_batch,
    loss_and_gradient,
    random_sequence,
    tiny_policy,
)
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from ascent.customize.batch import Scored, TrainSequence, collate, micro_batches
from ascent.customize.loops.online import require_current
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import ROWS, OnlineRow, PreferenceRow, Row, SupervisedRow
from ascent.customize.objectives.weights import WEIGHTS
from ascent.customize.policy import Policy
from ascent.customize.trainer import Optim, Trainer
from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Prompt, Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.tree import fold
from ascent.records import Message
from ascent.records.errors import AscentError

every_row = pytest.mark.parametrize("row", list(ROWS.values()), ids=list(ROWS))
either_training = pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])


@every_row
@either_training
def test_any_split_and_order_gives_the_same_loss_and_gradient(row: Row, full: bool, tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, full=full, moved=0.05, row=row)
    units = global_batch(row, policy)
    whole = loss_and_gradient(policy, row, [collate(flatten(units))])
    assert whole.gradient.norm() > 1e-3
    splits = {
        "one unit each": [collate(unit) for unit in units],
        "budget 40": micro_batches(units, 40),
        "budget 1": micro_batches(units, 1),
        "no bound": micro_batches(units, 10**9),
    }
    dice = random.Random(1)
    for attempt in range(min(4, len(units))):
        shuffled = dice.sample(units, len(units))
        cuts = sorted({0, len(units), *dice.sample(range(1, len(units)), attempt)})
        pieces = [shuffled[a:b] for a, b in itertools.pairwise(cuts)]
        splits[f"random {attempt}"] = [collate(flatten(piece)) for piece in pieces]
    assert len(splits["budget 40"]) > 1 or len(units) == 1, "only a row that crosses all pairs has one unit"
    for batches in splits.values():
        assert sum(batch.sequences for batch in batches) == len(flatten(units))
        loss_and_gradient(policy, row, batches, 1.0).assert_close(whole)


@every_row
@pytest.mark.parametrize("width", [2, 3])
def test_any_data_parallel_width_gives_the_same_loss_and_gradient(row: Row, width: int, tiny_model: Path) -> None:
    """Each of `width` workers takes every so-manieth unit and splits it by its own budget; all of it adds up."""
    policy = tiny_policy(tiny_model, moved=0.05, row=row)
    units = global_batch(row, policy)
    whole = loss_and_gradient(policy, row, [collate(flatten(units))])
    parts = [
        loss_and_gradient(policy, row, micro_batches(units[rank::width], 40 + 30 * rank))
        for rank in range(width)
        if units[rank::width]
    ]
    total = Result(sum(part.loss for part in parts), torch.stack([part.gradient for part in parts]).sum(0))
    total.assert_close(whole)


@every_row
def test_the_rule_of_a_mean_of_means_breaks_this_law(row: Row, tiny_model: Path) -> None:
    """The test above can fail: weights made per micro-batch, the common bug, give another loss."""
    policy = tiny_policy(tiny_model, moved=0.05, row=row)
    units = global_batch(row, policy)
    if len(units) == 1:
        pytest.skip("a batch whose pairs are crossed is never split")
    whole = loss_and_gradient(policy, row, [collate(flatten(units))])
    halves = (units[:1], units[1:])
    for half in halves:
        seqs = flatten(half)
        name = row.weights if row.kind != "preference" else "token_mean"
        for seq, weight in zip(seqs, WEIGHTS[name]([s.targets for s in seqs], LONGEST), strict=True):
            scale = 1 / len(halves)
            seq.ce_weight = weight * scale if seq.ce_weight else 0.0
            seq.rl_weight = seq.kl_weight = weight * scale if seq.rl_weight else 0.0
            seq.pair_weight = 1 / len(half) * scale if seq.pair_weight else 0.0
    wrong = loss_and_gradient(policy, row, [collate(flatten(half)) for half in halves])
    assert (wrong.gradient - whole.gradient).norm() > 0.02 * whole.gradient.norm()


@every_row
def test_packed_neighbours_do_not_contaminate(row: Row, tiny_model: Path) -> None:
    """A neighbour of weight zero, whatever its tokens, changes neither the others' log-probs nor loss and gradient."""
    policy = tiny_policy(tiny_model, moved=0.05, row=row)
    units = global_batch(row, policy)
    if len(units) == 1:
        pytest.skip("a neighbour of crossed pairs is a pair of the batch and changes the row's own mean")
    alone = loss_and_gradient(policy, row, [collate(flatten(units))])
    logp_alone = policy.score(collate(flatten(units)))[0].detach()
    for seed in (1, 2):
        dice = random.Random(seed)
        guests = [random_sequence(dice) for _ in range(4)]
        mixed: Units = [guests[:2], units[0], guests[2:], *units[1:]]
        batch = collate(flatten(mixed))
        loss_and_gradient(policy, row, [batch]).assert_close(alone)
        mine = torch.tensor([i not in (0, 1, *range(2 + len(units[0]), 4 + len(units[0]))) for i in batch.sequence_M])
        torch.testing.assert_close(policy.score(batch)[0].detach()[mine], logp_alone, atol=3e-6, rtol=0)


@every_row
def test_only_target_tokens_are_predicted(row: Row, tiny_model: Path) -> None:
    """The gradient of the loss in the logits is exactly zero at every position that does not predict a target."""
    policy = tiny_policy(tiny_model, moved=0.05, row=row)
    if getattr(row, "score", "") == "head" or (isinstance(row, SupervisedRow) and row.teacher):
        pytest.skip("this row's loss is not a function of the targets' log-probs")
    units = global_batch(row, policy)
    batch = collate(flatten(units))
    value = policy.measure(batch).head.detach().double()
    with torch.no_grad():
        hidden = policy.decoder.hidden_packed(batch.tokens_T, batch.tree)
        logits = (hidden @ policy.decoder.head_weight.T).double()
    logits.requires_grad_()
    dense = logits.log_softmax(-1)
    logp = dense[batch.at_M, batch.targets_M]
    objective(row)(Scored(logp, -(dense.exp() * dense).sum(-1)[batch.at_M], value), batch).loss.backward()
    predicting = torch.zeros(len(logits), dtype=torch.bool)
    for seq, path in zip(flatten(units), fold([seq.token_ids for seq in flatten(units)])[2], strict=True):
        predicting[[int(path[i - 1]) for i, kept in enumerate(seq.loss_mask) if kept]] = True
    assert torch.count_nonzero(logits.grad[~predicting]) == 0
    moved = logits.grad[predicting].abs().sum(-1) > 0
    clipped_away = 0.6 if isinstance(row, OnlineRow) else 0.0
    assert moved.float().mean() >= 1 - clipped_away
    said = [token for seq in flatten(units) for token, kept in zip(seq.token_ids, seq.loss_mask, strict=True) if kept]
    assert batch.targets_M.tolist() == said


@every_row
def test_weights_of_a_global_batch_sum_to_one(row: Row, tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, row=row)
    for seed in range(3):
        units = global_batch(row, policy, seed=seed, units=5 + seed)
        batches = micro_batches(units, 50)
        if row.kind == "supervised":
            total = sum(batch.ce_weight_M.sum().item() for batch in batches)
        elif row.kind == "preference":
            assert isinstance(row, PreferenceRow)
            step = 1 if row.pairing == "unpaired" else 2
            total = sum(batch.pair_weight_N[0::step].sum().item() for batch in batches)
        else:
            total = sum(batch.rl_weight_M.sum().item() for batch in batches)
            if row.weights == "seq_mean_token_sum":  # Dr. GRPO's constant: the mean length over the longest allowed
                lengths = [seq.targets for seq in flatten(units)]
                total /= sum(lengths) / len(lengths) / LONGEST
            kl_total = sum(batch.kl_weight_M.sum().item() for batch in batches)
            assert kl_total == pytest.approx(sum(batch.rl_weight_M.sum().item() for batch in batches))
        assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapter_off_and_a_fresh_adapter_are_the_base_bit_for_bit(precision: str, tiny_model: Path) -> None:
    dice = random.Random(0)
    batch = collate([random_sequence(dice) for _ in range(5)])
    policy = tiny_policy(tiny_model, precision=precision)
    base = Policy.load(tiny_model, precision, None).score(batch)[0].detach()
    assert torch.equal(policy.score(batch)[0].detach(), base)
    assert torch.equal(policy.reference(batch), base)
    moved = tiny_policy(tiny_model, moved=0.1, precision=precision)
    assert torch.equal(moved.reference(batch), base)
    assert not torch.allclose(moved.score(batch)[0].detach(), base, atol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_training_keeps_the_start_model_as_reference(precision: str, tiny_model: Path) -> None:
    dice = random.Random(0)
    batch = collate([random_sequence(dice) for _ in range(5)])
    policy = tiny_policy(tiny_model, full=True, precision=precision)
    start = load_decoder(tiny_model).parameters()
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters, start, strict=True)), "no bit was rounded away"
    before = policy.reference(batch)
    assert torch.equal(policy.score(batch)[0].detach(), before)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter += 0.05
    assert torch.equal(policy.reference(batch), before)
    assert not torch.allclose(policy.score(batch)[0].detach(), before, atol=1e-2)


def test_add_reference_fills_each_sequence_with_its_own_scores(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, moved=0.1)
    dice = random.Random(4)
    units = [[random_sequence(dice), random_sequence(dice)] for _ in range(5)]
    policy.add_reference(units, 30)
    for seq in flatten(units):
        alone = policy.reference(collate([seq]))
        torch.testing.assert_close(torch.tensor(seq.reference_logps), alone, atol=3e-6, rtol=0)


def sampled(engine: TorchEngine, temperature: float) -> list[TrainSequence]:
    prompts = [Prompt((Message(role="user", content=text),)) for text in ("Take one", "a day", "food and 12 foxes")]
    found = []
    for group in engine.generate(prompts, Sampling(n=3, max_tokens=12, temperature=temperature, seed=5)):
        for done in group:
            mask = (False,) * len(done.prompt_ids) + (True,) * len(done.token_ids)
            found.append(TrainSequence(done.prompt_ids + done.token_ids, mask, old_logps=done.logps))
    return found


@either_training
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_after_synchronising(full: bool, temperature: float, tiny_model: Path) -> None:
    """Every sampled token's log-prob equals the trainer's `score` of it, at the sampling temperature."""
    policy = tiny_policy(tiny_model, full=full, moved=0.05)
    engine = TorchEngine(load_decoder(tiny_model), Renderer(tiny_model), "tiny")
    engine.synchronise(policy.decoder)
    batch = collate(sampled(engine, temperature))
    logp, _ = policy.score(batch, temperature=temperature)
    assert (logp.detach() - batch.old_logp_M).abs().max() <= 1e-5
    wrong, _ = policy.score(batch, temperature=temperature * 1.5)
    assert (wrong.detach() - batch.old_logp_M).abs().max() > 0.05


@either_training
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stale_sampler_is_refused(full: bool, precision: str, tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, full=full, moved=0.05, precision=precision)
    trainer = Trainer(policy, Optim(lr=0.1, warmup_fraction=0), 10)
    dtype = policy.decoder.dtype
    engine = TorchEngine(load_decoder(tiny_model, dtype), Renderer(tiny_model), "tiny")
    with pytest.raises(AscentError, match="synchronise"):
        require_current(engine, trainer)
    engine.synchronise(policy.decoder)
    require_current(engine, trainer)
    row = ROWS["sft"]
    trainer.update([collate(flatten(global_batch(row, policy)))], objective(row))
    with pytest.raises(AscentError, match="synchronise"):
        require_current(engine, trainer)
    engine.synchronise(policy.decoder)
    require_current(engine, trainer)
    with torch.no_grad():
        *_, (_, last) = engine.decoder.linears()
        last.weight[0, 0] += 1  # the hash says current, the weights do not
    with pytest.raises(AscentError, match="synchronise"):
        require_current(engine, trainer)


WIDTHS = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama with bias": LlamaConfig(**WIDTHS, attention_bias=True),
    "qwen2": Qwen2Config(**WIDTHS, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**WIDTHS, head_dim=6),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_synchronising_copies_every_weight_of_every_family(family: str, tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    policy = tiny_policy(tmp_path, full=True, moved=0.1)
    engine = TorchEngine(load_decoder(tmp_path), Renderer(tiny_model), family)
    engine.synchronise(policy.decoder)
    ours = dict(engine.decoder.named_parameters())
    for name, trained in policy.decoder.named_parameters():
        assert torch.equal(ours[name], trained), name


def test_an_update_without_finite_gradient_changes_nothing(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, moved=0.05)
    trainer = Trainer(policy, Optim(lr=1.0), 5)
    before = [parameter.detach().clone() for parameter in policy.parameters]
    seq = random_sequence(random.Random(0))
    seq.ce_weight = float("inf")
    numbers = trainer.update([collate([seq])], objective(ROWS["sft"]))
    assert not torch.isfinite(torch.tensor(numbers["grad_norm"]))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters, strict=True))
    assert trainer.update([], objective(ROWS["sft"]))["grad_norm"] == 0, "a step without sequences is no error"
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters, strict=True))


def test_an_update_steps_once_for_any_number_of_micro_batches(tiny_model: Path) -> None:
    """AdamW's first step moves every number by lr·g/|g|, whichever way the batch was cut."""
    row = ROWS["dapo"]
    ends = []
    for budget in (1, 10**9):
        policy = tiny_policy(tiny_model, moved=0.05)
        units = global_batch(row, policy)
        trainer = Trainer(policy, Optim(lr=1e-3, schedule="constant", warmup_fraction=0), 5)
        numbers = trainer.update(micro_batches(units, budget), objective(row))
        ends.append((torch.cat([p.detach().flatten() for p in policy.parameters]), numbers))
        assert trainer.step == 1
        assert all(parameter.grad is None for parameter in policy.parameters)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4, abs=1e-6)
    assert (ends[0][0] - ends[1][0]).abs().mean() < 1e-6
