"""`plan`: its counts against real runs, its bytes against real tensors, its operations against torch's own counter."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laws.helpers import random_sequence, run_recipe
from torch.utils.flop_counter import FlopCounterMode

from ascent.cli.train import training_data
from ascent.customize import workload
from ascent.customize.arithmetic import Packed, Shapes, pack
from ascent.customize.batch import TrainSequence, collate, micro_batches
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import row_named
from ascent.customize.plan import PLAN, Outcome, Plan, Rates, machine_rates, plan, record_outcome
from ascent.customize.policy import Policy
from ascent.customize.recipes import Recipe, SupervisedRecipe, load_recipe
from ascent.customize.train import TrainingData, train
from ascent.customize.trainer import Optim, Trainer
from ascent.inference.lora import LoraConfig
from ascent.inference.store import Store
from ascent.records import Message, RunCard, Task
from ascent.records.errors import BadInput

ADAPTERS = {"lora": LoraConfig(4, 8.0), "some": LoraConfig(3, 3.0, ("q_proj", "v_proj", "down_proj")), "full": None}
RATES = Rates(machine="test", threads=1, bf16=4e11, fp32=1e11, copy_rate=1e10, fresh=1e9, measured="2026-01-01")
SIZES = {"bf16": 2, "fp32": 4}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def planned(use_case: Path, name: str, store: Store, **changes: object) -> tuple[Plan, Recipe]:
    recipe = load_recipe(use_case / f"{name}.yaml").model_copy(update=changes)
    return plan(recipe, Path(recipe.model), training_data(recipe), rates=RATES, store=store), recipe


# ── counts ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "extra"), [("sft", ""), ("sft", "{epochs: 1.3, batch_size: 5}"), ("dpo", "")])
def test_tokens_and_steps_are_those_of_the_run(
    use_case: Path, store: Store, tmp_path: Path, name: str, extra: str
) -> None:
    card = run_recipe(use_case, name, tmp_path / "run", extra=extra)
    recipe = type(load_recipe(use_case / f"{name}.yaml")).model_validate(card.recipe)
    found = plan(recipe, Path(recipe.model), training_data(recipe), rates=RATES, store=store)
    assert (found.steps, found.tokens, found.exact) == (card.steps, card.tokens, True)


def test_online_tokens_are_the_most_that_a_run_can_have(use_case: Path, store: Store, tmp_path: Path) -> None:
    found, _ = planned(use_case, "grpo", store)
    card = run_recipe(use_case, "grpo", tmp_path / "run")
    assert found.steps == card.steps
    assert card.tokens <= found.tokens < 2 * card.tokens
    assert not found.exact
    assert found.seconds["sampling"] > 0 and found.seconds["reference"] > 0  # grpo's KL term


def test_a_large_file_is_estimated_from_a_sample(use_case: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of sixteen rows of 35 to 37 tokens tell the rest to within a few per cent."""
    exact, _ = planned(use_case, "sft", store)
    monkeypatch.setattr(workload, "SAMPLE", 8)
    guess, _ = planned(use_case, "sft", store)
    assert not guess.exact
    assert guess.steps == exact.steps
    assert guess.tokens == pytest.approx(exact.tokens, rel=0.05)


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_micro_batches_are_laid_out_as_the_trainer_does(budget: int) -> None:
    dice = random.Random(budget)
    units = [[random_sequence(dice) for _ in range(dice.choice((1, 2)))] for _ in range(40)]
    laid = pack([tuple((len(s.token_ids), s.targets) for s in unit) for unit in units], budget)
    made = micro_batches(units, budget)
    assert [batch.lengths for batch in laid] == [tuple(batch.lengths) for batch in made]
    assert [batch.targets for batch in laid] == [len(batch.at_M) for batch in made]


def test_what_cannot_be_trained_on_cannot_be_planned(use_case: Path, store: Store) -> None:
    recipe = load_recipe(use_case / "sft.yaml")
    long = (Message(role="user", content="word " * 400), Message(role="assistant", content="yes"))
    with pytest.raises(BadInput, match=r"row 1 has .* the model's context is 256"):
        plan(recipe, Path(recipe.model), TrainingData(conversations=[long]), rates=RATES, store=store)
    with pytest.raises(BadInput, match="nothing to train sft on"):
        plan(recipe, Path(recipe.model), TrainingData(), rates=RATES, store=store)
    online = load_recipe(use_case / "grpo.yaml").model_copy(update={"max_tokens": 250})
    task = Task(id="1", messages=long[:1])
    with pytest.raises(BadInput, match="exceed the context of 256"):
        plan(online, Path(online.model), TrainingData(tasks=[task]), rates=RATES, store=store)


# ── bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", SIZES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_weights_and_moments_are_those_of_the_tensors(tiny_model: Path, name: str, precision: str) -> None:
    policy = Policy.load(tiny_model, precision, ADAPTERS[name])
    shapes = Shapes(policy.decoder.config, ADAPTERS[name], SIZES[precision])
    base = [p for key, p in policy.decoder.named_parameters() if "lora" not in key]
    assert shapes.weights == sum(p.numel() * p.element_size() for p in base)
    assert shapes.trainable == sum(p.numel() for p in policy.parameters)
    trainer = Trainer(policy, Optim(1e-3), 1)
    batch = collate([TrainSequence((1, 2, 3), (False, True, True), ce_weight=0.5)])
    trainer.update([batch], objective(row_named("sft")))
    moments = [t for state in trainer._adam.state.values() for key, t in state.items() if key != "step"]
    assert 8 * shapes.trainable == sum(t.numel() * t.element_size() for t in moments)


@pytest.mark.parametrize("lengths", [(96, 90), (200, 170, 40)], ids=["short", "flash"])
@pytest.mark.parametrize("precision", SIZES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_activations_are_what_autograd_keeps(
    tiny_model: Path, name: str, precision: str, lengths: tuple[int, ...]
) -> None:
    """The distinct storages that a forward pass saves for its backward pass, weights excepted, add up to `kept`.

    What is not counted: masks and indices, and the first layer where the frozen base needs no gradient of its input.
    """
    policy = Policy.load(tiny_model, precision, ADAPTERS[name])
    shapes = Shapes(policy.decoder.config, ADAPTERS[name], SIZES[precision])
    weights = {p.untyped_storage().data_ptr() for p in (*policy.decoder.parameters(), *policy.parameters)}
    saved: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # or its address could be given to another
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights and tensor.dtype in (torch.float32, torch.bfloat16):
            saved[place.data_ptr()] = place.nbytes()
        return tensor

    batch = collate([TrainSequence(tuple([7] * n), (False, *[True] * (n - 1))) for n in lengths])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.decoder.hidden_packed(batch.tokens_T, batch.lengths)
    assert shapes.kept(Packed(lengths, len(batch.at_M))) == pytest.approx(sum(saved.values()), rel=0.04)


def test_memory_names_what_a_full_fine_tuning_adds(use_case: Path, store: Store) -> None:
    adapter, _ = planned(use_case, "sft", store)
    full, _ = planned(use_case, "sft", store, lora=None, precision="bf16")
    numbers = Shapes(Policy.load(Path(full.base), "fp32", None).decoder.config, None, 4).parameters
    assert "adapter" in adapter.memory and "reference copy" not in adapter.memory
    assert full.memory["weights"] == 4 * numbers
    assert full.memory["reference copy"] == 2 * numbers
    assert full.memory["optimiser moments"] == 8 * numbers
    assert full.peak_bytes == sum(full.memory.values())


# ── operations and seconds ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lengths", [(96, 90), (200, 170, 40)], ids=["short", "flash"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_operations_are_those_that_torch_counts(tiny_model: Path, name: str, lengths: tuple[int, ...]) -> None:
    """FlopCounterMode counts every product of a real pass.

    It does not know the CPU's kernel for long rows, so there attention is left out. The first layer of
    a frozen base needs no gradient of its input, which saves one product with qkv and one with its A.
    """
    adapter = ADAPTERS[name]
    policy = Policy.load(tiny_model, "fp32", adapter)
    config = policy.decoder.config
    shapes = Shapes(config, adapter, 4)
    batch = collate([TrainSequence(tuple([7] * n), (False, *[True] * (n - 1))) for n in lengths])
    packed = Packed(lengths, len(batch.at_M))
    unseen = 4 * packed.places * packed.longest * config.heads * config.head_size * config.layers
    unseen = unseen if packed.longest > 160 else 0
    with FlopCounterMode(display=False) as counter:
        hidden = policy.decoder.hidden_packed(batch.tokens_T, batch.lengths)
    assert counter.get_total_flops() == shapes.forward(packed).operations - unseen / 2
    with FlopCounterMode(display=False) as counter:
        hidden.sum().backward()
    qkv = next(linear for _, linear in policy.decoder.linears())
    inner = adapter.rank * len(qkv.adapted) if adapter else 0
    unneeded = 2 * packed.tokens * config.width * (qkv.weight.shape[0] + inner) if adapter else 0
    assert counter.get_total_flops() == shapes.backward(packed).operations - unseen * 5 / 4 - unneeded


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_head_operations_are_those_that_torch_counts(tiny_model: Path, full: bool) -> None:
    adapter = None if full else ADAPTERS["lora"]
    policy = Policy.load(tiny_model, "fp32", adapter)
    shapes = Shapes(policy.decoder.config, adapter, 4)
    batch = collate([TrainSequence(tuple([7] * 50), (False, *[True] * 49))])
    packed = Packed((50,), 49)
    with FlopCounterMode(display=False) as counter:
        policy.score(batch, entropy=False)[0].sum().backward()
    work = shapes.head(packed.heads, backward=True)
    body = shapes.forward(packed) + shapes.backward(packed)
    config = policy.decoder.config
    unneeded = 0 if full else 2 * packed.tokens * config.width * (config.width * 2 + 12)  # as above; 3 ranks of 4
    assert counter.get_total_flops() == work.operations + work.single + body.operations - unneeded


def test_full_fine_tuning_is_six_operations_per_parameter_and_token(tiny_model: Path) -> None:
    shapes = Shapes(Policy.load(tiny_model, "fp32", None).decoder.config, None, 4)
    batch = Packed((16,) * 4, 1)
    scores = 4 * batch.places * batch.longest * shapes.config.heads * shapes.config.head_size * shapes.config.layers
    both = shapes.forward(batch) + shapes.backward(batch)
    assert both.operations - 3 * scores == 6 * shapes.linear * batch.tokens


def test_seconds_follow_the_rates(use_case: Path, store: Store) -> None:
    """With free memory traffic only products take time, in fp32 here; twice the rate is half the time."""
    recipe = load_recipe(use_case / "sft.yaml")
    data = training_data(recipe)
    free = RATES.model_copy(update={"copy_rate": math.inf, "fresh": math.inf})
    slow = plan(recipe, Path(recipe.model), data, rates=free, store=store)
    fast = plan(recipe, Path(recipe.model), data, rates=free.model_copy(update={"fp32": 2e11}), store=store)
    assert slow.total_seconds == pytest.approx(2 * fast.total_seconds)
    assert slow.seconds["optimiser"] == slow.seconds["first touch of memory"] == 0
    same = plan(recipe, Path(recipe.model), data, rates=free.model_copy(update={"bf16": 1.0}), store=store)
    assert same.seconds == slow.seconds


def test_small_batches_sample_at_the_speed_of_memory(tiny_model: Path) -> None:
    """Operations double with the rows; the weights are read once a step however many rows there are."""
    config = Policy.load(tiny_model, "fp32", None).decoder.config
    shapes = Shapes(replace(config, vocab=40_000, layers=30, mlp=4096, width=1024), LoraConfig(1), 2)
    one, two, many = (shapes.sampling([20], 0, n, 64, 128)[1] for n in (1, 2, 64))
    assert two.operations == 2 * one.operations
    assert one.traffic < two.traffic < 1.02 * one.traffic
    rate, copy = 4e11, 2e10
    assert one.operations / rate < one.traffic / copy / 10
    assert many.operations / rate > many.traffic / copy


# ── outcomes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_outcome_is_recorded_beside_the_run_and_corrects_the_next_plan(
    use_case: Path, store: Store, tmp_path: Path
) -> None:
    first, _ = planned(use_case, "sft", store)
    card = run_recipe(use_case, "sft", tmp_path / "run")
    outcome = record_outcome(first, card, tmp_path / "run", store=store)
    assert Outcome.from_json((tmp_path / "run" / PLAN).read_bytes()) == outcome
    assert outcome.error["tokens"] == outcome.error["steps"] == 0
    assert outcome.error["seconds"] == pytest.approx(card.seconds / first.total_seconds - 1)
    assert outcome.error["peak_mb"] == pytest.approx(card.peak_rss_mb * 2**20 / first.peak_bytes - 1)
    second, _ = planned(use_case, "sft", store)
    assert second.past_runs == 1
    assert second.total_seconds == pytest.approx(card.seconds)
    record_outcome(second, card, tmp_path / "run", store=store)  # the same run again teaches nothing new
    assert planned(use_case, "sft", store)[0].past_runs == 1
    assert planned(use_case, "dpo", store)[0].past_runs == 0


def test_the_slowdown_is_a_median_of_finished_runs_of_like_models(use_case: Path, store: Store, tmp_path: Path) -> None:
    found, _ = planned(use_case, "sft", store)
    raw = found.total_seconds / found.slowdown
    for index, factor in enumerate((2.0, 3.0, 50.0)):
        card = RunCard(id=str(index), row="sft", recipe={}, base="", seed=0, steps=found.steps, seconds=factor * raw)
        record_outcome(found, card, tmp_path / str(index), store=store)
    early = RunCard(id="early", row="sft", recipe={}, base="", seed=0, steps=1, seconds=1.0)
    record_outcome(found, early, tmp_path / "early", store=store)
    giant = found.model_copy(update={"parameters": 5 * found.parameters})
    record_outcome(giant, card, tmp_path / "giant", store=store)
    again, _ = planned(use_case, "sft", store)
    assert (again.slowdown, again.past_runs) == (pytest.approx(3.0), 3)


def test_rates_are_measured_once(store: Store) -> None:
    first = machine_rates(store, seconds=0.05)
    assert first.bf16 > 1e8 and first.fp32 > 1e8 and first.copy_rate > 1e8 and first.fresh > 1e7
    assert machine_rates(store, seconds=0.05) == first
    again = machine_rates(store, again=True, seconds=0.05)
    assert again.machine == first.machine and again != first
    assert len(list((store.root / "machines").glob("*.json"))) == 1


def test_price_and_json(use_case: Path, store: Store) -> None:
    recipe = load_recipe(use_case / "sft.yaml")
    found = plan(recipe, Path(recipe.model), training_data(recipe), rates=RATES, price_per_hour=36.0, store=store)
    assert found.cost == pytest.approx(found.total_seconds / 100)
    assert Plan.from_json(json.dumps(json.loads(found.to_json()))) == found


@pytest.mark.slow
def test_a_real_model_takes_what_was_planned(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two short SFT runs of SmolLM2: memory within a quarter; time, once a run was seen, within half.

    The bounds are those of a shared machine, whose speed halves when others compute.
    """
    name = "smollm2-135m-instruct"
    start = Store().resolve(name)
    template = {"algorithm": "sft", "model": name, "data": "none.jsonl", "batch_size": 8, "token_budget": 1024}
    dice = random.Random(0)
    talks = [
        (
            Message(role="user", content=f"Rewrite item {i}: " + "one tablet by mouth daily " * dice.randint(4, 12)),
            Message(role="assistant", content="Take it with food. " * dice.randint(3, 9)),
        )
        for i in range(48)
    ]
    data = TrainingData(conversations=talks)
    outcomes = []
    for seed in range(2):
        recipe = SupervisedRecipe.model_validate({**template, "seed": seed})
        found = plan(recipe, start, data, store=store)
        card = train(recipe, start, data, tmp_path / str(seed))
        outcomes.append(record_outcome(found, card, tmp_path / str(seed), store=store))
    with capsys.disabled():
        sys.stderr.write("".join(f"\n{o.predicted} predicted, {o.actual} actual, {o.error}" for o in outcomes))
    assert all(outcome.error["tokens"] == 0 for outcome in outcomes)
    assert abs(outcomes[0].error["peak_mb"]) < 0.25
    assert abs(outcomes[1].error["seconds"]) < 0.5
