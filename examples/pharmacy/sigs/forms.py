# ruff: noqa: E501
"""How amounts and routes are said for each form of a drug."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .catalogue import Product
from .phrases import Family, Phrase, pick
from .quantities import number

_WORDS = {"1": "one", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "10": "ten", "1/2": "one-half"}
_ABBREVIATED = {"tablet": ("tab", "tabs"), "capsule": ("cap", "caps"), "ml": ("ml", "milliliters"), "drop": ("gtt", "gtts"), "puff": ("puff", "puffs"), "spray": ("spray", "sprays"),
    "unit": ("units", "u"), "mg": ("mg", "milligrams"), "suppository": ("supp", "supp"), "inhalation": ("inhalation", "inhalations"), "g": ("gm", "grams"), "teaspoon": ("tsp", "tsps")}  # fmt: skip
_FORMS_OF_WRITING: list[Family] = [
    Family("dose.digit", 9, (Phrase("digit"),)),
    Family("dose.word", 5, (Phrase("word"),)),
    Family("dose.short", 9, (Phrase("short"), Phrase("short"), Phrase("short_plural"))),
    Family("dose.twice_said", 2.5, (Phrase("digit_word"), Phrase("bracket"))),
    Family("dose.with_strength", 5, (Phrase("total"), Phrase("total"), Phrase("total_bracket"), Phrase("equal"))),
    Family("dose.strength_first", 1.5, (Phrase("strength_first"),)),
    Family("dose.bare", 2, (Phrase("bare"),)),
    Family("dose.range", 4, (Phrase("range_to"), Phrase("range_hyphen"), Phrase("range_hyphen"))),
    Family("dose.half", 2.5, (Phrase("half"), Phrase("half_a"), Phrase("half_short"), Phrase("one_and_half"))),
    Family("dose.mass", 1, (Phrase("mass"), Phrase("mass_joined"))),
    Family("dose.held.joined", 7, (Phrase("joined"), Phrase("spelled_up")), held=True),
    Family("dose.held.word_bracket", 4, (Phrase("word_bracket"), Phrase("word_digit")), held=True),
    Family("dose.held.milligram_total", 4, (Phrase("milligram_total"), Phrase("strength_after")), held=True),
    Family("dose.held.range", 4, (Phrase("range_or"), Phrase("range_words"), Phrase("half_to_one")), held=True),
    Family("dose.held.half", 2.5, (Phrase("half_decimal"), Phrase("half_word"), Phrase("mixed_words")), held=True),
    Family("dose.held.typo_one", 1, (Phrase("on"),), held=True),
    Family("dose.held.bare_word", 1.5, (Phrase("bare_word"),), held=True),
]  # fmt: skip


@dataclass(frozen=True)
class Dose:
    """An amount as written, what to copy of it, and its value."""

    surface: str
    slot: str
    low: float
    high: float
    unit: str | None
    family: str


def plural(unit: str, amount: str) -> str:
    """Return the unit in the plural unless the amount is one or less, or the unit has none."""
    if unit in {"ml", "mg", "mcg", "g", "oz"} or amount in {"1", "1/2", "0.5", "1/4"}:
        return unit
    return unit + "es" if unit.endswith("ch") else unit[:-1] + "ies" if unit.endswith("ry") else unit + "s"


_AMOUNTS = {"tablet": ("1",) * 10 + ("2", "2", "3", "4"), "capsule": ("1",) * 10 + ("2", "2", "3"), "pill": ("1", "2"), "ml": ("5", "10", "2.5", "7.5", "15", "3", "6", "4", "1", "8", "12.5", "20", "30"), "puff": ("1", "2", "2", "2"), "inhalation": ("1", "2"),
    "drop": ("1", "1", "2", "3", "4", "5"), "spray": ("1", "2", "1"), "unit": ("10", "12", "15", "20", "8", "5", "30", "42", "6"), "mg": ("0.5", "1", "40", "80", "0.25", "2", "60"), "g": ("1", "2", "4", "0.5"), "click": ("1", "2", "4"),
    "application": ("1",), "patch": ("1",), "vial": ("1",), "suppository": ("1",), "packet": ("1", "1", "2"), "applicator": ("1",), "lozenge": ("1",), "film": ("1", "2"), "teaspoon": ("1", "2", "1/2", "1.5")}  # fmt: skip


def say_dose(product: Product, unit: str, rng: Random, *, held: bool, manner: str = "") -> Dose:
    """Return an amount of a product said in one manner of the split."""
    solid = unit in {"tablet", "capsule", "pill"}
    for _ in range(200):
        drawn = pick(_FORMS_OF_WRITING, rng, held=held)
        amount = rng.choice(_AMOUNTS.get(unit, ("1", "2")))
        made = _say(drawn.surface, amount, unit, product, rng, solid)
        if made and (not manner or drawn.surface == manner):
            surface, slot, low, high, said = made
            return Dose(surface, slot, low, high, said, drawn.family)
    return Dose(
        f"{amount} {plural(unit, amount)}",
        f"{amount} {plural(unit, amount)}",
        number(amount),
        number(amount),
        unit,
        "dose.held.joined" if held else "dose.digit",
    )


_Made = tuple[str, str, float, float, str | None]


def _say(manner: str, amount: str, unit: str, product: Product, rng: Random, solid: bool) -> _Made | None:
    value, units = number(amount), plural(unit, amount)
    short, shorts = _ABBREVIATED.get(unit, (unit, units))
    word = _WORDS.get(amount)
    slot = f"{amount} {units}"
    simple = {
        "digit": slot, "short": f"{amount} {short if value <= 1 else shorts}", "short_plural": f"{amount} {shorts}", "joined": f"{amount}{short if value <= 1 else shorts}",
        "spelled_up": f"{amount} {units}", "word": f"{word} {units}", "digit_word": f"{amount} {word} {units}", "bracket": f"{amount} ({word}) {units}",
        "word_bracket": f"{word} ({amount}) {units}", "word_digit": f"{word} {amount} {short if value <= 1 else shorts}", "on": f"on {unit}",
    }  # fmt: skip
    if manner == "spelled_up":
        slot = simple[manner] = f"{amount} {unit}"
    if manner == "on" and not (solid and amount == "1" and unit != "pill"):
        return None
    if manner in simple:
        if word is None and ("word" in manner or manner == "bracket"):
            return None
        copied = f"{amount} {shorts}" if manner == "short_plural" else slot
        return simple[manner], copied, value, value, unit
    if manner in {"bare", "bare_word"} and solid:
        return (amount if manner == "bare" else word or amount), amount, value, value, None
    if "range" in manner or manner == "half_to_one":
        return _say_range(manner, unit, shorts, rng, solid)
    if manner.startswith(("half", "one_and", "mixed")):
        return _say_half(manner, unit, rng) if unit in {"tablet", "pill", "teaspoon"} else None
    return _say_strength(manner, amount, units, unit, product, rng, solid)


def _say_range(manner: str, unit: str, shorts: str, rng: Random, solid: bool) -> _Made | None:
    if not (solid or unit in {"puff", "drop", "spray", "ml", "g"}):
        return None
    low, high = rng.choice(
        [("1", "2"), ("1", "2"), ("2", "3"), ("1", "3")] if unit != "ml" else [("5", "10"), ("2.5", "5"), ("10", "15")]
    )
    if manner == "half_to_one":
        if unit != "tablet":
            return None
        surface = rng.choice(["1/2 to 1 tablet", "1/2-1 tab", "1/2 to one tablet", "one-half to one tablet"])
        return surface, "1/2 to 1 tablet", 0.5, 1.0, unit
    units, slot = plural(unit, high), f"{low} to {high} {plural(unit, high)}"
    words = f"{_WORDS.get(low, low)} to {_WORDS.get(high, high)} {units}"
    surface = {
        "range_to": f"{low} to {high} {units}",
        "range_hyphen": f"{low}-{high} {shorts}",
        "range_or": f"{low} or {high} {units}",
        "range_words": words,
    }[manner]
    return surface, slot, number(low), number(high), unit


def _say_half(manner: str, unit: str, rng: Random) -> _Made:
    table = {
        "half": ("1/2 {u}", "1/2", 0.5), "half_a": ("half a {u}", "1/2", 0.5), "half_short": ("1/2 tab", "1/2", 0.5) if unit == "tablet" else ("1/2 {u}", "1/2", 0.5), "one_and_half": ("1 1/2 {u}s", "1 1/2", 1.5),
        "half_decimal": ("0.5 {u}", "0.5", 0.5), "half_word": ("one half {u}", "1/2", 0.5), "mixed_words": ("one and a half {u}s", "1 1/2", 1.5),
    }  # fmt: skip
    surface, amount, value = table[manner]
    return surface.format(u=unit), f"{amount} {unit}{'s' if value > 1 else ''}", value, value, unit


def _say_strength(
    manner: str, amount: str, units: str, unit: str, product: Product, rng: Random, solid: bool
) -> _Made | None:
    value = number(amount)
    strength = rng.choice(product.strengths) if product.strengths else rng.choice([100, 125, 160, 200, 250])
    total = f"{strength * value:g}" if solid else f"{strength:g}"
    slot = f"{amount} {units}"
    if manner in {"mass", "mass_joined"} and product.strengths and solid:
        gap = " " if manner == "mass" else ""
        return f"{strength:g}{gap}mg", f"{strength:g} mg", strength, strength, "mg"
    if solid or unit == "ml":
        table = {
            "total": f"{slot} {total} mg total", "total_bracket": f"{slot} ({total} mg total)", "equal": f"{slot} = {total} mg" if unit == "ml" else f"{slot} {total} mg",
            "milligram_total": f"{slot} {total} milligram total", "strength_after": f"{slot} {total}mg",
        }  # fmt: skip
        if manner in table:
            return table[manner], slot, value, value, unit
        if manner == "strength_first" and solid and product.strengths:
            return (
                f"{_WORDS.get(amount, amount)} {strength:g} mg {_ABBREVIATED.get(unit, (unit,))[0]}",
                f"{amount} {unit}",
                value,
                value,
                unit,
            )
    return None


# Each manner: verb, words for the route (None: no route stated), the route. `{d}` marks where the dose goes.
@dataclass(frozen=True)
class Manner:
    """A verb and a route as said, for one kind of form."""

    verb: str
    place: str
    route: str | None
    place_first: bool = False


def _manners(text: str) -> tuple[Phrase, ...]:
    return tuple(Phrase(part.strip()) for part in text.split("|"))


# `verb > place > route`; an empty verb is a terse prescription, an empty place states no route.
MANNERS: dict[str, list[Family]] = {
    "solid": [
        Family("route.mouth", 14, _manners("take > by mouth > oral|take > by mouth > oral|take > by mouth > oral| > by mouth > oral")),
        Family("route.po", 9, _manners(" > po > oral| > po > oral|take > po > oral")),
        Family("route.oral", 8, _manners("take > orally > oral| > orally > oral|take > oral > oral| > oral > oral|take > by oral route > oral|give > by mouth > oral")),
        Family("route.none", 7, _manners("take > > | > > |take > > |give > > |use > > ")),
        Family("route.chew", 0.7, _manners("chew and swallow > by mouth > oral|chew > by mouth > oral|swallow > by mouth > oral")),
        Family("route.held.dotted", 6, _manners(" > p.o. > oral|take > p.o. > oral| > per os > oral")),
        Family("route.held.oral", 6, _manners("take > through the oral route > oral|take > via oral route > oral|ingest > orally > oral|administer > by mouth > oral|pt to take > by mouth > oral|please take > by mouth > oral", ), held=True),
        Family("route.held.none", 4, _manners("ingest > > |consume > > |please take > > |continue > > |start > > "), held=True),
    ],
    "liquid": [
        Family("route.liquid", 8, _manners("take > by mouth > oral|give > by mouth > oral| > po > oral|take > orally > oral|drink > by mouth > oral")),
        Family("route.liquid_none", 2, _manners("take > > |give > > | > > ")),
        Family("route.liquid_device", 1, _manners("give > via feeding tube > oral|give > by mouth with oral syringe > oral")),
        Family("route.held.liquid", 3, _manners("administer > by mouth > oral|give child > orally > oral|sip > by mouth > oral"), held=True),
    ],
    "mouthwash": [
        Family("route.swish", 3, _manners("swish > and spit > oral|swish and swallow > > oral|swish and spit > > oral|swish > in mouth then spit > oral")),
        Family("route.held.swish", 1, _manners("gargle with > > oral|swish around mouth > then spit out > oral"), held=True),
    ],
    "inhaler": [
        Family("route.inhale", 8, _manners("inhale > > inhalation|inhale > by mouth > inhalation|inhale > into the lungs > inhalation|inhale > via inhaler > inhalation")),
        Family("route.inh", 5, _manners(" > inh > inhalation| > inhale > inhalation| > via inhalation > inhalation| > by inhalation > inhalation|use > by mouth > inhalation|take > by mouth > inhalation|use > > inhalation| > using inhaler > inhalation| > > inhalation")),
        Family("route.held.inhale", 4, _manners("breathe in > > inhalation|inhale > through the mouth > inhalation|inhale > orally > inhalation|take > by inhalation route > inhalation"), held=True),
    ],
    "nebulizer": [
        Family("route.neb", 5, _manners(" > via nebulizer > inhalation|use > via nebulizer > inhalation|inhale > via nebulizer > inhalation|use > in nebulizer > inhalation|take > by nebulization > inhalation|use > > |inhale contents of > > inhalation")),
        Family("route.held.neb", 2, _manners("nebulize > > inhalation|administer > per nebulizer > inhalation|put > in nebulizer machine > inhalation"), held=True),
    ],
    "nasal spray": [
        Family("route.nostril", 6, _manners("use > in each nostril > nasal| > each nostril > nasal|spray > into both nostrils > nasal| > in each nostril > nasal|instill > into each nostril > nasal|use > in the nose > nasal|inhale > in each nostril > nasal|use > by nasal route > nasal")),
        Family("route.held.nostril", 2, _manners("administer > per nostril > nasal|place > into the left nostril > nasal|use > intranasally > nasal| > each nare > nasal"), held=True),
    ],
    "eye drop": [
        Family("route.eye", 6, _manners("instill > in both eyes > ophthalmic|place > into right eye > ophthalmic| > ou > ophthalmic| > od > ophthalmic|put > in left eye > ophthalmic|instill > into affected eye > ophthalmic| > in each eye > ophthalmic| > in the operated eye > ophthalmic|administer > to both eyes > ophthalmic|instill > os > ophthalmic|place > in eyes > ophthalmic")),
        Family("route.held.eye", 2, _manners("apply > to the operative eye > ophthalmic|use > in the affected eye > ophthalmic|instill > by ophthalmic route > ophthalmic|place > under lower eyelid of right eye > ophthalmic"), held=True),
    ],
    "ear drop": [
        Family("route.ear", 4, _manners("place > into both ears > otic|instill > in right ear > otic| > in affected ear > otic|put > in left ear > otic|place > au > otic|administer > into each ear > otic")),
        Family("route.held.ear", 2, _manners("use > in the affected ears > otic|instill > into ear canal > otic|apply > otically > otic"), held=True),
    ],
    "cream": [
        Family("route.apply", 8, _manners("apply > to affected area > topical|apply > topically > topical|apply > topically to affected areas > topical|apply > to skin > topical|apply > to rash > topical|apply > to face > topical|apply > top aa > topical|apply > by topical route to the affected area > topical|apply > topical > topical|rub > on affected joint > topical|apply > to scalp > topical|apply > > topical|apply > to the sore spots and skin around them > topical|apply > to left knee > topical")),
        Family("route.held.apply", 3, _manners("massage > into skin > topical|spread > over the affected areas of the body > topical|rub > into both hands > topical|apply > externally > topical|apply > on the skin of arms and legs > topical"), held=True),
    ],
    "patch": [
        Family("route.patch", 4, _manners("apply > to skin > transdermal|place > onto the skin > transdermal|apply > > transdermal|apply > topically > transdermal|use > > transdermal|apply > transdermally > transdermal|apply > to back > transdermal")),
        Family("route.held.patch", 2, _manners("wear > on upper arm > transdermal|stick > on clean dry skin > transdermal|put > on the skin > transdermal"), held=True),
    ],
    "subcutaneous": [
        Family("route.sc", 5, _manners("inject > under the skin > subcutaneous|inject > subcutaneously > subcutaneous|inject > sq > subcutaneous|inject > subq > subcutaneous| > sc > subcutaneous|inject > into the skin > subcutaneous|inject > > |take > sub q > subcutaneous")),
        Family("route.held.sc", 2, _manners("give > by subcutaneous route > subcutaneous|administer > under your skin > subcutaneous|inject > s.c. > subcutaneous|inject > subcut > subcutaneous"), held=True),
    ],
    "intramuscular": [
        Family("route.im", 4, _manners("inject > im > intramuscular|inject > into the muscle > intramuscular|inject > intramuscularly > intramuscular| > im > intramuscular")),
        Family("route.held.im", 2, _manners("administer > by intramuscular route > intramuscular|give > i.m. > intramuscular|inject > into a muscle > intramuscular"), held=True),
    ],
    "rectal": [
        Family("route.rectal", 4, _manners("insert > rectally > rectal|insert > into the rectum > rectal| > pr > rectal|unwrap and insert > rectally > rectal|use > rectally > rectal")),
        Family("route.held.rectal", 2, _manners("place > in rectum > rectal|administer > by rectal route > rectal|insert > per rectum > rectal"), held=True),
    ],
    "vaginal": [
        Family("route.vaginal", 4, _manners("insert > vaginally > vaginal|insert > into the vagina > vaginal| > pv > vaginal|apply > vaginally > vaginal|place > vaginally > vaginal")),
        Family("route.held.vaginal", 2, _manners("administer > by vaginal route > vaginal|insert > intravaginally > vaginal|use > in vagina > vaginal"), held=True),
    ],
    "sublingual": [
        Family("route.sl", 4, _manners("dissolve > under the tongue > sublingual|place > under tongue > sublingual| > sl > sublingual|take > sublingually > sublingual|let > dissolve under tongue > sublingual")),
        Family("route.held.sl", 2, _manners("melt > beneath the tongue > sublingual|put > under your tongue > sublingual|take > by sublingual route > sublingual"), held=True),
    ],
    "lozenge": [
        Family("route.lozenge", 3, _manners("dissolve > in mouth > oral|let > dissolve in the mouth > oral|suck on > by mouth > oral|dissolve > inside cheek > buccal|place > buccally > buccal")),
        Family("route.held.lozenge", 1, _manners("place > between cheek and gum > buccal|allow > to melt in the mouth > oral|use > by buccal route > buccal"), held=True),
    ],
    "powder": [
        Family("route.powder", 3, _manners("take > by mouth mixed with water > oral|mix > in 8 oz of water and drink > oral|dissolve > in water and take by mouth > oral|take > by mouth in juice > oral")),
        Family("route.held.powder", 1, _manners("stir > into a glass of water and drink > oral|mix > with liquid and take orally > oral"), held=True),
    ],
}  # fmt: skip
# The dotted family belongs to the test set like every other `held` one.
MANNERS["solid"] = [Family(item.id, item.weight, item.phrases, held=".held." in item.id) for item in MANNERS["solid"]]


def kind_of(product: Product) -> str:
    """Return the key of `MANNERS` for a product."""
    table = {"tablet": "solid", "capsule": "solid", "liquid": "liquid", "mouthwash": "mouthwash", "ointment": "cream", "gel": "cream", "shampoo": "cream", "injection": product.route, "suppository": "rectal", "vaginal cream": "vaginal", "vaginal gel": "vaginal",
        "sublingual tablet": "sublingual", "film": "sublingual"}  # fmt: skip
    return table.get(product.form, product.form)


def say_manner(product: Product, rng: Random, *, held: bool) -> tuple[Manner, str]:
    """Return a verb and route of the split for a product, with the family's id."""
    drawn = pick(MANNERS[kind_of(product)], rng, held=held)
    verb, place, route = (part.strip() for part in drawn.surface.split(">"))
    return Manner(verb, place, route or None), drawn.family


def all_families() -> list[Family]:
    """Return every phrase family of this module."""
    return [*_FORMS_OF_WRITING, *(family for families in MANNERS.values() for family in families)]
