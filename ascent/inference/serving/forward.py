"""One pass of a serving step: the next tokens of every row, one or many each, over the paged cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference import native
from ascent.inference.attention import parted
from ascent.inference.cache import padded
from ascent.inference.decoder import DecoderConfig
from ascent.inference.serving import kernels
from ascent.inference.serving.adapters import AdaptedWeights, Adapter, Segment
from ascent.inference.serving.pages import PAGE
from ascent.inference.tree import rounded_up

FEW, MANY = 64, 32  # steps of more tokens than `FEW` are rounded up to a multiple of `MANY`: one product per shape


@dataclass(frozen=True)
class Part:
    """A row's next tokens; the first stands at `position`. The pages hold what came before and have room for these."""

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    adapter: Adapter | None


class PagedCache:
    """Keys and values of all layers: paired for the kernels where they fit, else as [pages · PAGE, K, E]."""

    def __init__(self, config: DecoderConfig, pages: int, like: Tensor) -> None:
        self.config = config
        c, fits = config, kernels.library() is not None and native.fits(like.new_empty(native.LANES))
        self.native = fits and c.head_size % native.COLUMNS == 0
        if self.native:
            self._keys = like.new_zeros(c.layers, pages, c.kv_heads, c.head_size // 2, PAGE, 2)
            self._values = like.new_zeros(c.layers, pages, c.kv_heads, PAGE // 2, c.head_size, 2)
        else:
            self._keys = like.new_zeros(c.layers, pages * PAGE, c.kv_heads, c.head_size)
            self._values = torch.zeros_like(self._keys)

    def plan(self, parts: Sequence[Part]) -> kernels.Stretches | _Gathers:
        """What all layers of a step share."""
        places = [
            part.pages[at // PAGE] * PAGE + at % PAGE
            for part in parts
            for at in range(part.position, part.position + len(part.tokens))
        ]
        if not self.native:
            return _Gathers.of(parts, torch.tensor(places, device=self._keys.device), self._keys.device)
        most = max(1, kernels.ROWS * self.config.kv_heads // self.config.heads)
        rows: list[tuple[int, int, int, int]] = []
        tables: list[int] = []
        first = 0
        for part in parts:
            count = len(part.tokens)
            for at in range(0, count, most):
                rows.append((len(tables), part.position + at, first + at, min(most, count - at)))
            tables += part.pages
            first += count
        return kernels.Stretches(torch.tensor(rows), torch.tensor(tables), torch.tensor(places))

    def attend(self, layer: int, qkv_TNE: Tensor, plan: kernels.Stretches | _Gathers) -> Tensor:
        """Store the step's keys and values, and return what its tokens attend to [T, H·E]."""
        keys, values, kv_heads = self._keys[layer], self._values[layer], self.config.kv_heads
        if isinstance(plan, kernels.Stretches):
            return kernels.paged_attention(qkv_TNE, keys, values, kv_heads, plan).flatten(1)
        q, k, v = parted(qkv_TNE, kv_heads)
        count = len(plan.places)
        keys[plan.places], values[plan.places] = k[:count], v[:count]
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for tokens, seen in plan.gathers:
            rows = q[tokens].view(len(seen.places), -1, *q.shape[1:]).transpose(1, 2)
            k_NKSE, v_NKSE = keys[seen.places].transpose(1, 2), values[seen.places].transpose(1, 2)
            attended = F.scaled_dot_product_attention(rows, k_NKSE, v_NKSE, seen.mask, enable_gqa=True)
            out[tokens] = attended.transpose(1, 2).flatten(0, 1)
        return out.flatten(1)


@dataclass(frozen=True)
class _Seen:
    """Places [N, S] that N rows gather, and which of them each query sees [N, 1, L, S]."""

    places: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _Gathers:
    """The step for tensor operations: rows of one token together, each longer part alone."""

    places: Tensor
    gathers: Sequence[tuple[Tensor, _Seen]]

    @classmethod
    def of(cls, parts: Sequence[Part], places: Tensor, device: torch.device) -> _Gathers:
        firsts = [0, *itertools.accumulate(len(part.tokens) for part in parts)]
        placed = list(zip(firsts, parts, strict=False))
        alone = [[one] for one in placed if len(one[1].tokens) > 1]
        together = [one for one in placed if len(one[1].tokens) == 1]
        return cls(places, [_gather(group, device) for group in (together, *alone) if group])


def _gather(group: Sequence[tuple[int, Part]], device: torch.device) -> tuple[Tensor, _Seen]:
    """The tokens of these rows, which have as many each, and what they see."""
    count = len(group[0][1].tokens)
    tokens = torch.tensor([first + at for first, _ in group for at in range(count)], device=device)
    width = max(part.position for _, part in group) + count
    across = -(-width // PAGE)
    pages = torch.tensor([[*part.pages, *[0] * across][:across] for _, part in group], device=device)
    places = (pages[..., None] * PAGE + torch.arange(PAGE, device=device)).flatten(1)[:, :width]
    position = torch.tensor([part.position for _, part in group], device=device)
    last_seen = position[:, None] + torch.arange(count, device=device)
    mask = torch.arange(width, device=device) <= last_seen[..., None]
    return tokens, _Seen(places, mask[:, None])


def forward(weights: AdaptedWeights, cache: PagedCache, parts: Sequence[Part], wanted: Sequence[int]) -> Tensor:
    """Run the parts' tokens and return the final hidden state of the last token of each part in `wanted` [B, D].

    Parts of one adapter must stand together.
    """
    model = weights.model
    tokens = [token for part in parts for token in part.tokens]
    positions = [at for part in parts for at in range(part.position, part.position + len(part.tokens))]
    spare = (padded(len(tokens)) if len(tokens) <= FEW else rounded_up(len(tokens), MANY)) - len(tokens)
    ends, segments = [0], list[Segment]()
    for part in parts:
        ends.append(ends[-1] + len(part.tokens))
        if part.adapter is not None and segments and segments[-1].adapter is part.adapter:
            segments[-1] = Segment(part.adapter, segments[-1].begin, ends[-1])
        elif part.adapter is not None:
            segments.append(Segment(part.adapter, ends[-2], ends[-1]))
    weights.through(segments)
    plan = cache.plan(parts)
    x, added = model.embed(torch.tensor([*tokens, *[0] * spare], device=model.device)), None
    rope = model.rope(torch.tensor([*positions, *[0] * spare], device=model.device))
    for index, layer in enumerate(weights.layers):
        x, qkv = layer.attend(x, added, rope)
        x, added = layer.finish(cache.attend(index, qkv, plan), x)
    last = torch.tensor([ends[at + 1] - 1 for at in wanted], dtype=torch.long, device=model.device)
    assert added is not None
    final: Tensor = model.norm(x.index_select(0, last) + added.index_select(0, last))
    return final
