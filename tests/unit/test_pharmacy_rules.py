# ruff: noqa: E402, E501
"""The typed rules of the pharmacy example against values worked out by hand."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "pharmacy"))

import program
from sigs.frequency import read_frequency
from sigs.lexicon import ROUTES
from sigs.quantities import read_dose, read_duration, read_maximum
from sigs.safety import REASONS

FREQUENCIES = {
    "twice daily": 2, "every 4 to 6 hours": 6, "every 6 to 8 hours": 4, "every other day": 1 / 2, "every 72 hours": 1 / 3,
    "once a week": 1 / 7, "twice weekly": 2 / 7, "3 times a week": 3 / 7, "every 2 weeks": 1 / 14, "monthly": 1 / 30,
    "every morning and at bedtime": 2, "morning noon and night": 3, "at breakfast": 1, "before each meal": 3,
    "with meals and at bedtime": 4, "daily at bedtime": 1, "every night at bedtime": 1, "every evening at bedtime": 1,
    "2 to 3 times daily": 3, "up to 4 times a day": 4, "every 6 hours up to 3 times daily": 3, "once": 1,
    "single dose": 1, "monday wednesday friday": 3 / 7, "once weekly on sunday": 1 / 7, "daily except sunday": 6 / 7,
    "monday through friday": 5 / 7, "5 days a week": 5 / 7, "at 8 am and 8 pm": 2, "in the morning at 8 am": 1,
    "daily with meals": 1, "3 times daily with meals": 3, "4 times daily before meals and at bedtime": 4,
    "in the morning with breakfast": 1, "each evening with dinner": 1, "2 times every day in the morning and evening": 2,
    "every 24 hours": 1, "hourly": 24, "every 30 minutes": 48, "once every 7 days": 1 / 7, "on weekdays": 5 / 7,
    "may repeat once in 2 hours": 2, "with morning and evening meals": 2, "twice a day on monday and thursday": 4 / 7,
}  # fmt: skip


@pytest.mark.parametrize(("phrase", "per_day"), FREQUENCIES.items())
def test_frequency_counts_at_the_most_frequent_end(phrase: str, per_day: float) -> None:
    read = read_frequency(phrase)
    assert read.per_day == pytest.approx(per_day, rel=1e-6)
    assert not read.conflict


@pytest.mark.parametrize(
    "phrase", ["once daily twice daily", "every 6 hours 3 times a day", "once daily in the morning and at bedtime"]
)
def test_two_statements_that_differ_are_a_conflict(phrase: str) -> None:
    assert read_frequency(phrase).conflict


@pytest.mark.parametrize("phrase", ["", "with food", "1 hour before surgery", "while awake"])
def test_what_is_no_frequency_stays_unstated(phrase: str) -> None:
    assert read_frequency(phrase).per_day is None


@pytest.mark.parametrize(
    ("phrase", "low", "high", "unit"),
    [
        ("1 tablet", 1, 1, "tablet"), ("1 to 2 tablets", 1, 2, "tablet"), ("1/2 to 1 tablet", 0.5, 1, "tablet"),
        ("1 1/2 tablets", 1.5, 1.5, "tablet"), ("2.5 ml", 2.5, 2.5, "ml"), ("1 150 mg tablet", 1, 1, "tablet"),
        ("a tablet", 1, 1, "tablet"), ("1", 1, 1, None), ("1 by mouth", 1, 1, None), ("1 tablet 20 mg", 1, 1, "tablet"),
        ("2 gummies", 2, 2, "gummy"), ("40 mg", 40, 40, "mg"), ("1 chewable tablet", 1, 1, "tablet"),
        ("4 clicks", 4, 4, "click"), ("2 suppositories", 2, 2, "suppository"), ("2 patches", 2, 2, "patch"),
    ],
)  # fmt: skip
def test_doses(phrase: str, low: float, high: float, unit: str | None) -> None:
    dose = read_dose(phrase)
    assert dose is not None
    assert (dose.low, dose.high, dose.unit) == (low, high, unit)


def test_durations_and_maxima() -> None:
    days = {
        "10 days": 10,
        "2 weeks": 14,
        "1 month": 30,
        "7 to 10 days": 10,
        "48 hours": 2,
        "10 nights": 10,
        "a week": 7,
    }
    assert {phrase: read_duration(phrase) for phrase in days} == days
    assert read_duration("until gone") is None
    assert read_maximum("3 per week") is None
    maximum = read_maximum("200 mg in 24 hours")
    assert maximum is not None
    assert (maximum.high, maximum.unit) == (200, "mg")


def _finish(sig: str, answer: str, **given: str) -> dict[str, object]:
    return program.finish(answer, {"sig": sig, **given})


@pytest.mark.parametrize(
    ("sig", "answer", "reasons"),
    [
        ("1 tab po daily", "dose: 1 tablet; route: oral; when: daily", []),
        ("take 1 tablet by mouth", "dose: 1 tablet; route: oral", ["missing_frequency"]),
        ("apply to skin bid", "route: topical; when: twice daily", ["missing_dose"]),
        (
            "1 tab qam and 2 tabs qhs",
            "dose: 1 tablet; when: every morning; dose: 2 tablets; when: at bedtime",
            ["split_dose"],
        ),
        ("1 tab bid take tid", "dose: 1 tablet; when: twice daily; when: 3 times daily", ["contradiction"]),
        ("1 tab tid prn mdd 2", "dose: 1 tablet; when: 3 times daily; prn: yes; max: 2", ["contradiction"]),
        ("1 tab bid prn mdd 5", "dose: 1 tablet; when: twice daily; prn: yes; max: 5", ["contradiction"]),
        ("1 tab bid prn mdd 2", "dose: 1 tablet; when: twice daily; prn: yes; max: 2", []),
        (
            "1 tab bid max 100 mg per day",
            "dose: 1 tablet; when: twice daily; max: 100 mg per day",
            ["max_not_checkable"],
        ),
        ("1 tab 50 mg bid max 100 mg per day", "dose: 1 tablet; when: twice daily; max: 100 mg per day", []),
        (
            "2 tabs daily x 3 days then 1 tab daily x 3 days",
            "dose: 2 tablets; when: daily; then: 1 tablet daily for 3 days",
            ["sequence"],
        ),
        ("1 tab daily ud", "dose: 1 tablet; when: daily", ["points_elsewhere"]),
        ("1 tab daily", "I think one tablet", ["missing_dose", "missing_frequency", "garbled", "unread_text"]),
        ("40 tabs daily", "dose: 40 tablets; when: daily", ["implausible_dose"]),
        ("1 tab daily", "dose: 3 tablets; when: daily", ["missing_dose", "not_in_text"]),
        ("1 tab po daily prn", "dose: 1 tablet; route: oral; when: daily", ["unread_text"]),
    ],
)
def test_review_rules(sig: str, answer: str, reasons: list[str]) -> None:
    output = _finish(sig, answer)
    assert output["review_reasons"] == reasons
    assert output["needs_review"] == bool(reasons)
    assert set(reasons) <= set(REASONS)


def test_catalogue_conflicts_by_route_form_and_daily_maximum() -> None:
    by_eye = _finish(
        "instill 1 drop in right eye daily", "dose: 1 drop; route: ophthalmic; when: daily", drug="metformin"
    )
    too_much = _finish(
        "2 tabs po bid", "dose: 2 tablets; route: oral; when: twice daily", drug="atorvastatin", strength="40 mg"
    )
    fine = _finish("1 tab po daily", "dose: 1 tablet; route: oral; when: daily", drug="atorvastatin", strength="40 mg")
    assert by_eye["review_reasons"] == ["catalogue_conflict"]
    assert too_much["review_reasons"] == ["catalogue_conflict"]
    assert fine["review_reasons"] == []


def test_a_route_gives_way_to_what_verb_or_site_say_and_is_never_invented() -> None:
    assert (
        _finish("inhale 2 puffs by mouth bid", "dose: 2 puffs; route: oral; when: twice daily")["route"] == "inhalation"
    )
    assert (
        _finish("1 tab by mouth under the tongue qd", "dose: 1 tablet; route: oral; when: every day")["route"]
        == "sublingual"
    )
    assert (
        _finish("apply 1 patch to skin qd", "dose: 1 patch; route: topical; when: every day")["route"] == "transdermal"
    )
    assert _finish("take 1 tablet daily", "dose: 1 tablet; route: oral; when: daily")["route"] is None
    assert len(ROUTES) == 14


def test_direction_says_the_components_in_plain_words() -> None:
    answer = "dose: 1 to 2 tablets; route: oral; when: every 4 to 6 hours; prn: pain; for: 10 days; max: 12"
    output = _finish("1-2 tabs po q4-6h prn pain x10 days mdd 12", answer)
    assert output["direction"] == (
        "Take 1 to 2 tablets by mouth up to 6 times a day when needed for pain, for 10 days. Not more than 12 tablets a day."
    )


def _shared() -> Path:
    return (
        Path(os.environ.get("ASCENT_SHARED", ROOT.parent / "shared"))
        / "data"
        / "pharmacy"
        / "sig_gold_from_tests.jsonl"
    )


def test_normalised_text_of_published_examples_keeps_their_amounts() -> None:
    if not _shared().exists():
        pytest.skip("the shared reference file is not on this machine")
    rows = [json.loads(line) for line in _shared().read_text(encoding="utf-8").splitlines()]
    for row in rows:
        text = program.prepare({"sig": row["sig"]})
        for part in row["expected"]:
            amount = part.get("singleDosageAmount")
            if amount and float(amount).is_integer() and amount > 1:
                assert f"{amount:g}" in text.split(), (row["sig"], text)


@pytest.mark.parametrize(
    ("sig", "days"),
    [
        ("1 tablet daily supply for 30 days", None),
        ("1 tablet daily, discard after 28 days", None),
        ("1 tablet daily for 28 days discard after 28 days", 28.0),
        ("1 tablet daily for 30 days", 30.0),
    ],
)
def test_how_long_a_supply_lasts_is_no_duration(sig: str, days: float | None) -> None:
    span = "28 days" if "28" in sig else "30 days"
    output = program.finish(f"dose: 1 tablet; when: daily; for: {span}", {"sig": sig})
    assert output["duration_days"] == days
