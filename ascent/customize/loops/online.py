"""Online training: sample, grade, give credit, update; the sampler always holds the policy that is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ascent.customize import parallel
from ascent.customize.batch import TokenBatch, TrainSequence, micro_batches
from ascent.customize.loops.ahead import Rollout, Rollouts
from ascent.customize.loops.credit import Annotate, Annotated, credit
from ascent.customize.objectives.losses import Objective, objective
from ascent.customize.objectives.ratio import mismatch
from ascent.customize.objectives.rows import OnlineRow
from ascent.customize.order import items_at
from ascent.customize.policy import Policy, per_target, teacher_logps
from ascent.customize.rollout import Group, reward_of
from ascent.customize.run import TrainingRun
from ascent.customize.trainer import Trainer
from ascent.evaluate.agreement import diverged
from ascent.inference.engine import Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.lora import policy_hash
from ascent.records import Task
from ascent.records.errors import AscentError, BadInput

EMPTY_STEPS = 3  # this many steps without one informative group end the run: there is nothing left to learn from


@dataclass(frozen=True)
class OnlineSettings:
    """How much to sample. `prompts` groups of `group` samples make a step, split into `minibatches` updates.

    `max_tokens` bounds a turn, `max_turns` the assistant turns of an episode. `overlong_cache` is DAPO's L_cache in
    tokens. `gold` names a grader that is measured beside the reward, never trained on.
    """

    prompts: int = 8
    group: int = 8
    minibatches: int = 1
    max_tokens: int = 64
    max_turns: int = 1
    temperature: float = 1.0
    overlong_cache: int = 16
    reward: str = "reward"
    gold: str | None = None


Sample = Callable[[Sequence[Task], Sampling], tuple[list[Group], dict[str, float]]]
"""Sample and grade groups for tasks; the second result is what there is to log about lost rollouts and the like."""


def train_online(
    trainer: Trainer,
    row: OnlineRow,
    tasks: Sequence[Task],
    engine: TorchEngine,
    sample: Sample,
    run: TrainingRun,
    settings: OnlineSettings,
    *,
    token_budget: int,
    seed: int,
) -> None:
    """Train on graded samples of `tasks` for the trainer's total steps.

    A trainer step is one optimizer update; every `minibatches` updates share one rollout, whose mismatch to the
    trainer is what the first of them finds between the sampler's log-probs and its own.
    """
    loss = objective(row)
    annotate = annotator(trainer.policy, row, token_budget, settings.temperature)
    if row.lookahead and parallel.width() > 1:
        raise BadInput(f"row {row.name}, axis lookahead: sampling ahead goes with one process; set --processes to 1")

    def synchronise() -> None:
        engine.synchronise(trainer.policy.decoder)
        require_current(engine, trainer)

    def collect() -> Rollout:
        return collect_groups(row, tasks, shared(sample), run, settings, seed)

    rollouts = Rollouts(collect, synchronise, run, ahead=row.lookahead > 0)
    with rollouts:
        _train(trainer, row, rollouts, run, settings, loss, annotate, token_budget)


def _train(
    trainer: Trainer,
    row: OnlineRow,
    rollouts: Rollouts,
    run: TrainingRun,
    settings: OnlineSettings,
    loss: Objective,
    annotate: Annotate,
    token_budget: int,
) -> None:
    """Update on rollout after rollout."""
    chunks: list[list[TrainSequence]] = []
    facts: dict[str, float] = {}
    for step in run.steps(trainer):
        fresh = step % settings.minibatches == 0 or not chunks
        if fresh:
            groups, facts = rollouts.next(last=step + settings.minibatches >= trainer.total_steps)
            _note_empty(run, row.teacher or any(group.informative for group in groups))
            _note_divergence(run, facts)
            chunks = credit(
                row,
                groups,
                max_tokens=settings.max_tokens * settings.max_turns,
                minibatches=settings.minibatches,
                overlong_cache=settings.overlong_cache,
                annotate=_noting(annotate, facts),
            )
        batch = chunks.pop(0)
        metrics = trainer.update(
            micro_batches([[seq] for seq in batch], token_budget),
            loss,
            temperature=settings.temperature,
            entropy=True,
        )
        if fresh and row.correction == "none":
            facts["mismatch_kl"] = metrics.get("approx_kl", math.nan)
        run.log(step, trainer.total_steps, sum(len(seq.token_ids) for seq in batch), {**facts, **metrics})


def _noting(annotate: Annotate, facts: dict[str, float]) -> Annotate:
    """Let an annotation also note how far sampler and trainer are apart, where the trainer's log-probs are asked."""

    def noted(sequences: Sequence[TrainSequence]) -> Annotated:
        said = annotate(sequences)
        if said.trainer:
            facts["mismatch_kl"] = mismatch(said.trainer, [seq.old_logps for seq in sequences])
        return said

    return noted


def shared(sample: Sample) -> Sample:
    """Let each of the processes that train together sample a share of the tasks; all get all groups."""

    def sample_share(tasks: Sequence[Task], sampling: Sampling) -> tuple[list[Group], dict[str, float]]:
        mine = range(parallel.rank(), len(tasks), parallel.width())
        seeded = replace(sampling, seed=sampling.seed + parallel.rank() * 999_983)  # a task may be drawn twice
        groups, numbers = sample([tasks[i] for i in mine], seeded) if mine else ([], {})
        counted: dict[str, float] = {}
        for part in parallel.gathered(numbers):
            for name, number in part.items():
                counted[name] = counted.get(name, 0.0) + number
        return parallel.collected(dict(zip(mine, groups, strict=True)), len(tasks)), counted

    return sample_share


def annotator(policy: Policy, row: OnlineRow, token_budget: int, temperature: float) -> Annotate:
    """Return what scores sampled sequences as far as the row needs it, before the first update sees them."""

    def annotate(sequences: Sequence[TrainSequence]) -> Annotated:
        def run(measure: Callable[[TokenBatch], Tensor]) -> list[list[float]]:
            return per_target(sequences, token_budget, measure)

        def score(batch: TokenBatch) -> Tensor:
            return policy.score(batch, temperature=temperature, entropy=False)[0]

        teacher = policy.teacher if row.teacher else None
        return Annotated(
            reference=run(lambda b: policy.reference(b, temperature=temperature)) if row.kl or row.reward_kl else (),
            trainer=run(score) if row.correction != "none" else (),
            teacher=teacher_logps(teacher, sequences, token_budget, temperature) if teacher is not None else (),
            values=run(lambda b: policy.measure(b, temperature=temperature).head) if row.critic else (),
        )

    return annotate


def require_current(engine: TorchEngine, trainer: Trainer) -> None:
    """Prove that the sampler holds the trained policy before it samples.

    Compares hashes, and the merged weights of the last layer bit for bit, so that an adapter that never reached the
    sampler is an error and not two months on a wrong trail.

    Raises:
        AscentError: the sampler is stale.
    """
    trained = trainer.policy.decoder
    *_, (_, mine) = engine.decoder.linears()
    *_, (_, theirs) = trained.linears()
    merged = torch.cat([weight for _, weight, _ in theirs.split()]).to(mine.weight.dtype)
    if engine.policy != policy_hash(trained) or not torch.equal(mine.weight, merged):
        raise AscentError("the sampler does not hold the trained policy; synchronise the engine before each rollout")


def collect_groups(
    row: OnlineRow,
    tasks: Sequence[Task],
    sample: Sample,
    run: TrainingRun,
    settings: OnlineSettings,
    seed: int,
) -> tuple[list[Group], dict[str, float]]:
    """Sample one step's groups; rows that drop dead groups draw new prompts until the step is full (DAPO §3.2).

    `run.state["cursor"]` is the endless position in the prompts, so a resumed run draws the same ones.
    """
    kept: list[Group] = []
    seen: list[Group] = []
    counted: dict[str, float] = {}
    for _ in range(1 + (row.refills or 0)):
        wanted = settings.prompts - len(kept)
        cursor = run.state.get("cursor", 0)
        drawn = [tasks[i] for i in items_at(cursor, wanted, len(tasks), seed)]
        run.state["cursor"] = cursor + wanted
        sampling = Sampling(
            n=settings.group,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=seed * 1_000_003 + cursor,
        )
        groups, numbers = sample(drawn, sampling)
        for name, number in numbers.items():
            counted[name] = counted.get(name, 0.0) + number
        seen += groups
        kept += groups if row.keep_dead_groups else [group for group in groups if group.informative]
        if len(kept) >= settings.prompts:
            break
    return kept, facts_of(seen, settings.gold) | counted


def facts_of(groups: Sequence[Group], gold: str | None = None) -> dict[str, float]:
    """What a rollout's log line says: mean reward of what was graded, and how much was not; the gold grader's mean."""
    rewards = [reward for group in groups for reward in group.rewards]
    known = [reward for reward in rewards if not math.isnan(reward)]
    episodes = [episode for group in groups for episode in group.episodes]
    facts = {
        "reward": sum(known) / len(known) if known else math.nan,
        "ungraded": float(len(rewards) - len(known)),
        "informative_groups": sum(group.informative for group in groups) / len(groups),
        "prompts_drawn": float(len(groups)),
        "completion_tokens": sum(episode.completion_tokens for episode in episodes) / len(episodes),
    }
    if gold is not None:
        values = [value for episode in episodes if not math.isnan(value := reward_of(episode, gold))]
        facts["gold"] = sum(values) / len(values) if values else math.nan
    return facts


def _note_divergence(run: TrainingRun, facts: dict[str, float]) -> None:
    """End the run when the reward keeps rising while the gold grader, which nothing trains on, falls."""
    if "gold" not in facts:
        return
    curves = run.state.setdefault("curves", {"reward": [], "gold": []})
    for name, curve in curves.items():
        curve.append(facts[name])
    reason = diverged(curves["reward"], curves["gold"])
    if reason is not None:
        run.state["ended"] = reason


def _note_empty(run: TrainingRun, informative: bool) -> None:
    """Count rollouts in a row without a gradient and end the run when there are too many."""
    run.state["empty"] = 0 if informative else run.state.get("empty", 0) + 1
    if run.state["empty"] >= EMPTY_STEPS:
        run.state["ended"] = "no informative group in several rollouts: every sample of a prompt scores the same"
