"""Sampling on top of key/value caches: what is shared is kept once, what is finished leaves.

The longest prefix that all prompts of a call share (system text, few-shot examples) is computed once and its keys and
values are kept once; every row's attention runs over that shared part and its own part with one joint softmax. Each
distinct prompt is computed once however many samples it has. Rows that end are dropped from the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference.decoder import Cache, Decoder, Layer
from ascent.inference.engine import Sampling
from ascent.inference.head import exact_logp

DROP_FRACTION = 0.125  # compact the caches when this share of rows has ended: copying costs about one step


@dataclass(frozen=True)
class Ending:
    """When a row ends: one of these ids, or what `stopped(tokens)` says after a token (stop strings)."""

    ids: frozenset[int] = frozenset()
    stopped: Callable[[list[int]], bool] | None = None

    def reached(self, tokens: list[int]) -> bool:
        """Whether the row ends with its last token."""
        return tokens[-1] in self.ids or (self.stopped is not None and self.stopped(tokens))


@dataclass
class Row:
    """One sample in flight or done."""

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: bool = False


@torch.inference_mode()
def sample_rows(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ending: Ending,
    *,
    seeds: Sequence[int],
    rows_in_flight: int,
    on_done: Callable[[int], None] | None = None,
) -> list[list[Row]]:
    """Sample `sampling.n` rows for each prompt of token ids; `seeds[i]` starts prompt i's streams.

    Returned rows include the end token when one was sampled.
    """
    n = sampling.n
    shared = shared_prefix(prompts)
    prefix = prefill_prefix(model, prompts[0][:shared])
    results: list[list[Row]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
    per_wave = max(1, rows_in_flight // n)
    for start in range(0, len(order), per_wave):
        wave = order[start : start + per_wave]
        rows = [Row(i, k) for i in wave for k in range(n)]
        noise = _noise([seeds[i] for i in wave], n, sampling.max_tokens) if sampling.temperature > 0 else None
        place = {tokens: at for at, tokens in enumerate(dict.fromkeys(tuple(prompts[i]) for i in wave))}
        cache, last_BD = prefill(model, [tokens[shared:] for tokens in place], prefix, room=sampling.max_tokens)
        repeat = torch.tensor([place[tuple(prompts[row.prompt])] for row in rows], device=model.device)
        if len(place) < len(rows):
            cache.select(repeat)
        _decode(model, cache, last_BD[repeat], rows, noise, sampling, ending, on_done)
        for row in rows:
            results[row.prompt].append(row)
    return results


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens all prompts share, leaving each prompt at least one token of its own."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    common = 0
    limit = min(len(prompt) for prompt in prompts) - 1
    while common < limit and first[common] == last[common]:
        common += 1
    return common


def prefill_prefix(model: Decoder, tokens: Sequence[int]) -> Cache:
    """Compute the shared prefix once; its keys and values are [K, P, E] per layer."""
    empty = Cache([], [], torch.zeros(1, dtype=torch.long), [], [], 0)
    if not tokens:
        return empty
    cache, _ = prefill(model, [tokens], empty, room=0)
    return Cache(
        [],
        [],
        cache.used_B,
        [key[0] for key in cache.keys],
        [value[0] for value in cache.values],
        len(tokens),
    )


def prefill(model: Decoder, prompts: Sequence[Sequence[int]], prefix: Cache, *, room: int) -> tuple[Cache, Tensor]:
    """Run prompts on top of the shared prefix. Returns a cache with `room` free places a row, last hidden [B, D]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    tokens_BS = torch.zeros(len(prompts), longest, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        tokens_BS[index, : len(prompt)] = torch.tensor(prompt)
    tokens_BS = tokens_BS.to(model.device)
    positions_S = torch.arange(prefix.prefix, prefix.prefix + longest, device=model.device)
    rope = model.rope(positions_S)
    causal_SS = torch.ones(longest, longest, dtype=torch.bool, device=model.device).tril()
    mask = torch.cat((causal_SS.new_ones(longest, prefix.prefix), causal_SS), dim=1)
    cache = Cache([], [], lengths.to(model.device), prefix.prefix_keys, prefix.prefix_values, prefix.prefix)
    x = model.embed(tokens_BS)
    for index, layer in enumerate(model.blocks):
        q, k, v = (part.transpose(1, 2) for part in layer.project(x, rope))
        cache.keys.append(F.pad(k, (0, 0, 0, room)))
        cache.values.append(F.pad(v, (0, 0, 0, room)))
        if prefix.prefix:
            rows = (len(prompts), -1, -1, -1)
            k = torch.cat((prefix.prefix_keys[index].expand(*rows), k), dim=2)
            v = torch.cat((prefix.prefix_values[index].expand(*rows), v), dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        x = layer.mlp(x + layer.out(attended.transpose(1, 2).flatten(2)))
    last_BD = model.norm(x)[torch.arange(len(prompts)), lengths - 1]
    return cache, last_BD


def step(model: Decoder, cache: Cache, tokens_B: Tensor) -> Tensor:
    """Add one token to every row and return the final hidden states [B, D]."""
    rows = torch.arange(len(tokens_B), device=model.device)
    rope = model.rope(cache.used_B + cache.prefix)
    span = int(cache.used_B.max()) + 1
    hidden_from_BS = torch.arange(span, device=model.device) > cache.used_B[:, None]
    x = model.embed(tokens_B)
    for index, layer in enumerate(model.blocks):
        q, k, v = layer.project(x, rope)
        cache.keys[index][rows, :, cache.used_B] = k
        cache.values[index][rows, :, cache.used_B] = v
        x = x + layer.out(_attend(layer, cache, index, q, span, hidden_from_BS))
        x = layer.mlp(x)
    cache.used_B = cache.used_B + 1
    final: Tensor = model.norm(x)
    return final


def _attend(layer: Layer, cache: Cache, index: int, q_BHE: Tensor, span: int, hidden_from_BS: Tensor) -> Tensor:
    """Attention of one new token a row over the shared prefix and the row's own places, one softmax over both."""
    c = layer.config
    batch, groups = q_BHE.shape[0], c.heads // c.kv_heads
    q_BKGE = q_BHE.view(batch, c.kv_heads, groups, c.head_size) * c.head_size**-0.5
    own = (q_BKGE @ cache.keys[index][:, :, :span].transpose(-1, -2)).float()
    own = own.masked_fill(hidden_from_BS[:, None, None], float("-inf"))
    value = cache.values[index][:, :, :span]
    if not cache.prefix:
        alone: Tensor = own.softmax(-1).to(q_BHE.dtype) @ value
        return alone.reshape(batch, -1)
    q_KRE = q_BKGE.transpose(0, 1).reshape(c.kv_heads, batch * groups, c.head_size)
    shared = (q_KRE @ cache.prefix_keys[index].transpose(-1, -2)).float()
    shared = shared.view(c.kv_heads, batch, groups, -1).transpose(0, 1)
    weights = torch.cat((shared, own), -1).softmax(-1).to(q_BHE.dtype)
    on_shared, on_own = torch.split(weights, [cache.prefix, span], -1)
    from_shared = on_shared.transpose(0, 1).reshape(c.kv_heads, batch * groups, -1) @ cache.prefix_values[index]
    from_shared = from_shared.view(c.kv_heads, batch, groups, -1).transpose(0, 1)
    both: Tensor = from_shared + on_own @ value
    return both.reshape(batch, -1)


def _decode(
    model: Decoder,
    cache: Cache,
    hidden_BD: Tensor,
    rows: Sequence[Row],
    noise: Tensor | None,
    sampling: Sampling,
    ending: Ending,
    on_done: Callable[[int], None] | None,
) -> None:
    """Grow all rows until each has ended or holds `max_tokens`."""
    alive = list(rows)
    place = torch.arange(len(rows))
    head = model.head_weight
    for index in range(sampling.max_tokens):
        uniform_B = None if noise is None else noise[place, index].to(hidden_BD.device)
        tokens_B, logps_B = draw(hidden_BD, head, sampling.temperature, sampling.top_p, uniform_B)
        ended = 0
        for row, token, logp in zip(alive, tokens_B.tolist(), logps_B.tolist(), strict=True):
            if row.ended:
                ended += 1
                continue
            row.tokens.append(token)
            row.logps.append(logp)
            row.ended = ending.reached(row.tokens) or len(row.tokens) == sampling.max_tokens
            if row.ended:
                ended += 1
                if on_done:
                    on_done(1)
        if ended == len(alive):
            return
        if ended >= max(1, DROP_FRACTION * len(alive)):
            keep = torch.tensor([i for i, row in enumerate(alive) if not row.ended])
            cache.select(keep.to(tokens_B.device))
            tokens_B, place = tokens_B[keep.to(tokens_B.device)], place[keep]
            alive = [alive[i] for i in keep.tolist()]
        hidden_BD = step(model, cache, tokens_B)


def draw(
    hidden_BD: Tensor, head_VD: Tensor, temperature: float, top_p: float, uniform_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pick a token per row and return (tokens_B, logps_B); greedy when `uniform_B` is None.

    One uniform number per token picks it by the inverse of the cumulative distribution, so that a row's tokens do not
    depend on which other rows are in the batch.
    """
    logits_BV = (hidden_BD @ head_VD.T).float()
    if uniform_B is None:
        tokens_B, temperature = logits_BV.argmax(-1), 1.0
        lse_B = logits_BV.logsumexp(-1)
    else:
        lse_B = logits_BV.div_(temperature).logsumexp(-1)
        p_BV = (logits_BV - lse_B[:, None]).exp_()
        if top_p < 1:
            p_BV = nucleus(p_BV, top_p)
        cumulative = p_BV.cumsum(-1)
        wanted = uniform_B[:, None] * cumulative[:, -1:]
        tokens_B = torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp(max=p_BV.shape[1] - 1)
    rounded_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
    return tokens_B, exact_logp(hidden_BD, head_VD, tokens_B, rounded_B, lse_B, temperature)


def nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens whose mass reaches `top_p` (Holtzman et al. 2020, arXiv 1904.09751)."""
    ordered, index = p_BV.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return p_BV.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), 0.0)


def _noise(seeds: Sequence[int], n: int, max_tokens: int) -> Tensor:
    """Uniform numbers [rows, max_tokens]; row (prompt, k) has its own stream."""
    generator = torch.Generator()
    streams = []
    for seed in seeds:
        for sample in range(n):
            generator.manual_seed((seed * 1_000_003 + sample) % (1 << 63))
            streams.append(torch.rand(max_tokens, generator=generator))
    return torch.stack(streams)
