"""From final hidden states to tokens where every row has its own temperature, `top_p`, constraint and log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference import native
from ascent.inference.cache import padded
from ascent.inference.head import exact_logp
from ascent.inference.sampling.draw import LIKELY, pick
from ascent.inference.sampling.weights import Weights
from ascent.inference.serving import kernels
from ascent.inference.serving.request import Token

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Choice:
    """How one row draws: greedily at temperature 0, else the token at `uniform` of the cumulative distribution.

    `allowed` are the tokens a constraint allows, as booleans [V]; the `top` likeliest ones are reported.
    """

    temperature: float
    top_p: float
    uniform: float
    top: int = 0
    allowed: Tensor | None = None


def choose(hidden_BD: Tensor, weights: Weights, choices: Sequence[Choice]) -> list[Token]:
    """Draw a token for each row; log-probs are the model's own, as `request.py` says."""
    count = len(choices)
    hidden_BD = F.pad(hidden_BD, (0, 0, 0, padded(count) - count))
    logits_BV, hidden_BD = weights.head(hidden_BD)[:count], hidden_BD[:count]
    greedy_B, lse_B = _highest(logits_BV)
    shaped_BV = logits_BV
    held = [row for row, choice in enumerate(choices) if choice.allowed is not None]
    if held:
        allowed_NV = torch.stack([a for row in held if (a := choices[row].allowed) is not None]).to(logits_BV.device)
        shaped_BV = logits_BV.clone()
        shaped_BV[held] = shaped_BV[held].masked_fill_(~allowed_NV, float("-inf"))
        greedy_B = shaped_BV.argmax(-1)
    tokens_B = _drawn(shaped_BV, greedy_B, choices)
    rounded_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1).float()
    logps = exact_logp(hidden_BD, weights.head_VD, tokens_B, rounded_B, lse_B, 1.0).tolist()
    tops = _tops(hidden_BD, weights.head_VD, logits_BV, lse_B, [choice.top for choice in choices])
    return [Token(*one) for one in zip(tokens_B.tolist(), logps, tops, strict=True)]


def allowed_tokens(mask: np.ndarray[Any, Any], vocab: int) -> Tensor:
    """Unpack a constraint's bit mask; tokens beyond its end are not allowed.

    Raises:
        ValueError: it allows no token.
    """
    import numpy as np

    bits = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little", count=vocab)
    if not bits.any():
        raise ValueError("its mask allows no token")
    return torch.from_numpy(bits.view(np.bool_))


def _highest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, and the logarithm of the normaliser."""
    if native.fits(logits_BV):
        tokens_B, _, lse_B = native.pick_tokens(logits_BV, None, 1.0)
        return tokens_B, lse_B
    return logits_BV.argmax(-1), logits_BV.float().logsumexp(-1)


def _drawn(logits_BV: Tensor, greedy_B: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Each row's token: the greedy one, or one drawn from the row's own distribution."""
    rows = [row for row, choice in enumerate(choices) if choice.temperature > 0]
    if not rows:
        return greedy_B
    settings = torch.tensor([[choices[row].temperature, choices[row].top_p, choices[row].uniform] for row in rows])
    tokens_B, rows_N = greedy_B.clone(), torch.tensor(rows)
    if kernels.library() is not None and native.fits(logits_BV):
        tokens_B[rows_N] = kernels.draw_tokens(logits_BV, rows_N, settings)
        return tokens_B
    temperature_N, top_p_N, uniform_N = settings.to(logits_BV.device).T.contiguous()
    rows_N = rows_N.to(logits_BV.device)
    p_NV = (logits_BV[rows_N].float() / temperature_N[:, None]).softmax(-1)
    tokens_B[rows_N] = pick(_nucleus(p_NV, top_p_N), uniform_N)
    return tokens_B


def _nucleus(p_NV: Tensor, top_p_N: Tensor) -> Tensor:
    """Keep in each row the likeliest tokens whose mass reaches its `top_p`, and those as likely as the last of them.

    As `nucleus` of `draw.py`, but by a threshold as in the kernel: scattering the kept ones back costs twenty times as
    much.
    """
    if bool((top_p_N >= 1).all()):
        return p_NV
    top = p_NV.topk(min(LIKELY, p_NV.shape[1])).values
    threshold_N = _threshold(top, top_p_N)
    wide = ((top.sum(-1) < top_p_N) & (top_p_N < 1)).nonzero().squeeze(1)
    if len(wide):
        threshold_N[wide] = _threshold(p_NV[wide].sort(-1, descending=True).values, top_p_N[wide])
    threshold_N[top_p_N >= 1] = 0.0
    return p_NV * (p_NV >= threshold_N[:, None])


def _threshold(ordered: Tensor, top_p_N: Tensor) -> Tensor:
    """The smallest mass of the nucleus, from masses in descending order."""
    before = ordered.cumsum(-1) - ordered
    return ordered.masked_fill(before >= top_p_N[:, None], float("inf")).amin(-1)


def _tops(
    hidden_BD: Tensor, head_VD: Tensor, logits_BV: Tensor, lse_B: Tensor, wanted: Sequence[int]
) -> list[tuple[tuple[int, float], ...]]:
    """Each row's likeliest tokens with log-probs as exact as the drawn token's, best first."""
    found: list[tuple[tuple[int, float], ...]] = [()] * len(wanted)
    rows, most = [row for row, top in enumerate(wanted) if top], max(wanted, default=0)
    if not rows:
        return found
    rounded, ids = logits_BV[rows].topk(most)
    repeated = (x[rows].repeat_interleave(most, 0) for x in (hidden_BD, lse_B))
    hidden, lse = repeated
    logps = exact_logp(hidden, head_VD, ids.flatten(), rounded.flatten().float(), lse, 1.0).view(len(rows), most)
    for row, of_ids, of_logps in zip(rows, ids.tolist(), logps.tolist(), strict=True):
        pairs = sorted(zip(of_ids, of_logps, strict=True), key=lambda pair: -pair[1])
        found[row] = tuple(pairs[: wanted[row]])
    return found
