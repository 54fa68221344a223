"""Semantic assembly: slots written by the model become typed components."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from .frequency import read_frequency
from .grounding import PRN_EVIDENCE, is_grounded
from .lexicon import EXPLICIT_ROUTE, ROUTE_PATTERNS, read_route
from .quantities import Amount, read_dose, read_duration, read_maximum
from .slots import Slots, parse_slots

# A stated route gives way to a more specific one that the text's verb or site makes unmistakable.
_MORE_SPECIFIC = {
    "oral": ("sublingual", "inhalation", "buccal"),
    "topical": ("transdermal",),
}
_UNMISTAKABLE = {
    "sublingual": ROUTE_PATTERNS["sublingual"],
    "inhalation": re.compile(r"\binhale (?!.*\bdo not inhale)|\binhal(?:er|ed|ation|ations)\b|\bpuffs?\b|\bnebuli\w*"),
    "buccal": re.compile(r"\bbuccal(?:ly)?\b"),
    "transdermal": re.compile(
        r"\b(?:apply|place|use|change|wear|\d) (?:\d |a |the |new )*(?:patch|patches)\b|\btransdermal(?:ly)?\b"
    ),
}


_SUPPLY = re.compile(
    r"\b(?:supply|supplies|(?:discard|dispose|expires?|good|stable)(?: \w+)?) (?:for |of |after |in |= )?$"
)
_FOLLOWED = re.compile(r"\bfollowed by\b|\bthen \d")
_MAXIMUM = re.compile(
    r"\bmax (?:daily )?(?:dose )?(\d[\d./]*(?: [a-z]+)?(?: (?:per|a|each|in|every) (?:\d+ )?[a-z]+)?)"
)


class Components(BaseModel):
    """What a direction states, in numbers. A component that is not stated is None."""

    model_config = ConfigDict(extra="forbid")

    dose_min: float | None = None
    dose_max: float | None = None
    dose_unit: str | None = None
    route: str | None = None
    max_times_per_day: float | None = None
    as_needed: bool = False
    duration_days: float | None = None
    stated_max_daily: float | None = None


@dataclass
class Assembly:
    """Components with what the safety rules need to know about how they were read."""

    components: Components
    broken: bool = False
    disagreement: bool = False
    split_dose: bool = False
    steps: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    maximum: Amount | None = None
    single: bool = False
    when: str = ""
    amounts: list[tuple[float, float]] = field(default_factory=list)
    reason: str = ""


def assemble(answer: str, text: str) -> Assembly:
    """Read a model's answer against the normalised text it was given.

    Components of a sequence are those of its first step. Two different amounts at named times of one day give the
    range of the amounts and the sum of the times.
    """
    slots = parse_slots(answer)
    kept = Slots(broken=slots.broken)
    dropped = []
    for label, value in slots.values:
        if is_grounded(label, value, text):
            kept.values.append((label, value))
        else:
            dropped.append(label)
    result = Assembly(Components(), broken=slots.broken, dropped=dropped, steps=kept.all("then"))
    _dose_and_frequency(kept, text, result)
    _route(kept, text, result)
    _duration_and_maximum(kept, text, result)
    if kept.all("prn") and PRN_EVIDENCE.search(text):
        result.components.as_needed = True
        reason = kept.all("prn")[0]
        result.reason = "" if reason in {"yes", "needed"} or not is_grounded("dose", reason, text) else reason
    return result


def _whole(when: str, text: str) -> str:
    """Complete a time copied without period or count: `2 days` of `2 days per week`, `daily` of `thrice daily`."""
    hit = re.search(
        rf"\b(?:(?:once|twice|thrice|\d+ times) )?{re.escape(when)}(?: (?:per|a|each) (?:day|week|month))?\b", text
    )
    return hit.group() if hit else when


def _dose_and_frequency(slots: Slots, text: str, result: Assembly) -> None:
    doses = [dose for value in slots.all("dose") if (dose := read_dose(value))]
    result.amounts = [(dose.low, dose.high) for dose in doses]
    whens = slots.all("when")
    whens = [_whole(whens[0], text)] if len(whens) == 1 else whens
    parts = [read_frequency(value) for value in whens]
    result.when = " and ".join(whens)
    frequency = parts[0] if len(parts) == 1 else None
    if len(parts) > 1:
        named = all(part.events and not part.single for part in parts)
        together = read_frequency(result.when)
        rates = [part.per_day for part in parts if part.per_day is not None]
        if named and together.per_day and together.per_day >= max(rates, default=0):
            frequency = together
        else:
            frequency = parts[0]
            result.disagreement = any(abs(rate - rates[0]) > 0.01 * rates[0] for rate in rates)
    facts = result.components
    if frequency:
        facts.max_times_per_day = frequency.per_day
        result.single = frequency.single
        result.disagreement = result.disagreement or frequency.conflict
    if doses:
        facts.dose_min, facts.dose_max, facts.dose_unit = doses[0].low, doses[0].high, doses[0].unit
    others = [dose for dose in doses[1:] if dose != doses[0]]
    if (
        others
        and all(part.events for part in parts)
        and len(parts) > 1
        and all(dose.unit in {doses[0].unit, None} for dose in others)
    ):
        facts.dose_min = min(dose.low for dose in doses)
        facts.dose_max = max(dose.high for dose in doses)
        result.split_dose = True
    elif others:
        result.disagreement = True


def _route(slots: Slots, text: str, result: Assembly) -> None:
    if not slots.all("route"):
        return
    routes = list(dict.fromkeys(route for value in slots.all("route") if (route := read_route(value))))
    if not routes:  # copied words that tell no route, such as `sip`: take what the text says in so many words
        routes = [route for route, pattern in EXPLICIT_ROUTE.items() if pattern.search(text)][:1]
    if not routes:
        return
    route = routes[0]
    for specific in _MORE_SPECIFIC.get(route, ()):
        if _UNMISTAKABLE[specific].search(text):
            route = specific
            break
    result.components.route = route
    result.disagreement = result.disagreement or len(routes) > 1


def _is_supply(value: str, text: str) -> bool:
    """Whether a span tells only how long a supply or an opened pack lasts (`supply for 30 days`)."""
    places = [hit.start() for hit in re.finditer(rf"(?<![\d./]){re.escape(value)}\b", text)]
    return bool(places) and all(_SUPPLY.search(text[:place]) for place in places)


def _duration_and_maximum(slots: Slots, text: str, result: Assembly) -> None:
    """Read how long and at most how much. After normalisation a maximum has one spelling, which rules read alone."""
    stated_for = [value for value in slots.all("for") if not _is_supply(value, text)]
    durations = [days for value in stated_for if (days := read_duration(value)) is not None]
    if durations and not result.single and not result.steps and not _FOLLOWED.search(text):
        result.components.duration_days = durations[0]
        result.disagreement = result.disagreement or any(days != durations[0] for days in durations)
    stated = slots.all("max") or [hit[1] for hit in _MAXIMUM.finditer(text)]
    maxima = [amount for value in stated if (amount := read_maximum(value)) and read_duration(value) is None]
    if maxima:
        result.maximum = maxima[0]
        result.components.stated_max_daily = maxima[0].high
        result.disagreement = result.disagreement or any(amount.high != maxima[0].high for amount in maxima)
