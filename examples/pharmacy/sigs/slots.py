"""The model's language: labelled slots whose words are copied from the normalised text.

    dose: 1 to 2 tablets; route: by mouth; when: every 4 to 6 hours; prn: pain; for: 10 days; max: 8 tablets per day

Only stated slots are written, in this order; `none` says that the text states nothing. `dose` and `when` may come
twice when the text gives different amounts at different times; each later step of a sequence is one `then`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LABELS = ("dose", "route", "when", "prn", "for", "max", "then")
_PART = re.compile(r"^\s*([a-z]+)\s*:\s*(.*?)\s*$")


@dataclass
class Slots:
    """Values per label in the order written. `broken` is True when the text is not in the slot language."""

    values: list[tuple[str, str]] = field(default_factory=list)
    broken: bool = False

    def all(self, label: str) -> list[str]:
        """Return every value written under a label."""
        return [value for name, value in self.values if name == label]


def write_slots(values: list[tuple[str, str]]) -> str:
    """Return the slot text of labelled values, or `none`."""
    return "; ".join(f"{label}: {value}" for label, value in values) or "none"


def parse_slots(text: str) -> Slots:
    """Parse a model's answer. Unknown labels and loose words mark it broken; what is readable is kept."""
    line = text.strip().lower().split("\n\n")[0].replace("\n", "; ").rstrip(".; ")
    slots = Slots()
    if line == "none":
        return slots
    for part in line.split(";"):
        if not part.strip():
            continue
        hit = _PART.match(part)
        if hit is None or hit[1] not in LABELS or not hit[2]:
            slots.broken = True
        elif (hit[1], hit[2]) not in slots.values:
            slots.values.append((hit[1], hit[2]))
    slots.broken = slots.broken or not slots.values
    return slots
