"""Token batches: sequences laid end to end, with one entry per *target* token in every stream.

Shape letters: T tokens of all sequences, M target tokens (those the policy produced), N sequences.
A stream's weights are computed once for the *global* batch (`weights.py`) and already contain 1/N, so that any split
into micro-batches sums to the same loss and the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class TrainSequence:
    """One sequence and its per-target streams; `None` streams are filled with zeros."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    ce_weight: float | None = None
    rl_weight: float | None = None
    kl_weight: float | None = None
    advantage: float | None = None
    old_logps: Sequence[float] | None = None
    reference_logps: Sequence[float] | None = None
    pair_weight: float = 0.0

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError("token_ids and loss_mask must have the same length")
        if self.loss_mask[0]:
            raise ValueError("the first token has nothing before it and cannot be a target")

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return sum(self.loss_mask)


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
    pair_weight_N: Tensor
    sequences: int

    def to(self, device: torch.device) -> TokenBatch:
        """Move every tensor."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name[-2:] in ("_T", "_M", "_N")}
        return replace(self, **tensors)


def collate(sequences: Sequence[TrainSequence]) -> TokenBatch:
    """Lay sequences end to end. Target i of the batch is predicted from position `at_M[i]`."""
    tokens: list[int] = []
    at: list[int] = []
    owner: list[int] = []
    streams: dict[str, list[float]] = {k: [] for k in ("ce", "rl", "kl", "advantage", "old", "reference")}
    for index, seq in enumerate(sequences):
        places = [i for i, kept in enumerate(seq.loss_mask) if kept]
        at += [len(tokens) + i - 1 for i in places]
        owner += [index] * len(places)
        tokens += seq.token_ids
        for name, value in (
            ("ce", seq.ce_weight),
            ("rl", seq.rl_weight),
            ("kl", seq.kl_weight),
            ("advantage", seq.advantage),
        ):
            streams[name] += [value or 0.0] * len(places)
        for name, values in (("old", seq.old_logps), ("reference", seq.reference_logps)):
            streams[name] += [0.0] * len(places) if values is None else list(values)
    tokens_T = torch.tensor(tokens)
    at_M = torch.tensor(at)
    made = {name: torch.tensor(values, dtype=torch.float32) for name, values in streams.items()}
    return TokenBatch(
        tokens_T=tokens_T,
        lengths=[len(seq.token_ids) for seq in sequences],
        at_M=at_M,
        targets_M=tokens_T[at_M + 1],
        sequence_M=torch.tensor(owner),
        ce_weight_M=made["ce"],
        rl_weight_M=made["rl"],
        kl_weight_M=made["kl"],
        advantage_M=made["advantage"],
        old_logp_M=made["old"],
        reference_logp_M=made["reference"],
        pair_weight_N=torch.tensor([seq.pair_weight for seq in sequences]),
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
