# ruff: noqa: E501
"""The rare scenes: sequences, different amounts, contradictions, directions that point elsewhere, and texts that are none."""

from __future__ import annotations

from random import Random

from .catalogue import Product
from .forms import Dose, plural, say_manner
from .phrases import ELSEWHERES, EXTRAS, FREQUENCIES, pick
from .quantities import number
from .scenes import Part, Scene, components

_ONE_DAY = ("daily", "once daily", "every day", "qd", "once a day")
_HELD_DAY = ("each day", "once each day", "per day", "q.d.")


def _amount(value: str, unit: str, rng: Random, *, short: bool = True) -> Dose:
    units = plural(unit, value)
    brief = {"tablet": "tab", "capsule": "cap"}.get(unit, unit)
    said = f"{value} {units}" if not short or rng.random() < 0.6 else f"{value} {brief}{'s' if units != unit else ''}"
    return Dose(said, f"{value} {units}", number(value), number(value), unit, "")


def _unit(product: Product) -> str:
    return product.unit if product.unit in {"tablet", "capsule", "ml", "puff", "drop"} else "tablet"


def taper(product: Product, rng: Random, *, held: bool) -> Scene:
    """Steps that follow each other. Dose and frequency are the first step's; the duration is null unless of the whole."""
    unit = _unit(product)
    manner, family = say_manner(product, rng, held=held)
    verb = manner.verb or rng.choice(["take", ""])
    start = rng.choice([2, 3, 4, 6]) if unit == "tablet" else rng.choice([2, 4])
    steps = [str(n) for n in range(start, 0, -1)][: rng.choice([2, 3, 3, 4])]
    days = rng.choice([1, 2, 3, 4, 5, 7])
    often = rng.choice(_HELD_DAY if held else (*_ONE_DAY, "bid", "twice daily"))
    times = 2.0 if often in {"bid", "twice daily"} else 1.0
    span = f"for {days} day{'s' * (days > 1)}" if held or rng.random() < 0.6 else f"x {days} day{'s' * (days > 1)}"
    join = rng.choice([" then ", ", then ", " followed by "] if held else [" then ", " then ", " ", " then take "])
    first = _amount(steps[0], unit, rng)
    parts = [
        Part(verb),
        Part(first.surface, "dose", first.slot),
        Part(manner.place, "route" if manner.route else "", manner.route or ""),
        Part(often, "when", often),
        Part(span),
    ]
    for value in steps[1:]:
        step = _amount(value, unit, rng)
        text = f"{step.surface} {often} {span}"
        parts.append(Part((join + text).strip() if join.strip() else text, "then", text))
    return Scene(
        [part for part in parts if part.surface or part.label],
        components(first, manner.route, times),
        {"sequence"},
        {family, "scene.held.taper" if held else "scene.taper"},
    )


def mass_taper(product: Product, rng: Random, *, held: bool) -> Scene:
    """A taper in milligrams without a frequency, sometimes with a duration of the whole."""
    values = rng.choice([["40", "30", "20", "10"], ["60", "40", "20"], ["20", "10", "5"], ["30", "20", "10"]])
    days = rng.choice([1, 2, 3, 4, 5])
    span = f"for {days} days" if held else f"x {days} days"
    say = (lambda value: f"{value} mg") if held else (lambda value: rng.choice([f"{value}mg", f"{value} mg"]))
    first = Dose("", "", float(values[0]), float(values[0]), "mg", "")
    parts = [Part(rng.choice(["take", "", "prednisone"])), Part(say(values[0]), "dose", f"{values[0]} mg"), Part(span)]
    parts += [
        Part(f"{'then ' if held else ''}{say(value)} {span}", "then", f"{value} mg {span}") for value in values[1:]
    ]
    scene = Scene(
        [part for part in parts if part.surface],
        components(first),
        {"sequence"},
        {"scene.held.mass" if held else "scene.mass"},
    )
    if not held and rng.random() < 0.4:
        route = rng.choice(["po", "by mouth", "orally"])
        scene.parts.append(Part(route, "route", "oral"))
        scene.expected["route"] = "oral"
    return scene


def first_day(product: Product, rng: Random, *, held: bool) -> Scene:
    """A larger amount on the first day, then a smaller one."""
    unit = "capsule" if product.unit == "capsule" else "tablet"
    verb, later = ("take", rng.choice([4, 6, 9]))
    on_day = rng.choice(
        ["initially", "for the first dose"]
        if held
        else ["on day 1", "on the first day", "today", "the first day", "on day one"]
    )
    rest = rng.choice(
        ["each day after that", "each day thereafter"]
        if held
        else [
            f"daily for {later} days",
            f"once a day on days 2-{later + 1}",
            f"daily x {later} days",
            f"every day for {later} days",
        ]
    )
    one = rng.choice([f"1 {unit}", f"1 {unit}", f"one {unit}"])
    place = rng.choice(["by mouth", "po", "orally", ""])
    first = _amount("2", unit, rng)
    parts = [
        Part(verb),
        Part(first.surface, "dose", first.slot),
        *([Part(place, "route", "oral")] if place else []),
        Part(on_day),
        Part(f"then {one} {rest}", "then", f"{one} {rest}"),
    ]
    return Scene(
        parts,
        components(first, "oral" if place else None),
        {"sequence"},
        {"scene.held.first_day" if held else "scene.first_day"},
    )


def pulse(product: Product, rng: Random, *, held: bool) -> Scene:
    """Some days on, some days off."""
    unit = "capsule" if product.unit == "capsule" else "tablet"
    often, times = rng.choice(
        [("each day", 1.0), ("2 times each day", 2.0)]
        if held
        else [("daily", 1.0), ("twice daily", 2.0), ("bid", 2.0), ("", None)]
    )
    on, off = rng.choice([(7, 21), (21, 7), (5, 23), (14, 14)])
    text = rng.choice(
        [f"then nothing for {off} days then repeat cycle"]
        if held
        else [
            f"then stop for {off} days",
            f"then off for {off} days then repeat",
            f"then stop for {off} days then 1 {unit} for {on} days",
        ]
    )
    opening = rng.choice(["pulse regimen", "pulse therapy"]) if not held and rng.random() < 0.5 else "take"
    first = _amount("1", unit, rng)
    parts = [
        Part(opening),
        Part(first.surface, "dose", first.slot),
        Part("by mouth", "route", "oral"),
        Part(often, "when" if often else "", often),
        Part(f"for {on} days"),
        Part(text, "then", text.removeprefix("then ")),
    ]
    return Scene(
        [part for part in parts if part.surface],
        components(first, "oral", times),
        {"sequence"},
        {"scene.held.pulse" if held else "scene.pulse"},
    )


def split(product: Product, rng: Random, *, held: bool) -> Scene:
    """Two amounts at named times of a day; equal amounts are an ordinary direction."""
    unit = _unit(product) if product.unit != "puff" else "tablet"
    low, high = ("1", rng.choice(["1", "1", "1", "2", "1/2"]))
    morning, night = rng.choice(
        [("upon waking", "before bed"), ("at breakfast", "at supper")]
        if held
        else [
            ("in the morning", "at bedtime"),
            ("every morning", "every evening"),
            ("in the morning", "in the evening"),
            ("qam", "qhs"),
            ("with breakfast", "with dinner"),
            ("at noon", "at bedtime"),
            ("in the morning", "before bedtime"),
        ]
    )
    verb = rng.choice(["take", "take", ""])
    first, second = _amount(low, unit, rng), _amount(high, unit, rng)
    place = rng.choice(["by mouth", "by mouth", "po", ""])
    link = rng.choice(["and", "plus"]) if held else "and"
    same = low == high
    parts = [Part(verb), Part(first.surface, "dose", first.slot)]
    if place:
        parts.append(Part(place, "route", "oral"))
    if same:
        parts += [Part(morning, "when", f"{morning} and {night}"), Part(link), Part(second.surface), Part(night)]
    else:
        parts += [
            Part(morning, "when", morning),
            Part(link),
            Part(second.surface, "dose", second.slot),
            Part(night, "when", night),
        ]
    scene = Scene(
        [part for part in parts if part.surface],
        components(first, "oral" if place else None, 2.0),
        set() if same else {"split_dose"},
        {"scene.held.split" if held else "scene.split"},
    )
    scene.expected["dose_min"], scene.expected["dose_max"] = min(first.low, second.low), max(first.high, second.high)
    return scene


def repeated(product: Product, rng: Random, *, held: bool) -> Scene:
    """A first dose at the onset that may be repeated."""
    unit = "tablet"
    value = rng.choice(["1", "1", "2", "4"])
    onset = rng.choice(
        ["when headache begins", "at earliest symptom"]
        if held
        else [
            "at first tingle of a cold sore",
            "at onset of migraine",
            "at onset of headache",
            "with onset",
            "at first sign of symptoms",
        ]
    )
    hours = rng.choice([1, 2, 4, 12])
    again = rng.choice(
        [f"may be repeated after {hours} hours"]
        if held
        else [
            f"may repeat in {hours} hours",
            f"repeat in {hours} hours",
            f"may repeat once in {hours} hours",
            f"and repeat after {hours} hours",
        ]
    )
    if hours == 1:
        again = again.replace("hours", "hour")
    first = _amount(value, unit, rng)
    place = rng.choice(["by mouth", "po", ""])
    parts = [
        Part(rng.choice(["take", "take", "for fever blisters take"])),
        Part(first.surface, "dose", first.slot),
        *([Part(place, "route", "oral")] if place else []),
        Part(onset),
        Part(again, "when", again),
    ]
    scene = Scene(
        parts,
        components(first, "oral" if place else None, 2.0),
        {"sequence"},
        {"scene.held.repeated" if held else "scene.repeated"},
    )
    if not held and rng.random() < 0.5:
        scene.parts.append(Part(rng.choice(["if needed", "as needed", "prn"]), "prn", "yes"))
        scene.expected["as_needed"] = True
    return scene


def contradiction(product: Product, rng: Random, *, held: bool) -> Scene:
    """Two statements of one component that disagree; the first is reported and the whole is flagged."""
    first = _amount("1", _unit(product), rng)
    manner, family = say_manner(product, rng, held=held)
    one, other = pick(FREQUENCIES, rng, held=held), pick(FREQUENCIES, rng, held=held)
    plain = (
        {"when.held.each_day", "when.held.bid", "when.held.tid", "when.held.four"}
        if held
        else {"when.daily", "when.bid", "when.twice", "when.tid", "when.four", "when.q8", "when.q6", "when.q12"}
    )
    while one.family not in plain or "twice daily " in one.surface:
        one = pick(FREQUENCIES, rng, held=held)
    while other.family not in plain or other.value == one.value:
        other = pick(FREQUENCIES, rng, held=held)
    verb = manner.verb or "take"
    again = rng.choice([f"{verb} {first.surface} {other.surface}", other.surface, f"{verb} {other.surface}"])
    at = again.index(other.surface)
    parts = [
        Part(verb),
        Part(first.surface, "dose", first.slot),
        Part(manner.place, "route" if manner.route else "", manner.route or ""),
        Part(one.surface, "when", one.surface),
    ]
    parts += [Part(again[:at].strip())] if again[:at].strip() else []
    parts.append(Part(other.surface, "when", other.surface))
    families = {family, one.family, other.family, "scene.held.contradiction" if held else "scene.contradiction"}
    return Scene(
        [part for part in parts if part.surface or part.label],
        components(first, manner.route, one.value),
        {"contradiction"},
        families,
        noisy=False,
    )


def elsewhere(product: Product, rng: Random, *, held: bool) -> Scene:
    """A direction that hands over to another text, with little or nothing of its own."""
    phrase = pick(ELSEWHERES, rng, held=held)
    manner, family = say_manner(product, rng, held=held)
    verb = manner.verb or rng.choice(["take", "use"])
    scene = Scene(
        [Part(verb)],
        components(),
        {"points_elsewhere"},
        {family, phrase.family, "scene.held.elsewhere" if held else "scene.elsewhere"},
    )
    if rng.random() < 0.5:
        dose = _amount("1", _unit(product), rng)
        scene.parts.append(Part(dose.surface, "dose", dose.slot))
        scene.expected = components(dose)
    if manner.place and rng.random() < 0.6:
        scene.parts.append(Part(manner.place, "route" if manner.route else "", manner.route or ""))
        scene.expected["route"] = manner.route
    elif manner.route and manner.route != "oral":
        scene.parts.append(Part("", "route", manner.route))
        scene.expected["route"] = manner.route
    scene.parts.append(Part(phrase.surface.removeprefix("use ") if verb == "use" else phrase.surface))
    if rng.random() < 0.3:
        days = rng.choice([3, 5, 6, 7, 10])
        scene.parts.append(Part(f"for {days} days", "for", f"{days} days"))
        scene.expected["duration_days"] = float(days)
    return scene


_BEFORE = (
    "1 hour before procedure",
    "1 hour prior to appointment",
    "30 minutes before dental visit",
    "1 hour before needed",
    "2 hours before surgery",
    "1 hour prior to laser session",
)
_HELD_BEFORE = ("60 minutes prior to mri", "one hour before flight", "45 minutes before imaging")


def before(product: Product, rng: Random, *, held: bool) -> Scene:
    """A dose tied to an event: no frequency is stated unless the text says once."""
    unit = "capsule" if product.unit == "capsule" else "tablet"
    dose = _amount(rng.choice(["1", "1", "2", "4"]), unit, rng)
    place = rng.choice(["by mouth", "po", "", "orally"])
    parts = [Part("take"), Part(dose.surface, "dose", dose.slot), *([Part(place, "route", "oral")] if place else [])]
    scene = Scene(
        parts, components(dose, "oral" if place else None), set(), {"scene.held.before" if held else "scene.before"}
    )
    if rng.random() < 0.25:
        once = "just once" if held else rng.choice(["once", "one time"])
        scene.parts.append(Part(once, "when", once))
        scene.expected["max_times_per_day"] = 1.0
    elif rng.random() < 0.35:
        scene.parts.append(Part("when required" if held else rng.choice(["as needed", "prn"]), "prn", "yes"))
        scene.expected["as_needed"] = True
    scene.parts.append(Part(rng.choice(_HELD_BEFORE if held else _BEFORE)))
    return scene


_TASKS = (
    "use to measure glucose {}",
    "use to test blood sugar {}",
    "check blood sugar {}",
    "use in bath {}",
    "wear compression stockings {}",
    "use {}",
    "use device {}",
    "test blood glucose {} - any brand",
)
_HELD_TASKS = ("use lancets to monitor sugars {}", "change sensor {}", "shampoo hair {}", "use pen needle {}")


def task(product: Product, rng: Random, *, held: bool) -> Scene:
    """Something to do that has a frequency but no amount."""
    phrase = pick(FREQUENCIES, rng, held=held)
    while "once" in phrase.family:
        phrase = pick(FREQUENCIES, rng, held=held)
    text = rng.choice(_HELD_TASKS if held else _TASKS)
    before_it, after = text.split("{}")
    scene = Scene(
        [Part(before_it.strip()), Part(phrase.surface, "when", phrase.surface)],
        components(None, None, phrase.value),
        set(),
        {phrase.family, "scene.held.task" if held else "scene.task"},
    )
    if "shampoo" in text:
        scene.parts.append(Part("", "route", "topical"))
        scene.expected["route"] = "topical"
    if after.strip():
        scene.parts.append(Part(after.strip()))
    return scene


_NONSENSE = (
    "tome una tableta por la boca cada ocho horas",
    "asdf qwer zxcv poiu lkjh",
    "tomar dos capsulas cada dia con comida",
    "xx yyz kkl trx 0",
    "prendre un comprime par jour",
    "tome dos tabletas al dia",
    "lorem ipsum dolor amet elit",
    "aplicar en la piel dos veces al dia",
    "zzz kjh wqe bnm",
    "una pastilla cada noche antes de dormir",
)
_HELD_NONSENSE = (
    "tome media tableta cada manana",
    "eine tablette morgens und abends einnehmen",
    "qwrt plkm vbnx zzrt",
    "tomar una cucharada cada seis horas",
    "mnbv cxzl kjhg fdsa poiu",
    "prenez deux gelules le soir",
    "inhalar dos veces por dia cuando necesite",
    "usar gotas en ojos cada noche",
)


def nonsense(product: Product, rng: Random, *, held: bool) -> Scene:
    """Not English, or not language."""
    text = rng.choice(_HELD_NONSENSE if held else _NONSENSE)
    if rng.random() < 0.5:
        text += " " + rng.choice(["pf", "gracias", "xq", "ref", "por favor", "nn", "vv kk"])
    return Scene(
        [Part(text)], components(), {"garbled"}, {"scene.held.nonsense" if held else "scene.nonsense"}, noisy=False
    )


def note(product: Product, rng: Random, *, held: bool) -> Scene:
    """Remarks without a direction."""
    phrases = [pick(EXTRAS, rng, held=held) for _ in range(rng.choice([1, 2]))]
    return Scene(
        [Part(" ".join(phrase.surface for phrase in phrases))],
        components(),
        set(),
        {"scene.held.note" if held else "scene.note", *(phrase.family for phrase in phrases)},
    )


def conflicting(product: Product, rng: Random, *, held: bool) -> Scene:
    """A clear direction for a drug that is not used this way."""
    scene = Scene([], components(), {"catalogue_conflict"}, {"scene.held.conflict" if held else "scene.conflict"})
    phrase = pick(FREQUENCIES, rng, held=held)
    if product.route == "oral" and product.unit in {"tablet", "capsule"}:
        dose = _amount("1", "drop", rng)
        scene.parts = [
            Part("instill" if not held else "put"),
            Part(dose.surface, "dose", dose.slot),
            Part("in right eye", "route", "ophthalmic"),
            Part(phrase.surface, "when", phrase.surface),
        ]
        scene.expected = components(dose, "ophthalmic", phrase.value)
    else:
        dose = _amount("1", "tablet", rng)
        scene.parts = [
            Part("take"),
            Part(dose.surface, "dose", dose.slot),
            Part("by mouth", "route", "oral"),
            Part(phrase.surface, "when", phrase.surface),
        ]
        scene.expected = components(dose, "oral", phrase.value)
    scene.families.add(phrase.family)
    scene.given["drug"] = product.drug
    return scene


RARE = (
    (taper, 3.0), (mass_taper, 1.0), (first_day, 1.2), (pulse, 0.8), (split, 3.0), (repeated, 1.2), (contradiction, 1.6),
    (elsewhere, 3.0), (before, 1.4), (task, 1.6), (nonsense, 0.6), (note, 0.6), (conflicting, 1.0),
)  # fmt: skip
