# ruff: noqa: E501
"""Safety enforcement: when a person must look, and why.

Reasons are stable codes:

    missing_dose         no amount is stated
    missing_frequency    no frequency is stated
    contradiction        two doses, frequencies, routes or durations disagree, or a stated maximum per day is
                         exceeded or never reached by dose times frequency
    split_dose           different amounts at different times of one day
    sequence             steps follow each other: tapers, pulses, loading doses, repeated doses
    points_elsewhere     the text sends the reader to another text ("as directed", "follow package")
    garbled              not readable as English, or the model's answer is not in the slot language
    max_not_checkable    a maximum in another unit than the dose and no strength to convert it
    implausible_dose     an amount outside the bounds of its unit
    catalogue_conflict   the drug's usual route, form or daily maximum says otherwise
    not_in_text          the model wrote a number or word that the text does not hold; that slot was dropped
    unread_text          the text states something that no slot took up
    unsure               the model was less confident than the threshold that its stage learned on validation items
"""

from __future__ import annotations

import re
from typing import Any

from .assemble import Assembly
from .catalogue import drug_words, find
from .frequency import read_frequency
from .lexicon import COUNTED, ELSEWHERE, EXPLICIT_ROUTE, MASS_UNITS, VOCABULARY
from .quantities import number, singular

REASONS = (
    "missing_dose", "missing_frequency", "contradiction", "split_dose", "sequence", "points_elsewhere", "garbled",
    "max_not_checkable", "implausible_dose", "catalogue_conflict", "not_in_text", "unread_text", "unsure",
)  # fmt: skip

SEQUENCE = re.compile(
    r"\bthen\b(?! (?:spit|swallow|rinse|wait|discard|remove|wipe|wash|exhale|hold|stop\b(?! for)))(?=.*(?:\d|daily|needed|once|twice|off|every|stop for))|\btaper(?:ed|ing)?\b|\bpulse\b|\bfollowed by\b|\b(?:on|for|take) days? 1\b|^days? 1\b|\bday 1 (?:then|of|and)\b|\bdays? 1 to \d+(?! (?:tablets?|capsules?|pills?|puffs?|drops?|ml))|\bweek 1\b(?! (?:tablet|capsule|pill|by))|"
    r"\b(?:on|the) (?:first|1st) day\b|\b(?:increase|decrease|reduce|titrate)\w* (?:to|by|dose|as|up|down|after|every)\b|\bthereafter\b|\boff for\b|\b(?:weeks?|days?) off\b|\b\d+ (?:weeks|days) on (?:and|then|\d)|"
    r"\bfor \d+ (?:days?|weeks?|doses?)(?: \.)?(?: and| take| apply| use)? (?:\d+(?:\.\d+)?(?: \d/\d)?|\d/\d) (?:tablets?|capsules?|pills?|mg|ml|puffs?|by mouth|drops?|times?|twice|every|daily)(?! (?:as needed|per|max|daily max))|"
    r"\brepeat(?:ed)?\b(?! (?:labs?|test))|\bfirst dose\b.*\bsecond dose\b|\binitially\b|\bloading\b|\bafter that\b|\bsubsequent\b"
)
_WITH_ORAL = {"inhalation", "sublingual", "buccal"}
_WITH_TOPICAL = {"transdermal", "ophthalmic", "nasal", "otic", "vaginal", "rectal", "oral", "buccal"}
_BOUNDS: dict[str, tuple[float, float]] = {
    "tablet": (0.125, 12), "capsule": (0.25, 12), "pill": (0.125, 12), "caplet": (0.25, 6), "softgel": (0.5, 8), "puff": (0.5, 10),
    "inhalation": (0.5, 10), "drop": (0.5, 30), "spray": (0.5, 8), "patch": (0.25, 4), "suppository": (0.25, 3),
    "vial": (0.25, 6), "ml": (0.01, 500), "teaspoon": (0.125, 8), "tablespoon": (0.25, 8), "mg": (0.01, 6000), "mcg": (0.1, 10000),
    "g": (0.01, 60), "unit": (0.25, 100000), "application": (0.5, 4), "click": (0.5, 20), "lozenge": (0.5, 4), "oz": (0.1, 64),
    "packet": (0.25, 8), "applicator": (0.25, 3),
}  # fmt: skip
_MG = {"mg": 1.0, "mcg": 0.001, "g": 1000.0}
_SPAN = re.compile(r"(?<!\d )(?<!supply )\bfor \d+(?: to \d+)? (?:days|weeks?|months?|nights)\b")
_BARE_SPAN = re.compile(
    r"\b(?:duration|next|total of|course of|over|during|mouth|orally|daily|day|needed|bedtime|hours|waking|nightly|night|"
    r"morning|evening) \d+ (?:days|weeks|months|nights)\b(?! (?:before|after|prior|supply|a week|per week|each week))"
)
_TEXT_STRENGTH = re.compile(
    r"\b(?P<n>\d+(?:\.\d+)?) (?P<u>tablets?|capsules?|pills?|ml) (?P<s>\d+(?:\.\d+)?) (?P<m>mg|mcg|g)\b(?P<t> total)?"
)


def review(result: Assembly, text: str, given: dict[str, Any], *, doubtful: bool = False) -> list[str]:
    """Return the reasons why a person must look at a direction, in the order of `REASONS`; empty when none."""
    facts = result.components
    found: set[str] = set()
    sequence = bool(result.steps or SEQUENCE.search(text))
    if facts.dose_min is None:
        found.add("missing_dose")
    if facts.max_times_per_day is None:
        found.add("missing_frequency")
    if result.disagreement or _routes_disagree(text):
        found.add("contradiction")
    if result.split_dose:
        found.add("split_dose")
    if sequence:
        found.add("sequence")
    if ELSEWHERE.search(text):
        found.add("points_elsewhere")
    if result.broken or is_garbled(text):
        found.add("garbled")
    if implausible(facts.dose_min, facts.dose_max, facts.dose_unit, facts.max_times_per_day):
        found.add("implausible_dose")
    if result.dropped:
        found.add("not_in_text")
    if (verdict := _maximum(result, text, given)) and not sequence:
        found.add(verdict)
    if catalogue_conflict(result, given):
        found.add("catalogue_conflict")
    if _unread(result, text, sequence):
        found.add("unread_text")
    if doubtful:
        found.add("unsure")
    return [reason for reason in REASONS if reason in found]


def is_garbled(text: str) -> bool:
    """Say whether too few words of a normalised text are known English, prescription or drug words."""
    words = [word for word in re.findall(r"[a-z][a-z'-]*", text) if word != "x"]
    if not words:
        return True
    unknown = [
        word
        for word in words
        if word not in VOCABULARY and word.removesuffix("s") not in VOCABULARY and word not in drug_words()
    ]
    share = len(unknown) / len(words)
    return share > 0.5 or (len(unknown) >= 3 and share > 0.34)


def implausible(low: float | None, high: float | None, unit: str | None, times: float | None) -> bool:
    """Say whether an amount is zero or outside the bounds of its unit, or a frequency beyond every hour or so."""
    if times is not None and times > 48:
        return True
    if low is None or high is None:
        return False
    least, most = _BOUNDS.get(unit or "tablet", (0.01, 1000.0))
    return low < least or high > most


def _routes_disagree(text: str) -> bool:
    stated = {route for route, pattern in EXPLICIT_ROUTE.items() if pattern.search(text)}
    if "sublingual" in stated:
        stated.discard("oral")
    if "topical" in stated and stated & _WITH_TOPICAL - {"oral"}:
        stated.discard("topical")
    return len(stated) > 1


def strength_mg(given: dict[str, Any]) -> float | None:
    """Return the strength given with a direction in mg per unit, when it is a plain mass such as `20 mg`."""
    hit = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(mg|mcg|g)\s*", str(given.get("strength") or "").lower())
    return float(hit[1]) * _MG[hit[2]] if hit else None


def _maximum(result: Assembly, text: str, given: dict[str, Any]) -> str | None:
    """Compare the stated maximum with what the direction reaches; a reason when they disagree or cannot be compared."""
    facts, maximum = result.components, result.maximum
    if maximum is None or facts.dose_max is None or facts.max_times_per_day is None:
        return None
    reach: float | None
    if maximum.unit in {"dose", "application"} and maximum.unit != facts.dose_unit:
        reach = facts.max_times_per_day
    else:
        reach = facts.dose_max * facts.max_times_per_day
        if maximum.unit in MASS_UNITS and facts.dose_unit not in MASS_UNITS:
            per_unit = strength_mg(given) or _text_strength(text, facts.dose_max)
            reach = None if per_unit is None or maximum.unit not in _MG else reach * per_unit / _MG[maximum.unit]
        elif maximum.unit in _MG and facts.dose_unit in _MG:
            reach *= _MG[facts.dose_unit] / _MG[maximum.unit]
        elif not _same_kind(maximum.unit, facts.dose_unit):
            reach = None
    if reach is None:
        return "max_not_checkable"
    return "contradiction" if abs(reach - maximum.high) > 0.01 * maximum.high else None


def _same_kind(left: str | None, right: str | None) -> bool:
    if left is None or right is None or left == right:
        return True
    countable = COUNTED | {"dose"}
    return (left in countable and right in countable) or {left, right} <= {"puff", "inhalation", "actuation"}


def _text_strength(text: str, dose: float) -> float | None:
    hit = _TEXT_STRENGTH.search(text)
    if hit is None:
        return None
    mg = float(hit["s"]) * _MG[hit["m"]]
    if hit["t"] or float(hit["n"]) == 1:
        return mg / float(hit["n"]) if dose else None
    return None


def catalogue_conflict(result: Assembly, given: dict[str, Any]) -> bool:
    """Say whether route, unit or daily amount conflict with the catalogue, for a drug that it knows."""
    drug = str(given.get("drug") or "")
    known = find(drug) if drug else ()
    if not known:
        return False
    facts = result.components
    form = str(given.get("form") or "").lower()
    rows = [row for row in known if not form or row.form in form or form in row.form] or list(known)
    routes = {row.route for row in rows}
    if facts.route and facts.route not in routes and not (facts.route == "oral" and routes & {"sublingual", "buccal"}):
        return True
    units = {row.unit for row in rows}
    solid = facts.dose_unit in {"tablet", "capsule", "caplet", "softgel"}
    if solid and not units & {"tablet", "capsule", "caplet", "softgel"}:
        return True
    if (
        solid
        and form
        and facts.dose_unit in {"tablet", "capsule"}
        and singular(form.split()[-1]) in {"tablet", "capsule"}
        and singular(form.split()[-1]) != facts.dose_unit
    ):
        return True
    if facts.dose_unit in {"puff", "drop", "patch", "suppository", "spray"} and facts.dose_unit not in units | {
        row.form for row in rows
    }:
        return True
    return _too_much(
        result,
        given,
        [row.max_daily * _MG[row.strength_unit] for row in rows if row.max_daily and row.strength_unit in _MG],
    )


def _too_much(result: Assembly, given: dict[str, Any], limits: list[float]) -> bool:
    facts = result.components
    if not limits or facts.dose_max is None or facts.max_times_per_day is None:
        return False
    per_unit = _MG.get(facts.dose_unit or "") or (strength_mg(given) if facts.dose_unit in COUNTED | {None} else None)
    return per_unit is not None and facts.dose_max * per_unit * facts.max_times_per_day > max(limits) * 1.01


def _unread(result: Assembly, text: str, sequence: bool) -> bool:
    """Say whether the text states a component that no slot took up. Sequences are flagged anyway."""
    if sequence:
        return False
    facts = result.components
    if not facts.as_needed and ("as needed" in text or re.search(r"\bif [a-z]{5,} for\b", text)):
        return True
    if _amount_left_over(result, text) or _weekday_left_over(result, text):
        return True
    if facts.duration_days is None and not result.single and _SPAN.search(text):
        return True
    if facts.duration_days is None and not result.single and _BARE_SPAN.search(text):
        return True
    if facts.stated_max_daily is None and re.search(r"\bmax (?:daily )?(?:dose )?\d", text):
        return True
    if facts.route is None and re.search(r"\bby mouth\b|\borally\b|\btopically\b|\brectally\b|\bvaginally\b", text):
        return True
    whole = read_frequency(re.sub(r"\b(?:up to|max daily dose|max|not to exceed|no more than)\b.*$", "", text))
    if facts.max_times_per_day is None:
        return whole.per_day is not None and not whole.single and not whole.events and not whole.conflict
    return False


_COUNTED_AMOUNT = re.compile(
    r"(?<!#)(?<!dispense )(?<!quantity )(?<!qty )(?<!disp )(?<![\d./])(?<!\d )(\d+ \d/\d|\d[\d./]*)(?: to (\d+ \d/\d|\d[\d./]*))? "
    r"(?:tablets?|capsules?|pills?|puffs?|drops?|sprays?|patch(?:es)?|suppositor(?:y|ies)|lozenges?)\b"
)
_WEEKDAY = re.compile(r"\b(mon|tues?|wed|thurs?|thu|fri|sat|sun)(?:days?|nesdays?|urdays?)?\b")


def _amount_left_over(result: Assembly, text: str) -> bool:
    """Say whether the text counts more units, or a wider range of them, than the slots took up."""
    facts = result.components
    if facts.dose_min is None or facts.dose_max is None:
        return False
    amounts = [(number(hit[1]), number(hit[2] or hit[1])) for hit in _COUNTED_AMOUNT.finditer(text)]
    taken = result.amounts + ([] if facts.stated_max_daily is None else [(facts.stated_max_daily,) * 2])
    return any(amount not in taken for amount in amounts)


def _weekday_left_over(result: Assembly, text: str) -> bool:
    """Say whether the text names a weekday that the time slot does not, where the slot names some."""
    taken = {hit[1][:2] for hit in _WEEKDAY.finditer(result.when)}
    return bool(taken) and bool({hit[1][:2] for hit in _WEEKDAY.finditer(text)} - taken) and " except" not in text
