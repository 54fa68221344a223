"""`train` from files to a model folder that other libraries read."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from laws.helpers import PROGRAM, RECIPES, Stopped, metrics, run_recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ascent.customize.batch import TrainSequence, collate, micro_batches
from ascent.customize.order import items_at
from ascent.customize.trainer import Optim
from ascent.inference.decoder import load_decoder
from ascent.inference.head import logp_and_entropy
from ascent.inference.tree import Tree
from ascent.records import RunCard
from ascent.records.errors import BadInput, UnknownName

ADAPTER = "adapter/adapter_model.safetensors"
IDS = torch.tensor([[1, 87, 85, 261, 201, 74, 75, 2, 201, 1, 67, 85, 306, 294, 201, 81, 271, 2]])


def logits_logp(model) -> torch.Tensor:
    with torch.no_grad():
        table = model(IDS).logits.float().log_softmax(-1)
    return table[0, :-1].gather(1, IDS[0, 1:, None]).squeeze(1)


def our_logp(folder: Path) -> torch.Tensor:
    model = load_decoder(folder)
    hidden = model.hidden_packed(IDS[0], Tree.flat([IDS.shape[1]]))[:-1]
    return logp_and_entropy(hidden, model.head_weight, IDS[0, 1:])[0]


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_run_leaves_a_model_that_transformers_and_peft_read(
    name: str, use_case: Path, tiny_model: Path, tmp_path: Path
) -> None:
    weights = tiny_model / "model.safetensors"
    start = hashlib.sha256(weights.read_bytes()).hexdigest()
    said: list[dict] = []
    card = run_recipe(use_case, name, tmp_path, announce=said.append)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == start, "the start model is never written to"
    model = tmp_path / "model"
    merged = logits_logp(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    torch.testing.assert_close(merged, our_logp(model), atol=2e-5, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    plain = logits_logp(base)
    moved = 1e-3 if name == "reward_model" else 1e-2  # a reward head at zero passes little on to its trunk at first
    assert (merged - plain).abs().max() > moved, "training changed the model"
    adapted = logits_logp(PeftModel.from_pretrained(base, str(model / "adapter")).eval())
    torch.testing.assert_close(adapted, merged, atol=5e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    assert tokenizer.chat_template
    stored = RunCard.from_json((tmp_path / "run.json").read_bytes())
    assert stored == card
    assert (card.row, card.steps, card.seed) == (name, 12, 3)
    assert card.tokens == sum(row["tokens"] for row in metrics(tmp_path))
    assert [len(source.sha256) for source in card.data] == [64]
    assert not (tmp_path / "checkpoint").exists()
    assert said[0]["steps"] == 12
    adapter = sum(t.numel() for t in load_file(model / ADAPTER).values())
    head = 33 if name in ("ppo", "reward_model") else 0  # 32 weights and a bias
    assert said[0]["trainable parameters"] == adapter + head
    assert (model / "head.safetensors").exists() is (name == "reward_model"), "a critic is not part of the model"


def test_full_training_in_bf16_saves_its_fp32_weights(use_case: Path, tiny_model: Path, tmp_path: Path) -> None:
    run_recipe(use_case, "sft", tmp_path, extra="{lora: null, precision: bf16}")
    assert not (tmp_path / "model" / "adapter").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_logp(saved), our_logp(tmp_path / "model"), atol=2e-5, rtol=1e-5)
    for name, tensor in saved.state_dict().items():
        assert not torch.equal(tensor, start.state_dict()[name]), f"{name} was not trained"
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} lost its low bits"


def test_bf16_adapter_training_follows_fp32(use_case: Path, tmp_path: Path) -> None:
    """The same data and seed: the losses of both precisions stay within bf16's noise."""
    for precision in ("fp32", "bf16"):
        run_recipe(use_case, "sft", tmp_path / precision, extra=f"{{precision: {precision}}}")
    pairs = zip(metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16"), strict=True)
    assert max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs) < 0.03


def test_dead_groups_are_replaced_by_dapo_and_kept_by_grpo(use_case: Path, tmp_path: Path) -> None:
    """A quarter of the prompts scores the same for every sample; only dynamic sampling draws others for them."""
    counts = {}
    for name, axes in (("grpo", "{}"), ("dapo", "{refills: 3}")):
        run_recipe(use_case, name, tmp_path / name, extra=f"{{minibatches: 1, axes: {axes}}}")
        counts[name] = [(row["prompts_drawn"], row["informative_groups"]) for row in metrics(tmp_path / name)]
    assert all(drawn == 3 for drawn, _ in counts["grpo"])
    assert any(share < 1 for _, share in counts["grpo"])
    assert any(drawn > 3 for drawn, _ in counts["dapo"])
    for drawn, share in counts["dapo"]:
        assert round(drawn * share) == 3, "every step trains on three groups with spread"


def test_sampler_reference_and_trainer_speak_of_the_same_temperature(use_case: Path, tmp_path: Path) -> None:
    run_recipe(use_case, "grpo", tmp_path, extra="{temperature: 0.6, minibatches: 1}")
    rows = metrics(tmp_path)
    assert max(abs(row["mismatch_kl"]) for row in rows) < 1e-6
    assert abs(rows[0]["kl"]) < 1e-6, "before the first update the policy is its reference"
    assert rows[-1]["kl"] > 1e-4


def test_prompts_come_in_epochs(use_case: Path, tmp_path: Path) -> None:
    seen, program = tmp_path / "seen", tmp_path / "noting.py"
    note = f"""

def noting(task, episode):
    with open({str(seen)!r}, "a") as file:
        print(task.id, file=file)
    return letters(task, episode)
"""
    program.write_text(PROGRAM + note)
    run_recipe(use_case, "grpo", tmp_path / "run", extra=f"{{program: {program}, reward: noting, minibatches: 1}}")
    drawn = seen.read_text().split()[::4]  # four samples of each
    assert len(drawn) == 12 * 3
    # the three of a step are graded in the order in which they end, so epochs of 16 are told apart by steps of 3
    assert len(set(drawn[:15])) == 15
    assert len(set(drawn[:18])) == len(set(drawn[15:33])) == 16
    assert sorted(Counter(drawn).values()) == [2] * 12 + [3] * 4
    assert [set(drawn[at : at + 3]) for at in (0, 3, 6)] != [set(drawn[at : at + 3]) for at in (18, 21, 24)]


def test_a_reward_without_spread_ends_the_run_early(use_case: Path, tmp_path: Path) -> None:
    program = tmp_path / "flat.py"
    program.write_text(PROGRAM.replace('in "aeiou"', 'in ""'))
    extra = f"{{program: {program}, reward: vowels, minibatches: 1}}"
    said: list[dict] = []
    card = run_recipe(use_case, "dapo", tmp_path / "run", extra=extra, announce=said.append)
    assert card.steps == 3
    assert "no informative group" in said[-1]["ended early"]
    assert [row["reward"] for row in metrics(tmp_path / "run")] == [0.0] * 3
    assert all(row["loss"] == 0 for row in metrics(tmp_path / "run"))


def test_ungraded_samples_are_counted_and_carry_no_gradient(use_case: Path, tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text(
        PROGRAM + "\n\ndef picky(task, episode):\n    return None if episode.sample % 2 else vowels(task, episode)\n"
    )
    run_recipe(use_case, "grpo", tmp_path / "run", extra=f"{{program: {program}, reward: picky}}")
    rows = metrics(tmp_path / "run")
    assert all(row["ungraded"] == 6 for row in rows)
    assert all(isinstance(row["loss"], float) for row in rows), "no NaN may reach the loss"


def test_what_cannot_be_trained_is_refused_before_anything_is_written(use_case: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    long = tmp_path / "long.jsonl"
    empty.write_text("")
    rows = [{"input": {"prompt": "short"}, "target": "fine"}, {"input": {"prompt": "x " * 400}, "target": "y"}]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=r"row 2 has \d+ tokens, the model's context is 256"):
        run_recipe(use_case, "sft", tmp_path / "a", extra=f"{{data: {long}}}")
    with pytest.raises(BadInput):
        run_recipe(use_case, "sft", tmp_path / "b", extra=f"{{data: {empty}}}")
    with pytest.raises(UnknownName, match="did you mean 'vowels'"):
        run_recipe(use_case, "grpo", tmp_path / "c", extra="{reward: vowel}")
    with pytest.raises(BadInput, match="exceed the context"):
        run_recipe(use_case, "grpo", tmp_path / "d", extra="{max_tokens: 250}")
    pairs = tmp_path / "pairs.jsonl"
    pair = {"input": {"prompt": "short"}, "chosen": "fine", "rejected": "no"}
    pairs.write_text("".join(json.dumps(pair | {"rejected": word}) + "\n" for word in ("no", "no " * 400)))
    with pytest.raises(BadInput, match="row 2 has"):
        run_recipe(use_case, "dpo", tmp_path / "e", extra=f"{{data: {pairs}}}")


def test_a_run_killed_after_its_last_step_still_knows_its_last_numbers(
    use_case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_recipe(use_case, "sft", tmp_path / "straight")

    def die(*_) -> None:
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr("ascent.customize.train.save_model", die)
        run_recipe(use_case, "sft", tmp_path / "run")
    assert run_recipe(use_case, "sft", tmp_path / "run").final == straight.final


def test_schedules() -> None:
    """Warm-up rises linearly to the peak, cosine ends at a tenth, linear just above zero, constant stays."""
    total = 100
    for schedule, last in (("constant", 1.0), ("linear", 1 / 90), ("cosine", 0.1)):
        optim = Optim(lr=2.0, schedule=schedule, warmup_fraction=0.1)
        rates = [optim.lr_at(step, total) for step in range(total)]
        assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
        assert max(rates) == 2.0
        assert rates[-1] == pytest.approx(2.0 * last, rel=0.02)
        assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert Optim(lr=1.0, warmup_fraction=0).lr_at(0, 1) == 1.0


@pytest.mark.parametrize(("size", "batch"), [(7, 3), (5, 5), (3, 8), (1, 4)])
def test_order_is_epochs_of_permutations_from_any_position(size: int, batch: int) -> None:
    order = [i for start in range(0, size * 6, batch) for i in items_at(start, batch, size, 11)]
    for epoch in range(5):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert items_at(size * 2, batch, size, 11) == order[size * 2 : size * 2 + batch]
    if size > 3:
        assert order[:size] != order[size : 2 * size]
        assert items_at(0, size, size, 12) != order[:size]


def test_micro_batches_hold_the_budget_and_keep_units_together() -> None:
    units = [[TrainSequence(tuple(range(n)), (False,) + (True,) * (n - 1))] * 2 for n in (3, 20, 7, 5, 4, 12)]
    batches = micro_batches(units, 24)
    assert all(len(b.tokens_T) <= 24 or b.sequences == 2 for b in batches)
    lengths = [[int((b.sequence_M == n).sum()) + 1 for n in range(b.sequences)] for b in batches]
    assert sorted(n for b in lengths for n in b) == sorted(n for n in (3, 20, 7, 5, 4, 12) for _ in "ab")
    assert all(b[0::2] == b[1::2] for b in lengths)
    assert micro_batches([], 10) == []


def test_sequences_that_cannot_be_predicted_are_refused() -> None:
    with pytest.raises(ValueError, match="first token"):
        TrainSequence((1, 2), (True, True))
    with pytest.raises(ValueError, match="same length"):
        TrainSequence((1, 2), (False,))


def test_collate_points_at_the_token_before_each_target() -> None:
    first = TrainSequence((5, 6, 7, 8), (False, True, False, True), ce_weight=0.5, old_logps=[-1, -2])
    second = TrainSequence((9, 10), (False, True), advantage=2.0, reference_logps=[-3])
    batch = collate([first, second])
    assert batch.at_M.tolist() == [0, 2, 4]
    assert batch.targets_M.tolist() == [6, 8, 10]
    assert batch.sequence_M.tolist() == [0, 0, 1]
    assert batch.ce_weight_M.tolist() == [0.5, 0.5, 0.0]
    assert batch.advantage_M.tolist() == [0.0, 0.0, 2.0]
    assert batch.old_logp_M.tolist() == [-1.0, -2.0, 0.0]
    assert batch.reference_logp_M.tolist() == [0.0, 0.0, -3.0]


def test_metrics_never_repeat_or_skip_a_step_when_a_run_breaks_between_checkpoints(
    use_case: Path, tmp_path: Path
) -> None:
    for step in (3, 6, 7, 11):
        with pytest.raises(Stopped):
            run_recipe(use_case, "sft", tmp_path, stop_at=step)
    run_recipe(use_case, "sft", tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 13))
