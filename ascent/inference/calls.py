"""Tool calls as a model writes them, read from its text.

Two spellings are read: JSON between `<tool_call>` tags, as the chat templates of Hermes and Qwen write it, and a plain
line that a very small model can learn, `call: name(argument, argument)`. What is malformed becomes an error message,
never a crash.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>(?P<json>(?s:.*?))(?P<closed></tool_call>|\Z)|^[ \t]*call:(?P<plain>.*)$", re.M)
_PLAIN = re.compile(r"\s*(\w+)\s*\((.*)\)\s*;?\s*")
_NAMED = re.compile(r"(\w+)\s*=\s*(.*)")
_EXPECTED = "write call: name(argument, argument)"


@dataclass(frozen=True)
class Call:
    """One call as written: positional arguments are texts, named ones JSON values. `error` says why it is none."""

    name: str
    positional: tuple[str, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()
    error: str | None = None


def parse_calls(text: str) -> list[Call]:
    """Return the calls in an assistant's text, in order; malformed ones have their `error` set. None: no call."""
    found = []
    for match in _CALL.finditer(text):
        if match["plain"] is not None:
            found.append(parse_plain_call(match["plain"]))
        elif not match["closed"]:
            found.append(Call("", error="<tool_call> was not closed by </tool_call>"))
        else:
            found.append(parse_json_call(match["json"]))
    return found


def parse_json_call(text: str) -> Call:
    """Read one call from `{"name": …, "arguments": {…}}`; Llama's `parameters` is the same field."""
    try:
        value = json.loads(text)
        arguments = value.get("arguments", value.get("parameters", {}))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return Call(str(value["name"]), named=tuple(arguments.items()))
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, ValueError) else "its fields are wrong"
        return Call("", error=f'a tool call is {{"name": …, "arguments": {{…}}}} as JSON ({reason})')


def parse_plain_call(text: str) -> Call:
    """Read one call from `name(argument, argument)`, what follows `call:` on its line."""
    match = _PLAIN.fullmatch(text)
    if match is None:
        return Call("", error=f"the call cannot be read; {_EXPECTED}")
    positional: list[str] = []
    named: list[tuple[str, Any]] = []
    try:
        row = next(csv.reader([match[2]], skipinitialspace=True), [])
    except csv.Error as error:
        return Call("", error=f"the arguments cannot be read ({error}); {_EXPECTED}")
    for part in (cell.strip() for cell in row):
        pair = _NAMED.fullmatch(part)
        if pair:
            named.append((pair[1], pair[2].strip("'\"")))
        else:
            positional.append(part.strip("'"))
    return Call(match[1], tuple(positional), tuple(named))
