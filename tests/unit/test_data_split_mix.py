"""Splits and mixtures: properties that hold for any data, and errors that say what to do."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ascent.customize.data import mix, split_by_group
from ascent.records import Task
from ascent.records.errors import BadInput, UnknownName


def rows(groups: list[str | None]) -> list[Task]:
    return [Task(id=f"r{n}", group=group) for n, group in enumerate(groups)]


PARTS = {"train": 0.8, "validation": 0.1, "test": 0.1}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | st.integers(0, 60).map(str), min_size=3, max_size=150), st.integers(0, 10**9))
def test_parts_cover_everything_once_and_never_share_a_group(groups: list[str | None], seed: int) -> None:
    data = rows(groups)
    try:
        parts = split_by_group(data, {"a": 0.5, "b": 0.5}, seed, tolerance=1)
    except BadInput:
        assume(False)
    assert sorted(row.id for part in parts.values() for row in part) == sorted(row.id for row in data)
    left, right = ({row.group for row in part} - {None} for part in parts.values())
    assert not left & right
    for part in parts.values():
        assert [row for row in data if row in part] == part


def test_rows_added_later_move_nobody() -> None:
    before = rows([f"g{n % 211}" for n in range(1000)])
    after = [*before, *(Task(id=f"new{n}", group=f"h{n % 97}") for n in range(700))]
    where = {row.id: name for name, part in split_by_group(before, PARTS, 3).items() for row in part}
    later = {row.id: name for name, part in split_by_group(reversed(after), PARTS, 3).items() for row in part}
    assert all(later[name] == part for name, part in where.items())
    other = {row.id: name for name, part in split_by_group(before, PARTS, 4).items() for row in part}
    assert other != where


def test_shares_of_many_groups_are_near_the_fractions() -> None:
    """With 20,000 groups of one row, a share of 0.8 has a standard error of 0.0028."""
    parts = split_by_group(rows([None] * 20_000), PARTS, 0, tolerance=0.015)
    assert {name: len(part) / 20_000 for name, part in parts.items()} == pytest.approx(PARTS, abs=0.0085)


def test_a_split_is_the_same_on_every_machine() -> None:
    """A recorded split: SHA-256 of "seed NUL kind NUL name", read as a fraction of 2**64."""
    parts = split_by_group(rows(list("abcdefghij")), {"x": 0.5, "y": 0.5}, 2, tolerance=0.5)
    assert {name: "".join(str(row.group) for row in part) for name, part in parts.items()} == {
        "x": "cdefhj",
        "y": "abgi",
    }


def test_too_few_groups() -> None:
    with pytest.raises(BadInput, match="2 groups cannot be split into 3 parts"):
        split_by_group(rows(["a", "b", "a", "b", "a"]), PARTS, 0)


def test_shares_that_a_seed_misses_come_with_a_seed_that_meets_them() -> None:
    data = rows([f"g{n % 12}" for n in range(60)])
    refused = 0
    for seed in range(30):
        try:
            split_by_group(data, PARTS, seed)
        except BadInput as error:
            refused += 1
            better = int(re.search(r"seed (\d+) meets", str(error))[1])  # type: ignore[index]
            parts = split_by_group(data, PARTS, better)
            assert all(abs(len(parts[name]) / 60 - share) <= 0.1 and parts[name] for name, share in PARTS.items())
    assert refused > 0


def test_a_group_too_large_for_any_split_is_named() -> None:
    with pytest.raises(BadInput, match="the largest group, 'huge', holds 90% of the rows"):
        split_by_group(rows(["huge"] * 90 + [None] * 10), {"a": 0.5, "b": 0.5}, 0)


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5, "b": 0.4}, {"a": 1.2, "b": -0.2}, {"a": 1.0, "b": 0.0}])
def test_wrong_fractions(fractions: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="add up to 1"):
        split_by_group(rows([None] * 9), fractions, 0)


# Mixtures

SOURCES = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(1, 9), st.sampled_from([0.1, 0.3, 1, 1.5, 2, 7])), min_size=1
)


@settings(max_examples=100, deadline=None)
@given(SOURCES, st.integers(0, 120), st.integers(0, 1000))
def test_every_prefix_is_in_proportion_and_every_epoch_whole(
    spec: dict[str, tuple[int, float]], n: int, seed: int
) -> None:
    sources = {name: [f"{name}{k}" for k in range(size)] for name, (size, _) in spec.items()}
    weights = {name: weight for name, (_, weight) in spec.items()}
    drawn = mix(sources, weights, n, seed)
    assert len(drawn) == n
    total = sum(weights.values())
    counts = Counter[str]()
    for k, row in enumerate(drawn, 1):
        counts[row[0]] += 1
        for name, weight in weights.items():
            assert abs(counts[name] - k * weight / total) < 1 + 1e-9
    for name, items in sources.items():
        own = [row for row in drawn if row[0] == name]
        for start in range(0, len(own), len(items)):
            epoch = own[start : start + len(items)]
            assert len(set(epoch)) == len(epoch)
    assert drawn == mix(sources, weights, n, seed)
    assert drawn[: n // 2] == mix(sources, weights, n // 2, seed)


def test_two_to_one() -> None:
    drawn = mix({"a": ["a"], "b": ["b"]}, {"a": 2, "b": 1}, 9, seed=0)
    assert Counter(drawn) == {"a": 6, "b": 3}
    places = [place for place, row in enumerate(drawn) if row == "b"]
    assert [right - left for left, right in pairwise(places)] == [3, 3]


def test_seeds_and_epochs_reorder_and_sources_do_not_disturb_each_other() -> None:
    items = list(range(50))
    one = mix({"a": items}, {"a": 1}, 100, seed=1)
    assert one[:50] != one[50:] and sorted(one[:50]) == sorted(one[50:]) == items
    assert one != mix({"a": items}, {"a": 1}, 100, seed=2)
    both = mix({"a": items, "b": ["x"]}, {"a": 1, "b": 3}, 400, seed=1)
    assert [row for row in both if row != "x"] == one


def test_mixtures_that_cannot_be() -> None:
    with pytest.raises(UnknownName, match="did you mean 'labels'"):
        mix({"labels": [1]}, {"lables": 1}, 1, 0)
    with pytest.raises(BadInput, match="'b' has no weight"):
        mix({"a": [1], "b": [2]}, {"a": 1}, 1, 0)
    with pytest.raises(BadInput, match="'a' has no rows"):
        mix({"a": []}, {"a": 1}, 1, 0)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="must be above 0"):
            mix({"a": [1]}, {"a": weight}, 1, 0)
    with pytest.raises(BadInput, match="cannot draw"):
        mix({"a": [1]}, {"a": 1}, -1, 0)
