"""Splits that keep a group together and do not move when the data grows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from ascent.customize.data.load import DataRow, T
from ascent.records.errors import BadInput

_SEEDS_TRIED = 200
_Group = tuple[str, str]


def split_by_group(
    rows: Iterable[T], fractions: Mapping[str, float], seed: int, *, tolerance: float = 0.1
) -> dict[str, list[T]]:
    """Split rows into named parts so that no group is in two of them.

    Each group goes where the hash of (seed, group) falls, and nothing else has a say: adding or removing rows
    never moves another row, on any machine. The price is that shares are met by chance; they are therefore
    checked, and the error names a seed that meets them. A row without a group is a group of its own.

    Args:
        rows: the rows, in the order that every part keeps.
        fractions: part -> share of the rows; the shares add up to 1.
        seed: chooses among the splits.
        tolerance: how far a part's share of the rows may lie from its fraction.

    Raises:
        BadInput: wrong fractions, fewer groups than parts, or shares that this seed does not meet.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise BadInput(f"the fractions of a split must be above 0 and add up to 1, got {dict(fractions)}")
    rows = list(rows)
    sizes = Counter(_group(row) for row in rows)
    if len(sizes) < len(fractions):
        raise BadInput(
            f"{len(sizes)} groups cannot be split into {len(fractions)} parts, because a group stays whole; "
            "collect rows of more groups, or make fewer parts"
        )
    if fault := _fault(sizes, fractions, seed, tolerance):
        raise BadInput(f"with seed {seed}, {fault}; {_remedy(sizes, fractions, seed, tolerance)}")
    parts: dict[str, list[T]] = {name: [] for name in fractions}
    for row in rows:
        parts[_part(_group(row), fractions, seed)].append(row)
    return parts


def _group(row: DataRow) -> _Group:
    return ("group", row.group) if row.group is not None else ("row", row.id)


def _part(group: _Group, fractions: Mapping[str, float], seed: int) -> str:
    """Return the part where a group's hash, a number in [0, 1), falls among the cumulated fractions."""
    text = "\0".join((str(seed), *group))
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    edge = 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if point < edge:
            return name
    return list(fractions)[-1]


def _fault(sizes: Counter[_Group], fractions: Mapping[str, float], seed: int, tolerance: float) -> str | None:
    """Return what is wrong with the split that a seed gives, or None."""
    rows = dict.fromkeys(fractions, 0)
    for group, size in sizes.items():
        rows[_part(group, fractions, seed)] += size
    total = sum(sizes.values())
    for name, fraction in fractions.items():
        share = rows[name] / total
        if rows[name] == 0:
            return f"the part {name!r} is empty"
        if abs(share - fraction) > tolerance:
            return f"the part {name!r} has {share:.1%} of the rows instead of {fraction:.1%}"
    return None


def _remedy(sizes: Counter[_Group], fractions: Mapping[str, float], seed: int, tolerance: float) -> str:
    for other in range(seed + 1, seed + 1 + _SEEDS_TRIED):
        if _fault(sizes, fractions, other, tolerance) is None:
            return f"seed {other} meets all fractions within {tolerance:.0%}"
    largest, size = sizes.most_common(1)[0]
    return (
        f"none of the next {_SEEDS_TRIED} seeds does better (the largest group, {largest[1]!r}, holds "
        f"{size / sum(sizes.values()):.0%} of the rows); raise the tolerance, change the parts or group finer"
    )
