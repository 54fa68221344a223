"""Losses: what a row's axes mean for log-probs, entropies and heads. Pure functions `(scored, batch, row) → LossOut`.

`loss = Σ w_rl·c·(−ψ) + Σ w_ce·(−ℓ) + Σ w_ce·D + Σ w_kl·KL − Σ w_rl·η·H`, plus pair losses on sequence scores. The
trainer that sums and steps does not know which row it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ascent.customize.batch import Scored, TokenBatch
from ascent.customize.objectives import preference
from ascent.customize.objectives.kl import k3, reverse_kl
from ascent.customize.objectives.ratio import pool, sequence_mean
from ascent.customize.objectives.rows import OnlineRow, PreferenceRow, Row, SupervisedRow
from ascent.customize.objectives.surrogate import clip_fraction, surrogate


@dataclass(frozen=True)
class LossOut:
    """A loss to sum, and metrics as (numerator, denominator) tensors: a rate is never stored as a rate."""

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


def supervised_loss(scored: Scored, batch: TokenBatch, row: SupervisedRow) -> LossOut:
    """Σ w_ce · (ce·(−ℓ) + D)."""
    logp_M = scored.logp
    weight = batch.ce_weight_M.to(logp_M.dtype)
    count = _count(logp_M)
    loss = -row.ce * (weight * logp_M).sum()
    metrics = {"nll": (-logp_M.detach().sum(), count)}
    if row.teacher:
        loss = loss + (weight * scored.divergence).sum()
        metrics["divergence"] = (scored.divergence.detach().sum(), count)
    return LossOut(loss, metrics)


def preference_loss(scored: Scored, batch: TokenBatch, row: PreferenceRow) -> LossOut:
    """Pairs lie chosen, rejected, chosen, rejected…; `pair_weight_N` is 1/pairs (unpaired: 1/answers)."""
    if row.pairing == "unpaired":
        return _unpaired(scored, batch, row)
    scores = scored.head if row.score == "head" else preference.sequence_scores(scored.logp, batch, row)
    chosen, rejected = scores[0::2], scores[1::2]
    weight = batch.pair_weight_N[0::2].to(scores.dtype)
    gap = (batch.reward_N[0::2] - batch.reward_N[1::2]).to(scores.dtype)
    margin = row.beta * (chosen - rejected) - row.gamma
    if row.pairing == "cross":
        omega = preference.similarity_weights(batch.embedding_ND[0::2], row.temperature).to(scores.dtype)
        crossed = omega * (row.beta * (chosen[:, None] - rejected[None, :]) - row.gamma)
        each = preference.pair_loss(crossed, row).mean(1)
    elif row.score == "head":
        each = preference.pair_loss(margin - row.eta * gap, row) + row.centring * (chosen + rejected).square()
    else:
        each = preference.pair_loss(margin, row, row.eta * gap)
    loss = (weight * each).sum()
    pairs = _count(margin)
    metrics = {
        "margin": (margin.detach().sum(), pairs),
        "accuracy": ((margin.detach() > 0).float().sum(), pairs),
        "chosen_reward": ((row.beta * chosen).detach().sum(), pairs),
    }
    if row.score != "head":
        nll = -sequence_mean(scored.logp, batch)[0::2]
        metrics["chosen_nll"] = (nll.detach().sum(), pairs)
        if row.nll:
            loss = loss + row.nll * (weight * nll).sum()
    return LossOut(loss, metrics)


def _unpaired(scored: Scored, batch: TokenBatch, row: PreferenceRow) -> LossOut:
    scores = preference.sequence_scores(scored.logp, batch, row)
    good = batch.reward_N > 0
    each = preference.unpaired_loss(scores, good, batch.anchor_N.to(scores.dtype), row)
    reward = row.beta * scores.detach()
    loss = (batch.pair_weight_N.to(scores.dtype) * each).sum()
    metrics = {
        "desirable_reward": (reward[good].sum(), good.float().sum()),
        "undesirable_reward": (reward[~good].sum(), (~good).float().sum()),
        "anchor": (batch.anchor_N.sum(), _count(scores)),
    }
    if row.nll:
        loss = loss - row.nll * (batch.pair_weight_N * good * sequence_mean(scored.logp, batch)).sum()
    return LossOut(loss, metrics)


def online_loss(scored: Scored, batch: TokenBatch, row: OnlineRow) -> LossOut:
    """−Σ w·c·ψ(r, A) + kl·Σ w_kl·KL − entropy·Σ w·H + value_weight·Σ w·L_V."""
    logp_M = scored.logp
    weight = batch.rl_weight_M.to(logp_M.dtype)
    advantage = batch.advantage_M.to(logp_M.dtype)
    old = batch.old_logp_M.to(logp_M.dtype)
    log_ratio = pool(logp_M, old, advantage, batch, row)
    trusted = weight * batch.correction_M.to(logp_M.dtype)
    loss = -(trusted * surrogate(log_ratio, logp_M, advantage, row)).sum()
    count = _count(logp_M)
    moved = (logp_M - old).detach()
    metrics = {
        "entropy": (scored.entropy.detach().sum(), count),
        "clip_fraction": (clip_fraction(log_ratio.detach(), advantage, row.clip).sum(), count),
        "advantage": (advantage.sum(), count),
        "approx_kl": (k3(moved, torch.zeros_like(moved)).sum(), count),
    }
    if row.kl:
        kl = reverse_kl(logp_M, batch.reference_logp_M.to(logp_M.dtype), logp_M - old)
        loss = loss + row.kl * (batch.kl_weight_M.to(logp_M.dtype) * kl).sum()
        metrics["kl"] = (kl.detach().sum(), count)
    if row.entropy:
        loss = loss - row.entropy * (weight * scored.entropy).sum()
    if row.critic:
        value_loss = clipped_value_loss(scored.head, batch, row)
        loss = loss + row.value[1] * (weight * value_loss).sum()
        metrics["value_loss"] = (value_loss.detach().sum(), count)
        missed = (scored.head.detach() - batch.return_M).square().sum()
        metrics["value_missed"] = (missed, batch.return_M.square().sum())  # 1 for a critic that says 0 of everything
    return LossOut(loss, metrics)


def clipped_value_loss(value_M: Tensor, batch: TokenBatch, row: OnlineRow) -> Tensor:
    """½ max((V − R)², (clip(V, V°±c) − R)²) (PPO's reference implementation; Huang et al. 2022, detail 9)."""
    old, target = batch.old_value_M.to(value_M.dtype), batch.return_M.to(value_M.dtype)
    near = old + (value_M - old).clamp(-row.value[0], row.value[0])
    return 0.5 * torch.maximum((value_M - target).square(), (near - target).square())


Objective = Callable[[Scored, TokenBatch], LossOut]


def objective(row: Row) -> Objective:
    """Bind a row to its loss."""
    if isinstance(row, SupervisedRow):
        return lambda scored, batch: supervised_loss(scored, batch, row)
    if isinstance(row, PreferenceRow):
        return lambda scored, batch: preference_loss(scored, batch, row)
    return lambda scored, batch: online_loss(scored, batch, row)


def _count(x: Tensor) -> Tensor:
    return torch.tensor(float(x.numel()))
