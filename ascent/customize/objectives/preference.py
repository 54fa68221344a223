"""Preference losses on sequence scores: score, pairing and link of a row as tensor maths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.customize.batch import TokenBatch
from ascent.customize.objectives.ratio import sequence_mean, sequence_sum
from ascent.customize.objectives.rows import PreferenceRow

NEVER_CERTAIN = -1e-6  # a mean log-prob of 0 has infinite log-odds; fp32 cannot tell smaller ones from 0


def sequence_scores(logp_M: Tensor, batch: TokenBatch, row: PreferenceRow) -> Tensor:
    """s(x, y) [N]: Σ_t or mean_t of (ℓ_t − ℓ_ref,t), or the log-odds of exp(mean_t ℓ_t)."""
    if row.score == "log_odds":
        mean = sequence_mean(logp_M, batch).clamp(max=NEVER_CERTAIN)
        return mean - log1mexp(mean)
    gap = logp_M - batch.reference_logp_M.to(logp_M.dtype) if row.reference else logp_M
    return sequence_sum(gap, batch) if row.score == "sum" else sequence_mean(gap, batch)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0, accurate at both ends (Mächler 2012, Eq. 7); the plain form is NaN near 0."""
    near = x > -0.6931471805599453
    return torch.where(
        near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, x).exp())
    )


def link_loss(margin: Tensor, row: PreferenceRow, given: Tensor | None = None) -> Tensor:
    """What a margin m = β(s_w − s_l) − γ costs; `given` is η(r_w − r_l) for links that fit given rewards.

    | link | loss | source |
    |---|---|---|
    | logistic | −log σ(m) | DPO Eq. 7 |
    | odds_ratio | −β log σ(m/β) | ORPO, arXiv 2403.07691 Eq. 6, β its λ |
    | squared | (m/β − 1/(2β))² | IPO, arXiv 2310.12036 Eq. 17 |
    | reward_squared | (m − ηΔr)² | arXiv 2406.11704 §3.3.2 |
    | reward_kl | KL(Bernoulli σ(ηΔr) ‖ Bernoulli σ(m)) | arXiv 2406.11704 Eq. 1 |
    """
    match row.link:
        case "odds_ratio":
            return -row.beta * F.logsigmoid(margin / row.beta)
        case "squared":
            return (margin / row.beta - 1 / (2 * row.beta)).square()
        case "reward_squared":
            assert given is not None
            return (margin - given).square()
        case "reward_kl":
            assert given is not None
            p = torch.sigmoid(given)
            return p * (F.logsigmoid(given) - F.logsigmoid(margin)) + (1 - p) * (
                F.logsigmoid(-given) - F.logsigmoid(-margin)
            )
        case _:
            return -F.logsigmoid(margin)


def pair_loss(margin: Tensor, row: PreferenceRow, given: Tensor | None = None) -> Tensor:
    """(1−ε)·link(m) + ε·link(−m): with ε the share of flipped labels (cDPO, Mitchell 2023, Eq. 3)."""
    loss = link_loss(margin, row, given)
    epsilon = row.label_smoothing
    return loss if epsilon == 0 else (1 - epsilon) * loss + epsilon * link_loss(-margin, row, given)


def similarity_weights(embedding_PD: Tensor, temperature: float) -> Tensor:
    """ω [P, P]: each row a softmax over −(1 − cos(e_i, e_j))/T (relative PO, arXiv 2402.10958 Eq. 7)."""
    unit = F.normalize(embedding_PD.float(), dim=-1)
    return torch.softmax((unit @ unit.T - 1) / temperature, dim=-1)


def unpaired_loss(scores: Tensor, good: Tensor, anchor: Tensor, row: PreferenceRow) -> Tensor:
    """λ_D(1 − σ(β(s − z0))) for good answers, λ_U(1 − σ(β(z0 − s))) for bad ones (KTO, arXiv 2402.01306 Eq. 7-8)."""
    value = torch.sigmoid(row.beta * torch.where(good, scores - anchor, anchor - scores))
    return torch.where(good, row.desirable, row.undesirable).to(scores.dtype) * (1 - value)
