"""Calls as models write them: both spellings, and everything malformed, which the model must be able to read about."""

from __future__ import annotations

import json
from typing import Literal

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascent.customize.agentic.environment import ToolEnvironment
from ascent.customize.agentic.tools import Tools, parse_calls
from ascent.records import Message, Task
from ascent.records.errors import BadInput


def convert(amount: float, unit: Literal["mg", "g"], places: int = 0) -> str:
    """Convert an amount to mg."""
    if amount < 0:
        raise ValueError("amount must not be negative")
    return f"{amount * (1000 if unit == 'g' else 1):.{places}f} mg"


def look_up(name: str) -> dict[str, str]:
    """Look a drug up."""
    return {"name": name, "class": {"warfarin": "anticoagulant"}[name]}


TOOLS = Tools(convert, look_up)
WARFARIN = '{"name": "warfarin", "class": "anticoagulant"}'


def run(text: str) -> list[str]:
    return [TOOLS.run(call) for call in parse_calls(text)]


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("call: convert(2, g)", ["2000 mg"]),
        ("I convert.\n  call: convert( 2.5 , 'g' , places=1 ) \nthen wait", ["2500.0 mg"]),
        ('call: look_up("warfarin")\ncall: convert(unit=mg, amount=3)', [WARFARIN, "3 mg"]),
        ('<tool_call>\n{"name": "convert", "arguments": {"amount": 2, "unit": "g"}}\n</tool_call>', ["2000 mg"]),
        (r'<tool_call>{"name": "convert", "arguments": "{\"amount\": 1, \"unit\": \"g\"}"}</tool_call>', ["1000 mg"]),
        ("call: convert(-1, g)", ["error: amount must not be negative"]),
        ("call: look_up(aspirin)", ["error: aspirin"]),
        ("call: convert(two, g)", ["error: amount: Input should be a valid number"]),
        ("call: convert(nan, g)", ["error: amount: Input should be a finite number"]),
        ("call: convert(1, kg)", ["error: unit: Input should be 'mg' or 'g'"]),
        ("call: convert(1)", ["error: unit: Field required; the tool is convert(amount, unit, places)"]),
        ("call: convert(1, g, 2, 3)", ["error: too many arguments"]),
        ("call: convert(1, g, amount=2)", ["error: too many arguments"]),
        ("call: convert(1, g, colour=red)", ["error: colour: Extra inputs are not permitted"]),
        ("call: convrt(1, g)", ["error: there is no tool 'convrt'; did you mean 'convert'?"]),
        ("call: convert 1 g", ["error: the call cannot be read; write call: name("]),
        ('<tool_call>{"name": "convert"', ["error: <tool_call> was not closed"]),
        ("<tool_call>convert</tool_call>", ["error: a tool call is {"]),
        ('<tool_call>["convert"]</tool_call>', ["error: a tool call is {"]),
        ('<tool_call>{"arguments": {}}</tool_call>', ["error: a tool call is {"]),
        ('<tool_call>{"name": "convert", "arguments": [1]}</tool_call>', ["error: a tool call is {"]),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ["error: a tool call is {"]),
        ("The answer is 2000 mg; I recall: nothing more.", []),
    ],
)  # fmt: skip
def test_calls_are_answered_or_explained(text: str, answers: list[str]) -> None:
    found = run(text)
    assert len(found) == len(answers)
    for answer, wanted in zip(found, answers, strict=True):
        assert answer.startswith(wanted) if wanted.startswith("error") else answer == wanted


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.from_regex(r"[a-z_]+", fullmatch=True), st.dictionaries(st.text(), VALUES)), max_size=3))
def test_json_calls_are_read_as_they_were_written(calls: list[tuple[str, dict]]) -> None:
    written = [json.dumps({"name": name, "arguments": arguments}).replace("<", "\\u003c") for name, arguments in calls]
    found = parse_calls("so\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in written))
    assert [(call.name, dict(call.named), call.error) for call in found] == [(n, a, None) for n, a in calls]


PIECES = ["call:", "<tool_call>", "</tool_call>", "convert", *'(){}[]",=:\n 1g\\\x00']


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_no_text_breaks_the_tools(text: str) -> None:
    for answer in run(text):
        assert answer.startswith("error: ") or answer.endswith(" mg")


def test_schemas_accept_what_the_tools_accept() -> None:
    convert_schema, look_up_schema = (tool["function"] for tool in TOOLS.schemas())
    assert (convert_schema["name"], convert_schema["description"]) == ("convert", "Convert an amount to mg.")
    check = jsonschema.Draft202012Validator(convert_schema["parameters"])
    assert check.is_valid({"amount": 1.5, "unit": "g"})
    assert check.is_valid({"amount": 1, "unit": "mg", "places": 2})
    for bad in ({}, {"amount": 1, "unit": "kg"}, {"amount": "x", "unit": "g"}, {"amount": 1, "unit": "g", "z": 1}):
        assert not check.is_valid(bad), bad
    assert look_up_schema["parameters"]["required"] == ["name"]


def test_tools_need_types() -> None:
    def untyped(amount):
        return amount

    def variadic(*amounts: float) -> float:
        return sum(amounts)

    with pytest.raises(BadInput, match="tool untyped: give parameter 'amount' a type"):
        Tools(untyped)
    with pytest.raises(BadInput, match="tool variadic: give parameter 'amounts' a type, and write out"):
        Tools(variadic)


def test_a_defect_of_a_tool_is_not_blamed_on_the_model() -> None:
    def broken(amount: float) -> float:
        raise ZeroDivisionError(amount)

    with pytest.raises(ZeroDivisionError):
        Tools(broken).run(parse_calls("call: broken(1)")[0])


def test_a_tool_environment_answers_every_call_and_ends_without_one() -> None:
    world = ToolEnvironment(TOOLS)
    task = Task(id="1", messages=(Message(role="user", content="q"),))
    assert tuple(world.reset(task)) == task.messages
    step = world.step("call: convert(1, g)\ncall: convert(2)")
    assert not step.done
    assert [message.role for message in step.messages] == ["tool", "tool"]
    assert step.messages[0].content == "1000 mg"
    assert step.messages[1].content.startswith("error: unit: Field required")
    assert world.step("It is 1000 mg.").done
