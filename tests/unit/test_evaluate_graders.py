from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ascent.evaluate.graders import BUILTIN, as_score
from ascent.evaluate.program import Program
from ascent.records import Episode, Score, Task, Unscored


def grade(name: str, text: str, expected: dict[str, Any] | None) -> float | None:
    task = Task(id="1", expected=expected)
    output = Program().finish(text, {})
    score = as_score(name, BUILTIN[name](task, Episode(task_id="1", model="m", messages=(), text=text, output=output)))
    assert score.name == name
    return score.value


@pytest.mark.parametrize(
    ("name", "text", "expected", "value"),
    [
        ("exact", " yes\n", {"answer": "yes"}, 1.0),
        ("exact", "Yes", {"answer": "yes"}, 0.0),
        ("exact", "12", {"answer": "12"}, 1.0),
        ("exact", '{"b": [1, 2.0], "a": null}', {"answer": {"a": None, "b": [1.0, 2]}}, 1.0),
        ("exact", '{"a": 1}', {"answer": {"a": True}}, 0.0),
        ("exact", '{"a": 1, "b": 2}', {"answer": {"a": 1}}, 0.0),
        ("exact", "true", {"answer": True}, 1.0),
        ("contains", "Take with FOOD", {"answer": "food"}, 1.0),
        ("contains", "take daily", {"answer": ["take", "daily", "mouth", "tablet"]}, 0.5),
        ("contains", "x", {"answer": []}, None),
        ("json_valid", '{"a": 1}', None, 1.0),
        ("json_valid", '```json\n{"a": 1}\n```', None, 0.0),
        ("json_valid", "NaN", None, 0.0),
        ("numeric", "The total is 1,250.5 mg", {"answer": 1250.5}, 1.0),
        ("numeric", "between 3 and 4", {"answer": 4}, 1.0),
        ("numeric", "-2.5e-3", {"answer": -0.0025}, 1.0),
        ("numeric", ".5", {"answer": "0.5"}, 1.0),
        ("numeric", "about 101", {"answer": 100, "tolerance": 0.011}, 1.0),
        ("numeric", "about 102", {"answer": 100, "tolerance": 0.011}, 0.0),
        ("numeric", "0.0005", {"answer": 0, "tolerance": 0.001}, 1.0),
        ("numeric", "none", {"answer": 0}, 0.0),
        ("regex", "take 2 tablets", {"pattern": r"\b\d+ tablets?\b"}, 1.0),
        ("regex", "take two tablets", {"pattern": r"\b\d+ tablets?\b"}, 0.0),
    ],
)
def test_builtin(name: str, text: str, expected: dict[str, Any] | None, value: float | None) -> None:
    assert grade(name, text, expected) == value


@pytest.mark.parametrize("name", sorted(set(BUILTIN) - {"json_valid"}))
@pytest.mark.parametrize("expected", [None, {}])
def test_without_what_it_needs_a_grader_is_not_applicable(name: str, expected: dict[str, Any] | None) -> None:
    assert grade(name, "text", expected) is None


@pytest.mark.parametrize(
    ("graded", "value"),
    [
        (True, 1.0),
        (False, 0.0),
        (3, 3.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (Fraction(1, 4), 0.25),
    ],
)
def test_numbers_become_values(graded: object, value: float) -> None:
    assert as_score("g", graded) == Score(name="g", value=value)


@pytest.mark.parametrize("graded", [math.nan, math.inf, "0.5", [1], object(), Score(name="g", value=math.nan)])
def test_what_is_no_number_is_an_unscored_error(graded: object) -> None:
    score = as_score("g", graded)
    assert score.value is None
    assert score.unscored is Unscored.error
    assert "returned" in score.reason


def test_none_is_not_applicable_and_a_score_keeps_its_words() -> None:
    assert as_score("g", None).unscored is Unscored.not_applicable
    score = as_score("g", Score(name="other", value=0.5, label="half", reason="why"))
    assert score == Score(name="g", value=0.5, label="half", reason="why")
