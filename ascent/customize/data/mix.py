"""Several sources in one stream, at given weights."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

from ascent.records.errors import BadInput, UnknownName

R = TypeVar("R")


def mix(sources: Mapping[str, Sequence[R]], weights: Mapping[str, float], n: int, seed: int) -> list[R]:
    """Draw `n` rows from several sources, interleaved in proportion to their weights.

    Every prefix of the result is in proportion: after k rows, each source has given its share of k to within
    less than one row, so a batch never sees a run of one source. Which source comes when is decided by the
    weights alone (each draw takes the source whose next row is due first, out of those that are not ahead of
    their share). Within a source, rows come in a random order without replacement; once all have come, an
    epoch is over and a new random order begins. The seed decides these orders, source by source, so changing
    one source leaves the others as they were.

    Args:
        sources: name -> rows.
        weights: name -> weight, above 0; only ratios matter. Names the same sources as `sources`.
        n: how many rows to draw; more than there are means repetition.
        seed: chooses the orders.

    Raises:
        BadInput: names that do not match, an empty source, a weight that is not above 0, a negative `n`.
    """
    for name in weights:
        if name not in sources:
            raise UnknownName("data source", name, sources)
    for name, rows in sources.items():
        if name not in weights:
            raise BadInput(f"the data source {name!r} has no weight; give it one, or leave the source out")
        if not rows:
            raise BadInput(f"the data source {name!r} has no rows; add some, or leave the source out")
        if not 0 < weights[name] < float("inf"):
            raise BadInput(
                f"the weight of {name!r} must be above 0, got {weights[name]}; leave a source out to drop it"
            )
    if n < 0 or not sources:
        raise BadInput(f"cannot draw {n} rows from {len(sources)} data sources")
    streams = {name: _stream(rows, f"{seed}:{name}") for name, rows in sources.items()}
    return [next(streams[name]) for name in _schedule(weights, n)]


def _schedule(weights: Mapping[str, float], n: int) -> Iterator[str]:
    """Yield `n` names such that each has its share of every prefix, to within less than one.

    Row j (from 1) of a source with share w belongs into the slots from floor((j - 1) / w) + 1 to ceil(j / w).
    Taking, at every slot, the source with the earliest deadline among those whose window is open meets all
    deadlines, because the shares add up to 1 (earliest deadline first is optimal for unit tasks on one
    machine). Fractions keep it exact.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    period = {name: total / weight for name, weight in exact.items()}
    drawn = dict.fromkeys(exact, 0)
    release = dict.fromkeys(exact, 0)
    deadline = {name: -(-period[name] // 1) for name in exact}
    for slot in range(n):
        name = min((name for name in exact if release[name] <= slot), key=lambda name: deadline[name])
        yield name
        drawn[name] += 1
        release[name] = drawn[name] * period[name] // 1
        deadline[name] = -(-(drawn[name] + 1) * period[name] // 1)


def _stream(rows: Sequence[R], seed: str) -> Iterator[R]:
    """Yield rows for ever, epoch by epoch, each epoch in a new order."""
    epoch = 0
    while True:
        order = list(range(len(rows)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        yield from (rows[position] for position in order)
        epoch += 1
