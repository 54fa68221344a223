from __future__ import annotations

import math
import socket
import subprocess
import sys
from fractions import Fraction
from typing import Any

import jsonschema
import numpy as np
import pytest

from ascent.evaluate.graders import BUILTIN, as_score
from ascent.evaluate.program import Program
from ascent.records import Episode, Score, Task, Unscored

DOSE = {"type": "object", "properties": {"dose": {"type": "number"}, "route": {"enum": ["oral"]}}, "required": ["dose"]}


def grade(name: str, text: str, expected: dict[str, Any] | None) -> float | None:
    return score_of(name, text, expected).value


def score_of(name: str, text: str, expected: dict[str, Any] | None) -> Score:
    task = Task(id="1", expected=expected)
    output = Program().finish(text, {})
    score = as_score(name, BUILTIN[name](task, Episode(task_id="1", model="m", messages=(), text=text, output=output)))
    assert score.name == name
    return score


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
        ("json_schema", '{"dose": 2}', {"schema": DOSE}, 1.0),
        ("json_schema", '{"dose": 2, "route": "oral"}', {"schema": DOSE}, 1.0),
        ("json_schema", '{"dose": "2"}', {"schema": DOSE}, 0.0),
        ("json_schema", "{}", {"schema": DOSE}, 0.0),
        ("json_schema", "two", {"schema": DOSE}, 0.0),
        ("json_schema", "[1, 2.0]", {"schema": {"type": "array", "items": {"type": "integer"}}}, 1.0),
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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"dose": "2"}', "$.dose: '2' is not of type 'number'"),
        ('{"dose": 2, "route": "nasal"}', "$.route: 'nasal' is not one of ['oral']"),
        ("{}", "$: 'dose' is a required property"),
    ],
)
def test_a_broken_schema_rule_is_named_with_its_path(text: str, reason: str) -> None:
    assert score_of("json_schema", text, {"schema": DOSE}).reason == reason


def test_a_schema_that_is_none_or_leads_elsewhere_is_an_error_and_nothing_is_fetched() -> None:
    with pytest.raises(jsonschema.SchemaError):
        grade("json_schema", "{}", {"schema": {"type": "thing"}})
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        with pytest.raises(jsonschema.exceptions._WrappedReferencingError):
            grade("json_schema", "{}", {"schema": {"$ref": address}})
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_reference_inside_the_schema_is_followed() -> None:
    schema = {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}}
    assert grade("json_schema", "[1, 2]", {"schema": schema}) == 1.0
    assert score_of("json_schema", '[1, "2"]', {"schema": schema}).reason.startswith("$[1]: ")


def test_graders_stay_light() -> None:
    """Every grader worker imports them, and jsonschema only when a schema is to be checked."""
    heavy = ("torch", "numpy", "scipy", "transformers", "jsonschema")
    code = f"import ascent.evaluate.graders, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
