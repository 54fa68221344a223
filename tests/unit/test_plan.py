"""`plan`: its counts against real runs, its bytes against real tensors, its operations against torch's own counter."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.helpers import run_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ascent.cli.train import training_data
from ascent.customize import workload
from ascent.customize.arithmetic import Packed, Shapes
from ascent.customize.batch import TokenBatch, TrainSequence, collate
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import row_named
from ascent.customize.order import items_at
from ascent.customize.plan import PLAN, Outcome, Plan, Rates, machine_rates, plan, record_outcome
from ascent.customize.policy import DTYPES, Policy
from ascent.customize.recipes import Recipe, SupervisedRecipe, load_recipe
from ascent.customize.train import TrainingData, train
from ascent.customize.trainer import Optim, Trainer
from ascent.inference import cache, sampler
from ascent.inference.cache import Cache
from ascent.inference.chat import Renderer
from ascent.inference.decoder import Decoder, DecoderConfig
from ascent.inference.engine import Sampling
from ascent.inference.head import Distance, divergence
from ascent.inference.lora import LoraConfig, merge
from ascent.inference.store import Store
from ascent.inference.tree import Tree, fold
from ascent.records import Message, RunCard, Task
from ascent.records.errors import BadInput

ADAPTERS = {"lora": LoraConfig(4, 8.0), "some": LoraConfig(3, 3.0, ("q_proj", "v_proj", "down_proj")), "full": None}
RATES = Rates(machine="test", threads=1, bf16=4e11, fp32=1e11, copy_rate=1e10, fresh=1e9, measured="2026-01-01")
SIZES = {"bf16": 2, "fp32": 4}
TREES = ("flat", "tree")


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


@pytest.mark.parametrize("name", ["sft", "dpo", "rpo_relative", "kto"])
def test_micro_batches_are_those_of_the_run(
    use_case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever the trainer is given in each step, tree by tree."""
    trained: list[list[Packed]] = []
    update = Trainer.update

    def noted(self: Trainer, batches: list[TokenBatch], *args: Any, **options: Any) -> dict[str, float]:
        trained.append([Packed.of(batch) for batch in batches])
        return update(self, batches, *args, **options)

    monkeypatch.setattr(Trainer, "update", noted)
    run_recipe(use_case, name, tmp_path / "run")
    recipe = load_recipe(use_case / f"{name}.yaml")
    load = workload.workload_of(recipe, training_data(recipe), Renderer(Path(recipe.model)), 256)
    assert load.batches == trained
    folded = any(len(set(batch.tree.parents)) > 1 for step in trained for batch in step)
    assert folded == (name in ("dpo", "rpo_relative"))


def test_samples_of_a_prompt_are_planned_with_their_prompt_once(use_case: Path) -> None:
    """Three prompts have four samples of 8 tokens, half of which make a step: its tree holds each prompt once."""
    recipe = load_recipe(use_case / "grpo.yaml").model_copy(update={"token_budget": 10_000})
    data, renderer = training_data(recipe), Renderer(Path(recipe.model))
    load = workload.workload_of(recipe, data, renderer, 256)
    prompts = [renderer.prompt_ids(task.messages) for task in data.tasks]
    for step, batches in enumerate(load.batches):
        drawn = [prompts[i] for i in items_at(3 * (step // 2), 3, len(prompts), recipe.seed)]
        (batch,) = batches
        assert batch.tree.nodes == fold(drawn)[0].nodes + 6 * 8
        assert batch.predictions == 6 * 8
    assert load.tokens == 4 * sum(len(prompts[i]) + 8 for i in items_at(0, 18, 16, recipe.seed))


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


def tree_of(name: str) -> TokenBatch:
    """Sequences without a common token, or groups of answers to long prompts with turns that go on; of some a tile's
    scores exceed the cache."""
    fresh = itertools.count(1)
    if name == "flat":
        parts = [[n] for n in (96, 90, 17)]
    else:
        prompt, turn = (list(itertools.islice(fresh, n)) for n in (130, 40))
        parts = [[prompt, 20], [prompt, 25], [prompt, turn, 30], [prompt, turn, 900], [prompt, turn], [44]]
    sequences = []
    for stretches in parts:
        ids = [i for part in stretches for i in (part if isinstance(part, list) else itertools.islice(fresh, part))]
        sequences.append(TrainSequence(tuple(i % 300 for i in ids), (False, *[True] * (len(ids) - 1))))
    return collate(sequences)


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


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("precision", SIZES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_activations_are_what_autograd_keeps(tiny_model: Path, name: str, precision: str, shape: str) -> None:
    """The distinct storages that a forward pass saves for its backward pass, weights excepted, add up to `kept`.

    What is not counted: indices, and the weights of norms in the compute type.
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

    batch = tree_of(shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.decoder.hidden_packed(batch.tokens_T, batch.tree)
    assert shapes.kept(Packed.of(batch)) == pytest.approx(sum(saved.values()), rel=0.01)


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as those live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self._note(tensor.untyped_storage())
        self.most = max(self.most, self.live)
        return result

    def _note(self, place: torch.UntypedStorage) -> None:
        if place._cdata not in self.known:
            self.known.add(place._cdata)
            self.live += place.nbytes()
            weakref.finalize(place, self._forget, place._cdata, place.nbytes())

    def _forget(self, name: int, size: int) -> None:
        self.known.remove(name)
        self.live -= size


@pytest.mark.parametrize("precision", SIZES)
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_pass_peaks_where_the_head_runs(tiny_model: Path, name: str, precision: str) -> None:
    """What is alive at most while a batch is scored and differentiated is what the layers keep and the head holds.

    The vocabulary is larger than the tiny model's, as the head is beside attention in a real one.
    """
    config = replace(DecoderConfig.from_folder(tiny_model), vocab=8000)
    decoder = Decoder(config, DTYPES[precision])
    for parameter in decoder.parameters():
        parameter.requires_grad_(False).normal_(0, 0.1)
        parameter.data = parameter.data.to(DTYPES[precision])
    policy = Policy(decoder, adapter=ADAPTERS[name])
    batch = tree_of("flat")
    with Peak() as peak:
        policy.score(batch, entropy=False)[0].sum().backward()
    shapes, packed = Shapes(config, ADAPTERS[name], SIZES[precision]), Packed.of(batch)
    assert shapes.kept(packed) + shapes.head_held(packed) == pytest.approx(peak.most, rel=0.05)


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


def counting() -> FlopCounterMode:
    """Torch's counter, which by itself does not know a product that is added in place."""

    def product(into: Any, left: list[int], right: list[int], **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_operations_are_those_that_torch_counts(tiny_model: Path, name: str, shape: str) -> None:
    """FlopCounterMode counts every product of a real pass.

    The first layer of a frozen base needs no gradient of its input: one product with qkv and one with its A less.
    """
    policy = Policy.load(tiny_model, "fp32", ADAPTERS[name])
    shapes = Shapes(policy.decoder.config, ADAPTERS[name], 4)
    batch = tree_of(shape)
    packed = Packed.of(batch)
    with counting() as counter:
        hidden = policy.decoder.hidden_packed(batch.tokens_T, batch.tree)
    assert counter.get_total_flops() == shapes.forward(packed).operations
    with counting() as counter:
        hidden.sum().backward()
    assert counter.get_total_flops() == shapes.backward(packed).operations - first_layer(policy, packed)


def first_layer(policy: Policy, packed: Packed) -> int:
    """Operations that a frozen base saves in its first layer."""
    qkv = next(linear for _, linear in policy.decoder.linears())
    inner = policy.adapter.rank * len(qkv.adapted) if policy.adapter else 0
    return 2 * packed.tokens * qkv.inputs * (qkv.weight.shape[0] + inner) if policy.adapter else 0


@pytest.mark.parametrize("bonus", [False, True], ids=["logp", "bonus"])
@pytest.mark.parametrize("entropy", [False, True], ids=["plain", "entropy"])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_head_operations_are_those_that_torch_counts(tiny_model: Path, name: str, entropy: bool, bonus: bool) -> None:
    policy = Policy.load(tiny_model, "fp32", ADAPTERS[name])
    shapes = Shapes(policy.decoder.config, ADAPTERS[name], 4)
    batch = tree_of("tree")
    packed = Packed.of(batch)
    with counting() as counter:
        logp, ent = policy.score(batch, entropy=entropy)
        (logp.sum() + ent.sum() if bonus else logp.sum()).backward()
    work = shapes.head(packed.rows, backward=True, entropy=entropy, bonus=bonus)
    body = shapes.forward(packed) + shapes.backward(packed)
    made = work.operations + work.single + body.operations - first_layer(policy, packed)
    assert counter.get_total_flops() == made
    with counting() as counter:
        policy.reference(batch)
    work = shapes.head(packed.rows, backward=False) + shapes.forward(packed, trains=False)
    assert counter.get_total_flops() == work.operations


@pytest.mark.parametrize("name", ["lora", "full"])
def test_divergence_operations_are_those_that_torch_counts(tiny_model: Path, name: str) -> None:
    policy = Policy.load(tiny_model, "fp32", ADAPTERS[name])
    shapes = Shapes(policy.decoder.config, ADAPTERS[name], 4)
    student, weight = torch.randn(300, shapes.config.width, requires_grad=True), policy.decoder.head_weight
    known, theirs = torch.randn(300, shapes.config.width), weight.detach().clone()
    with counting() as counter:
        divergence(student, weight, known, theirs, Distance("forward")).sum().backward()
    assert counter.get_total_flops() == shapes.divergence(300, shapes).operations


def test_full_fine_tuning_is_six_operations_per_parameter_and_token(tiny_model: Path) -> None:
    """Beside attention, which has 2 products with each score forward and 5 backward."""
    shapes = Shapes(Policy.load(tiny_model, "fp32", None).decoder.config, None, 4)
    batch = Packed(Tree.flat((16,) * 4), 1)
    scores = 4 * 16 * 16 * shapes.config.heads * shapes.config.head_size * shapes.config.layers
    both = shapes.forward(batch) + shapes.backward(batch)
    assert both.operations - 14 * scores == 6 * shapes.linear * batch.tokens


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


def test_sampling_operations_are_those_that_torch_counts(tiny_model: Path) -> None:
    """Groups on top of prompts on top of a prefix: prefills exactly, decoding on average over an answer's length.

    The sampler rounds what it reads up to 16 places, and here all products are torch's own, which its counter knows.
    """
    policy = Policy.load(tiny_model, "fp32", ADAPTERS["lora"])
    decoder, samples, tokens, shared = policy.decoder, 8, 40, 24
    merge(decoder)
    shapes = Shapes(decoder.config, ADAPTERS["lora"], 4)
    prompts = [[*range(shared), *range(100 + 10 * i, 160 + 10 * i)] for i in range(4)]
    sampling = Sampling(n=samples, max_tokens=tokens, temperature=1.0)
    fill, decode = shapes.sampling([len(prompt) for prompt in prompts], shared, samples, tokens, 128)
    with counting() as counter:
        sampler.sample_rows(decoder, prompts, sampling, sampler.Ending(), seeds=[0] * 4, rows_in_flight=128)
    assert fill.operations + decode.operations == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_prompts_in_flight_are_read_once_for_all_their_rows(tiny_model: Path) -> None:
    """Where keys and values of long prompts are most of what is read, twice the samples take hardly longer."""
    config = replace(Policy.load(tiny_model, "fp32", None).decoder.config, layers=30, kv_heads=4, head_size=64)
    shapes, tokens = Shapes(config, LoraConfig(1), 2), 8
    few, many = (shapes.sampling([4000] * 2, 0, n, tokens, 128)[1] for n in (8, 16))
    assert few.traffic > 2 * 30 * 4 * 64 * 2 * 2 * 4000 * tokens
    assert few.traffic < many.traffic < 1.1 * few.traffic


@pytest.mark.parametrize(("samples", "shared"), [(1, 0), (1, 40), (8, 0), (8, 40)])
def test_caches_are_those_of_the_sampler(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, samples: int, shared: int
) -> None:
    """Keys and values of rows, of prompts and of their common prefix, apart or folded into one another."""
    made: list[Cache] = []

    class Noted(Cache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(sampler, "Cache", Noted)
    monkeypatch.setattr(cache, "FOLD_BYTES", 1 << 12)
    policy = Policy.load(tiny_model, "fp32", ADAPTERS["lora"])
    prompts = [[*range(shared), *range(100 + 10 * i, 160 + 10 * i)] for i in range(4)]
    sampling, lengths = Sampling(n=samples, max_tokens=40, temperature=1.0), [len(prompt) for prompt in prompts]
    sampler.sample_rows(policy.decoder, prompts, sampling, sampler.Ending(), seeds=[0] * 4, rows_in_flight=128)
    (found,) = made
    stores = [part for part in (found.own, found.groups) if part is not None]
    assert (found.groups is not None) == (samples > 1)
    assert (found.common is not None) == (shared > 0)
    tensors = [t for part in stores for t in (part._keys, part._values)]
    if found.common is not None:
        tensors += [*found.common.keys, *found.common.values]
    shapes = Shapes(policy.decoder.config, ADAPTERS["lora"], 4)
    drawing = found.own.slots * shapes.config.vocab * 16
    held = sum(t.numel() * t.element_size() for t in tensors)
    before_the_last_step = 2 * found.own._keys.nbytes * (found.own.places - cache.STEP) // found.own.places
    assert shapes.caches(lengths, shared, samples, 40, 128) - drawing == held + before_the_last_step


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
def test_a_real_model_takes_what_was_planned(
    store: Store, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two short SFT runs of SmolLM2: memory within a quarter; time, once a run was seen, within half.

    The bounds are those of a shared machine, whose speed halves when others compute.
    """
    template = {"algorithm": "sft", "model": "smollm2", "data": "none.jsonl", "batch_size": 8, "token_budget": 1024}
    dice = random.Random(0)
    talks = [
        (
            Message(role="user", content=f"Rewrite item {i}: " + "one tablet by mouth daily " * dice.randint(4, 12)),
            Message(role="assistant", content="Take it with food. " * dice.randint(3, 9)),
        )
        for i in range(48)
    ]
    data, outcomes = TrainingData(conversations=talks), []
    for seed in range(2):
        recipe = SupervisedRecipe.model_validate(template | {"seed": seed})
        found = plan(recipe, smollm2, data, store=store)
        card = train(recipe, smollm2, data, tmp_path / str(seed))
        outcomes.append(record_outcome(found, card, tmp_path / str(seed), store=store))
    with capsys.disabled():
        sys.stderr.write("".join(f"\n{o.predicted} predicted, {o.actual} actual, {o.error}" for o in outcomes))
    assert all(outcome.error["tokens"] == 0 for outcome in outcomes)
    assert abs(outcomes[0].error["peak_mb"]) < 0.25
    assert abs(outcomes[1].error["seconds"]) < 0.5
