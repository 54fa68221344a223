# ruff: noqa: E501
"""Scenes: what is meant, how it is said, and what a correct reading is. The truth comes from the frame, not from the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from .catalogue import Product
from .forms import Dose, Manner, plural, say_dose, say_manner
from .phrases import DURATIONS, ELSEWHERES, EXTRAS, FREQUENCIES, MAXIMA, PRN, REASONS, Phrase, pick
from .safety import REASONS as CODES
from .safety import implausible


@dataclass
class Part:
    """A piece of the text; `label` and `slot` say what a reader copies from it. `glue` joins it to the piece before."""

    surface: str
    label: str = ""
    slot: str = ""
    glue: bool = False


@dataclass
class Scene:
    """One direction before noise: pieces in text order, slots in answer order, truth, and the families it used."""

    parts: list[Part]
    expected: dict[str, Any]
    reasons: set[str] = field(default_factory=set)
    families: set[str] = field(default_factory=set)
    given: dict[str, Any] = field(default_factory=dict)
    noisy: bool = True

    def slots(self) -> list[tuple[str, str]]:
        """Return the labelled slots in the order of the answer: first dose and route, then time, then the rest."""
        order = ("dose", "route", "when", "prn", "for", "max", "then")
        return sorted(
            ((part.label, part.slot) for part in self.parts if part.label), key=lambda item: order.index(item[0])
        )

    def truth(self) -> dict[str, Any]:
        """Return the expected components with `needs_review` and its reasons."""
        reasons = set(self.reasons)
        if self.expected["dose_min"] is None:
            reasons.add("missing_dose")
        if self.expected["max_times_per_day"] is None:
            reasons.add("missing_frequency")
        if implausible(*(self.expected[key] for key in ("dose_min", "dose_max", "dose_unit", "max_times_per_day"))):
            reasons.add("implausible_dose")
        return {
            **self.expected,
            "needs_review": bool(reasons),
            "review_reasons": [code for code in CODES if code in reasons],
        }


def components(
    dose: Dose | None = None, route: str | None = None, when: float | None = None, **more: Any
) -> dict[str, Any]:
    """Return expected components from the parts of a frame; what is not given is not stated."""
    return {
        "dose_min": dose.low if dose else None,
        "dose_max": dose.high if dose else None,
        "dose_unit": dose.unit if dose else None,
        "route": route,
        "max_times_per_day": when,
        "as_needed": more.get("as_needed", False),
        "duration_days": more.get("duration_days"),
        "stated_max_daily": more.get("stated_max_daily"),
    }


_TEMPLATES: list[tuple[str, float, bool, str]] = [
    ("order.plain", 16, False, "verb dose place when prn for max extra"),
    ("order.when_place", 5, False, "verb dose when place prn for max extra"),
    ("order.for_prn", 2, False, "verb dose place when for prn max extra"),
    ("order.prn_when", 1.5, False, "verb dose place prn when for max extra"),
    ("order.extra_first", 2, False, "extra verb dose place when prn for max"),
    ("order.extra_middle", 3, False, "verb dose place when extra prn for max"),
    ("order.glued", 7, False, "verb dose place when *for *prn max *extra"),
    ("order.max_first", 0.7, False, "verb dose place when max prn for extra"),
    ("order.place_late", 1, False, "verb dose when prn place for max extra"),
    ("order.stops", 5, False, "verb dose place when prn for . max . extra"),
    ("order.when_lead", 1.5, False, "when dose place prn for max extra"),
    ("order.held.sentence", 9, True, "verb dose place , when , prn for . max . extra"),
    ("order.held.capitals", 7, True, "verb dose place when for prn max extra"),
    ("order.held.when_first", 1.5, True, "when verb dose place prn for max extra"),
    ("order.held.glued", 3, True, "verb dose place when *prn for max *extra"),
    ("order.held.place_first", 1, True, "place verb dose when prn for max extra"),
]

_ALTERNATIVE_UNITS = {"tablet": ["tablet"] * 14 + ["pill"], "ml": ["ml"] * 5 + ["teaspoon"]}


def _template(rng: Random, held: bool) -> tuple[str, list[str]]:
    pool = [item for item in _TEMPLATES if item[2] == held]
    chosen = rng.choices(pool, [item[1] for item in pool])[0]
    return chosen[0], chosen[3].split()


def simple(product: Product, rng: Random, *, held: bool) -> Scene:
    """Return a direction of one part: the great majority of real ones."""
    manner, manner_family = say_manner(product, rng, held=held)
    dose = _dose(product, manner, rng, held)
    frequency: Phrase | None = pick(FREQUENCIES, rng, held=held)
    if rng.random() < 0.045:
        frequency = None
    prn = rng.random() < 0.24
    scene = Scene([], components(dose, manner.route, frequency.value if frequency else None), families={manner_family})
    parts: dict[str, Part] = {"verb": Part(manner.verb)}
    if dose:
        scene.families.add(dose.family)
        parts["dose"] = Part(dose.surface, "dose", dose.slot)
    parts["place"] = Part(manner.place, "route" if manner.route else "", manner.route or "")
    if frequency:
        scene.families.add(frequency.family)
        parts["when"] = Part(frequency.surface, "when", frequency.slot or frequency.surface)
    if prn:
        parts["prn"] = _prn(scene, rng, held)
    single = frequency is not None and "once" in frequency.family.split(".")
    if not single and rng.random() < 0.26:
        duration = pick(DURATIONS, rng, held=held)
        scene.families.add(duration.family)
        parts["for"] = Part(duration.surface, "for", duration.slot or "")
        scene.expected["duration_days"] = duration.value
    _give(scene, product, dose, rng)
    if dose and frequency and rng.random() < (0.26 if prn else 0.07) and frequency.value and frequency.value >= 1:
        parts["max"] = _maximum(scene, product, dose, frequency.value, rng, held)
    if rng.random() < 0.36:
        extra = pick(EXTRAS, rng, held=held)
        scene.families.add(extra.family)
        parts["extra"] = Part(extra.surface)
    if rng.random() < 0.05:
        elsewhere = pick(ELSEWHERES, rng, held=held)
        scene.families.add(elsewhere.family)
        scene.reasons.add("points_elsewhere")
        parts["extra"] = Part(elsewhere.surface + (" " + parts["extra"].surface if "extra" in parts else ""))
    _order(scene, parts, rng, held)
    return scene


def _dose(product: Product, manner: Manner, rng: Random, held: bool) -> Dose | None:
    unit = rng.choice(_ALTERNATIVE_UNITS.get(product.unit, [product.unit]))
    if product.route == "topical":
        if product.unit == "click":
            unit = "click"
        elif rng.random() < 0.72:
            return None
        else:
            unit = rng.choice(["g", "application", "g", "pump", "ml"])
    elif rng.random() < 0.03:
        return None
    dose = say_dose(product, unit, rng, held=held)
    if unit in {"click", "patch"} and rng.random() < 0.4:
        equal = (
            rng.choice(["1 gram", "0.25 ml", "(1 g)", "0.5 gm", "1 milliliter"])
            if unit == "click"
            else rng.choice(["5%", "0.1 mg", "(25 mcg)", "21 mg"])
        )
        return Dose(f"{dose.surface} {equal}", dose.slot, dose.low, dose.high, dose.unit, dose.family)
    return dose


_VAGUE = ("a thin layer", "a small amount", "sparingly", "a pea sized amount", "thin film", "liberally")


def _prn(scene: Scene, rng: Random, held: bool) -> Part:
    phrase = pick(PRN, rng, held=held)
    scene.families.add(phrase.family)
    scene.expected["as_needed"] = True
    if "{}" not in phrase.surface:
        return Part(phrase.surface, "prn", "yes")
    reason = rng.choice(REASONS)
    return Part(phrase.surface.format(reason), "prn", reason)


def _give(scene: Scene, product: Product, dose: Dose | None, rng: Random) -> None:
    """Sometimes hand over the drug, its strength and form beside the text, as a dispensing system would."""
    if rng.random() > 0.22:
        return
    scene.given["drug"] = product.drug
    if rng.random() < 0.7 and product.strengths:
        scene.given["strength"] = f"{rng.choice(product.strengths):g} {product.strength_unit}"
    if rng.random() < 0.6 and not (dose and dose.unit == "pill"):
        scene.given["form"] = product.form
    facts = scene.expected
    per_unit = (
        1.0
        if facts["dose_unit"] == "mg"
        else float(str(scene.given["strength"]).split()[0])
        if "strength" in scene.given and facts["dose_unit"] in {"tablet", "capsule", "pill", None}
        else None
    )
    if (
        product.max_daily
        and per_unit
        and facts["dose_max"]
        and facts["max_times_per_day"]
        and facts["dose_max"] * per_unit * facts["max_times_per_day"] > product.max_daily * 1.01
    ):
        scene.reasons.add("catalogue_conflict")


def _maximum(scene: Scene, product: Product, dose: Dose, times: float, rng: Random, held: bool) -> Part:
    phrase = pick(MAXIMA, rng, held=held)
    scene.families.add(phrase.family)
    reach = dose.high * times
    value = reach if rng.random() < 0.8 else rng.choice([max(1.0, reach - 1), reach + 1, reach * 2])
    unit = dose.unit
    if (
        product.strengths
        and dose.unit in {"tablet", "capsule", "pill"}
        and rng.random() < 0.3
        and "amount" not in phrase.surface
    ) or ("amount" in phrase.surface and product.strengths and dose.unit != "mg"):
        strength = float(str(scene.given["strength"]).split()[0]) if "strength" in scene.given else _strength_in(dose)
        value, unit = value * (strength or rng.choice(product.strengths)), "mg"
        if strength is None:
            scene.reasons.add("max_not_checkable")
        elif abs(value - reach * strength) > 0.01 * value:
            scene.reasons.add("contradiction")
    elif abs(value - reach) > 0.01 * value:
        scene.reasons.add("contradiction")
    amount = f"{value:g}"
    surface = phrase.surface
    if unit == "mg" and "{u}" not in surface:
        surface = surface.replace("{n}", "{n} {u}")
    name = plural(unit, amount) if unit else ""
    scene.expected["stated_max_daily"] = float(amount)
    text = " ".join(surface.format(n=amount, u=name).split()).replace(" /", "/")
    said = f"{amount} {name}".strip() if ("{u}" in surface and name) else amount
    per = " per day" if "{u}" in surface and "per day" in surface and unit != "mg" else ""
    return Part(text, "max", said + per)


def _strength_in(dose: Dose) -> float | None:
    words = dose.surface.replace("(", "").split()
    if dose.low != dose.high or dose.unit not in {"tablet", "capsule", "pill"}:
        return None
    if words[-1] == "total" and words[-2] in {"mg", "milligram", "total)"}:
        return float(words[-3]) / dose.low
    if words[-1] == "total)":
        return float(words[-3]) / dose.low
    if words[-1] == "mg" and dose.low == 1:
        return float(words[-2])
    if (
        words[-1].endswith("mg")
        and words[-1][0].isdigit()
        and dose.low == 1
        and dose.family == "dose.held.milligram_total"
    ):
        return float(words[-1].removesuffix("mg"))
    return None


def _order(scene: Scene, parts: dict[str, Part], rng: Random, held: bool) -> None:
    name, order = _template(rng, held)
    scene.families.add(name)
    if "dose" not in parts and parts["verb"].surface in {"apply", "rub", "massage", "spread"} and rng.random() < 0.35:
        parts["verb"] = Part(f"{parts['verb'].surface} {rng.choice(_VAGUE)}")
    if name == "order.held.capitals":
        for part in parts.values():
            part.surface = part.surface.upper()
    for key in order:
        if key in {",", "."}:
            if scene.parts:
                scene.parts[-1].surface += key
            continue
        glued, key = key.startswith("*"), key.strip("*")
        part = parts.get(key)
        if part is None or not (part.surface or part.label):
            continue
        if glued and key == "extra":
            part.surface = "instr" + part.surface
        part.glue = (
            glued
            and part.surface[:1].isalpha()
            and (key != "for" or part.surface.startswith("x"))
            and (key != "prn" or part.surface.startswith("prn"))
        )
        scene.parts.append(part)
    if scene.parts and name == "order.held.sentence":
        first = scene.parts[0]
        first.surface = first.surface[:1].upper() + first.surface[1:]
