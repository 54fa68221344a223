"""Preference training: pairs of answers to the same prompt; the reference is scored once, before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from ascent.customize.batch import TrainSequence, micro_batches
from ascent.customize.objectives.rows import PreferenceRow, objective
from ascent.customize.order import items_at
from ascent.customize.run import TrainingRun
from ascent.customize.trainer import Trainer

Pair = tuple[TrainSequence, TrainSequence]


def train_preference(
    trainer: Trainer,
    row: PreferenceRow,
    pairs: Sequence[Pair],
    run: TrainingRun,
    *,
    batch_size: int,
    token_budget: int,
    seed: int,
) -> None:
    """Train on (chosen, rejected) pairs for the trainer's total steps of `batch_size` pairs each."""
    loss = objective(row)
    referenced = False
    for step in run.steps(trainer):
        if not referenced:
            trainer.policy.add_reference(pairs, token_budget)
            referenced = True
        batch = [pairs[i] for i in items_at(step * batch_size, batch_size, len(pairs), seed)]
        for pair in batch:
            for seq in pair:
                seq.pair_weight = 1 / len(batch)
        metrics = trainer.update(micro_batches(batch, token_budget), loss)
        run.log(step, trainer.total_steps, sum(len(seq.token_ids) for pair in batch for seq in pair), metrics)
