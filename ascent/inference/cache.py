"""Keys and values of rows in flight, as a tree: what is shared is kept once.

Three levels: the prefix that all prompts of a call share, each prompt's own part (kept once for the group of rows that
sample it), and each row's own tokens. Attention of a row's new token runs over all three with one joint softmax. A
level that would save less reading than its products cost is folded into the one below it.

Keys lie with their places last, [.., E, S]: products with few queries read them without reordering, three times as
fast in bf16. A place holds one step's tokens of all rows, since rotated keys need no order; it is free again when no
row is left that was in flight at that step. Shape letters as in `decoder.py`; N counts groups in flight, R the rows of
the largest one, S places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ascent.inference.decoder import DecoderConfig
from ascent.inference.tree import rounded_up

FOLD_BYTES = 1 << 20  # reading this much in a layer takes about as long as the products and gathers of one more level
STEP = 16  # places are taken in such steps, rows in a half or a quarter: products are compiled per shape


class Store:
    """Keys [slots, K, E, S] and values [slots, K, S, E] of every layer; zeros where nothing was written yet."""

    def __init__(self, config: DecoderConfig, slots: int, places: int, like: Tensor) -> None:
        self.config, self.slots, self.places = config, slots, places
        shape = (config.layers, slots, config.kv_heads)
        self._keys = like.new_zeros(*shape, config.head_size, places)
        self._values = like.new_zeros(*shape, places, config.head_size)
        self.keys, self.values = self._keys.unbind(0), self._values.unbind(0)

    def refitted(self, slots: int, places: int, kept: int, begin: int, end: int, at: int) -> Store:
        """Another one with the places from `begin` to `end` of the first `kept` slots, which begin there at `at`."""
        other = Store(self.config, slots, places, self._keys)
        other._keys[:, :kept, ..., at : at + end - begin] = self._keys[:, :kept, ..., begin:end]
        other._values[:, :kept, :, at : at + end - begin] = self._values[:, :kept, :, begin:end]
        return other

    def used(self, slots: int) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer's keys [slots·K, E, S] and values [slots·K, S, E] of the first slots."""
        return [key[:slots].flatten(0, 1) for key in self.keys], [value[:slots].flatten(0, 1) for value in self.values]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy some slots onto others."""
        self._keys[:, targets], self._values[:, targets] = self._keys[:, sources], self._values[:, sources]

    def write(self, layer: int, first: int, end: int, keys_NKES: Tensor, values_NKSE: Tensor) -> None:
        """Write whole prompts into the slots from `first` on, so that they finish before the place `end`."""
        count, begin = len(keys_NKES), end - keys_NKES.shape[-1]
        self.keys[layer][first : first + count, ..., begin:end] = keys_NKES
        self.values[layer][first : first + count, :, begin:end] = values_NKSE


@dataclass(frozen=True)
class Common:
    """The prefix of all prompts: per layer keys [K, E, P] and values [K, P, E]; no layers when there is none."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0


@dataclass(frozen=True)
class Span:
    """Where a prompt lies: the first `used` of the last `width` places of its slot's prompt part, then padding."""

    width: int = 0
    used: int = 0


@dataclass
class Flight:
    """A row in flight: its group's slot, its prompt when folded in, its first step, and its position less the step."""

    group: int
    span: Span
    entry: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """Which levels of a call stay apart, and the longest own part and the most rows there will be."""

    groups_apart: bool
    prefix_apart: bool
    tail: int
    rows: int


def layout(config: DecoderConfig, itemsize: int, tails: Sequence[int], prefix: int, rows: int, limit: int) -> Layout:
    """Lay out `rows` rows of prompts with these own lengths, `limit` in flight at once."""
    token_bytes = 2 * config.kv_heads * config.head_size * itemsize
    flying = min(rows, limit)
    groups = min(len(tails), -(-flying * len(tails) // rows))
    saved = sum(tails) / len(tails) * (flying - groups) * token_bytes
    apart = flying > groups and saved >= FOLD_BYTES
    carriers = groups if apart else flying
    return Layout(
        groups_apart=apart,
        prefix_apart=prefix > 0 and prefix * (carriers - 1) * token_bytes >= FOLD_BYTES,
        tail=max(tails),
        rows=padded(flying),
    )


def padded(rows: int) -> int:
    """How many rows a step computes when this many are in flight."""
    return rows if rows <= 2 else rounded_up(rows, STEP // 4 if rows <= STEP else STEP // 2)


@dataclass(frozen=True)
class GroupReach:
    """The groups' part of a step: `to_group` [N·K·R] gathers (row, head) pairs by group, `to_row` [B·K] the reverse.

    `seen` [N, S] are the places that hold something, `of_row` [B] is each row's group, `rows` the most that one has.
    """

    config: DecoderConfig
    keys: list[Tensor]
    values: list[Tensor]
    seen: Tensor
    of_row: Tensor
    rows: int
    to_group: Tensor
    to_row: Tensor

    @cached_property
    def bias(self) -> Tensor:
        """`seen` as a bias of the scores, [N·K, R·G, S]."""
        return _bias(self.seen, self.rows, self.config, self.keys[0])


@dataclass(frozen=True)
class Reach:
    """What a step sees: per layer keys [B·K, E, S] and values [B·K, S, E], of which `seen` [B, S] are a row's own.

    The new tokens stand at the place `column`.
    """

    config: DecoderConfig
    rows: int
    positions_B: Tensor
    column: int
    keys: list[Tensor]
    values: list[Tensor]
    seen: Tensor
    group: GroupReach | None

    @cached_property
    def bias(self) -> Tensor:
        """`seen` as a bias of the scores, [B·K, G, S]."""
        return _bias(self.seen, 1, self.config, self.keys[0])


class Cache:
    """The tree of one call. Rows in flight stand in slots 0, 1, … without holes, and so do groups.

    Products copy a matrix that is a part of another, so the rows' store has no more places than are in use.
    """

    def __init__(self, config: DecoderConfig, common: Common, layout: Layout, like: Tensor) -> None:
        self.config, self.layout = config, layout
        self.common = common if layout.prefix_apart else None
        self.lead = 0 if layout.prefix_apart else common.length
        self.prompt = rounded_up(self.lead + layout.tail, STEP) if layout.groups_apart else 0
        self.groups = Store(config, 1, self.prompt, like) if layout.groups_apart else None
        self.own_prompt = 0
        self.own = Store(config, layout.rows, STEP, like)
        self.flights: list[Flight] = []
        self.spans: list[Span] = []
        self.time = 0
        self._written = [-1] * STEP
        self._members: _Members | None = None

    def enter_groups(self, spans: Sequence[Span]) -> int:
        """Make room for prompts that stay apart and return the slot of the first."""
        assert self.groups is not None
        first = len(self.spans)
        self.spans += spans
        self._members = None
        slots = self.groups.slots if len(self.spans) <= self.groups.slots else max(len(self.spans), 2 * first)
        width = rounded_up(max(span.width for span in self.spans), STEP)
        places = width if 4 * width <= 3 * self.prompt else self.prompt
        if (slots, places) != (self.groups.slots, self.prompt):
            self.groups = self.groups.refitted(slots, places, first, self.prompt - places, self.prompt, 0)
            self.prompt = places
        return first

    def enter_rows(self, rows: Sequence[tuple[int, int, Span]]) -> int:
        """Add rows, each as (group's slot, position of its first new token, folded prompt); return the first's slot."""
        first = len(self.flights)
        self.flights += [Flight(group, span, self.time, position - self.time) for group, position, span in rows]
        self._fit(first)
        return first

    def leave_rows(self, slots: Sequence[int]) -> list[tuple[int, int]]:
        """Remove rows; the last ones move into the holes. Returns these moves as (from, to)."""
        left, gone = len(self.flights) - len(slots), set(slots)
        moves = [slot for slot in range(left, len(self.flights)) if slot not in gone]
        holes = [slot for slot in slots if slot < left]
        if holes:
            self.own.move(moves, holes)
            for source, target in zip(moves, holes, strict=True):
                self.flights[target] = self.flights[source]
        del self.flights[left:]
        self._members = None
        return list(zip(moves, holes, strict=True))

    def leave_group(self, slot: int) -> None:
        """Remove a group without rows; the last group moves into its slot."""
        assert self.groups is not None
        last = len(self.spans) - 1
        if slot != last:
            self.groups.move([last], [slot])
            self.spans[slot] = self.spans[last]
            for flight in self.flights:
                flight.group = slot if flight.group == last else flight.group
        self.spans.pop()
        self._members = None

    def advance(self) -> Reach:
        """Begin a step: find the place for its tokens and say what each row sees."""
        if self._members is None:
            self._fit(len(self.flights))
        oldest = min(flight.entry for flight in self.flights)
        place = next((at for at, time in enumerate(self._written) if time < oldest), len(self._written))
        if place == len(self._written):
            self._refit(len(self.flights), self.own_prompt, place + max(STEP, rounded_up(place // 8, STEP)))
        self._written[place] = self.time
        members = self._members = self._members or _Members(self)
        times = torch.tensor(self._written, device=members.entry_B.device)
        seen_BS = torch.cat((members.prompt_BS, times >= members.entry_B[:, None]), 1)
        reach = Reach(
            config=self.config,
            rows=len(seen_BS),
            positions_B=members.offset_B + self.time,
            column=self.own_prompt + place,
            keys=members.keys,
            values=members.values,
            seen=seen_BS,
            group=members.group,
        )
        self.time += 1
        return reach

    def _fit(self, kept: int) -> None:
        """Keep the places of the rows in flight and few more; the first `kept` of them have something there."""
        self._members = None
        oldest = min(flight.entry for flight in self.flights)
        used = 1 + max((at for at, time in enumerate(self._written) if time >= oldest), default=0)
        prompt = rounded_up(max(flight.span.width for flight in self.flights), STEP)
        tokens = rounded_up(used, STEP)
        much = 4 * (prompt + tokens) <= 3 * (self.own_prompt + len(self._written))
        if prompt > self.own_prompt or much:
            self._refit(kept, prompt, tokens if much else len(self._written))

    def _refit(self, kept: int, prompt: int, tokens: int) -> None:
        """Give the rows' store other numbers of places for prompts and for own tokens."""
        left, right = min(prompt, self.own_prompt), min(tokens, len(self._written))
        begin, end = self.own_prompt - left, self.own_prompt + right
        self.own = self.own.refitted(self.own.slots, prompt + tokens, kept, begin, end, prompt - left)
        self._written = [*self._written[:tokens], *[-1] * (tokens - right)]
        self.own_prompt, self._members = prompt, None


class _Members:
    """What of a step's reach depends only on which rows are in flight. Rows of padding see what was written last."""

    def __init__(self, cache: Cache) -> None:
        device, rows = cache.own.keys[0].device, padded(len(cache.flights))
        spare = rows - len(cache.flights)
        flights = [*cache.flights, *[Flight(0, Span(), 0, 0)] * spare]
        self.entry_B = torch.tensor([flight.entry for flight in flights], device=device)
        self.offset_B = torch.tensor([flight.offset for flight in flights], device=device)
        self.prompt_BS = _seen([flight.span for flight in flights], cache.own_prompt, device)
        self.keys, self.values = cache.own.used(rows)
        self.group = None if cache.groups is None else self._grouped(cache, flights)

    @staticmethod
    def _grouped(cache: Cache, flights: Sequence[Flight]) -> GroupReach:
        heads, device = cache.config.kv_heads, cache.own.keys[0].device
        rows_of: list[list[int]] = [[] for _ in cache.spans]
        to_row = [0] * (len(flights) * heads)
        for row, flight in enumerate(cache.flights):
            rows_of[flight.group].append(row)
        most = max(map(len, rows_of))
        to_group = [0] * (len(rows_of) * heads * most)
        for group, rows in enumerate(rows_of):
            for head in range(heads):
                first = (group * heads + head) * most
                for place, row in enumerate(rows, first):
                    to_group[place], to_row[row * heads + head] = row * heads + head, place
        assert cache.groups is not None
        keys, values = cache.groups.used(len(rows_of))
        seen_NS = _seen(cache.spans, cache.prompt, device)
        return GroupReach(
            config=cache.config,
            keys=keys,
            values=values,
            seen=seen_NS,
            rows=most,
            of_row=torch.tensor([flight.group for flight in flights], device=device),
            to_group=torch.tensor(to_group, device=device),
            to_row=torch.tensor(to_row, device=device),
        )


def _seen(spans: Sequence[Span], places: int, device: torch.device) -> Tensor:
    """Which places of the prompts' part hold something [spans, places]."""
    before_end = torch.arange(places, 0, -1, device=device)
    width, used = torch.tensor([[span.width, span.used] for span in spans], device=device).T[..., None]
    seen: Tensor = (before_end <= width) & (before_end > width - used)
    return seen


def _bias(seen: Tensor, rows: int, config: DecoderConfig, like: Tensor) -> Tensor:
    """Zeros, and −∞ where nothing is seen: [slots·K, rows·G, S] for slots that each serve this many rows."""
    slots, places = seen.shape
    queries = rows * config.heads // config.kv_heads
    bias = like.new_zeros(slots, places).masked_fill_(~seen, float("-inf"))
    return bias[:, None, None].expand(-1, config.kv_heads, queries, -1).reshape(slots * config.kv_heads, queries, -1)
