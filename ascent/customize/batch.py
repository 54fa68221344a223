"""Token batches: sequences laid end to end, with one entry per *target* token in every stream.

Shape letters: T tokens of all sequences, M target tokens (those the policy produced), N sequences.
A stream's weights are computed once for the *global* batch (`weights.py`) and already contain 1/N, so that any split
into micro-batches sums to the same loss and the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass
class TrainSequence:
    """One sequence and its streams: one number for all its targets, or one per target.

    Per target: weights of the cross-entropy, policy-gradient and KL terms, advantage, log-probs of the behaviour
    policy and of the reference, mismatch correction, critic's values at sampling time and the returns they should
    have had. Per
    sequence: the weight of its pair or answer, its reward (or ±1 for a good or bad answer), the anchor z0, and the
    embedding of its prompt.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    ce_weight: float = 0.0
    rl_weight: float = 0.0
    kl_weight: float = 0.0
    advantage: float | Sequence[float] = 0.0
    old_logps: float | Sequence[float] = 0.0
    reference_logps: float | Sequence[float] = 0.0
    correction: float | Sequence[float] = 1.0
    old_values: float | Sequence[float] = 0.0
    returns: float | Sequence[float] = 0.0
    pair_weight: float = 0.0
    reward: float = 0.0
    anchor: float = 0.0
    embedding: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError("token_ids and loss_mask must have the same length")
        if self.loss_mask[0]:
            raise ValueError("the first token has nothing before it and cannot be a target")

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return sum(self.loss_mask)


class Scored(NamedTuple):
    """What the model says of a batch, in fp32: `logp` and `entropy` [M] always.

    `head` is the value per target [M] or the reward per sequence [N] where a head is attached; `divergence` [M] the
    distance to the teacher's distribution where a row asks for it. Both are empty otherwise.
    """

    logp: Tensor
    entropy: Tensor
    head: Tensor = torch.empty(0)
    divergence: Tensor = torch.empty(0)


@dataclass
class TokenBatch:
    """A micro-batch: what `score` needs (tokens, lengths, at, targets) and what objectives need (the streams)."""

    tokens_T: Tensor
    lengths: list[int]
    at_M: Tensor
    targets_M: Tensor
    sequence_M: Tensor
    ce_weight_M: Tensor
    rl_weight_M: Tensor
    kl_weight_M: Tensor
    advantage_M: Tensor
    old_logp_M: Tensor
    reference_logp_M: Tensor
    correction_M: Tensor
    old_value_M: Tensor
    return_M: Tensor
    pair_weight_N: Tensor
    reward_N: Tensor
    anchor_N: Tensor
    embedding_ND: Tensor
    sequences: int

    def to(self, device: torch.device) -> TokenBatch:
        """Move every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: t.to(device) for name, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **moved)

    @property
    def last_N(self) -> Tensor:
        """Where each sequence's last token lies in `tokens_T`."""
        return torch.tensor(self.lengths).cumsum(0) - 1


STREAMS = {
    "ce_weight_M": "ce_weight",
    "rl_weight_M": "rl_weight",
    "kl_weight_M": "kl_weight",
    "advantage_M": "advantage",
    "old_logp_M": "old_logps",
    "reference_logp_M": "reference_logps",
    "correction_M": "correction",
    "old_value_M": "old_values",
    "return_M": "returns",
}
"""Batch tensor [M] → field of `TrainSequence`."""


def collate(sequences: Sequence[TrainSequence]) -> TokenBatch:
    """Lay sequences end to end. Target i of the batch is predicted from position `at_M[i]`."""
    tokens: list[int] = []
    at: list[int] = []
    owner: list[int] = []
    streams: dict[str, list[float]] = {name: [] for name in STREAMS}
    for index, seq in enumerate(sequences):
        places = [i for i, kept in enumerate(seq.loss_mask) if kept]
        at += [len(tokens) + i - 1 for i in places]
        owner += [index] * len(places)
        tokens += seq.token_ids
        for name, stream in streams.items():
            value = getattr(seq, STREAMS[name])
            stream += value if isinstance(value, Sequence) else [value] * len(places)
    tokens_T, at_M = torch.tensor(tokens), torch.tensor(at, dtype=torch.long)
    return TokenBatch(
        tokens_T=tokens_T,
        lengths=[len(seq.token_ids) for seq in sequences],
        at_M=at_M,
        targets_M=tokens_T[at_M + 1],
        sequence_M=torch.tensor(owner, dtype=torch.long),
        **{name: torch.tensor(values, dtype=torch.float32) for name, values in streams.items()},
        pair_weight_N=torch.tensor([seq.pair_weight for seq in sequences]),
        reward_N=torch.tensor([seq.reward for seq in sequences]),
        anchor_N=torch.tensor([seq.anchor for seq in sequences]),
        embedding_ND=torch.tensor([seq.embedding for seq in sequences]),
        sequences=len(sequences),
    )


def micro_batches(units: Sequence[Sequence[TrainSequence]], token_budget: int) -> list[TokenBatch]:
    """Split units (sequences that must stay together, such as a preference pair) into micro-batches.

    Units are sorted by their longest sequence, so that attention's padded view is tight, and filled greedily up to
    `token_budget` tokens; a unit larger than the budget travels alone.
    """
    ordered = sorted(units, key=lambda unit: max(len(seq.token_ids) for seq in unit))
    batches: list[list[TrainSequence]] = []
    size = token_budget + 1
    for unit in ordered:
        tokens = sum(len(seq.token_ids) for seq in unit)
        if size + tokens > token_budget:
            batches.append([])
            size = 0
        batches[-1] += unit
        size += tokens
    return [collate(batch) for batch in batches]
