"""What a training run will take, before it starts: steps, tokens, memory, seconds and money; and how right that was.

Tokens come from rendering the real data, memory and operations from the decoder's shapes (`customize/arithmetic.py`),
seconds from this machine's measured rates: each part takes operations / rate + bytes / bandwidth, as if nothing
overlapped. What that leaves out (kernel launches, caches, other processes) is one factor, the slowdown: the median of
what past runs of the same algorithm on this machine needed.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import Field

from ascent.customize.arithmetic import Packed, Shapes, Work
from ascent.customize.policy import DTYPES
from ascent.customize.recipes import OnlineRecipe, Recipe, SupervisedRecipe
from ascent.customize.train import TrainingData
from ascent.customize.workload import SAMPLE, Workload, answer_tokens, workload_of
from ascent.inference.chat import Renderer
from ascent.inference.decoder import DecoderConfig
from ascent.inference.engines.torch import ROWS_IN_FLIGHT
from ascent.inference.lora import LoraConfig
from ascent.inference.store import Store
from ascent.records import Record, RunCard, digest
from ascent.records.files import append_jsonl, read_jsonl, write_atomic

SLOWDOWN = 1.7
"""Measured over predicted seconds without a record of this machine: 1.53 to 1.83, the median 1.67, in seven runs of
SmolLM2-135M of 4 to 8 steps (sft, dpo, grpo; LoRA, bf16, one or two threads of a quiet machine)."""
HEAP = 0.35
"""Share of what comes and goes that the C library keeps beside it: 0.18 to 0.54 in the same runs, the median 0.40.
With this one, their peaks lay between 9 % below and 8 % above what was predicted."""
FRESH = 1 << 27
"""Bytes copied to measure memory: more than caches hold, and than the allocator would reuse."""
REMEMBERED = 20
"""How many past runs of an algorithm the slowdown is the median of."""
PLAN = "plan.json"
PASSING = ("gradients", "activations", "head", "optimiser buffers", "sampling caches", "allocator")
FROZEN = LoraConfig(rank=1, targets=("q_proj",))
"""Stands for "does not train" in `Shapes`, where no adapter means that all weights train."""


class Rates(Record):
    """What a machine was measured to do, with the number of threads that torch used."""

    machine: str
    threads: int
    bf16: float
    """Operations per second of bf16 matrix products."""
    fp32: float
    """Operations per second of fp32 matrix products."""
    copy_rate: float
    """Bytes read and written per second by a copy."""
    fresh: float
    """Bytes per second of memory that is written for the first time, which the system must supply page by page."""
    measured: str
    """When, in ISO 8601."""


class Plan(Record):
    """What a run is predicted to take. Seconds contain the slowdown; the parts of both tables add up."""

    algorithm: str
    base: str
    parameters: int
    """Of the start model."""
    steps: int
    sequences: int
    tokens: int
    tokens_per_step: float
    exact: bool
    """Whether the tokens are counted, not estimated."""
    memory: dict[str, int]
    """Bytes by part at the moment of the peak."""
    seconds: dict[str, float]
    """By part: sampling, reference, forward and backward, head, optimiser."""
    slowdown: float
    past_runs: int
    """How many past runs the slowdown was learnt from."""
    price_per_hour: float | None = None
    rates: Rates
    assumptions: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of resident memory."""
        return sum(self.memory.values())

    @property
    def total_seconds(self) -> float:
        """The predicted time of all steps."""
        return sum(self.seconds.values())

    @property
    def cost(self) -> float | None:
        """Machine time at the price per hour."""
        return None if self.price_per_hour is None else self.price_per_hour * self.total_seconds / 3600


class Outcome(Record):
    """A plan beside what happened. `error` is actual / predicted − 1."""

    plan: Plan
    run: str
    predicted: dict[str, float]
    actual: dict[str, float]
    error: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    """A model that a run loads beside the policy; `log_probs` tells whether it scores tokens, and not only states."""

    name: str
    shapes: Shapes
    log_probs: bool


def plan(
    recipe: Recipe,
    start: Path,
    data: TrainingData,
    *,
    rates: Rates | None = None,
    price_per_hour: float | None = None,
    store: Store | None = None,
) -> Plan:
    """Predict a training run from its recipe, start model folder and data.

    Args:
        recipe: what to train and how.
        start: the start model's folder; only its configuration and tokenizer are read.
        data: the rows, as `train` takes them.
        rates: this machine's; by default measured once and kept in the store.
        price_per_hour: of the machine.
        store: where rates and past outcomes are kept.

    Raises:
        BadInput: there is nothing to train on, or a row is longer than the model's context.
        UnknownName: the recipe's teacher is not in the store.
    """
    store = store or Store()
    rates = rates or machine_rates(store)
    config = DecoderConfig.from_folder(start)
    size = 2 if recipe.precision == "bf16" else 4
    shapes = Shapes(config, recipe.lora.config if recipe.lora else None, size)
    load = workload_of(recipe, data, Renderer(start), config.context)
    others = _others(recipe, store, size)
    works, memory = _works(recipe, shapes, others, load), _memory(recipe, shapes, others, load)
    slowdown, past = learnt_slowdown(recipe.algorithm, shapes.parameters, rates, store)
    rate = rates.bf16 if size == 2 else rates.fp32
    seconds = {
        part: slowdown * (work.operations / rate + work.single / rates.fp32 + work.traffic / rates.copy_rate)
        for part, work in works.items()
    }
    seconds["first touch of memory"] = slowdown * sum(memory[part] for part in memory if part in PASSING) / rates.fresh
    return Plan(
        algorithm=recipe.algorithm,
        base=recipe.model,
        parameters=shapes.parameters,
        steps=load.steps,
        sequences=load.sequences,
        tokens=load.tokens,
        tokens_per_step=load.tokens / load.steps,
        exact=load.exact,
        memory=memory,
        seconds=seconds,
        slowdown=slowdown,
        past_runs=past,
        price_per_hour=price_per_hour,
        rates=rates,
        assumptions=_assumptions(recipe, load, rates, slowdown, past),
    )


def record_outcome(planned: Plan, card: RunCard, folder: Path, *, store: Store | None = None) -> Outcome:
    """Write `folder/plan.json`, the plan beside what the finished run took, and remember it for the next plan.

    A run that ended before its last step, or whose plan.json is there already, is compared but not remembered.
    """
    predicted = {
        "steps": float(planned.steps),
        "tokens": float(planned.tokens),
        "seconds": planned.total_seconds,
        "peak_mb": planned.peak_bytes / 2**20,
    }
    actual = {
        "steps": float(card.steps),
        "tokens": float(card.tokens),
        "seconds": card.seconds,
        "peak_mb": card.peak_rss_mb,
    }
    error = {name: actual[name] / value - 1 for name, value in predicted.items() if value}
    outcome = Outcome(plan=planned, run=card.id, predicted=predicted, actual=actual, error=error)
    new = not (folder / PLAN).exists()
    write_atomic(folder / PLAN, outcome.to_json(indent=1))
    if new and card.steps == planned.steps:
        row = {
            "algorithm": planned.algorithm,
            "parameters": planned.parameters,
            "run": card.id,
            "slowdown": card.seconds / (planned.total_seconds / planned.slowdown),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append_jsonl(_place(store or Store(), planned.rates).with_suffix(".outcomes.jsonl"), [row])
    return outcome


def learnt_slowdown(algorithm: str, parameters: int, rates: Rates, store: Store) -> tuple[float, int]:
    """Return the median slowdown of the latest like runs on this machine, and how many there were.

    Alike are runs of the same algorithm on models of a quarter to four times the size: small models pay more overhead.
    """
    rows = read_jsonl(_place(store, rates).with_suffix(".outcomes.jsonl"))
    alike = [row for row in rows if row["algorithm"] == algorithm and 1 / 4 <= row["parameters"] / parameters <= 4]
    past = [row["slowdown"] for row in alike[-REMEMBERED:]]
    return (statistics.median(past), len(past)) if past else (SLOWDOWN, 0)


def machine_rates(store: Store, *, again: bool = False, seconds: float = 0.6) -> Rates:
    """Return this machine's rates, measured for `seconds` at the first call (or `again`) and kept in the store."""
    probe = Rates(
        machine=_machine(), threads=torch.get_num_threads(), bf16=1, fp32=1, copy_rate=1, fresh=1, measured=""
    )
    place = _place(store, probe).with_suffix(".json")
    if place.is_file() and not again:
        return Rates.from_json(place.read_bytes())
    products = {name: matmul_rate(seconds / 4, dtype) for name, dtype in DTYPES.items()}
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    source, target = torch.ones(FRESH // 4), torch.ones(FRESH // 4)
    copy_rate = 2 * FRESH * _repeats(lambda: target.copy_(source), seconds / 4)
    fresh = FRESH * _repeats(lambda: source.clone(), seconds / 4)
    found = {**products, "copy_rate": copy_rate, "fresh": fresh, "measured": stamp}
    rates = probe.model_copy(update=found)
    write_atomic(place, rates.to_json(indent=1))
    return rates


def matmul_rate(seconds: float, dtype: torch.dtype = torch.bfloat16, size: int = 1024) -> float:
    """Operations per second of square matrix products, 2·size³ each, measured for `seconds`."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 * _repeats(lambda: a @ b, seconds)


def _repeats(work: Callable[[], object], seconds: float) -> float:
    """Calls per second by the quickest of those within `seconds`: other processes can only slow a call down."""
    work()  # prepares kernels and buffers
    best, end = math.inf, time.perf_counter() + seconds
    while (started := time.perf_counter()) < end or best == math.inf:
        work()
        best = min(best, time.perf_counter() - started)
    return 1 / best


def _machine() -> str:
    return f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def _place(store: Store, rates: Rates) -> Path:
    return store.root / "machines" / digest([rates.machine, rates.threads])[:12]


def _works(recipe: Recipe, shapes: Shapes, others: Sequence[Frozen], load: Workload) -> dict[str, Work]:
    """Sum the work of all steps by part."""
    row: Any = recipe.row
    online = isinstance(recipe, OnlineRecipe)
    parts = dict.fromkeys(("sampling", "reference", "forward and backward", "head", "optimiser"), Work())
    passes = 0  # forward passes of the policy or its reference over what a step trains on
    if online:
        passes = bool(row.kl or row.reward_kl) + (row.correction != "none") + row.critic
    elif row.kind == "preference" and row.anchor == "kl":
        passes = 2
    for step in load.batches:
        for batch in step:
            parts["forward and backward"] += shapes.forward(batch) + shapes.backward(batch)
            parts["reference"] += _scored(shapes, batch) * passes
            for other in others:
                parts["reference"] += _scored(other.shapes, batch) if other.log_probs else _read(other.shapes, batch)
            if _headless(row):
                continue
            bonus = online and row.entropy > 0
            parts["head"] += shapes.head(batch.rows, backward=True, entropy=online, bonus=bonus)
            if row.kind == "supervised" and row.teacher:
                parts["head"] += shapes.divergence(batch.predictions, others[0].shapes)
        parts["optimiser"] += shapes.update()
    parts = {part: work * (load.steps / len(load.batches)) for part, work in parts.items()}
    for batch in load.scored:
        parts["reference"] += _scored(shapes, batch) * load.rows_each
    if isinstance(recipe, OnlineRecipe):
        mean = round(sum(load.prompts) / len(load.prompts))
        fill, decode = shapes.sampling(
            [mean] * recipe.prompts_per_step,
            min(load.shared, mean - 1),
            recipe.group_size,
            answer_tokens(recipe),
            ROWS_IN_FLIGHT,
        )
        rollouts = math.ceil(load.steps / recipe.minibatches)
        parts["sampling"] = ((fill + decode) * _draws(row) + shapes.merge()) * rollouts
    return parts


def _scored(shapes: Shapes, batch: Packed) -> Work:
    """One pass of a frozen model: log-probs of the targets."""
    return _read(shapes, batch) + shapes.head(batch.rows, backward=False)


def _read(shapes: Shapes, batch: Packed) -> Work:
    """One pass of a frozen model: hidden states."""
    return shapes.forward(batch, trains=False)


def _headless(row: Any) -> bool:
    """Whether the vocabulary is left out: a reward model reads one number per sequence."""
    return bool(row.kind == "preference" and row.score == "head")


def _draws(row: Any) -> float:
    """How often a step's prompts are sampled: once, or where dead groups are replaced, with half of the refills."""
    return 1 + (row.refills or 0) / 2


def _others(recipe: Recipe, store: Store, size: int) -> list[Frozen]:
    """The frozen models that a run loads beside the policy: a teacher, a reward model."""
    found = []
    if isinstance(recipe, OnlineRecipe):
        if recipe.reward.teacher is not None:
            found.append(("teacher", store.resolve(recipe.reward.teacher), True))
        if recipe.reward.model is not None:
            found.append(("reward model", recipe.reward.model, False))
    elif isinstance(recipe, SupervisedRecipe) and recipe.teacher is not None and getattr(recipe.row, "teacher", False):
        found.append(("teacher", store.resolve(recipe.teacher.model), False))
    return [
        Frozen(name, Shapes(DecoderConfig.from_folder(place), FROZEN, size), log_probs)
        for name, place, log_probs in found
    ]


def _memory(recipe: Recipe, shapes: Shapes, others: Sequence[Frozen], load: Workload) -> dict[str, int]:
    """Bytes at the peak by part: what stays, and the largest of what comes and goes."""
    trainable, size = shapes.trainable, shapes.size
    held = {
        "process": psutil.Process().memory_info().rss,
        "weights": shapes.weights,
        "adapter": trainable * 4 if shapes.adapter else 0,
        "optimiser moments": trainable * 8,
        "reference copy": 0 if shapes.adapter else shapes.parameters * size,
        "sampling copy": (shapes.parameters + shapes.repacked) * size if load.prompts else 0,
        **{other.name: other.shapes.parameters * size for other in others},
    }
    batches = [batch for step in load.batches for batch in step]
    in_pass = [(shapes.kept(batch), 0 if _headless(recipe.row) else shapes.head_held(batch)) for batch in batches]
    activations, head = max(in_pass, key=sum)
    passing = {
        "update": {"gradients": trainable * 4, "activations": activations, "head": head},
        "optimiser": {"gradients": trainable * 4, "optimiser buffers": trainable * 4},
        "saving": {"copy while saving": shapes.weights},
    }
    if isinstance(recipe, OnlineRecipe):
        longest = sorted(load.prompts)[-recipe.prompts_per_step :]
        caches = shapes.caches(longest, load.shared, recipe.group_size, answer_tokens(recipe), ROWS_IN_FLIGHT)
        passing["sampling"] = {"sampling caches": caches}
    largest = max(passing.values(), key=lambda parts: sum(parts.values()))
    largest["allocator"] = int(HEAP * sum(largest.values()))
    return {part: count for part, count in {**held, **largest}.items() if count}


def _assumptions(recipe: Recipe, load: Workload, rates: Rates, slowdown: float, past: int) -> tuple[str, ...]:
    bf16, fp32, copied = rates.bf16 / 1e9, rates.fp32 / 1e9, rates.copy_rate / 1e9
    made = [
        f"measured {rates.measured[:10]} with {rates.threads} threads: bf16 {bf16:,.0f} and fp32 {fp32:,.0f} GFLOP/s, "
        f"copies {copied:,.1f} GB/s",
        f"a step takes {slowdown:.2f} times its operations and bytes at these rates "
        + (f"(median of {past} past runs here)" if past else "(no past run of this algorithm here)"),
        "seconds are those of the steps: loading, checkpoints and saving come on top",
    ]
    row: Any = recipe.row
    if isinstance(recipe, OnlineRecipe):
        made.append(f"every answer has {answer_tokens(recipe)} tokens, the most it may have; grading is not counted")
        if _draws(row) > 1:
            made.append(f"a step's prompts are sampled {_draws(row):g} times, to replace groups without spread")
    elif isinstance(recipe, SupervisedRecipe) and recipe.teacher is not None and not row.teacher:
        made.append(
            f"every answer of the teacher has {recipe.teacher.max_tokens} tokens and is kept; asking it is not counted"
        )
    elif not load.exact:
        made.append(f"{SAMPLE:,} rows, drawn at random, stand for all")
    return tuple(made)
