# ruff: noqa: E501
"""Plain words for the patient, composed from components only."""

from __future__ import annotations

import re

from .assemble import Assembly, Components
from .frequency import read_frequency
from .lexicon import MASS_UNITS

_VERB = {
    "oral": "Take", "sublingual": "Place", "buccal": "Place", "inhalation": "Inhale", "nasal": "Use", "ophthalmic": "Put", "otic": "Put", "topical": "Apply",
    "transdermal": "Apply", "rectal": "Insert", "vaginal": "Insert", "subcutaneous": "Inject", "intramuscular": "Inject", "intravenous": "Give",
}  # fmt: skip
_PLACE = {
    "oral": "by mouth", "sublingual": "under the tongue", "buccal": "against the cheek", "inhalation": "", "nasal": "in the nose", "ophthalmic": "in the eye", "otic": "in the ear",
    "topical": "on the skin", "transdermal": "on the skin", "rectal": "into the rectum", "vaginal": "into the vagina", "subcutaneous": "under the skin",
    "intramuscular": "into a muscle", "intravenous": "into a vein",
}  # fmt: skip
_UNCHANGED = MASS_UNITS | {"ml", "oz", "l"}


def plain_number(value: float) -> str:
    """Return a number as a patient reads it: halves and quarters as fractions, no trailing zeros."""
    whole, rest = int(value), round(value - int(value), 4)
    names = {0.5: "1/2", 0.25: "1/4", 0.75: "3/4", 0.3333: "1/3", 0.6667: "2/3"}
    if rest in names and value < 10:
        return f"{whole} {names[rest]}" if whole else names[rest]
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _with_unit(value: float, unit: str | None) -> str:
    if unit is None:
        return ""
    if unit in _UNCHANGED or value <= 1:
        return unit
    if unit.endswith(("ch", "x", "s")):
        return unit + "es"
    return unit[:-1] + "ies" if unit.endswith("y") and unit[-2] not in "aeiou" else unit + "s"


def often(times: float, *, at_most: bool) -> str:
    """Return times per day in words: `twice a day`, `every 3 days`, `2 times a week`."""
    if times >= 0.99:
        count = {1: "once", 2: "twice"}.get(round(times, 2), f"{plain_number(times)} times")
        return f"{'up to ' if at_most and times > 1 else ''}{count} a day"
    days = 1 / times
    if abs(times - 0.5) < 0.01:
        return "every other day"
    if abs(times - 1 / 7) < 0.005:
        return "once a week"
    per_week = times * 7
    if per_week > 1 and abs(per_week - round(per_week)) < 0.03:
        return f"{round(per_week)} times a week"
    if 29 < days < 32:
        return "once a month"
    return f"every {plain_number(round(days, 1))} days"


def direction(result: Assembly) -> str:
    """Return the direction in plain words. What is not stated is left out, and a later step is repeated as written."""
    facts = result.components
    if facts == Components():
        return ""
    solid = facts.dose_unit in {"tablet", "capsule", "pill", "caplet", "ml", "teaspoon", "softgel"}
    parts = [_VERB.get(facts.route or "", "Take" if solid else "Use")]
    if facts.dose_min is not None and facts.dose_max is not None:
        amount = plain_number(facts.dose_min)
        if facts.dose_max != facts.dose_min:
            amount += f" to {plain_number(facts.dose_max)}"
        parts += [amount, _with_unit(facts.dose_max, facts.dose_unit)]
    parts.append(_PLACE.get(facts.route or "", ""))
    if facts.max_times_per_day is not None:
        parts.append(often(facts.max_times_per_day, at_most=facts.as_needed or " to " in result.when))
        parts.append(_moments(result.when))
    if facts.as_needed:
        parts.append("when needed" + (f" for {result.reason}" if result.reason else ""))
    text = " ".join(part for part in parts if part)
    if facts.duration_days is not None:
        days = plain_number(facts.duration_days)
        text += f", for {days} day{'' if facts.duration_days == 1 else 's'}"
    text += "."
    if result.steps:
        text += " Then: " + "; then ".join(result.steps) + "."
    if result.maximum is not None:
        unit = _with_unit(result.maximum.high, result.maximum.unit or facts.dose_unit)
        text += f" Not more than {plain_number(result.maximum.high)}{' ' + unit if unit else ''} a day."
    return re.sub(r"\s+", " ", text)


def _moments(when: str) -> str:
    events = read_frequency(when).events
    if not events or (re.search(r"\d", when) and "clock" not in " ".join(events)):
        return ""
    words = re.sub(r"^(?:once |twice )?(?:daily|a day|every day)\s*", "", when)
    return f"({words})" if words and words != "nightly" else ""
