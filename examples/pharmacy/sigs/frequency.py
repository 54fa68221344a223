# ruff: noqa: E501
"""Frequency phrases: words of time become times per day, counted at the most frequent end."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NUM = r"\d+(?:\.\d+)?"
_PERIOD_DAYS = {
    "hour": 1 / 24,
    "minute": 1 / 1440,
    "day": 1.0,
    "night": 1.0,
    "evening": 1.0,
    "morning": 1.0,
    "week": 7.0,
    "month": 30.0,
    "year": 365.0,
}
_ADVERB_DAYS = {
    "daily": 1.0,
    "weekly": 7.0,
    "monthly": 30.0,
    "nightly": 1.0,
    "yearly": 365.0,
    "hourly": 1 / 24,
    "annually": 365.0,
}
_COUNT_WORD = {"once": 1.0, "twice": 2.0, "thrice": 3.0}
_ORDINAL = {"other": 2.0, "second": 2.0, "2nd": 2.0, "third": 3.0, "3rd": 3.0, "fourth": 4.0, "4th": 4.0}
_DAYS_OF_WEEK = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:days?)?"

_EVERY_N = re.compile(
    rf"\b(?:every|each|q) ({_NUM})(?: (?:to|or|-) ({_NUM}))? ?(minute|hour|day|week|month|year|night)s?\b"
)
_EVERY_NTH = re.compile(
    r"\b(?:every|each|on) (other|second|2nd|third|3rd|fourth|4th) (day|night|morning|evening|week|month)s?\b|\balternat(?:e|ing) (day|night)s?\b"
)
_COUNT = re.compile(
    rf"\b(once|twice|thrice|{_NUM}(?: (?:to|or|-) {_NUM})? ?(?:times?|x|doses?))\s+"
    rf"(?:(?:a|an|per|each|every|in a|in|in the|during the|within) (?:({_NUM}) )?(hour|day|week|month|year|night)s?|(daily|weekly|monthly|nightly|yearly))\b"
)
_DAYS_PER = re.compile(
    rf"\b({_NUM})(?: (?:to|-) ({_NUM}))? days? (?:a|per|each|every|out of the|of the) week\b|\b({_NUM}) (?:per|a) (day|week|month)\b"
)
_PLAIN = re.compile(
    r"\b(daily|weekly|monthly|yearly|hourly|annually)\b|\b(?:every|each|per|once a|a|any given) (day|hour|week|month|year)\b"
)
_WEEKDAY = re.compile(rf"\b{_DAYS_OF_WEEK}\b")
_CLOCK = re.compile(r"\b(\d{1,2})(?::\d\d)? ?(?:am|pm|o'clock)\b|\b\d{1,2}:\d\d\b|\bat (\d{4})\b|\b(\d{4}) hours\b")
_CAP = re.compile(r"\b(?:up to|max|no more than|not more than|at most|not to exceed|maximum)\b[^.]{0,12}$")
_MEAL = re.compile(
    r"\b(?:each|every|all|3|three) (?:main )?meals?\b|\b(?:with|before|after|at|between|during|prior to|following) (?:the |your |each |every |3 |all |daily )*(?:meals|mealtimes?)\b|(?<!morning )(?<!evening )(?<!noon )(?<!evening and )\bmeals\b"
)
_EACH_MEAL = re.compile(r"\b(?:each|every|all|3) (?:main )?meals?\b")
_ONCE_ONLY = re.compile(
    r"\b(?:single|1 time|one time|one-time)(?: only)?(?: dose)?\b|\b1 dose(?: only)?\b|\bonce only\b|\bonly once\b|\bonce\b|\bas a single dose\b|\bone dose\b|\bjust once\b"
)
_REPEAT = re.compile(r"\brepeat(?:ed)?\b(?!.*\bday \d)")
_EVENTS: dict[str, str] = {
    "morning": r"morning|breakfast|upon waking|on waking|on rising|upon rising|sunrise|waking up|wake up|awakening|arising|\bam\b",
    "noon": r"noon(?!\w)|midday|mid-day|lunch(?:time)?|afternoons?|after school",
    "evening": r"evenings?|dinner|supper|\bpm\b",
    "night": r"nights?|bedtime|nightly|sleep|going to bed|before bed|bed\b",
}  # fmt: skip
_EVENT = re.compile("|".join(f"(?P<{name}>\\b(?:{pattern})s?)" for name, pattern in _EVENTS.items()))


@dataclass
class Frequency:
    """What a phrase says about how often: the rate, and whether its parts disagree."""

    per_day: float | None = None
    conflict: bool = False
    single: bool = False
    events: frozenset[str] = field(default_factory=frozenset)


def read_frequency(phrase: str) -> Frequency:
    """Return how many times per day a phrase of normalised text means at most.

    Counts per period and intervals are strong; a bare "daily" is weak and yields to named times of the day; meals
    stand for three. Two strong statements that differ, or more named times than the stated count, are a conflict.
    """
    text = " ".join(phrase.lower().split())
    strong, caps, text = _strong(text)
    weekdays, text = _weekdays(text)
    plain, text = _plain(text)
    events = _events(text)
    meals = bool(_MEAL.search(text))
    each_meal = bool(_EACH_MEAL.search(text))
    named = len(events) + (3 if meals else 0)
    if meals and events & {"morning", "noon", "evening"}:
        named = max(3, len(events))
    seen = frozenset(events | ({"meal"} if meals else set()))
    if weekdays:
        return _on_weekdays(weekdays, strong, max(1, named), seen)
    if strong or caps:
        return _from_counts(strong, caps, named, len(events), meals, seen)
    if _REPEAT.search(text):
        return Frequency(2.0, events=seen)
    if plain and plain[0] != 1:
        return Frequency(plain[0], conflict=len(set(plain)) > 1, events=seen)
    if named and not (plain and meals and not events and not each_meal):
        return Frequency(float(named), events=seen)
    if plain:
        return Frequency(plain[0], events=seen)
    if _ONCE_ONLY.search(text):
        return Frequency(1.0, single=True, events=seen)
    return Frequency(events=seen)


def _strong(text: str) -> tuple[list[float], list[float], str]:
    """Return stated rates, stated caps ("up to 4 times a day"), and the text without them."""
    rates: list[tuple[int, float, bool]] = []

    def note(hit: re.Match[str], rate: float) -> str:
        rates.append((hit.start(), rate, bool(_CAP.search(text[: hit.start()]))))
        return " " * len(hit[0])

    def every(hit: re.Match[str]) -> str:
        least = min(float(hit[1]), float(hit[2] or hit[1]))
        return note(hit, 1 / (least * _PERIOD_DAYS[hit[3]])) if least else hit[0]

    def count(hit: re.Match[str]) -> str:
        word = hit[1].split()[0]
        high = max([_COUNT_WORD[word]] if word in _COUNT_WORD else [float(n) for n in re.findall(_NUM, hit[1])])
        days = _ADVERB_DAYS[hit[4]] if hit[4] else _PERIOD_DAYS[hit[3]]
        return note(hit, high / (days * float(hit[2] or 1)))

    def per_week(hit: re.Match[str]) -> str:
        if hit[4]:
            return note(hit, float(hit[3]) / _PERIOD_DAYS[hit[4]])
        return note(hit, float(hit[2] or hit[1]) / 7)

    text = re.sub(r"\b(?:once|1 time) (?=every (?:\d|other|second|third))", "", text)
    text = re.sub(
        r"\brepeat(?:ed)? (?:the )?(?:dose )?(?:once |1 time )?(?:in |after |within )?\d+ (?:to \d+ )?(?:minute|hour)s?\b",
        "repeat",
        text,
    )
    text = re.sub(r"\bevery 24 hours\b", "once daily", text)
    text = _EVERY_NTH.sub(
        lambda hit: note(hit, 1 / (_ORDINAL.get(hit[1] or "other", 2.0) * _PERIOD_DAYS[hit[2] or "day"])), text
    )
    text = _DAYS_PER.sub(per_week, text)
    text = _COUNT.sub(count, text)
    text = _EVERY_N.sub(every, text)
    rates.sort()
    return [rate for _, rate, cap in rates if not cap], [rate for _, rate, cap in rates if cap], text


def _weekdays(text: str) -> tuple[int, str]:
    number = 0
    if re.search(r"\bweekdays?\b", text):
        number = 5
    elif re.search(r"\bweekends?\b", text):
        number = 2
    names = {hit[0][:3] for hit in _WEEKDAY.finditer(text)}
    span = re.search(rf"\b({_DAYS_OF_WEEK}) (?:through|thru|to) ({_DAYS_OF_WEEK})\b", text)
    if names:
        order = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
        number = (order.index(span[2][:3]) - order.index(span[1][:3])) % 7 + 1 if span else len(names)
        if re.search(r"\b(?:except|but not|excluding|skip)\b", text):
            number = 7 - len(names)
    return number, _WEEKDAY.sub(" ", text)


def _plain(text: str) -> tuple[list[float], str]:
    rates: list[float] = []

    def note(hit: re.Match[str]) -> str:
        rates.append(1 / (_ADVERB_DAYS[hit[1]] if hit[1] else _PERIOD_DAYS[hit[2]]))
        return " " * len(hit[0])

    return rates, _PLAIN.sub(note, text)


def _events(text: str) -> set[str]:
    """Return the named times of the day. Neighbours that describe one moment ("at 8 am in the morning") count once."""
    marks: list[tuple[int, int, str]] = [(hit.start(), hit.end(), str(hit.lastgroup)) for hit in _EVENT.finditer(text)]
    marks = [mark for mark in marks if not re.search(r"(?:awake|asleep|times a|over) ?$", text[: mark[0]])]
    clocks = [(hit.start(), hit.end(), f"clock {' '.join(hit[0].split())}") for hit in _CLOCK.finditer(text)]
    marks = [mark for mark in marks if not any(start <= mark[0] < end for start, end, _ in clocks)] + clocks
    events: list[str] = []
    last_end = -99
    for start, end, name in sorted(marks):
        between = text[last_end:start] if events else "and"
        listed = (
            not re.fullmatch(r" (?:at |with |before |after |around |by )?(?:the |going to |about |bed )?", between)
            or between == " "
        )
        one_moment = (
            events
            and not listed
            and (
                name.startswith("clock") or events[-1].startswith("clock") or {events[-1], name} == {"evening", "night"}
            )
        )
        if not one_moment:
            events.append(name)
        last_end = end
    return set(events)


def _on_weekdays(weekdays: int, strong: list[float], named: int, seen: frozenset[str]) -> Frequency:
    weekly = [rate for rate in strong if rate < 0.99]
    if weekly:
        agree = abs(weekly[0] * 7 - weekdays) < 0.1 or abs(weekly[0] - 1 / 14) < 0.01
        return Frequency(weekly[0], conflict=not agree, events=seen)
    per_day = max(strong, default=float(named))
    return Frequency(per_day * weekdays / 7, events=seen)


def _from_counts(
    strong: list[float], caps: list[float], named: int, moments: int, meals: bool, seen: frozenset[str]
) -> Frequency:
    if not strong:
        strong, caps = caps, []
    rate = strong[0]
    conflict = any(abs(other - rate) > 0.01 * rate for other in strong)
    daily_caps = [cap for cap in caps if cap >= 0.99]
    if daily_caps and min(daily_caps) < rate:
        rate = min(daily_caps)
    if rate >= 0.99 and moments and not meals and moments != round(rate):
        conflict = conflict or moments > rate or (moments == 1 and rate > 1.01 and rate < 4.5 and "night" not in seen)
    if rate >= 0.99 and meals and named > rate and moments:
        conflict = True
    return Frequency(rate, conflict=conflict, events=seen)
