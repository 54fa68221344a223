# ruff: noqa: E501, RUF005
"""Phrase families: how the parts of a direction are said. About a quarter of the families are kept for the test set.

A family is one manner of speaking with its variants. `held` families appear in test rows only, all others never do, so
that a test score is not the memory of a phrase.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Phrase:
    """A surface and what it means; `slot` is what a reader would copy (the surface itself when None)."""

    surface: str
    value: float | None = None
    slot: str | None = None
    family: str = ""


@dataclass(frozen=True)
class Family:
    """A manner of speaking: an id, a weight, and its phrases."""

    id: str
    weight: float
    phrases: tuple[Phrase, ...]
    held: bool = False


def pick(families: list[Family], rng: Random, *, held: bool) -> Phrase:
    """Draw a family of the split by weight, then one of its phrases."""
    pool = [family for family in families if family.held == held]
    family = rng.choices(pool, [item.weight for item in pool])[0]
    phrase = rng.choice(family.phrases)
    return Phrase(phrase.surface, phrase.value, phrase.slot, family.id)


def _family(name: str, weight: float, value: float | None, surfaces: str, *, held: bool = False) -> Family:
    return Family(name, weight, tuple(Phrase(part.strip(), value) for part in surfaces.split("|")), held)


def _mixed(name: str, weight: float, table: dict[str, float], *, held: bool = False) -> Family:
    return Family(name, weight, tuple(Phrase(part, value) for part, value in table.items()), held)


FREQUENCIES: list[Family] = [
    _family("when.daily", 13, 1, "daily|daily|once daily|once a day|once daily"),
    _family("when.every_day", 6, 1, "every day|every day|once every day|everyday|one time a day|1 time daily"),
    _family("when.qd", 4, 1, "qd|q day|q d|qday|q24h|every 24 hours"),
    _family("when.qd_twice_said", 2, 1, "qd every day|daily once a day|qd once daily|1 one time daily|1 (one) time a day"),
    _family("when.morning", 6, 1, "every morning|in the morning|qam|q am|each morning|every am|qam every morning|in the am"),
    _family("when.bedtime", 7, 1, "at bedtime|qhs|q hs|every night|nightly|at night|hs|every night at bedtime|at bed time|every evening|each night|nightly at bedtime|qpm|before bedtime|qhs at bedtime"),
    _family("when.meal_moment", 3, 1, "before breakfast|with breakfast|at breakfast|with dinner|after dinner|with lunch|with supper|with the evening meal|before breakfast daily|daily with supper|with evening meal"),
    _family("when.daily_moment", 4, 1, "once daily in the morning|daily at bedtime|every day before breakfast|once a day at bedtime|daily in the morning|once daily at night|daily 30 minutes before breakfast|once a day in the morning with food"),
    _family("when.bid", 7, 2, "bid|bid|b i d|twice daily bid"),
    _family("when.twice", 9, 2, "twice daily|twice a day|two times a day|2 times daily|2 times a day|two times daily"),
    _family("when.two_twice_said", 4, 2, "2 two times daily|bid twice a day|two 2 times a day|2 (two) times a day|two (2) times daily|2 two times a day"),
    _family("when.q12", 3, 2, "q12h|every 12 hours|q 12 hours|q12hr|every 12 hrs|q12hr int|every twelve hours"),
    _family("when.two_moments", 4, 2, "in the morning and at bedtime|every morning and at bedtime|in the morning and evening|morning and night|with breakfast and dinner|with breakfast and supper|every morning and every evening|qam and qhs|in the morning and in the evening|in the morning and before bedtime|after breakfast and supper|am and pm"),
    _family("when.two_x", 1.5, 2, "2x daily|2x a day|2 x day|2x/day|twice daily with meals|twice daily with food|two times a day with meals"),
    _family("when.two_said_apart", 1, 2, "twice daily in the morning and evening|2 times every day in the morning and evening|twice a day in the morning and at night|bid with breakfast and dinner"),
    _family("when.tid", 5, 3, "tid|tid|t i d|3x daily|3x/day"),
    _family("when.three", 6, 3, "3 times daily|three times daily|three times a day|3 times a day|3 three times daily|3 (three) times a day|tid three times a day|three 3 times a day"),
    _family("when.q8", 3, 3, "q8h|every 8 hours|q 8 hours|q8hr|q8hr int|every eight hours|every 8 hrs"),
    _family("when.meals", 3, 3, "with meals|before meals|ac|tid with meals|three times daily with meals|3 times a day before meals|with each meal|before each meal|tid wm|after meals|with every meal|3 times daily before meals"),
    _family("when.three_moments", 1, 3, "in the morning at noon and at bedtime|morning noon and night|morning afternoon and evening|with breakfast lunch and dinner"),
    _family("when.four", 4, 4, "qid|4 times daily|four times a day|4 times a day|four times daily|4 four times daily|qid four times a day|4x daily"),
    _family("when.q6", 4, 4, "q6h|every 6 hours|q 6 hours|q6hr|q6hr int|every 6 six hours|every six hours|every 6 hrs"),
    _family("when.meals_and_bed", 2, 4, "before meals and at bedtime|ac and hs|with meals and at bedtime|4 times daily before meals and at bedtime|after meals and at bedtime|achs"),
    _mixed("when.more", 3, {"5 times daily": 5, "five times a day": 5, "q4h": 6, "every 4 hours": 6, "every 4 four hours": 6, "q4hr int": 6, "every 3 hours": 8, "q3h": 8, "every 2 hours": 12, "q2h while awake": 12, "every hour": 24, "6 times a day": 6, "8 times a day": 8}),
    _mixed("when.interval_range", 5, {"q4-6h": 6, "every 4 to 6 hours": 6, "every 4-6 hours": 6, "q 4-6 hrs": 6, "every 6 to 8 hours": 4, "q6-8h": 4, "q 6-8 hours": 4, "every 8-12 hours": 3, "q8-12h": 3, "every 12 to 24 hours": 2, "every four to six hours": 6, "every 3-4 hours": 8}),
    _mixed("when.count_range", 2, {"1-2 times daily": 2, "1 to 2 times a day": 2, "2-3 times daily": 3, "two to three times a day": 3, "3 to 4 times daily": 4, "3-4 times a day": 4, "once or twice daily": 2, "up to 3 times a day": 3, "up to twice daily": 2, "up to four times daily": 4}),
    _mixed("when.other_day", 3, {"every other day": 0.5, "qod": 0.5, "every 2 days": 0.5, "every other night": 0.5, "every 48 hours": 0.5, "every 3 days": 1 / 3, "every 72 hours": 1 / 3, "q72h": 1 / 3, "every third day": 1 / 3}),
    _mixed("when.weekly", 4, {"weekly": 1 / 7, "once a week": 1 / 7, "once weekly": 1 / 7, "every week": 1 / 7, "q week": 1 / 7, "every 7 days": 1 / 7, "once every week": 1 / 7, "one time a week": 1 / 7, "1 time per week": 1 / 7, "qweek": 1 / 7}),
    _mixed("when.weekly_more", 3, {"twice weekly": 2 / 7, "twice a week": 2 / 7, "2 times a week": 2 / 7, "3 times a week": 3 / 7, "three times weekly": 3 / 7, "3 times weekly": 3 / 7, "every 2 weeks": 1 / 14, "every 14 days": 1 / 14, "every other week": 1 / 14, "5 days a week": 5 / 7, "2-3 times a week": 3 / 7}),
    _mixed("when.monthly", 1.5, {"monthly": 1 / 30, "once a month": 1 / 30, "every month": 1 / 30, "every 4 weeks": 1 / 28, "every 28 days": 1 / 28, "every 30 days": 1 / 30, "every 3 months": 1 / 90, "every 12 weeks": 1 / 84, "once monthly": 1 / 30}),
    _mixed("when.weekdays", 3, {"on monday wednesday and friday": 3 / 7, "on monday wednesday friday": 3 / 7, "every monday and thursday": 2 / 7, "on tuesday thursday and saturday": 3 / 7, "every sunday": 1 / 7, "once a week on sunday": 1 / 7, "on mon wed fri": 3 / 7, "mwf": 3 / 7, "monday through friday": 5 / 7, "daily except sunday": 6 / 7, "on tuesday and friday": 2 / 7, "once weekly on saturday": 1 / 7, "on monday tuesday thursday friday and sunday": 5 / 7, "on mondays": 1 / 7}),
    _family("when.once", 3, 1, "once|one time|as a single dose|one time only|single dose|1 time|for 1 dose|x1 dose|once only"),
    _family("when.home_school", 0.7, 2, "every morning at home and at noon at school|in the morning and at 1 pm at school|every morning and at 12 pm at school|at 8 am and 8 pm|at 9am and 9pm|at 7:30 am and 2:00 pm"),
    _mixed("when.clock", 0.7, {"at 9 pm": 1, "at 8am": 1, "every day at 6 pm": 1, "daily at 5:00 pm": 1, "every morning at 7 am": 1, "at 6am 2pm and 10pm": 3}),
    # held out: test only
    _family("when.held.each_day", 11, 1, "each day|once each day|one time each day|1 time per day|once per day|a single time each day|1 one time each day", held=True),
    _family("when.held.dotted", 3, 1, "q.d.|o.d.|1x daily|1x/day|1 x day", held=True),
    _family("when.held.moment", 9, 1, "first thing in the morning|before bed|each evening|each evening with dinner|upon waking|once a day after lunch|at noon|daily after breakfast|nightly before bed|every day at noon|once daily with the evening meal|every night before bedtime", held=True),
    _family("when.held.bid", 10, 2, "b.i.d.|2 times each day|two times per day|twice per day|2 times per day|2 times every day|twice each day|2 x daily", held=True),
    _family("when.held.two_moments", 5, 2, "at breakfast and at bedtime|every morning and nightly|once in the morning and once in the evening|before breakfast and before dinner|in the am and in the pm|with morning and evening meals|morning and bedtime|at 8:00 am and at 8:00 pm", held=True),
    _family("when.held.tid", 6, 3, "t.i.d.|3 times per day|three times per day|3 times each day|thrice daily|3 x a day|three times each day", held=True),
    _family("when.held.three_moments", 2, 3, "at breakfast lunch and supper|morning midday and bedtime|before every meal|prior to meals|after each meal", held=True),
    _family("when.held.four", 4, 4, "q.i.d.|4 times per day|four times per day|4 times each day|4 x a day|breakfast lunch dinner and bedtime", held=True),
    _mixed("when.held.hours", 8, {"q.6.h": 4, "each 8 hours": 3, "q 4 h": 6, "every 12 hour": 2, "q.8h": 3, "q 5 hours": 4.8, "each 6 hours": 4, "q 6 h": 4, "q 8 hrs": 3, "q4 hours": 6}, held=True),
    _mixed("when.held.ranges", 6, {"every 4 or 6 hours": 6, "q4 to 6 hrs": 6, "q 6 to 8 h": 4, "every 5-6 hours": 4.8, "2 or 3 times a day": 3, "two or three times daily": 3, "q 8 to 12 hours": 3, "q4h to q6h": 6} | {}, held=True),
    _mixed("when.held.rare", 6, {"on alternate days": 0.5, "q other day": 0.5, "once every 3 days": 1 / 3, "once every 7 days": 1 / 7, "one day a week": 1 / 7, "one day per week": 1 / 7, "2 days per week": 2 / 7, "3 days a week": 3 / 7, "once every 2 weeks": 1 / 14, "q 2 weeks": 1 / 14, "once per month": 1 / 30, "every 21 days": 1 / 21}, held=True),
    _mixed("when.held.weekdays", 3, {"on weekdays": 5 / 7, "every wednesday": 1 / 7, "mondays and fridays": 2 / 7, "tues thurs sat": 3 / 7, "on saturday and sunday": 2 / 7, "every thursday morning": 1 / 7, "every day but not on sunday": 6 / 7}, held=True),
    _family("when.held.once", 2, 1, "one dose only|just once|only once|one-time dose|in a single dose", held=True),
]  # fmt: skip

DURATIONS: list[Family] = [
    Family("for.x", 6, tuple(Phrase(f"x {n} days", n, f"{n} days") for n in (3, 5, 7, 10, 14, 21, 28, 30, 90))),
    Family("for.x_joined", 5, tuple(Phrase(f"x{n} days", n, f"{n} days") for n in (1, 3, 5, 7, 10, 14, 15, 30, 60, 90)) + tuple(Phrase(f"x{n}d", n, f"{n} days") for n in (5, 7, 10))),
    Family("for.for", 9, tuple(Phrase(f"for {n} days", n, f"{n} days") for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15, 20, 21, 30, 45, 60, 90))),
    Family("for.bare", 6, tuple(Phrase(f"{n} days", n, f"{n} days") for n in (5, 7, 10, 14, 28, 30, 60, 90))),
    Family("for.weeks", 4, tuple(Phrase(f"for {n} week{'s' * (n > 1)}", 7 * n, f"{n} weeks" if n > 1 else "1 week") for n in (1, 2, 3, 4, 6, 8, 12)) + tuple(Phrase(f"x {n} wks", 7 * n, f"{n} weeks") for n in (2, 3, 4, 6))),
    Family("for.words", 3, (Phrase("for two weeks", 14, "2 weeks"), Phrase("for seven days", 7, "7 days"), Phrase("for ten days", 10, "10 days"), Phrase("for five days", 5, "5 days"), Phrase("for 10 ten days", 10, "10 days"), Phrase("for 7 (seven) days", 7, "7 days"))),
    Family("for.months", 2, (Phrase("for 1 month", 30, "1 month"), Phrase("for 3 months", 90, "3 months"), Phrase("for 2 months", 60, "2 months"), Phrase("x 6 months", 180, "6 months"), Phrase("for 12 months", 360, "12 months"))),
    Family("for.nights", 1.5, (Phrase("for 12nights", 12, "12 nights"), Phrase("x 7 nights", 7, "7 nights"), Phrase("for 3 nights", 3, "3 nights"), Phrase("x 14 nights", 14, "14 nights"))),
    Family("for.range", 1, (Phrase("for 7-10 days", 10, "7 to 10 days"), Phrase("for 3 to 5 days", 5, "3 to 5 days"), Phrase("x 5-7 days", 7, "5 to 7 days"), Phrase("for 1-2 weeks", 14, "1 to 2 weeks"))),
    Family("for.up_to", 1, (Phrase("for up to 7 days", 7, "7 days"), Phrase("for up to 2 weeks", 14, "2 weeks"), Phrase("continue for 10 days", 10, "10 days"), Phrase("keep this up for 7 days", 7, "7 days"))),
    Family("for.over", 2, tuple(Phrase(f"over {n} days", n, f"{n} days") for n in (3, 5, 7)) + tuple(Phrase(f"during {n} days", n, f"{n} days") for n in (5, 10))),
    Family("for.course", 2, tuple(Phrase(f"course of {n} days", n, f"{n} days") for n in (5, 7, 14)) + tuple(Phrase(f"for {n} days total", n, f"{n} days") for n in (4, 6, 9))),
    Family("for.joined", 2, tuple(Phrase(f"for {n}d", n, f"{n} days") for n in (3, 5, 7, 10)) + tuple(Phrase(f"x {n} d", n, f"{n} days") for n in (6, 9, 12))),
    Family("for.held.times", 5, tuple(Phrase(f"times {n} days", n, f"{n} days") for n in (4, 6, 8, 10, 14)) + (Phrase("times two weeks", 14, "2 weeks"), Phrase("times 1 week", 7, "1 week")), held=True),
    Family("for.held.total", 4, tuple(Phrase(f"for a total of {n} days", n, f"{n} days") for n in (5, 7, 10)) + tuple(Phrase(f"for the next {n} days", n, f"{n} days") for n in (3, 7, 14)), held=True),
    Family("for.held.colon", 4, tuple(Phrase(f"duration {n} days", n, f"{n} days") for n in (5, 10, 20)) + tuple(Phrase(f"- {n} days", n, f"{n} days") for n in (7, 10, 30)), held=True),
    Family("for.held.more", 3, tuple(Phrase(f"x{n}wk", 7 * n, f"{n} weeks") for n in (2, 3)) + (Phrase("for 16 weeks", 112, "16 weeks"), Phrase("for 10 full days", 10, "10 full days"), Phrase("for 9 months", 270, "9 months")), held=True),
]  # fmt: skip

PRN: list[Family] = [
    _family("prn.bare", 5, None, "prn|as needed|prn|if needed|when needed|as needed prn|prnas needed"),
    _family("prn.for", 8, None, "as needed for {}|prn for {}|as needed for {}|if needed for {}|prn as needed for {}|prnas needed for {}"),
    _family("prn.reason", 5, None, "prn {}|as needed {}|prn - {}|as needed ({})|prn{}|prnfor {}"),
    _family("prn.only", 1.5, None, "only if needed for {}|only as needed for {}|as needed only for {}|as needed if {}"),
    _family("prn.held.required", 3, None, "as required for {}|when required|if required for {}|when necessary for {}|when necessary", held=True),
    _family("prn.held.due_to", 3, None, "as needed due to {}|p.r.n. {}|as needed to help with {}|as needed to treat {}|whenever needed for {}", held=True),
]  # fmt: skip

REASONS = tuple(
    ["pain", "nausea", "anxiety", "muscle spasms", "cough", "itching", "headache", "sleep", "wheezing", "swelling", "heartburn", "dizziness", "constipation", "diarrhea", "allergies", "back pain", "severe pain", "shortness of breath", "insomnia", "fever", "nausea/vomiting", "panic attacks", "migraine", "knee pain", "neck pain", "pain or fever", "moderate pain", "congestion", "rash", "muscle pain", "cramps", "breakthrough pain", "agitation", "chest pain", "sore throat", "left shoulder pain", "vertigo", "stomach upset", "ear pain", "dry eyes", "neuropathy", "joint pain", "tremor", "hot flashes", "low back pain", "spasticity", "restless legs"]
)  # fmt: skip

# `{n}` the number, `{u}` the unit (plural when needed), filled by the frame.
MAXIMA: list[Family] = [
    _family("max.mdd", 5, None, "mdd {n}|mdd:{n}|mdd {n}|mdd {n} {u}|max daily dose {n}"),
    _family("max.both", 4, None, "maximum daily dose {n} mdd {n}|maximum daily dose {n} {u} mdd {n} {u}|maximum daily dose {n} {u}"),
    _family("max.per_day", 5, None, "max {n} {u} per day|max {n} {u}/day|max {n}/day|max of {n} {u} per day|maximum {n} {u} daily|max {n} per day|max {n} {u} in 24 hours"),
    _family("max.exceed", 3, None, "not to exceed {n} {u} per day|do not exceed {n} {u} in 24 hours|no more than {n} {u} per day|not to exceed {n} {u} a day|do not take more than {n} {u} in 24 hours"),
    _family("max.amount", 2, None, "max daily amount {n} {u}|max daily amount: {n} {u}|max daily dose: {n} {u}"),
    _family("max.at_most", 3, None, "at most {n} {u} per day|at most {n} per day|never more than {n} {u} in a day|up to {n} {u} per day|up to a maximum of {n} {u} daily"),
    _family("max.after", 2, None, "{n} {u} max per day|{n} {u} per day max|{n}/day max|{n} {u} maximum daily"),
    _family("max.total", 2, None, "max total {n} {u} per day|total max {n} {u} in 24 hours|max dose {n}|max dose: {n} {u}|daily max {n}"),
    _family("max.held.nte", 3, None, "nte {n}/day|nte {n} {u} per day|nte {n} {u}/24 hours", held=True),
    _family("max.held.limit", 3, None, "limit {n} {u} per day|maximum of {n} {u} a day|daily maximum {n} {u}|max dose {n} {u} per day", held=True),
]  # fmt: skip

# Words that state no component. They come at the end unless a template says otherwise.
EXTRAS: list[Family] = [
    _family("extra.indication", 8, None, "for blood pressure|for pain|for diabetes|for cholesterol|for depression|for thyroid|for infection|for heart|for mood|for allergies|for gerd|for acid reflux|for asthma|for sleep|for anxiety|for nerve pain|for heart or kidneys|for sinus infection|for adhd|for nausea|for left knee pain|for muscle spasm|for vitamin d deficiency"),
    _family("extra.counsel", 6, None, "do not crush or chew|with food|with a full glass of water|take with food|with food or milk|on an empty stomach|rinse mouth after use|shake well before use|do not drive|avoid alcohol|may cause drowsiness|swallow whole|do not stop suddenly|finish all of this medicine|with plenty of water|avoid sunlight|may cause dizziness|take with water"),
    _family("extra.admin", 5, None, "patient will pay cash|generic ok|needs appointment for further refills|please fill today|brand only|patient has appointment next week|okay to fill two days early|call office if insurance denies|text patient when ready|last refill until seen|dose change|replaces old prescription|labs due before next refill|keep on file|may substitute|insurance prefers generic|replaces 20mg dose|fill date january 4 2023|ok to fill march 3 2024|mail order"),
    _family("extra.quantity", 5, None, "#30|30 rf 0|dispense 90|qty 60|90 rf 3|disp 30|quantity 30 refills 2|#60 3 refills|30 day supply|90 day supply|disp #20|should last 28 days|dispense quantity sufficient"),
    _family("extra.diagnosis", 2, None, "dx: hypertension|dx code i10|copd|hypothyroidism|adhd/odd|hyperlipidemia|chronic pain|type 2 diabetes|dx migraine|water pill|antibiotic|steroid|high blood pressure|replaces metoprolol"),
    _family("extra.timed", 3, None, "20 minutes before sports|45-60 minutes before eating|at least 30 minutes before other medications|remove after 12 hours|no longer than two weeks in a row|wait 5 minutes between drops|hold in mouth for 30 seconds|2 hours apart from antacids|in the bath|starting 2 days before operation|add water to the line and shake|sit upright for 30 minutes after|not within 4 hours of calcium|last dose 6 hours before bed"),
    _family("extra.until", 1.5, None, "until gone|until finished|until symptoms improve|until all taken|until fever is gone|long term|ongoing|until clear|start tomorrow|starting 2 days before operation"),
    _family("extra.held.counsel", 5, None, "drink lots of fluids|do not take with dairy|take while sitting upright|may stain teeth|keep refrigerated|do not lie down after taking|wait 30 seconds between doses|discard after 28 days|avoid grapefruit juice|caution sedation", held=True),
    _family("extra.held.indication", 6, None, "indication: hypertension|to prevent stroke|to lower cholesterol|for the heart|to control blood sugar|for urinary tract infection|for gout prevention|to help with mood|for high triglycerides|for bladder", held=True),
    _family("extra.held.admin", 4, None, "patient aware of copay|new dosage|please deliver|note new directions|patient out of medication|pharmacy please text patient|discontinue 10mg dose|brand is too expensive|fill when due|on vacation from june 5", held=True),
    _family("extra.held.quantity", 3, None, "qty: 45 ref: 1|#28 no refills|disp 1 bottle|refill x 3|dispense #14|45 rf 5|supply for 30 days", held=True),
]  # fmt: skip

ELSEWHERES: list[Family] = [
    _family("elsewhere.directed", 8, None, "as directed|as directed|ud|ut dict|as directed by physician|use as directed|as directed on package|per package instructions|as prescribed"),
    _family("elsewhere.package", 4, None, "as on the dose pack label|follow package directions|per instructions|see attached instructions|follow instructions on package|per sliding scale|per protocol"),
    _family("elsewhere.held", 4, None, "as instructed|utd|as per package insert|according to the label|refer to handout|as directed by your doctor|follow directions on the box", held=True),
]  # fmt: skip


def all_families() -> list[Family]:
    """Return every phrase family of this module."""
    return [*FREQUENCIES, *DURATIONS, *PRN, *MAXIMA, *EXTRAS, *ELSEWHERES]
