"""The rows: every algorithm is a frozen choice on a few axes. Adding one is one entry here and one identity test.

An objective is a pure function `(logp, entropy, batch, row) → LossOut`; the trainer that sums and steps does not
know which row it runs.

`loss = Σ w_rl·(−ψ) + Σ w_ce·(−ℓ) + Σ w_kl·KL − Σ w_rl·η·H`, plus pair losses on sequence
scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ascent.customize.batch import TokenBatch
from ascent.customize.objectives import preference
from ascent.customize.objectives.kl import k3, reverse_kl
from ascent.customize.objectives.surrogate import SURROGATES, Clip, clip_fraction
from ascent.records.errors import UnknownName

Kind = Literal["supervised", "preference", "online"]


@dataclass(frozen=True)
class LossOut:
    """A loss to sum, and metrics as (numerator, denominator) tensors: a rate is never stored as a rate."""

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SupervisedRow:
    """Cross-entropy on the target tokens, averaged over all target tokens of the global batch."""

    name: str
    source: str
    weights: str = "token_mean"
    kind: Kind = "supervised"


@dataclass(frozen=True)
class PreferenceRow:
    """m = β(s_w − s_l); loss = (1−ε)·link(m) + ε·link(−m) + α·NLL(y_w)/|y_w|."""

    name: str
    source: str
    beta: float = 0.1
    norm: Literal["sum", "mean"] = "sum"
    link: str = "logistic"
    label_smoothing: float = 0.0
    nll: float = 0.0
    kind: Kind = "preference"


@dataclass(frozen=True)
class OnlineRow:
    """Policy gradient on sampled, graded groups; see the axes in the fields."""

    name: str
    source: str
    baseline: str = "group_mean"
    scale: str = "group_std"
    surrogate: str = "min_clip"
    clip: Clip = field(default=Clip(0.8, 1.2))
    weights: str = "seq_mean_token_mean"
    keep_dead_groups: bool = True
    overlong: bool = False
    kl: float = 0.0
    entropy: float = 0.0
    kind: Kind = "online"


Row = SupervisedRow | PreferenceRow | OnlineRow

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        SupervisedRow("sft", "maximum likelihood on demonstrations; per-token mean over the global batch"),
        PreferenceRow("dpo", "Rafailov et al. 2023, arXiv 2305.18290 Eq. 7; label smoothing: Mitchell 2023, Eq. 3"),
        OnlineRow("grpo", "Shao et al. 2024, arXiv 2402.03300 Eq. 3-4, β 0.04", kl=0.04),
        OnlineRow(
            "dapo",
            "Yu et al. 2025 (ByteDance), arXiv 2503.14476: clip-higher, dynamic sampling, token mean, soft overlong "
            "punishment, no KL",
            clip=Clip(0.8, 1.28),
            weights="token_mean",
            keep_dead_groups=False,
            overlong=True,
        ),
    )
}


AMBIGUOUS = {
    "rpo": ". 'rpo' is ambiguous: relative preference optimization, DPO with an NLL term (dpo with nll: 1), and "
    "reward-aware preference optimization all carry that name"
}


def row_named(name: str) -> Row:
    """Return the row. Raises `UnknownName`; a bare `rpo` is refused because three methods carry that name."""
    if name not in ROWS:
        raise UnknownName("algorithm", name, ROWS, hint=AMBIGUOUS.get(name, ""))
    return ROWS[name]


def supervised_loss(logp_M: Tensor, entropy_M: Tensor, batch: TokenBatch, row: SupervisedRow) -> LossOut:
    """Σ w_ce · (−ℓ)."""
    loss = -(batch.ce_weight_M.to(logp_M.dtype) * logp_M).sum()
    count = _count(logp_M)
    return LossOut(loss, {"nll": (-logp_M.detach().sum(), count)})


def preference_loss(logp_M: Tensor, entropy_M: Tensor, batch: TokenBatch, row: PreferenceRow) -> LossOut:
    """Pairs lie chosen, rejected, chosen, rejected…; `pair_weight_N` is 1/pairs of the global batch."""
    reference = batch.reference_logp_M.to(logp_M.dtype)
    scores = preference.sequence_scores(logp_M, reference, batch, row.norm)
    chosen, rejected = scores[0::2], scores[1::2]
    weight = batch.pair_weight_N[0::2].to(logp_M.dtype)
    margin = row.beta * (chosen - rejected)
    loss = (weight * preference.pair_loss(margin, row.link, row.label_smoothing)).sum()
    lengths = preference.sequence_lengths(batch).to(logp_M.dtype)
    sums = torch.zeros_like(scores).index_add(0, batch.sequence_M, logp_M)
    nll = -(sums / lengths)[0::2]
    if row.nll:
        loss = loss + row.nll * (weight * nll).sum()
    pairs = _count(margin)
    return LossOut(
        loss,
        {
            "margin": (margin.detach().sum(), pairs),
            "accuracy": ((margin.detach() > 0).float().sum(), pairs),
            "chosen_reward": ((row.beta * chosen).detach().sum(), pairs),
            "chosen_nll": (nll.detach().sum(), pairs),
        },
    )


def online_loss(logp_M: Tensor, entropy_M: Tensor, batch: TokenBatch, row: OnlineRow) -> LossOut:
    """−Σ w·ψ(ρ, A) + β Σ w_kl·KL − η Σ w·H."""
    weight = batch.rl_weight_M.to(logp_M.dtype)
    advantage = batch.advantage_M.to(logp_M.dtype)
    log_ratio = logp_M - batch.old_logp_M.to(logp_M.dtype)
    loss = -(weight * SURROGATES[row.surrogate](log_ratio, advantage, row.clip)).sum()
    count = _count(logp_M)
    detached = log_ratio.detach()
    metrics = {
        "entropy": (entropy_M.detach().sum(), count),
        "clip_fraction": (clip_fraction(detached, advantage, row.clip).sum(), count),
        "mismatch_kl": (k3(detached, torch.zeros_like(detached)).sum(), count),
    }
    if row.kl:
        reference = batch.reference_logp_M.to(logp_M.dtype)
        kl = reverse_kl(logp_M, reference, log_ratio)
        loss = loss + row.kl * (batch.kl_weight_M.to(logp_M.dtype) * kl).sum()
        metrics["kl"] = (kl.detach().sum(), count)
    if row.entropy:
        loss = loss - row.entropy * (weight * entropy_M).sum()
    return LossOut(loss, metrics)


Objective = Callable[[Tensor, Tensor, TokenBatch], LossOut]


def objective(row: Row) -> Objective:
    """Bind a row to its loss."""
    if isinstance(row, SupervisedRow):
        return lambda logp, entropy, batch: supervised_loss(logp, entropy, batch, row)
    if isinstance(row, PreferenceRow):
        return lambda logp, entropy, batch: preference_loss(logp, entropy, batch, row)
    return lambda logp, entropy, batch: online_loss(logp, entropy, batch, row)


def _count(x: Tensor) -> Tensor:
    return torch.tensor(float(x.numel()))
