# ruff: noqa: E501
"""The drug catalogue: which forms, routes and daily maxima are usual for a drug. Facts in `drugs.csv`."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "drugs.csv"


@dataclass(frozen=True)
class Product:
    """One drug in one form. `strengths` are in `strength_unit`; `max_daily` is in the same unit, None if unusual to state."""

    drug: str
    form: str
    route: str
    unit: str
    strengths: tuple[float, ...]
    strength_unit: str
    max_daily: float | None
    indication: str


@lru_cache(maxsize=1)
def products() -> tuple[Product, ...]:
    """Return every row of the catalogue."""
    with FILE.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return tuple(
            Product(
                drug=row["drug"],
                form=row["form"],
                route=row["route"],
                unit=row["unit"],
                strengths=tuple(float(part) for part in row["strengths"].split("|") if part),
                strength_unit=row["strength_unit"],
                max_daily=float(row["max_daily"]) if row["max_daily"] else None,
                indication=row["indication"],
            )
            for row in rows
        )


@lru_cache(maxsize=1)
def drug_words() -> frozenset[str]:
    """Return every word of a drug name, for the language check."""
    return frozenset(word for product in products() for word in re.findall(r"[a-z]+", product.drug.lower()))


def find(drug: str) -> tuple[Product, ...]:
    """Return the catalogue's products whose drug name occurs in the given name; none for an unknown drug."""
    name = " ".join(drug.lower().split())
    exact = tuple(product for product in products() if product.drug == name)
    if exact or not name:
        return exact
    return tuple(product for product in products() if re.search(rf"\b{re.escape(product.drug)}\b", name))
