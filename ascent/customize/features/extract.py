"""What an extractor is, and how rows become a matrix of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ascent.inference.store import CARD
from ascent.records import ModelCard, digest
from ascent.records.errors import BadData, BadInput
from ascent.records.files import sha256_file

Features = npt.NDArray[np.float32]
Item = str | Path | bytes
"""A text (str), the path of an image file (Path), or the bytes of one."""

CHUNK = 256
"""Items given to an extractor at once: enough for it to batch well."""

Kind = TypeVar("Kind", str, Path | bytes)


class Extractor(Protocol):
    """Frozen features of items. `identity` changes whenever the features of the same item may."""

    name: str
    dimensions: int
    identity: str

    def extract(self, items: Sequence[Item]) -> Features:
        """Return features [N, D] in the order of the items. No item's features depend on its neighbours.

        Raises:
            BadItem: an item is of the wrong kind or cannot be read; it says which.
        """
        ...


class BadItem(BadData):
    """An item that an extractor cannot read: `index` is its place among the items, `reason` what is wrong."""

    def __init__(self, index: int, reason: str, item: Item) -> None:
        self.index, self.reason = index, reason
        super().__init__(f"item {index + 1}: {reason}", file=item if isinstance(item, Path) else None)


@dataclass(frozen=True)
class FeatureRow:
    """One labelled item. `group` is what it belongs to (a product, a customer): folds keep it whole."""

    item: Item
    label: str | None = None
    id: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Extracted:
    """Features of the rows that could be read: `kept[i]` is the row of values_ND[i], the rest is in `excluded`."""

    values_ND: Features
    kept: list[int]
    excluded: list[str] = field(default_factory=list)


class Joined:
    """Several extractors side by side, for example hidden states and the answers to a rubric."""

    def __init__(self, extractors: Sequence[Extractor]) -> None:
        """Raises `BadInput` when there is none."""
        if not extractors:
            raise BadInput("no extractor to join; give at least one")
        self.extractors = tuple(extractors)
        self.name = "+".join(part.name for part in extractors)
        self.dimensions = sum(part.dimensions for part in extractors)
        self.identity = identity_of("joined", parts=[part.identity for part in extractors])

    def extract(self, items: Sequence[Item]) -> Features:
        """Return the features of all extractors, in their order, [N, D]."""
        return np.concatenate([part.extract(items) for part in self.extractors], axis=1)


def identity_of(kind: str, **settings: object) -> str:
    """Return the sha256 that names an extractor: its kind and everything that its features depend on."""
    return digest({"extractor": kind, **settings})


def model_sha256(folder: Path) -> str:
    """Return what names a model's content: the store's sha256, or, outside the store, a digest of its files."""
    if (folder / CARD).is_file():
        known = ModelCard.from_json((folder / CARD).read_bytes()).sha256
        stored = folder.name.partition("@")[2]
        if stored and known.startswith(stored):
            return known
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return digest({file.name: sha256_file(file) for file in files})


def texts_of(items: Sequence[Item]) -> list[str]:
    """Return the items as texts. Raises `BadItem` for an image or a blank text."""
    found = []
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise BadItem(index, f"a text is needed, this is a {type(item).__name__}; use an image extractor", item)
        if not item.strip():
            raise BadItem(index, "the text is empty; write it or delete the row", item)
        found.append(item)
    return found


def extract_rows(
    rows: Sequence[FeatureRow], extractor: Extractor, *, exclude_unreadable: bool = False, chunk: int = CHUNK
) -> Extracted:
    """Return the features of rows.

    Args:
        rows: the rows; labels are not looked at.
        extractor: what reads their items.
        exclude_unreadable: leave items out that cannot be read, and say which, instead of raising.
        chunk: items per call of the extractor.

    Raises:
        BadData: an item cannot be read, or has features that are not finite; the message names file and row.
        BadInput: the extractor's answer has the wrong shape.
    """
    parts: list[Features] = [np.zeros((0, extractor.dimensions), np.float32)]
    kept: list[int] = []
    excluded: dict[int, str] = {}
    for begin in range(0, len(rows), chunk):
        places = list(range(begin, min(begin + chunk, len(rows))))
        while places:
            try:
                values = extractor.extract([rows[place].item for place in places])
            except BadItem as error:
                bad = places.pop(error.index)
                if not exclude_unreadable:
                    raise _at(rows[bad], bad, error.reason) from error
                excluded[bad] = f"{place_of(rows[bad], bad)}: {error.reason}"
                continue
            _check(values, [rows[place] for place in places], places, extractor)
            parts.append(values)
            kept += places
            break
    return Extracted(np.concatenate(parts), kept, [excluded[place] for place in sorted(excluded)])


def place_of(row: FeatureRow, index: int) -> str:
    """Return how messages name a row: its number from 1, its id and its file."""
    name = f" ({row.id})" if row.id else ""
    return f"row {index + 1}{name}" + (f", {row.item}" if isinstance(row.item, Path) else "")


def _at(row: FeatureRow, index: int, reason: str) -> BadData:
    file = row.item if isinstance(row.item, Path) else None
    named = f" ({row.id})" if row.id else ""
    return BadData(f"row {index + 1}{named}: {reason}", file=file)


def _check(values: Features, rows: Sequence[FeatureRow], places: Sequence[int], extractor: Extractor) -> None:
    if values.shape != (len(rows), extractor.dimensions):
        raise BadInput(
            f"the extractor {extractor.name!r} gave features of shape {values.shape} for {len(rows)} items of "
            f"{extractor.dimensions} dimensions; correct its `dimensions` or its `extract`"
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        first = int(bad[0])
        raise _at(
            rows[first],
            places[first],
            f"the extractor {extractor.name!r} gave features that are not finite; look at the item, or run the "
            "model in fp32",
        )
