"""From final hidden states to tokens and their log-probs, one uniform number a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference import native
from ascent.inference.head import exact_logp

BLOCK = 256  # probabilities summed at a time: the cumulative distribution is searched among blocks, then within one
LIKELY = 256  # tokens that nearly always hold the nucleus; sorting the whole vocabulary costs twenty times as much


def draw(
    hidden_BD: Tensor,
    head_VD: Tensor,
    temperature: float,
    top_p: float,
    uniform_B: Tensor | None,
    product: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick a token per row and return (tokens_B, logps_B); greedy when `uniform_B` is None.

    One uniform number per token picks it by the inverse of the cumulative distribution, so that a row's tokens do not
    depend on which other rows are in the batch. `product` is hidden · headᵀ where a faster one is at hand.
    """
    logits_BV = hidden_BD @ head_VD.T if product is None else product(hidden_BD)
    if uniform_B is None:
        temperature = 1.0
    if native.fits(logits_BV) and (uniform_B is None or top_p >= 1):
        tokens_B, rounded_B, lse_B = native.pick_tokens(logits_BV, uniform_B, temperature)
    else:
        tokens_B, rounded_B, lse_B = _picked(logits_BV.float(), temperature, top_p, uniform_B)
    return tokens_B, exact_logp(hidden_BD, head_VD, tokens_B, rounded_B, lse_B, temperature)


def _picked(
    logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's token, its logit / temperature, and the logarithm of the normaliser."""
    if temperature != 1.0:
        logits_BV = logits_BV / temperature
    p_BV = logits_BV.softmax(-1)
    if uniform_B is None:
        tokens_B = logits_BV.argmax(-1)
    else:
        tokens_B = pick(nucleus(p_BV, top_p) if top_p < 1 else p_BV, uniform_B)
    rounded_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
    return tokens_B, rounded_B, rounded_B - p_BV.gather(1, tokens_B[:, None]).squeeze(1).log()


def pick(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return for each row the token at `uniform` of its cumulative mass; `p_BV` need not sum to one.

    The cumulative sum runs over blocks and then within one block. A token of no mass is never picked.
    """
    count, vocab = p_BV.shape
    blocks = F.pad(p_BV, (0, -vocab % BLOCK)).view(count, -1, BLOCK)
    block_B, rest_B = _inverse(blocks.sum(-1), uniform_B)
    inside_B, _ = _inverse(blocks[torch.arange(count, device=p_BV.device), block_B], rest_B)
    return block_B * BLOCK + inside_B


def nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens whose mass reaches `top_p` (Holtzman et al. 2020, arXiv 1904.09751)."""
    top, index = p_BV.topk(min(LIKELY, p_BV.shape[1]))
    kept = torch.zeros_like(p_BV).scatter_(1, index, _within(top, top_p))
    wide = (top.sum(-1) < top_p).nonzero().squeeze(1)
    if len(wide):
        top, index = p_BV[wide].sort(-1, descending=True)
        kept[wide] = torch.zeros_like(top).scatter_(1, index, _within(top, top_p))
    return kept


def _within(ordered: Tensor, top_p: float) -> Tensor:
    """Masses in descending order, zero from where those before them reach `top_p`."""
    return ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)


def _inverse(mass_BS: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place at `uniform` of each row's cumulative mass, and how far into that place's mass it falls."""
    cumulative = mass_BS.cumsum(-1)
    below_one = uniform_B.clamp(0, 1 - 2**-23)[:, None]  # so that the product stays below the total in fp32
    wanted = below_one * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, wanted, right=True)
    mass = mass_BS.gather(1, place)
    rest = (wanted - (cumulative.gather(1, place) - mass)) / mass
    return place.squeeze(1), rest.squeeze(1)
