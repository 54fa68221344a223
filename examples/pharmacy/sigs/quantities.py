# ruff: noqa: E501, SIM905
"""Numbers with units: doses, durations and stated maxima."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .lexicon import MASS_UNITS, UNITS

_ONE = r"(?:\d+ \d/\d|\d/\d|\d+(?:\.\d+)?)"
_AMOUNT = re.compile(rf"(?<![\d.%/])({_ONE})(?: ?(?:to|or|-) ?({_ONE}))?(?![\d./])")
_STRENGTH = re.compile(
    r"^ ?(?:\d+(?:\.\d+)? ?)?(?:mg|mcg|g|meq|ml|units?|%)(?:/\d* ?(?:ml|mg|g|mcg|actuation|puff|hour)s?)? (?=[a-z])"
)
_DAYS = {"day": 1.0, "night": 1.0, "morning": 1.0, "week": 7.0, "month": 30.0, "year": 365.0, "hour": 1 / 24}
_NOT_UNITS = frozenset(
    "a an and any area as at bedtime both by daily day days each every evening eye eyes food for from hour hours in inside into left meal "
    "meals month mouth morning needed night no nostril of on once or oral orally per right skin small the then thin time times to total "
    "twice under until up weekly weeks with affected nose ear ears topically".split()
)  # fmt: skip


@dataclass(frozen=True)
class Amount:
    """An amount as a range; a single number has equal ends. `unit` is singular, None when the text gives none."""

    low: float
    high: float
    unit: str | None = None


def number(text: str) -> float:
    """Return the value of a decimal, a fraction or a mixed number such as `1 1/2`."""
    total = 0.0
    for part in text.split():
        top, _, bottom = part.partition("/")
        total += float(top) / float(bottom) if bottom and float(bottom) else float(top)
    return total


def singular(word: str) -> str:
    """Return the reported name of a unit: known units by table, others without a plural ending."""
    word = word.lower().strip(".,()")
    for form in (word, word.removesuffix("s"), word.removesuffix("es")):
        if form in UNITS:
            return UNITS[form]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def read_dose(phrase: str) -> Amount | None:
    """Return the first amount of a phrase: `1 to 2 tablets`, `1 150 mg tablet` (one tablet), `a tablet`, `1`."""
    text = re.sub(r"\b(?:up to|about|approximately|max|maximum(?: of)?)\b ?", "", " ".join(phrase.lower().split()))
    text = re.sub(r"^(?:an?|each)(?= [a-z])", "1", text)
    hit = _AMOUNT.search(text)
    if hit is None:
        return None
    low = number(hit[1])
    high = number(hit[2]) if hit[2] else low
    rest = text[hit.end() :]
    if re.match(r" ?(?:times?|x)\b", rest):
        return None
    unit = _unit(rest)
    if strength := _STRENGTH.match(rest):
        counted = _unit(rest[strength.end() :], known=True)
        if counted and counted not in MASS_UNITS and re.match(r"^ ?\d", rest):
            unit = counted
    return Amount(min(low, high), max(low, high), unit)


def _unit(rest: str, *, known: bool = False) -> str | None:
    words = re.findall(r"[a-z%-]+|\d\S*|\.", rest)
    for word in words[:4]:
        if not word[0].isalpha() or word in _NOT_UNITS:
            break
        if (name := singular(word)) in UNITS.values() and name not in {"time"}:
            return name
    if not known and words and words[0][0].isalpha() and words[0] not in _NOT_UNITS and len(words) == 1:
        return singular(words[0])
    return None


def read_duration(phrase: str) -> float | None:
    """Return a duration in days; a range gives its longer end, a month is 30 days. Anything else is None."""
    text = " ".join(phrase.lower().split())
    found = [
        (number(hit[2] or hit[1]), hit[3])
        for hit in re.finditer(
            rf"({_ONE})(?: ?(?:to|or|-) ?({_ONE}))? (?:full |total |consecutive |more |additional |straight )?(day|night|morning|week|month|year|hour)s?\b",
            text,
        )
    ]
    if not found:
        one = re.search(r"\ba (day|week|month|year)\b", text)
        return _DAYS[one[1]] if one else None
    amount, unit = found[0]
    days = amount * _DAYS[unit]
    return round(days, 4)


def read_maximum(phrase: str) -> Amount | None:
    """Return a maximum per day: `8 tablets per day`, `3`, `200 mg in 24 hours`. A weekly maximum is None."""
    text = " ".join(phrase.lower().split())
    if re.search(
        r"\b(?:per|a|each|every|in a|in 1|in) (?:\d+ )?(?:week|month)s?\b|\bweekly\b|\bin \d+ days\b|\bper (?:hour|dose|episode|attack)\b",
        text,
    ):
        return None
    text = re.sub(r"\b(?:in|per|every|within) (?:a |any )?24(?: |-)?(?:hours?|hour period)\b", "per day", text)
    text = re.sub(r"\bin (?:1|a) day\b", "per day", text)
    return read_dose(text)
