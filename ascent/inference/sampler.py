"""Sampling with continuous batching on top of a tree of key/value caches.

Rows leave when they end, and waiting ones enter as soon as enough places in flight are free, so that no row waits for
the slowest of a wave. Each distinct prompt is computed once on top of the prefix that all prompts of the call share,
however many rows sample it. A row's tokens come from its own stream of uniform numbers: they do not depend on which
rows run beside it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference.cache import Cache, Span, layout, padded
from ascent.inference.decoder import Decoder
from ascent.inference.engine import Sampling
from ascent.inference.sampling.draw import draw
from ascent.inference.sampling.passes import prefill, prefill_common, step
from ascent.inference.sampling.weights import Packed, Weights
from ascent.inference.tree import common_prefix

ENTER_FRACTION = 0.125  # let rows enter when this share of those in flight is free: a prefill reads all weights too
PREFILL_TOKENS = 2048  # padded prompt tokens of one prefill; products gain nothing from more, and scores grow


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


@dataclass(eq=False)
class _Group:
    """Rows of one distinct prompt. `hidden_D` is the prompt's last state once computed; `slot` its place apart."""

    tokens: tuple[int, ...]
    waiting: deque[Row]
    alive: int = 0
    slot: int = -1
    hidden_D: Tensor | None = None


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
    on_group: Callable[[int, list[Row]], None] | None = None,
    packed: Packed | None = None,
) -> list[list[Row]]:
    """Sample `sampling.n` rows for each prompt of token ids; `seeds[i]` starts prompt i's streams.

    Returned rows include the end token when one was sampled. `on_done` hears of each row that ends, `on_group` of each
    prompt whose rows have all ended, while others are still sampled. `packed` keeps faster copies of the weights from
    call to call.
    """
    results = [[Row(index, sample) for sample in range(sampling.n)] for index in range(len(prompts))]
    rows_of: dict[tuple[int, ...], deque[Row]] = {}
    for prompt, rows in zip(prompts, results, strict=True):
        rows_of.setdefault(tuple(prompt), deque()).extend(rows)
    groups = [_Group(tokens, rows) for tokens, rows in sorted(rows_of.items(), key=lambda item: (-len(item[0]), item))]
    left = [sampling.n] * len(prompts)

    def ended(row: Row) -> None:
        left[row.prompt] -= 1
        if on_done is not None:
            on_done(1)
        if on_group is not None and not left[row.prompt]:
            on_group(row.prompt, results[row.prompt])

    flying = _Flying(Weights(model, packed), groups, sampling, ending, seeds, max(1, rows_in_flight))
    while flying.enter():
        for row in flying.draw():
            ended(row)
        flying.step()
    return results


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens all prompts share, leaving each prompt at least one token of its own."""
    ordered = sorted(map(tuple, prompts))  # what the first and the last share, all between them share
    return min(common_prefix(ordered[0], ordered[-1]), min(map(len, prompts)) - 1)


class _Flying:
    """The rows in flight and those that wait. Row i of the lists and tensors stands in slot i of the cache."""

    def __init__(
        self,
        weights: Weights,
        groups: Sequence[_Group],
        sampling: Sampling,
        ending: Ending,
        seeds: Sequence[int],
        limit: int,
    ) -> None:
        self.weights, self.sampling, self.ending, self.seeds, self.limit = weights, sampling, ending, seeds, limit
        self.waiting = deque(groups)
        self.prefix = shared_prefix([group.tokens for group in groups])
        self.common = prefill_common(weights, groups[0].tokens[: self.prefix])
        model = weights.model
        plan = layout(
            model.config,
            model.dtype.itemsize,
            [len(group.tokens) - self.prefix for group in groups],
            self.prefix,
            sum(len(group.waiting) for group in groups),
            limit,
        )
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        self.cache = Cache(model.config, self.common, plan, like)
        self.rows: list[Row] = []
        self.groups: list[_Group] = []
        self.noise: list[list[float]] = []
        self.hidden_BD = like.new_empty(0, model.config.width)
        self.tokens: list[int] = []
        self.slots: list[_Group] = []
        self._generator = torch.Generator()

    def enter(self) -> bool:
        """Let waiting rows enter when it is worth a prefill; False when no row is left."""
        if self.rows and self.limit - len(self.rows) < max(1, int(self.limit * ENTER_FRACTION)):
            return True
        while self.waiting and len(self.rows) < self.limit:
            if self.cache.groups is None:
                self._enter_folded(self._next())
                continue
            if self.waiting[0].hidden_D is None:
                self._prefill_apart(self._next())
            group = self.waiting[0]
            assert group.hidden_D is not None
            rows = self._take(group, self.limit - len(self.rows))
            self.cache.enter_rows([(group.slot, len(group.tokens), Span())] * len(rows))
            self._start([(group, row) for row in rows], group.hidden_D.expand(len(rows), -1))
        return bool(self.rows)

    def draw(self) -> list[Row]:
        """Give every row its next token; rows that end leave and are returned."""
        sampling, count = self.sampling, len(self.rows)
        hidden_BD = F.pad(self.hidden_BD, (0, 0, 0, padded(count) - count))
        uniform_B = None
        if sampling.temperature > 0:
            drawn = [noise[len(row.tokens)] for noise, row in zip(self.noise, self.rows, strict=True)]
            uniform_B = torch.tensor(drawn + [0.0] * (len(hidden_BD) - count), device=hidden_BD.device)
        head_VD, product = self.weights.head_VD, self.weights.head
        tokens_B, logps_B = draw(hidden_BD, head_VD, sampling.temperature, sampling.top_p, uniform_B, product)
        self.tokens = tokens_B.tolist()[:count]
        for row, token, logp in zip(self.rows, self.tokens, logps_B.tolist()[:count], strict=True):
            row.tokens.append(token)
            row.logps.append(logp)
            row.ended = len(row.tokens) == sampling.max_tokens or self.ending.reached(row.tokens)
        return self._leave([slot for slot, row in enumerate(self.rows) if row.ended])

    def step(self) -> None:
        """Run every row's new token through the model."""
        if self.rows:
            tokens_B = torch.tensor(self.tokens, device=self.hidden_BD.device)
            self.hidden_BD = step(self.weights, self.cache, tokens_B)
        self.hidden_BD = self.hidden_BD[: len(self.rows)]

    def _next(self) -> list[_Group]:
        """Groups at the front whose prompts are to be computed together."""
        batch = [self.waiting[0]]
        rows = len(self.rows) + len(batch[0].waiting)
        longest = len(batch[0].tokens) - self.prefix  # the longest come first
        for group in itertools.islice(self.waiting, 1, None):
            if rows >= self.limit or longest * (len(batch) + 1) > PREFILL_TOKENS:
                break
            batch.append(group)
            rows += len(group.waiting)
        return batch

    def _prefill_apart(self, batch: Sequence[_Group]) -> None:
        """Compute prompts that stay apart from the rows that sample them."""
        cache, tails = self.cache, [group.tokens[self.prefix :] for group in batch]
        width = cache.lead + max(map(len, tails))
        first = cache.enter_groups([Span(width, cache.lead + len(tail)) for tail in tails])

        def keep(layer: int, keys: Tensor, values: Tensor) -> None:
            assert cache.groups is not None
            cache.groups.write(layer, first, cache.prompt, keys[..., -width:], values[..., -width:, :])

        last_ND = prefill(self.weights, tails, self.common, keep)
        for slot, group in enumerate(batch, first):
            group.slot, group.hidden_D = slot, last_ND[slot - first]
        self.slots += batch

    def _enter_folded(self, batch: Sequence[_Group]) -> None:
        """Compute prompts into the slots of the rows that enter now; rows left behind will compute theirs again."""
        cache, tails = self.cache, [group.tokens[self.prefix :] for group in batch]
        width = cache.lead + max(map(len, tails))
        entering: list[tuple[int, Row]] = []
        for place, group in enumerate(batch):
            room = self.limit - len(self.rows) - len(entering)
            entering += [(place, row) for row in self._take(group, room)]
        first = cache.enter_rows(
            [(-1, len(batch[place].tokens), Span(width, cache.lead + len(tails[place]))) for place, _ in entering]
        )
        source = torch.tensor([place for place, _ in entering], device=self.hidden_BD.device)

        def keep(layer: int, keys: Tensor, values: Tensor) -> None:
            keys, values = keys[..., -width:], values[..., -width:, :]
            if len(source) > len(batch):
                keys, values = keys.index_select(0, source), values.index_select(0, source)
            cache.own.write(layer, first, cache.own_prompt, keys, values)

        last_ND = prefill(self.weights, tails, self.common, keep)
        self._start([(batch[place], row) for place, row in entering], last_ND[source])

    def _take(self, group: _Group, room: int) -> list[Row]:
        """Take up to `room` waiting rows of the group at the front."""
        rows = [group.waiting.popleft() for _ in range(min(room, len(group.waiting)))]
        if not group.waiting:
            self.waiting.popleft()
        return rows

    def _start(self, entering: Sequence[tuple[_Group, Row]], hidden_BD: Tensor) -> None:
        """Put rows behind those in flight; the cache has them already."""
        for group, row in entering:
            group.alive += 1
            self.groups.append(group)
            self.rows.append(row)
            self.noise.append(self._noise(row))
        self.hidden_BD = torch.cat((self.hidden_BD, hidden_BD))

    def _noise(self, row: Row) -> list[float]:
        """The row's own uniform numbers, one a token."""
        if self.sampling.temperature == 0:
            return []
        self._generator.manual_seed((self.seeds[row.prompt] * 1_000_003 + row.sample) % (1 << 63))
        drawn: list[float] = torch.rand(self.sampling.max_tokens, generator=self._generator).tolist()
        return drawn

    def _leave(self, slots: Sequence[int]) -> list[Row]:
        """Remove rows, and groups whose last row that was; the places that become free are filled from the end."""
        ended = [self.rows[slot] for slot in slots]
        left = [self.groups[slot] for slot in slots]
        for group in left:
            group.alive -= 1
        moves = self.cache.leave_rows(slots) if slots else []
        for column in (self.rows, self.groups, self.noise, self.tokens):
            _move(column, moves, len(slots))
        for group in left:
            if group.slot >= 0 and not group.alive and not group.waiting:
                self.cache.leave_group(group.slot)
                last = self.slots.pop()
                if last is not group:
                    self.slots[group.slot], last.slot = last, group.slot
                group.slot = -1
        return ended


def _move(column: list[Any], moves: Sequence[tuple[int, int]], gone: int) -> None:
    """Carry out moves (from, to) in a list that then ends `gone` places earlier."""
    for source, target in moves:
        column[target] = column[source]
    del column[len(column) - gone :]
