"""Our side, through the loops, the trainer and the engine that `ascent train` uses."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stopwatch import Stopwatch, start

from ascent.customize.batch import TrainSequence, micro_batches
from ascent.customize.loops.online import OnlineSettings, train_online
from ascent.customize.loops.supervised import train_supervised
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import row_named, row_with
from ascent.customize.policy import Policy
from ascent.customize.recipes import SupervisedRecipe
from ascent.customize.rewards import Rewards
from ascent.customize.run import TrainingRun
from ascent.customize.trainer import Optim, Trainer
from ascent.evaluate.pool import GraderPool
from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Prompt, Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.lora import LoraConfig
from ascent.records import Message, Task

PACKAGES = ("ascent-posttrain", "torch", "transformers")
TOKEN_BUDGET = SupervisedRecipe.model_fields["token_budget"].default
"""What a recipe has unless it says otherwise."""


def grpo(job: dict[str, Any], watch: Stopwatch) -> None:
    """Sample, grade, update, synchronise: `train_online`."""
    engine, trainer = _engine(job), _trainer(job)
    settings = OnlineSettings(prompts=job["prompts"], group=job["group"], max_tokens=job["new_tokens"], reward="vowels")

    def report(step: int, total: int, metrics: dict[str, float]) -> None:
        answer, loss = metrics["completion_tokens"], metrics["loss"]
        watch.lap(tokens=metrics["tokens"], answer=answer, loss=loss, reward=metrics["reward"])

    with (
        tempfile.TemporaryDirectory() as folder,
        GraderPool(Path(__file__).parent / "reward.py", ["vowels"]) as pool,
    ):
        run = TrainingRun(Path(folder), checkpoint_every=1_000_000, report=report)
        sample = Rewards("vowels", pool).sampler(engine)
        row: Any = row_with("grpo", {"kl": job["beta"]})
        train_online(trainer, row, _tasks(job), engine, sample, run, settings, token_budget=TOKEN_BUDGET, seed=0)


def sft(job: dict[str, Any], watch: Stopwatch) -> None:
    """One optimizer step over all sequences of a step: `train_supervised`."""
    sequences = [TrainSequence(tuple(ids), (False, *[True] * (len(ids) - 1))) for ids in job["sequences"][0]]

    def report(step: int, total: int, metrics: dict[str, float]) -> None:
        watch.lap(tokens=metrics["tokens"], loss=metrics["loss"])

    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(Path(folder), checkpoint_every=1_000_000, report=report)
        row: Any = row_named("sft")
        size = len(sequences)
        train_supervised(_trainer(job), row, sequences, run, batch_size=size, token_budget=TOKEN_BUDGET, seed=0)


def dpo(job: dict[str, Any], watch: Stopwatch) -> None:
    """Reference log-probs and one optimizer step, for the same pairs each time.

    `train_preference` would take the references of all its pairs at once, before the first step.
    """
    trainer, loss = _trainer(job), objective(row_with("dpo", {"beta": job["beta"]}))
    units = [tuple(_answered(pair, name) for name in ("chosen", "rejected")) for pair in job["pairs"]]
    tokens = sum(len(seq.token_ids) for unit in units for seq in unit)
    for unit in units:
        for seq in unit:
            seq.pair_weight = 1 / len(units)
    while True:
        trainer.policy.add_reference(units, TOKEN_BUDGET)
        metrics = trainer.update(micro_batches(units, TOKEN_BUDGET), loss)
        watch.lap(tokens=tokens, loss=metrics["loss"])


def sampling(job: dict[str, Any], watch: Stopwatch) -> None:
    """`generate`, log-probs included."""
    engine = _engine(job)
    for seed, ids in enumerate(job["prompt_ids"]):
        prompts = [Prompt(token_ids=tuple(tokens)) for tokens in ids]
        groups = engine.generate(prompts, Sampling(n=job["group"], max_tokens=job["new_tokens"], seed=seed))
        watch.lap(tokens=sum(len(answer.token_ids) for group in groups for answer in group))


def rates(job: dict[str, Any], watch: Stopwatch) -> None:
    """What this machine can do at most: products per second and bytes per second, each by its quickest measurement."""
    from ascent.customize.plan import machine_rates, matmul_rate
    from ascent.inference.store import Store

    with tempfile.TemporaryDirectory() as folder:
        found = machine_rates(Store(Path(folder)), again=True, seconds=4.0)
    peaks = {"bf16": found.bf16, "fp32": found.fp32}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        peaks[name] = max(peaks[name], *(matmul_rate(1.5, dtype, size) for size in (2048, 3072)))
    read = _read_rate()
    bandwidth = max(found.copy_rate, read)
    watch.note(**peaks, copied=found.copy_rate, read=read, bandwidth=bandwidth, machine=found.model_dump(mode="json"))
    watch.lap()


def predict(job: dict[str, Any], watch: Stopwatch) -> None:
    """Our own model of cost for one step, without the factor that it learns from past runs."""
    from ascent.customize.plan import Rates, plan
    from ascent.customize.recipes import LoraSpec, OnlineRecipe
    from ascent.customize.train import TrainingData
    from ascent.inference.store import Store

    folder, lora = Path(job["model"]), LoraSpec(rank=job["rank"], alpha=job["alpha"])
    recipe: Any
    if job["of"] == "grpo":
        sizes = {"prompts_per_step": job["prompts"], "group_size": job["group"], "max_tokens": job["new_tokens"]}
        recipe = OnlineRecipe(
            algorithm="grpo",
            axes={"kl": job["beta"]},
            model=job["model"],
            lora=lora,
            prompts="prompts.jsonl",
            reward="vowels",
            steps=1,
            **sizes,
        )
        data = TrainingData(tasks=_tasks(job)[: job["prompts"]])
    else:
        tokenizer, sequences = Renderer(folder).tokenizer, job["sequences"][0]
        documents = [tokenizer.decode(ids[:-1]) for ids in sequences]  # each gets an end token
        recipe = SupervisedRecipe(
            algorithm="cpt", model=job["model"], lora=lora, data="texts.jsonl", batch_size=len(sequences)
        )
        data = TrainingData(documents=documents)
    with tempfile.TemporaryDirectory() as empty:
        planned = plan(recipe, folder, data, rates=Rates.model_validate(job["rates"]), store=Store(Path(empty)))
    assert planned.steps == 1
    seconds = {part: value / planned.slowdown for part, value in planned.seconds.items()}
    watch.note(seconds=sum(seconds.values()), parts=seconds, peak_mb=planned.peak_bytes / 2**20, tokens=planned.tokens)
    watch.lap()


def _read_rate() -> float:
    """Bytes per second that a sum over 512 MB reads, by the quickest of several."""
    numbers, best = torch.ones(1 << 27), 0.0
    for _ in range(10):
        started = time.perf_counter()
        numbers.sum()
        best = max(best, 4 * len(numbers) / (time.perf_counter() - started))
    return best


def _tasks(job: dict[str, Any]) -> list[Task]:
    return [Task(id=str(i), messages=(Message(role="user", content=text),)) for i, text in enumerate(job["questions"])]


def _engine(job: dict[str, Any]) -> TorchEngine:
    """A sampler for which no token ends an answer, so that every answer has all its tokens."""
    folder = Path(job["model"])
    renderer = Renderer(folder)
    renderer.end_ids = frozenset()
    return TorchEngine(load_decoder(folder, torch.bfloat16), renderer, "benchmark")


def _trainer(job: dict[str, Any]) -> Trainer:
    policy = Policy.load(Path(job["model"]), "bf16", LoraConfig(job["rank"], job["alpha"]))
    optim = Optim(lr=job["lr"], schedule="constant", warmup_fraction=0.0)
    return Trainer(policy, optim, job["warmup"] + job["steps"])


def _answered(pair: dict[str, Any], name: str) -> TrainSequence:
    prompt, answer = pair["prompt_ids"], pair[f"{name}_ids"]
    return TrainSequence((*prompt, *answer), (*[False] * len(prompt), *[True] * len(answer)))


if __name__ == "__main__":
    work, watch = start(PACKAGES)
    torch.set_num_threads(work["threads"])
    torch.manual_seed(0)
    kinds = {"grpo": grpo, "sft": sft, "dpo": dpo, "sampling": sampling, "rates": rates, "predict": predict}
    kinds[work["kind"]](work, watch)
