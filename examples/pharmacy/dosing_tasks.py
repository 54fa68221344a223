"""Writes tasks for `dosing.py`, train and test without a common drug, and knows how an expert would act.

Run it as `python dosing_tasks.py [seed]`; into the folder `dosing` beside this file it writes `train.jsonl`,
`test.jsonl`, and an expert's episodes on the first train tasks as `demonstrations.jsonl`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dosing import Dosing, evidence, interactions, share_of, tablets

from ascent.records import Message, Task

SIZES = {"train": 600, "test": 200}
DEMONSTRATIONS = 96
TEST_PAIRS = 14  # interacting pairs that lie wholly on the test side
_ORDER = re.compile(
    r"Order: (?P<drug>.+) (?P<mg_per_kg>[\d.]+) mg/kg, tablets of (?P<strength>[\d.]+) mg\. "
    r"Patient: (?P<weight>[\d.]+) kg, clearance (?P<clearance>[\d.]+)\. Takes: (?P<takes>.+)\."
)


def make(seed: int, sizes: dict[str, int] = SIZES) -> dict[str, list[dict[str, Any]]]:
    """Return rows by file: id, input, expected answer, and the ordered drug as their group."""
    dice = Random(seed)
    return {
        name: [_row(f"{name}-{number}", drugs, dice) for number in range(sizes[name])]
        for name, drugs in split(seed).items()
    }


def split(seed: int) -> dict[str, frozenset[str]]:
    """Divide all drugs: pairs go to the test side until it has enough of its own, then a quarter of the others."""
    dice = Random(f"{seed}:split")
    pairs = sorted(tuple(sorted(pair)) for pair in interactions())
    dice.shuffle(pairs)
    test: set[str] = set()
    for pair in pairs:
        if sum(set(other) <= test for other in pairs) < TEST_PAIRS:
            test |= set(pair)
    lone = sorted(set(tablets()) - {drug for pair in pairs for drug in pair})
    test |= set(dice.sample(lone, len(lone) // 4))
    everything = {drug for pair in pairs for drug in pair} | set(lone)
    return {"train": frozenset(everything - test), "test": frozenset(test)}


def _row(name: str, drugs: frozenset[str], dice: Random) -> dict[str, Any]:
    level = dice.choice(("none", "moderate", "severe"))
    known = sorted((sorted(pair) for pair, (at, _) in interactions().items() if at == level and pair <= drugs))
    while True:
        pair = dice.choice(known) if known else dice.sample(sorted(drugs), 2)
        drug, takes = dice.sample(pair, 2)
        if drug in tablets() and (level != "none" or frozenset(pair) not in interactions()):
            break
    strength = dice.choice(tablets()[drug][0])
    weight, clearance = dice.randint(45, 110), dice.randint(15, 120)
    wanted = dice.randint(1, 6) / 2 * strength / weight / share_of(clearance)
    given = {
        "drug": drug,
        "mg_per_kg": float(f"{wanted:.2g}"),
        "weight": weight,
        "strength": strength,
        "clearance": clearance,
        "takes": takes,
    }
    return {"id": name, "input": given, "expected": _expected(*evidence(given)), "group": drug}


def _expected(pair: str, amount: str) -> dict[str, Any]:
    level = pair.rpartition(": ")[2].split()[0]
    count = float(amount.rpartition(": ")[2].split()[0])
    return {"interaction": level, "tablets": count, "action": "hold" if level == "severe" else "give"}


def expert(messages: Sequence[Message]) -> str:
    """Return what an expert says next in an episode of `Dosing`: two calls, then what the tools told."""
    order = next(match for message in messages if (match := _ORDER.fullmatch(message.content)))
    told = [message.content for message in messages if message.role == "tool"]
    if not told:
        return f"call: interaction({order['drug']}, {order['takes']})"
    if len(told) == 1:
        names = ("drug", "mg_per_kg", "weight", "strength", "clearance")
        return f"call: dose({', '.join(order[name] for name in names)})"
    answer = _expected(*told)
    return f"interaction: {answer['interaction']}; tablets: {answer['tablets']:g}; action: {answer['action']}"


def demonstrate(row: dict[str, Any]) -> dict[str, Any]:
    """Return an expert's episode on a row, as a conversation to imitate."""
    world = Dosing()
    messages = list(world.reset(Task(id=row["id"], input=row["input"])))
    while True:
        messages.append(Message(role="assistant", content=expert(messages)))
        step = world.step(messages[-1].content)
        if step.done:
            turns = [{"role": message.role, "content": message.content} for message in messages]
            return {"id": row["id"], "messages": turns, "group": row["group"]}
        messages += step.messages


def generate(folder: Path, seed: int) -> None:
    """Write the three files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = make(seed)
    files["demonstrations"] = [demonstrate(row) for row in files["train"][:DEMONSTRATIONS]]
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    generate(Path(__file__).resolve().parent / "dosing", int(sys.argv[1]) if len(sys.argv) > 1 else 7)
