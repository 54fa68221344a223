"""Supervised training: texts in, cross-entropy on the target tokens or a divergence to a teacher."""

from __future__ import annotations

from collections.abc import Sequence

from ascent.customize.batch import TrainSequence, micro_batches
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import SupervisedRow
from ascent.customize.objectives.weights import WEIGHTS
from ascent.customize.order import items_at
from ascent.customize.run import TrainingRun
from ascent.customize.trainer import Trainer


def train_supervised(
    trainer: Trainer,
    row: SupervisedRow,
    sequences: Sequence[TrainSequence],
    run: TrainingRun,
    *,
    batch_size: int,
    token_budget: int,
    seed: int,
) -> None:
    """Train on `sequences` for the trainer's total steps of `batch_size` sequences each."""
    loss = objective(row)
    for step in run.steps(trainer):
        batch = [sequences[i] for i in items_at(step * batch_size, batch_size, len(sequences), seed)]
        weights = WEIGHTS[row.weights]([seq.targets for seq in batch], 0)
        for seq, weight in zip(batch, weights, strict=True):
            seq.ce_weight = weight
        metrics = trainer.update(micro_batches([[seq] for seq in batch], token_budget), loss)
        run.log(step, trainer.total_steps, sum(len(seq.token_ids) for seq in batch), metrics)
