"""Graders: the signature `(Task, Episode) -> Graded`, how an answer becomes a `Score`, and the built-in ones.

A built-in reads what it needs from `task.expected`, and answers None (not applicable) where the task does not
say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic_core import from_json

from ascent.evaluate.code import TIME_LIMIT_S, Ran, extract_code, run_code
from ascent.records import Episode, Score, Task, Unscored

Graded = Score | float | bool | int | None
Grader = Callable[[Task, Episode], Graded]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?\.?\d+(?:[eE][-+]?\d+)?")


def as_score(name: str, graded: object) -> Score:
    """Turn what a grader returned into a score of that grader's name.

    True is 1 and False is 0; anything that converts to a finite float is its value; None is *not applicable*.
    A NaN, an infinity or another type is an unscored error, because averaging it would silently spoil the
    metric.
    """
    if graded is None:
        return Score(name=name, unscored=Unscored.not_applicable)
    if isinstance(graded, Score):
        if graded.value is None or math.isfinite(graded.value):
            return graded if graded.name == name else graded.model_copy(update={"name": name})
        return failed(name, f"the grader returned {graded.value}; a score is a finite number")
    if not hasattr(graded, "__float__"):
        return failed(name, f"the grader returned a {type(graded).__name__}; return a Score, a number, a bool or None")
    value = float(graded)
    if not math.isfinite(value):
        return failed(name, f"the grader returned {value}; a score is a finite number")
    return Score(name=name, value=value)


def failed(name: str, reason: str, cause: Unscored = Unscored.error) -> Score:
    """Return an unscored score with a cause and a reason that is safe to store as UTF-8."""
    return Score(name=name, unscored=cause, reason=reason.encode("utf-8", "replace").decode()[:1000])


def exact(task: Task, episode: Episode) -> Graded:
    """1 if the output equals `expected["answer"]`, else 0.

    The structured output is compared as JSON (1 and 1.0 are equal, 1 and true are not). An answer that is a
    string is also compared with the raw text, surrounding white space ignored.
    """
    if task.expected is None or "answer" not in task.expected:
        return None
    answer = task.expected["answer"]
    if isinstance(answer, str) and episode.text.strip() == answer.strip():
        return True
    return _same(episode.output, answer)


def contains(task: Task, episode: Episode) -> Graded:
    """1 if the text contains `expected["answer"]`, ignoring case; of a list, the share that it contains."""
    if task.expected is None or "answer" not in task.expected:
        return None
    answer = task.expected["answer"]
    wanted = [str(part).casefold() for part in (answer if isinstance(answer, list) else [answer])]
    if not wanted:
        return None
    text = episode.text.casefold()
    missing = [part for part in wanted if part not in text]
    reason = f"missing: {', '.join(missing)}" if missing else ""
    return Score(name="contains", value=1 - len(missing) / len(wanted), reason=reason)


def json_valid(task: Task, episode: Episode) -> Graded:
    """1 if the whole text is one JSON value by RFC 8259 (so no NaN and no code fence), else 0."""
    try:
        parse_json(episode.text)
    except ValueError as error:
        return Score(name="json_valid", value=0.0, reason=str(error))
    return True


def numeric(task: Task, episode: Episode) -> Graded:
    """1 if the answer's number is within a relative tolerance of `expected["answer"]`, else 0.

    The number is the output itself, or else the last number in the text ("1,250.5" reads as 1250.5). The
    tolerance is `expected["tolerance"]`, 1e-6 unless given; around an answer of 0 it is absolute.
    """
    if task.expected is None or "answer" not in task.expected:
        return None
    answer = float(task.expected["answer"])
    tolerance = float(task.expected.get("tolerance", 1e-6))
    if isinstance(episode.output, int | float) and not isinstance(episode.output, bool):
        value = float(episode.output)
    else:
        numbers = _NUMBER.findall(episode.text)
        if not numbers:
            return Score(name="numeric", value=0.0, reason="no number in the text")
        value = float(numbers[-1].replace(",", ""))
    close = abs(value - answer) <= tolerance * (abs(answer) or 1.0)
    return Score(name="numeric", value=float(close), reason="" if close else f"read {value:g}, expected {answer:g}")


def regex(task: Task, episode: Episode) -> Graded:
    """1 if the regular expression `expected["pattern"]` is found in the text, else 0."""
    if task.expected is None or "pattern" not in task.expected:
        return None
    return re.search(task.expected["pattern"], episode.text) is not None


def json_schema(task: Task, episode: Episode) -> Graded:
    """1 if the output satisfies the JSON schema `expected["schema"]`, else 0; the reason names the failing path.

    A text that is no JSON is a string to the schema. References lead inside the schema only, nothing is fetched.
    Raises what jsonschema raises for a schema that is none.
    """
    if task.expected is None or "schema" not in task.expected:
        return None
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing import Registry

    schema = task.expected["schema"]
    kind = validator_for(schema)
    kind.check_schema(schema)
    error = best_match(kind(schema, registry=Registry()).iter_errors(episode.output))
    if error is None:
        return True
    return Score(name="json_schema", value=0.0, reason=f"{error.json_path}: {error.message}"[:1000])


def code_output(task: Task, episode: Episode) -> Graded:
    """1 if the program in the answer prints `expected["stdout"]` and ends well, else 0.

    The program is the last fenced block of Python, or the whole text; it reads `expected["stdin"]` and is run as
    `run_code` says, for at most `expected["time_limit_s"]` of wall clock: 3 unless given; keep it a second below the
    limit of the pool. White space at the end of a line and of the output does not count. A program that does not end
    in time is unscored.
    """
    if task.expected is None or "stdout" not in task.expected:
        return None
    ran = _run(task.expected, episode)
    if ran.unscored is not None:
        return failed("code_output", ran.problem, ran.unscored)
    printed, wanted = _lines(ran.stdout), _lines(task.expected["stdout"])
    if ran.problem or printed == wanted:
        return Score(name="code_output", value=float(not ran.problem), reason=ran.problem)
    at = next((at for at, (left, right) in enumerate(zip(printed, wanted, strict=False)) if left != right), None)
    if at is None:
        reason = f"printed {len(printed)} lines, expected {len(wanted)}"
    else:
        reason = f"line {at + 1} is {printed[at][:200]!r}, expected {wanted[at][:200]!r}"
    return Score(name="code_output", value=0.0, reason=reason)


def unit_tests(task: Task, episode: Episode) -> Graded:
    """The share of `expected["tests"]` that the program in the answer passes; with `expected["all"]`, 1 only for all.

    `expected["tests"]` is a list of Python texts, or one text with `test...` functions or `assert` statements; it runs
    after the program, in the same process: see `run_code`. Program and limits are as in `code_output`.
    """
    if task.expected is None or not task.expected.get("tests"):
        return None
    ran = _run(task.expected, episode, task.expected["tests"])
    if ran.unscored is not None:
        return failed("unit_tests", ran.problem, ran.unscored)
    passed, total = ran.tests.count(""), len(ran.tests)
    value = float(passed == total) if task.expected.get("all") else passed / total
    first = next((f"; test {at + 1}: {problem}" for at, problem in enumerate(ran.tests) if problem), "")
    return Score(name="unit_tests", value=value, reason=f"passed {passed} of {total} tests{first}"[:1000])


BUILTIN: dict[str, Grader] = {
    "code_output": code_output,
    "contains": contains,
    "exact": exact,
    "json_schema": json_schema,
    "json_valid": json_valid,
    "numeric": numeric,
    "regex": regex,
    "unit_tests": unit_tests,
}


def parse_json(text: str) -> Any:
    """Parse one JSON value strictly.

    Raises ValueError for everything else, for NaN, for half a surrogate pair and for more than 200 levels of
    nesting, so that what it returns can be written to a report again.
    """
    return from_json(text, allow_inf_nan=False)


def _run(expected: dict[str, Any], episode: Episode, tests: str | Sequence[str] = ()) -> Ran:
    limit_s = float(expected.get("time_limit_s", TIME_LIMIT_S))
    return run_code(extract_code(episode.text), tests, stdin=str(expected.get("stdin", "")), time_limit_s=limit_s)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in str(text).rstrip().split("\n")]


def _same(left: object, right: object) -> bool:
    """Equality of JSON values: numbers by value, but a bool is never a number."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
