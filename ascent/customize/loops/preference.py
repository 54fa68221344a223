"""Preference training: judged answers in; the reference is scored once, before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ascent.customize.batch import TrainSequence, micro_batches
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import PreferenceRow
from ascent.customize.order import items_at
from ascent.customize.policy import Policy, per_target
from ascent.customize.run import TrainingRun
from ascent.customize.trainer import Trainer

Unit = tuple[TrainSequence, ...]
"""A pair (chosen, rejected), or one answer that is good or bad."""


def train_preference(
    trainer: Trainer,
    row: PreferenceRow,
    units: Sequence[Unit],
    run: TrainingRun,
    *,
    batch_size: int,
    token_budget: int,
    seed: int,
) -> None:
    """Train on units for the trainer's total steps of `batch_size` units each."""
    loss = objective(row)
    referenced = not row.reference
    for step in run.steps(trainer):
        if not referenced:
            trainer.policy.add_reference(units, token_budget)
            referenced = True
        batch = [units[i] for i in items_at(step * batch_size, batch_size, len(units), seed)]
        anchor = mismatched_kl(trainer.policy, batch, token_budget) if row.anchor == "kl" else 0.0
        for unit in batch:
            for seq in unit:
                seq.pair_weight, seq.anchor = 1 / len(batch), anchor
        together: list[Unit] = [tuple(seq for unit in batch for seq in unit)] if row.pairing == "cross" else batch
        metrics = trainer.update(micro_batches(together, token_budget), loss)
        run.log(step, trainer.total_steps, sum(len(seq.token_ids) for unit in batch for seq in unit), metrics)


def embed_prompts(
    policy: Policy,
    units: Sequence[Unit],
    token_budget: int,
    embedding: Tensor | None = None,
) -> None:
    """Give every sequence the embedding of its prompt, for rows that weigh cross pairs by similarity.

    Without a sentence embedder's `embedding` [N, D] the start model's own mean hidden states serve, centred over the
    data, because hidden states of a language model all point much the same way.
    """
    if embedding is None:
        prompts = [unit[0].token_ids[: unit[0].loss_mask.index(True)] for unit in units]
        embedding = policy.embed(prompts, token_budget)
        embedding = embedding - embedding.mean(0)
    for unit, vector in zip(units, embedding.tolist(), strict=True):
        for seq in unit:
            seq.embedding = tuple(vector)


def mismatched_kl(policy: Policy, batch: Sequence[Unit], token_budget: int) -> float:
    """KTO's z0 = max(0, mean of Σ_t (ℓ_t − ℓ_ref,t) over prompts with another item's answer) (arXiv 2402.01306 §4.1).

    It is taken over the whole global batch before the clamp, and no gradient flows through it.
    """
    singles = [seq for unit in batch for seq in unit]
    if len(singles) < 2:
        return 0.0
    mixed = [_with_answer(seq, singles[(i + 1) % len(singles)]) for i, seq in enumerate(singles)]
    now = per_target(mixed, token_budget, lambda part: policy.score(part, entropy=False)[0])
    before = per_target(mixed, token_budget, policy.reference)
    gaps = [sum(a) - sum(b) for a, b in zip(now, before, strict=True)]
    return max(0.0, sum(gaps) / len(gaps))


def _with_answer(prompt: TrainSequence, answer: TrainSequence) -> TrainSequence:
    """The prompt of one sequence with the answer of another."""
    head, start = prompt.loss_mask.index(True), answer.loss_mask.index(True)
    return TrainSequence(
        prompt.token_ids[:head] + answer.token_ids[start:], prompt.loss_mask[:head] + answer.loss_mask[start:]
    )
