"""Checking a tablet order with tools: a multi-turn environment and its graders. Illustrative, not for care.

The model sees an order by body weight and what the patient takes already. It looks the pair of drugs up, has the dose
worked out, and answers in one line. The rules (three bands of kidney function, half tablets) are made up to be checked
exactly; they are no medical advice.
"""

from __future__ import annotations

import csv
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from sigs.catalogue import products

from ascent.customize.agentic.environment import ToolEnvironment
from ascent.customize.agentic.tools import Tools
from ascent.records import Episode, Message, Task

FACTS = Path(__file__).resolve().parent / "dosing_interactions.csv"
BANDS = ((60.0, 1.0), (30.0, 0.75), (0.0, 0.5))
"""(creatinine clearance in mL/min from which a band reaches upwards, share of the dose given in it)."""

SYSTEM = (
    "Check a tablet order with tools, one call per turn:\n"
    "call: interaction(drug, other)\n"
    "call: dose(drug, mg_per_kg, weight, strength, clearance)\n"
    "Then answer on one line what the tools said:\n"
    "interaction: none, moderate or severe; tablets: NUMBER; action: give or hold\n"
    "Hold when the interaction is severe, else give."
)
_ANSWER = re.compile(r"\s*interaction: (none|moderate|severe); tablets: (\d+(?:\.\d+)?); action: (give|hold)\s*")


@lru_cache(maxsize=1)
def interactions() -> dict[frozenset[str], tuple[str, str]]:
    """Return the known pairs of drugs with their level and effect."""
    with FACTS.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {frozenset((row["drug"], row["other"])): (row["level"], row["effect"]) for row in rows}


@lru_cache(maxsize=1)
def tablets() -> dict[str, tuple[tuple[float, ...], float]]:
    """Return the drugs that come as tablets in mg: their strengths and the most a day."""
    return {
        product.drug: (product.strengths, product.max_daily)
        for product in products()
        if product.unit == "tablet" and product.strength_unit == "mg" and product.strengths and product.max_daily
    }


def share_of(clearance: float) -> float:
    """Return the share of the dose for a creatinine clearance in mL/min."""
    return next(share for lowest, share in BANDS if clearance >= lowest)


def interaction(drug: str, other: str) -> str:
    """Say how two drugs interact."""
    pair = sorted((_known(drug), _known(other)))
    if pair[0] == pair[1]:
        raise ValueError("give two different drugs")
    level, effect = interactions().get(frozenset(pair), ("none", ""))
    return f"{pair[0]} + {pair[1]}: {level}" + (f" ({effect})" if effect else "")


def dose(drug: str, mg_per_kg: float, weight: float, strength: float, clearance: float) -> str:
    """Work out a dose by weight in kg and creatinine clearance in mL/min, in tablets of a strength in mg."""
    name = _known(drug)
    if name not in tablets():
        raise ValueError(f"{name} is not given as tablets here")
    strengths, most = tablets()[name]
    if strength not in strengths:
        raise ValueError(f"{name} comes in {', '.join(f'{s:g}' for s in strengths)} mg")
    if mg_per_kg <= 0 or not 20 <= weight <= 250 or not 0 <= clearance <= 200:
        raise ValueError("mg_per_kg must be above 0, weight 20 to 250 kg, clearance 0 to 200 mL/min")
    share = share_of(clearance)
    amount = min(mg_per_kg * weight * share, most)
    count = max(0.5, math.floor(amount / strength * 2 + 0.5) / 2)
    return f"{name} {amount:.1f} mg at {share:.0%}: {count:g} tablets of {strength:g} mg"


def _known(drug: str) -> str:
    name = " ".join(drug.lower().split())
    if name not in {product.drug for product in products()}:
        raise LookupError(f"unknown drug {drug}")
    return name


class Dosing(ToolEnvironment):
    """An order to check: two tools, then one line."""

    def __init__(self) -> None:
        """Register the tools."""
        super().__init__(Tools(interaction, dose))

    def reset(self, task: Task) -> tuple[Message, ...]:
        """Return the instructions and the order."""
        return Message(role="system", content=SYSTEM), Message(role="user", content=prepare(task.input))


def prepare(input: dict[str, Any]) -> str:
    """Write the order as the model sees it."""
    return (
        f"Order: {input['drug']} {input['mg_per_kg']:g} mg/kg, tablets of {input['strength']:g} mg. Patient: "
        f"{input['weight']:g} kg, clearance {input['clearance']:g}. Takes: {input['takes']}."
    )


def finish(text: str, input: dict[str, Any]) -> dict[str, Any] | None:
    """Read the answer line; None when it is not one."""
    match = _ANSWER.fullmatch(text)
    return {"interaction": match[1], "tablets": float(match[2]), "action": match[3]} if match else None


def evidence(input: dict[str, Any]) -> tuple[str, str]:
    """Return what the two tools answer to the right calls."""
    names = ("drug", "mg_per_kg", "weight", "strength", "clearance")
    return interaction(input["drug"], input["takes"]), dose(*(input[name] for name in names))


def grounded(task: Task, episode: Episode) -> float:
    """Share of the two facts that a tool told in this episode."""
    told = {message.content for message in episode.messages if message.role == "tool"}
    return sum(fact in told for fact in evidence(task.input)) / 2


def answered(task: Task, episode: Episode) -> bool:
    """Whether the answer line is right, wherever it came from."""
    return episode.output is not None and episode.output == task.expected


def solved(task: Task, episode: Episode) -> bool:
    """Whether the answer is right and follows from what the tools told."""
    return answered(task, episode) and grounded(task, episode) == 1


def reward(task: Task, episode: Episode) -> float:
    """1 for a solved order; else up to 0.4 for facts looked up. A right guess earns nothing."""
    return 0.4 * grounded(task, episode) + 0.6 * solved(task, episode)
