"""Online training: sample, grade, give credit, update; the sampler always holds the policy that is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ascent.customize.batch import TrainSequence, micro_batches
from ascent.customize.objectives.credit import advantages, overlong_punishment
from ascent.customize.objectives.rows import OnlineRow, objective
from ascent.customize.objectives.weights import WEIGHTS
from ascent.customize.order import items_at
from ascent.customize.rollout import Group, rollout
from ascent.customize.run import TrainingRun
from ascent.customize.trainer import Trainer
from ascent.evaluate.pool import GraderPool
from ascent.inference.engine import Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.lora import policy_hash
from ascent.records import Task
from ascent.records.errors import AscentError

EMPTY_STEPS = 3  # this many steps without one informative group end the run: there is nothing left to learn from


@dataclass(frozen=True)
class OnlineSettings:
    """How much to sample. `prompts` groups of `group` samples make a step, split into `minibatches` updates.

    `refills` bounds dynamic sampling: how many times the prompts of a step may be drawn again to replace dead groups.
    `overlong_cache` is DAPO's L_cache in tokens.
    """

    prompts: int = 8
    group: int = 8
    minibatches: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    refills: int = 3
    overlong_cache: int = 16
    reward: str = "reward"


def train_online(
    trainer: Trainer,
    row: OnlineRow,
    tasks: Sequence[Task],
    engine: TorchEngine,
    pool: GraderPool,
    run: TrainingRun,
    settings: OnlineSettings,
    *,
    token_budget: int,
    seed: int,
) -> None:
    """Train on graded samples of `tasks` for the trainer's total steps.

    A trainer step is one optimizer update; every `minibatches` updates share one rollout.
    """
    loss = objective(row)
    chunks: list[list[TrainSequence]] = []
    facts: dict[str, float] = {}
    for step in run.steps(trainer):
        if step % settings.minibatches == 0 or not chunks:
            engine.synchronise(trainer.policy.decoder)
            require_current(engine, trainer)
            groups, facts = collect_groups(row, tasks, engine, pool, run, settings, seed)
            _note_empty(run, any(group.informative for group in groups))
            chunks = credit(row, groups, settings)
        batch = chunks.pop(0)
        if row.kl and batch:
            trainer.policy.add_reference([[seq] for seq in batch], token_budget, temperature=settings.temperature)
        metrics = trainer.update(
            micro_batches([[seq] for seq in batch], token_budget),
            loss,
            temperature=settings.temperature,
            entropy=True,
        )
        run.log(step, trainer.total_steps, sum(len(seq.token_ids) for seq in batch), {**facts, **metrics})


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
    engine: TorchEngine,
    pool: GraderPool,
    run: TrainingRun,
    settings: OnlineSettings,
    seed: int,
) -> tuple[list[Group], dict[str, float]]:
    """Sample one step's groups; rows that drop dead groups draw new prompts until the step is full (DAPO §3.2).

    `run.state["cursor"]` is the endless position in the prompts, so a resumed run draws the same ones.
    """
    kept: list[Group] = []
    seen: list[Group] = []
    for _ in range(1 if row.keep_dead_groups else 1 + settings.refills):
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
        groups = rollout(engine, drawn, pool, sampling, settings.reward)
        seen += groups
        kept += groups if row.keep_dead_groups else [group for group in groups if group.informative]
        if len(kept) >= settings.prompts:
            break
    rewards = [reward for group in seen for reward in group.rewards]
    known = [reward for reward in rewards if not math.isnan(reward)]
    lengths = [episode.completion_tokens for group in seen for episode in group.episodes]
    facts = {
        "reward": sum(known) / len(known) if known else math.nan,
        "ungraded": float(len(rewards) - len(known)),
        "informative_groups": sum(group.informative for group in seen) / len(seen),
        "prompts_drawn": float(len(seen)),
        "completion_tokens": sum(lengths) / len(lengths),
    }
    return kept, facts


def credit(row: OnlineRow, groups: Sequence[Group], settings: OnlineSettings) -> list[list[TrainSequence]]:
    """Turn groups into `minibatches` lists of weighted sequences; weights of each list sum to one."""
    sequences: list[TrainSequence] = []
    for group in groups:
        rewards = list(group.rewards)
        if row.overlong:
            rewards = [
                reward + overlong_punishment(episode.completion_tokens, settings.max_tokens, settings.overlong_cache)
                for reward, episode in zip(rewards, group.episodes, strict=True)
            ]
        for episode, advantage in zip(group.episodes, advantages(rewards, row.baseline, row.scale), strict=True):
            old = [logp for logp, kept in zip(episode.logps, episode.loss_mask, strict=True) if kept]
            sequences.append(TrainSequence(episode.token_ids, episode.loss_mask, advantage=advantage, old_logps=old))
    chunks = [sequences[i :: settings.minibatches] for i in range(settings.minibatches)]
    for chunk in chunks:
        weights = WEIGHTS[row.weights]([seq.targets for seq in chunk]) if chunk else []
        for seq, weight in zip(chunk, weights, strict=True):
            seq.rl_weight = seq.kl_weight = weight
    return chunks


def _note_empty(run: TrainingRun, informative: bool) -> None:
    """Count rollouts in a row without a gradient and end the run when there are too many."""
    run.state["empty"] = 0 if informative else run.state.get("empty", 0) + 1
    if run.state["empty"] >= EMPTY_STEPS:
        run.state["ended"] = "no informative group in several rollouts: every sample of a prompt scores the same"
