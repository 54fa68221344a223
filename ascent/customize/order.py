"""The order of data as a pure function of (seed, position), so that resuming needs no iterator state."""

from __future__ import annotations

import random


def item_at(position: int, size: int, seed: int) -> int:
    """Index of the item at an endless position: each epoch is its own permutation of all items."""
    epoch, place = divmod(position, size)
    return _permutation(size, seed, epoch)[place]


def items_at(start: int, count: int, size: int, seed: int) -> list[int]:
    """Indices of `count` items from an endless position on."""
    return [item_at(position, size, seed) for position in range(start, start + count)]


_cache: dict[tuple[int, int, int], list[int]] = {}


def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    key = (size, seed, epoch)
    if key not in _cache:
        _cache.clear()
        order = list(range(size))
        random.Random(f"{seed}:{epoch}:{size}").shuffle(order)
        _cache[key] = order
    return _cache[key]
