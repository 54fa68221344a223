"""Prefix trees: sequences that begin alike are laid out, and so computed, with what they share only once.

A tree is a forest of segments. A segment's tokens see each other causally and all of the path above; no other token
exists for them. Samples of one prompt, the two answers of a preference pair, turns of one conversation and prompts
under one system text are all such trees, and sequences that share nothing are a forest of roots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MIN_SHARED = 16  # tokens; a segment more costs about what computing so many tokens twice does
BUCKET = 32  # tokens; siblings whose lengths round up to the same multiple are padded to one view
ROUND = 16  # tokens; matrix products are compiled per shape, so few shapes must serve all trees
SCORES = 1 << 20  # attention scores of one family, over all heads: what a second-level cache holds in fp32


def rounded_up(size: int, step: int) -> int:
    """The next multiple of `step`: matrix products are compiled per shape, so few shapes must serve all batches."""
    return -(-size // step) * step


def dealt(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Deal pieces of work out so that the parts cost about the same: the largest first, each to the least busy part."""
    found: list[list[int]] = [[] for _ in range(parts)]
    busy = [0.0] * parts
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        part = min(range(parts), key=lambda p: (busy[p], p))
        found[part].append(piece)
        busy[part] += costs[piece]
    return found


@dataclass(frozen=True)
class Family:
    """Sibling segments of about one length, in a padded view [rows, longest]; letters: N = rows, L = longest.

    `above` are the stretches of nodes (start, end) on the path above all of them. `view_NL` is the node at each place
    (any at padding), `places` and `nodes` pair the places that are real with their nodes.
    """

    rows: int
    longest: int
    above: tuple[tuple[int, int], ...]
    view_NL: Tensor
    places: Tensor
    nodes: Tensor

    def to(self, device: torch.device) -> Family:
        """Move the indices."""
        moved = (x.to(device) for x in (self.view_NL, self.places, self.nodes))
        return Family(self.rows, self.longest, self.above, *moved)

    @property
    def prefix(self) -> int:
        """P, the number of nodes above."""
        return sum(end - start for start, end in self.above)


@dataclass(frozen=True)
class Tree:
    """Segments by length and parent (−1 for a root); parents come first. Nodes (tokens) of segments lie end to end."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def flat(cls, lengths: Sequence[int]) -> Tree:
        """Sequences that share nothing, laid end to end."""
        return cls(tuple(lengths), (-1,) * len(lengths))

    @cached_property
    def nodes(self) -> int:
        """Number of tokens."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first node of each segment."""
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return tuple(starts)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Tokens above each segment."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + self.lengths[parent])
        return tuple(depths)

    @cached_property
    def positions_T(self) -> Tensor:
        """Each node's place in its sequences."""
        pairs = zip(self.depths, self.lengths, strict=True)
        return torch.cat([torch.arange(depth, depth + length) for depth, length in pairs])

    def above(self, segment: int) -> tuple[tuple[int, int], ...]:
        """The path from the root to the end of a segment as stretches of nodes (start, end); none for −1."""
        stretches: list[tuple[int, int]] = []
        while segment >= 0:
            start, end = self.starts[segment], self.starts[segment] + self.lengths[segment]
            if stretches and stretches[-1][0] == end:
                stretches[-1] = (start, stretches[-1][1])
            else:
                stretches.append((start, end))
            segment = self.parents[segment]
        return tuple(reversed(stretches))

    def path(self, segment: int) -> Tensor:
        """The nodes from the root to the end of a segment, in order."""
        return torch.cat([torch.arange(start, end) for start, end in self.above(segment)])

    def families(self, heads: int) -> Iterator[Family]:
        """Group siblings of like length, few enough that a family's attention scores stay in cache."""
        groups: dict[tuple[int, int], list[int]] = {}
        for segment, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            groups.setdefault((parent, rounded_up(length, BUCKET)), []).append(segment)
        for (parent, _), segments in groups.items():
            longest = rounded_up(max(self.lengths[segment] for segment in segments), ROUND)
            path = self.depths[segments[0]]
            most = max(1, SCORES // (heads * longest * (longest + path)))
            together = -(-len(segments) // -(-len(segments) // most))  # as even as the bound allows
            for begin in range(0, len(segments), together):
                yield self._family(segments[begin : begin + together], longest, self.above(parent))

    def _family(self, segments: Sequence[int], longest: int, above: tuple[tuple[int, int], ...]) -> Family:
        starts = torch.tensor([self.starts[segment] for segment in segments])[:, None]
        lengths = torch.tensor([self.lengths[segment] for segment in segments])[:, None]
        place_L = torch.arange(longest)
        view_NL = (starts + torch.minimum(place_L, lengths - 1)).flatten()
        places = (place_L < lengths).flatten().nonzero().flatten()
        return Family(len(segments), longest, above, view_NL, places, view_NL[places])


@dataclass
class _Segment:
    """A stretch of one sequence while a tree is being folded: tokens `begin` to `end` of sequence `source`."""

    source: int
    begin: int
    end: int
    parent: int


def fold(sequences: Sequence[Sequence[int]], min_shared: int = MIN_SHARED) -> tuple[Tree, list[int], list[Tensor]]:
    """Fold token sequences into a tree.

    Beginnings that fewer than `min_shared` tokens of a segment share are laid out again: that changes no result.

    Returns:
        the tree, its tokens, and for each sequence the node of each of its tokens.
    """
    segments: list[_Segment] = []
    leaf = [-1] * len(sequences)
    previous = -1
    for index in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        tokens = sequences[index]
        shared = common_prefix(sequences[previous], tokens) if previous >= 0 else 0
        parent = _branch(segments, leaf, leaf[previous] if previous >= 0 else -1, shared, min_shared)
        begin = segments[parent].end if parent >= 0 else 0
        if begin < len(tokens) or parent < 0:
            segments.append(_Segment(index, begin, len(tokens), parent))
            parent = len(segments) - 1
        leaf[index] = parent
        previous = index
    return _laid_out(segments, leaf, sequences)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    limit = min(len(first), len(second))
    for at in range(limit):
        if first[at] != second[at]:
            return at
    return limit


def branching(ends: Sequence[int], shared: int, min_shared: int = MIN_SHARED) -> int:
    """Where a sequence leaves the path of another, whose segments end at `ends`, when `shared` tokens are the same."""
    begin = 0
    for end in ends:
        if end > shared:
            return shared if shared - begin >= min_shared else begin
        begin = end
    return begin


def _branch(segments: list[_Segment], leaf: list[int], last: int, shared: int, min_shared: int) -> int:
    """Return the segment that a sequence sharing `shared` tokens with the last one continues; split one if it pays."""
    path = []
    while last >= 0:
        path.append(last)
        last = segments[last].parent
    at = branching([segments[segment].end for segment in reversed(path)], shared, min_shared)
    top = next((segment for segment in path if segments[segment].begin < at), -1)
    if top < 0 or segments[top].end == at:
        return top
    cut, rest = segments[top], len(segments)
    for segment in segments:
        if segment.parent == top:
            segment.parent = rest
    segments.append(_Segment(cut.source, at, cut.end, top))
    leaf[:] = [rest if place == top else place for place in leaf]
    cut.end = at
    return top


def _laid_out(
    segments: list[_Segment], leaf: Sequence[int], sequences: Sequence[Sequence[int]]
) -> tuple[Tree, list[int], list[Tensor]]:
    """Order segments so that parents come first, and say where each sequence's tokens went."""
    order = sorted(range(len(segments)), key=lambda s: (segments[s].begin, s))
    place = {segment: at for at, segment in enumerate(order)} | {-1: -1}
    chosen = [segments[s] for s in order]
    tree = Tree(tuple(s.end - s.begin for s in chosen), tuple(place[s.parent] for s in chosen))
    tokens = [token for s in chosen for token in sequences[s.source][s.begin : s.end]]
    paths: dict[int, Tensor] = {}
    for segment in leaf:
        if segment not in paths:
            paths[segment] = tree.path(place[segment])
    return tree, tokens, [paths[segment] for segment in leaf]
