"""Writes the data of the pharmacy example: demonstrations, prompts with expected answers, validation and test.

Rows are made from frames (what is meant), said in phrase families, and disturbed by noise. Drugs are split between all
files. Phrase families are split between what trains (train, prompts) and what measures (validation, test), because an
abstention threshold must be chosen on phrasings as new to the model as those it will meet. No normalised text occurs
twice.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sigs.catalogue import Product, products
from sigs.grounding import is_grounded
from sigs.lexicon import ROUTE_PATTERNS, read_route
from sigs.noise import add_noise
from sigs.normalise import normalise
from sigs.scenes import Scene, simple
from sigs.scenes_rare import RARE
from sigs.slots import write_slots

SIZES = {"train": 2300, "validation": 1200, "test": 400, "prompts": 160}
MEASURING = ("validation", "test")
_SHARES = {"train": 0.58, "validation": 0.10, "test": 0.20, "prompts": 0.12}
_RARE_SHARE = 0.17
_KIND_WEIGHT = {"tablet": 10.0, "capsule": 7.0}
_ALIKE = 0.8


@dataclass
class Row:
    """One generated item with the families it used."""

    sig: str
    text: str
    target: str
    expected: dict[str, Any]
    given: dict[str, Any]
    drug: str
    families: frozenset[str]

    def as_json(self, name: str, *, target: bool) -> dict[str, Any]:
        """Return the row as the data files hold it."""
        row: dict[str, Any] = {"id": name, "input": {"sig": self.sig, **self.given}}
        if target:
            row["target"] = self.target
        return {**row, "expected": self.expected, "group": self.drug}


def generate(folder: Path, seed: int) -> None:
    """Write train, validation, test, prompts and examples as jsonl files. The same seed writes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    made = make(seed)
    for name, rows in made.items():
        keep_target = name in {"train", "validation", "test"}
        _write(
            folder / f"{name}.jsonl",
            [row.as_json(f"{name}-{number:04d}", target=keep_target) for number, row in enumerate(rows)],
        )
    examples = [
        json.loads(line)
        for line in (Path(__file__).resolve().parent / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    _write(folder / "examples.jsonl", examples)


def make(seed: int) -> dict[str, list[Row]]:
    """Return the rows of every file, split by drug and by phrasing family."""
    groups = split_drugs(seed)
    seen: set[str] = set()
    shingles: list[frozenset[str]] = []
    made: dict[str, list[Row]] = {}
    for name, size in SIZES.items():
        rng = Random(f"{seed}:{name}")
        rows: list[Row] = []
        while len(rows) < size:
            row = _row(rng, groups[name], held=name in MEASURING)
            if row is None or row.text in seen or (name in MEASURING and _near(row.text, shingles)):
                continue
            seen.add(row.text)
            if name != "test":
                shingles.append(_shingle(row.text))
            rows.append(row)
        made[name] = rows
    return made


def split_drugs(seed: int) -> dict[str, list[Product]]:
    """Return disjoint sets of drugs per file; every form is shared out by the same proportions."""
    rng = Random(f"{seed}:drugs")
    forms: dict[str, list[str]] = {}
    for product in products():
        forms.setdefault(product.form, []).append(product.drug)
    where: dict[str, str] = {}
    for drugs in forms.values():
        order = list(dict.fromkeys(drugs))
        rng.shuffle(order)
        for index, drug in enumerate(order):
            place = (index + rng.random()) / len(order)
            total = 0.0
            for name, share in _SHARES.items():
                total += share
                if place < total or name == "prompts":
                    where.setdefault(drug, name)
                    break
    return {name: [product for product in products() if where[product.drug] == name] for name in SIZES}


def _row(rng: Random, drugs: list[Product], *, held: bool) -> Row | None:
    product = rng.choices(
        drugs, [_KIND_WEIGHT.get(item.form, 6.0 if item.form in {"cream", "inhaler"} else 3.5) for item in drugs]
    )[0]
    if rng.random() < _RARE_SHARE:
        scene = rng.choices([item[0] for item in RARE], [item[1] for item in RARE])[0](product, rng, held=held)
    else:
        scene = simple(product, rng, held=held)
    plain = _join(scene)
    level = rng.choice([0.0, 0.6, 1.0]) if scene.noisy else 0.0
    for sig in (add_noise(plain, rng, level), plain):
        if row := _as_row(sig, scene, product):
            return row
    return None


def _join(scene: Scene) -> str:
    text = ""
    for part in scene.parts:
        if part.surface:
            text += part.surface if part.glue or not text else f" {part.surface}"
    return text


def _as_row(sig: str, scene: Scene, product: Product) -> Row | None:
    """Return the row when every slot can be copied from the normalised text, else None."""
    text = normalise(sig)
    if not text:
        return None
    values: list[tuple[str, str]] = []
    for label, slot in scene.slots():
        value = _route_words(slot, text) if label == "route" else slot if slot == "yes" else normalise(slot)
        if not value or not is_grounded(label, value, text):
            return None
        if label == "prn" and value != "yes" and not is_grounded("dose", value, text):
            return None
        values.append((label, value))
    values = _pair(values)
    return Row(sig, text, write_slots(values), scene.truth(), scene.given, product.drug, frozenset(scene.families))


def _route_words(route: str, text: str) -> str:
    """Return the words of the text that tell the route, as a reader would copy them."""
    hit = ROUTE_PATTERNS[route].search(text)
    return hit.group() if hit and read_route(hit.group()) == route else ""


def _pair(values: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Put the second amount of a split day after the first one's time: dose, when, dose, when."""
    doses = [value for value in values if value[0] == "dose"]
    whens = [value for value in values if value[0] == "when"]
    if len(doses) < 2:
        return values
    rest = [value for value in values if value[0] not in {"dose", "when", "route"}]
    routes = [value for value in values if value[0] == "route"]
    return [doses[0], *routes, whens[0], doses[1], *whens[1:], *rest]


def _shingle(text: str) -> frozenset[str]:
    return frozenset(text[at : at + 4] for at in range(max(1, len(text) - 3)))


def _near(text: str, others: list[frozenset[str]]) -> bool:
    mine = _shingle(text)
    for other in others:
        small, large = sorted((len(mine), len(other)))
        if small >= _ALIKE * large and len(mine & other) >= _ALIKE * len(mine | other):
            return True
    return False


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
