"""From graded groups to weighted training sequences: shaping, baseline, per-token terms, scale, weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ascent.customize.batch import TrainSequence
from ascent.customize.objectives.credit import (
    episode_advantages,
    gae,
    overlong_punishment,
    reward_to_go,
    whiten,
)
from ascent.customize.objectives.ratio import corrections
from ascent.customize.objectives.rows import OnlineRow
from ascent.customize.objectives.weights import WEIGHTS
from ascent.customize.rollout import Group
from ascent.records import Episode

PerToken = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Annotated:
    """What models say of the sampled sequences, per sequence and target; a row asks only for what it needs.

    `reference`: log-probs under the start model. `trainer`: under the policy itself, recomputed by the trainer.
    `teacher`: under the teacher. `values`: the critic's.
    """

    reference: PerToken = ()
    trainer: PerToken = ()
    teacher: PerToken = ()
    values: PerToken = ()


Annotate = Callable[[Sequence[TrainSequence]], Annotated]


def credit(
    row: OnlineRow,
    groups: Sequence[Group],
    *,
    max_tokens: int,
    minibatches: int = 1,
    overlong_cache: int = 1,
    annotate: Annotate = lambda sequences: Annotated(),
) -> list[list[TrainSequence]]:
    """Turn groups into `minibatches` lists of weighted sequences; weights of each list sum to one.

    Episodes that nobody could grade, and lost ones without tokens, are left out. Whitening and mismatch correction
    look at the whole rollout, so the number of minibatches does not change an advantage.
    """
    rewards = [_shaped(row, group, max_tokens, overlong_cache) for group in groups]
    places = [
        (g, e)
        for g, group in enumerate(groups)
        for e, episode in enumerate(group.episodes)
        if episode.completion_tokens and (row.teacher or not math.isnan(rewards[g][e]))
    ]
    sequences = [_sequence(groups[g].episodes[e]) for g, e in places]
    said = annotate(sequences) if sequences else Annotated()
    penalties = _penalties(row, sequences, said)
    if row.returns == "sequence":
        for (g, e), penalty in zip(places, penalties, strict=True):
            rewards[g][e] += sum(penalty)
    scores = episode_advantages(rewards, row)
    _assign(row, sequences, [scores[g][e] for g, e in places], penalties, said)
    for seq, reference in zip(sequences, said.reference, strict=False):
        seq.reference_logps = reference
    for seq, trainer in zip(sequences, said.trainer, strict=False):
        seq.correction = corrections(trainer, _old(seq), row)
        seq.old_logps = trainer
    chunks = [sequences[i::minibatches] for i in range(minibatches)]
    for chunk in chunks:
        weights = WEIGHTS[row.weights]([seq.targets for seq in chunk], max_tokens) if chunk else []
        for seq, weight in zip(chunk, weights, strict=True):
            seq.rl_weight = seq.kl_weight = weight
    return chunks


def _shaped(row: OnlineRow, group: Group, max_tokens: int, cache: int) -> list[float]:
    if not row.overlong:
        return list(group.rewards)
    lengths = [episode.completion_tokens for episode in group.episodes]
    return [r + overlong_punishment(n, max_tokens, cache) for r, n in zip(group.rewards, lengths, strict=True)]


def _sequence(episode: Episode) -> TrainSequence:
    old = [logp for logp, kept in zip(episode.logps, episode.loss_mask, strict=True) if kept]
    return TrainSequence(episode.token_ids, episode.loss_mask, old_logps=old)


def _penalties(row: OnlineRow, sequences: Sequence[TrainSequence], said: Annotated) -> list[list[float]]:
    """−β·k1 of every sampled token, k1 = ℓ − ℓ_ref; zeros for rows without a KL in the reward."""
    if not row.reward_kl:
        return [[0.0] * seq.targets for seq in sequences]
    return [
        [-row.reward_kl * (old - ref) for old, ref in zip(_old(seq), reference, strict=True)]
        for seq, reference in zip(sequences, said.reference, strict=True)
    ]


def _assign(
    row: OnlineRow,
    sequences: Sequence[TrainSequence],
    scores: Sequence[float],
    penalties: PerToken,
    said: Annotated,
) -> None:
    """Set the advantage of every sequence: one number, or one per target where a row looks at single tokens."""
    if row.returns == "sequence":
        per_token = [[score] * seq.targets for score, seq in zip(scores, sequences, strict=True)]
    elif row.teacher:
        per_token = [
            [teacher - old for teacher, old in zip(theirs, _old(seq), strict=True)]
            for theirs, seq in zip(said.teacher, sequences, strict=True)
        ]
    else:
        rewards = [[*penalty[:-1], penalty[-1] + score] for penalty, score in zip(penalties, scores, strict=True)]
        if row.critic:
            per_token = _with_critic(row, sequences, rewards, said.values)
        else:
            per_token = [reward_to_go(values) for values in rewards]
    if row.scale == "whiten_tokens":
        per_token = whiten(per_token)
    for seq, values in zip(sequences, per_token, strict=True):
        seq.advantage = values


def _with_critic(
    row: OnlineRow, sequences: Sequence[TrainSequence], rewards: PerToken, values: PerToken
) -> list[list[float]]:
    """GAE over the policy's own tokens; what the critic said and should have said goes with the sequence."""
    found = []
    for seq, reward, value in zip(sequences, rewards, values, strict=True):
        advantage, returns = gae(reward, value, *row.gae)
        seq.old_values, seq.returns = list(value), returns
        found.append(advantage)
    return found


def _old(seq: TrainSequence) -> Sequence[float]:
    assert isinstance(seq.old_logps, Sequence)
    return seq.old_logps
