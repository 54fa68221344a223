# ruff: noqa: E402
"""Pharmalexical normalisation: worked examples, idempotence, and numbers that never change."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "pharmacy"))

from sigs.lexicon import VOCABULARY
from sigs.normalise import _repair, _separate, normalise

CASES = {
    "1 tab PO TID PRN": "1 tablet by mouth 3 times daily as needed",
    "2 caps po bidx14 daysinstrkeep cold": "2 capsules by mouth twice daily for 14 days . keep cold",
    "½ tab p.o. b.i.d.": "1/2 tablet by mouth twice daily",
    "1½ tabs qhs": "1 1/2 tablets at bedtime",
    "take 3 (three) caps q 8 hrs": "take 3 capsules every 8 hours",
    "ii gtts ou q4-6h": "2 drops both eyes every 4 to 6 hours",
    "1 tab od": "1 tablet once daily",
    "1 drop od": "1 drop right eye",
    "take on tablet qod": "take 1 tablet every other day",
    "1-2 puffs inh q6hr intprnwheeze": "1 to 2 puffs inhale every 6 hours as needed wheeze",
    "take one-half tablet qam every morning": "take 1/2 tablet every morning",
    "take .5 ml q.6.h": "take 0.5 ml every 6 hours",
    "tkae 1 talbet by muoth dialy": "tkae 1 tablet by mouth daily",
    "max 4 tabs/day": "max 4 tablets per day",
    "maximum daily dose 4 mdd 4": "max daily dose 4",
    "take 1 tab po daily.": "take 1 tablet by mouth daily",
    "inject 10u sq ac & hs": "inject 10 units subcutaneously before meals and at bedtime",
    "1,000 mg tid": "1000 mg 3 times daily",
    "2x/day for 10nights": "2 times per day for 10 nights",
}


@pytest.mark.parametrize(("sig", "text"), CASES.items())
def test_worked_examples(sig: str, text: str) -> None:
    assert normalise(sig) == text


def test_steps_are_not_taken_for_repetitions() -> None:
    text = normalise("1 po bid x 2 days 1/2 po bid x 2 days 1/2 po qd x 2 days")
    assert text.count("1/2") == 2
    assert text.count("2 days") == 3


_WORDS = st.sampled_from(
    [
        "take",
        "tab",
        "tabs",
        "po",
        "by",
        "mouth",
        "daily",
        "prn",
        "bid",
        "tid",
        "q6h",
        "x",
        "for",
        "days",
        "pain",
        "instr",
        "dailyinstr",
        "the",
        "needed",
        "as",
        "mdd",
        "every",
        "hours",
        "1",
        "2",
        "3",
        "10",
        "40",
        "2.5",
        "1/2",
        "(one)",
        "1-2",
        "#30",
        "mg",
        "20mg",
        "5ml",
        "x7",
        "capsule",
        "at",
        "bedtime",
        "and",
        "then",
        "or",
        "with",
        ".",
        ",",
        ";",
        "--",
        "qhs",
        "od",
        "drops",
        "½",
        "inhale",
        "weeks",
        "w/",
        "food",
        "q8hr",
        "int",
    ]
)
_TEXTS = st.lists(_WORDS, max_size=14).map(" ".join) | st.text(alphabet="abdeilmnopqtxy 0123456789./-,;()", max_size=40)


@settings(max_examples=300, deadline=None)
@given(_TEXTS)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


_PLAIN = st.lists(
    st.sampled_from(
        ["take", "tablet", "by", "mouth", "with", "water", "for", "pain", "daily", "capsule", "then", "and"]
    )
    | st.integers(2, 999).map(str)
    | st.decimals(1, 99, places=1).map(str),
    max_size=12,
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(_PLAIN)
def test_no_number_appears_that_the_text_does_not_hold(text: str) -> None:
    before = {float(item) for item in re.findall(r"\d+(?:\.\d+)?", text)}
    after = {float(item) for item in re.findall(r"\d+(?:\.\d+)?", normalise(text))}
    assert after == before


def test_known_words_are_never_repaired_or_split() -> None:
    for word in sorted(VOCABULARY):
        if word.isalpha() and word != "instr":
            assert _repair(word) == word
            assert _separate(word) == word


def test_an_unknown_word_near_two_different_targets_is_left_alone() -> None:
    assert normalise("take xanthelasma daily") == "take xanthelasma daily"
    assert normalise("for lupus nephritis") == "for lupus nephritis"


def test_the_handwritten_directions_are_stable() -> None:
    path = ROOT / "tests" / "data" / "pharmacy_handwritten.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 60
    for row in rows:
        text = normalise(row["input"]["sig"])
        assert text == normalise(text)
        assert text == text.lower()
