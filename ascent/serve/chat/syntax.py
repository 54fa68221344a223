"""How models write tool calls: one `Syntax` each, chosen by what the checkpoint's chat template says.

A call is given back once it is whole and read; one that cannot be read stays text, so that nothing is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ascent.inference.calls import Call, parse_json_call, parse_plain_call
from ascent.serve.chat.text import overlap
from ascent.serve.chat.types import ToolSpec

_MISTRAL = re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True)
class Mark:
    """What opens a call and what closes it; an empty `close` is the end of the turn.

    `where` says at what place the opening counts: anywhere, at the start of a line, or of the answer. What could be
    plain text (`sure` is False) is a call only if it names a tool of the request. `whole` says that the opening is part
    of what is read.
    """

    open: str
    close: str
    read: Callable[[str], list[Call]]
    where: str = "anywhere"
    sure: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Syntax:
    """One way to write calls.

    Attributes:
        name: what it is called in messages and tests.
        told_by: a text in chat templates that gives it away.
        marks: what may open a call.
        arguments: the JSON field of the arguments.
        frame: what stands before and after the JSON object of a call that is forced.
        special: texts of the frame and within calls that may be special tokens of a vocabulary.
        id_length: the length that the template demands of a call's id, all of it letters and digits.
    """

    name: str
    told_by: str
    marks: tuple[Mark, ...]
    arguments: str
    frame: tuple[str, str]
    special: tuple[str, ...] = ()
    id_length: int | None = None


def _hermes(body: str) -> list[Call]:
    return [parse_json_call(body)]


def _plain(body: str) -> list[Call]:
    return [parse_plain_call(body)]


def _objects(body: str) -> list[Call]:
    """JSON objects one after the other, or in a list."""
    found, decoder, at = [], json.JSONDecoder(), 0
    while match := re.compile(r"[\s;,\[\]]*(?=\{)").match(body, at):
        try:
            _, end = decoder.raw_decode(body, match.end())
        except (ValueError, RecursionError) as error:
            return [Call("", error=str(error))]
        found.append(parse_json_call(body[match.end() : end]))
        at = end
    rest = body[at:].strip(" \t\r\n;,[]")
    return [*found, Call("", error=f"{rest[:40]!r} is no call")] if rest or not found else found


def _mistral(body: str) -> list[Call]:
    """A list of objects, or `name{arguments}` one after the other, as later versions write it."""
    if body.lstrip().startswith(("[{", "[ {", "{")):
        return _objects(body)
    found, decoder, at = [], json.JSONDecoder(), 0
    while match := _MISTRAL.match(body, at):
        try:
            arguments, at = decoder.raw_decode(body, match.end())
        except (ValueError, RecursionError) as error:
            return [Call("", error=str(error))]
        found.append(Call(match[1], named=tuple(arguments.items())))
    return [*found, Call("", error="no call")] if body[at:].strip() or not found else found


HERMES = Syntax(
    "hermes",
    "<tool_call>",
    (
        Mark("<tool_call>", "</tool_call>", _hermes),
        Mark("call:", "\n", _plain, where="line", sure=False),  # what `ToolEnvironment` teaches very small models
    ),
    "arguments",
    ("<tool_call>\n", "\n</tool_call>"),
    ("<tool_call>", "</tool_call>"),
)
LLAMA = Syntax(
    "llama",
    "<|python_tag|>",
    (Mark("<|python_tag|>", "", _objects), Mark("{", "", _objects, where="answer", sure=False, whole=True)),
    "parameters",
    ("", ""),
    ("<|python_tag|>",),
)
MISTRAL = Syntax(
    "mistral",
    "[TOOL_CALLS]",
    (Mark("[TOOL_CALLS]", "", _mistral),),
    "arguments",
    ("[TOOL_CALLS][", "]"),
    ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    id_length=9,
)
SYNTAXES = (LLAMA, MISTRAL, HERMES)


def syntax_of(template: str) -> Syntax:
    """Return the syntax that a chat template's text speaks of; Hermes where it speaks of none."""
    return next((syntax for syntax in SYNTAXES if syntax.told_by in template), HERMES)


def arguments_of(call: Call, tools: Iterable[ToolSpec]) -> dict[str, Any]:
    """Return a call's arguments by name: positional texts take the tool's parameters in order, and their types."""
    if not call.positional and all(not isinstance(value, str) for _, value in call.named):
        return dict(call.named)
    schema = next((tool.schema for tool in tools if tool.name == call.name), {})
    properties = schema.get("properties", {})
    given = dict(zip(properties, call.positional, strict=False)) | dict(call.named)
    return {name: _typed(value, properties.get(name)) for name, value in given.items()}


def _typed(value: Any, schema: Any) -> Any:
    """A text as the JSON value it stands for, where the schema wants no text and it can be read as what it wants."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if not isinstance(value, str) or kind not in ("integer", "number", "boolean", "array", "object"):
        return value
    try:
        return json.loads(value.lower() if kind == "boolean" else value)
    except ValueError:
        return value


class CallReader:
    """Tells calls from text while it arrives."""

    def __init__(self, syntax: Syntax, tools: Sequence[ToolSpec]) -> None:
        self.syntax, self.tools = syntax, tools
        self._names = {tool.name for tool in tools}
        self._held = ""
        self._mark: Mark | None = None
        self._line_start = self._first = True
        self._after_call = False

    def feed(self, text: str) -> list[str | Call]:
        """Return texts and calls as far as they are certain, in order."""
        self._held += text
        found: list[str | Call] = []
        while True:
            if self._mark is None and not self._open(found):
                return found
            mark = self._mark
            assert mark is not None
            at = self._held.find(mark.close, len(mark.open)) if mark.close else -1
            if at < 0:
                return found
            end = at + len(mark.close)
            self._close(found, self._held[len(mark.open) : at], self._held[:end])
            self._held = self._held[end:]

    def flush(self) -> list[str | Call]:
        """Return what the end of the turn makes of the rest."""
        found: list[str | Call] = []
        if self._mark is not None:  # also one that lacks its closing tag, as small models often leave it out
            self._close(found, self._held[len(self._mark.open) :], self._held)
        elif self._held and not (self._after_call and self._held.isspace()):
            found.append(self._held)
        self._held = ""
        return found

    def _open(self, found: list[str | Call]) -> bool:
        """Write what stands before the next call; whether one has been opened."""
        places = [(at, mark) for mark in self.syntax.marks if (at := self._place(mark)) is not None]
        if places:
            at, self._mark = min(places, key=lambda place: place[0])
            self._say(found, self._held[:at].rstrip() if self._mark.sure else self._held[:at])
            self._held = self._held[at:]
            return True
        keep = max(overlap(self._held, mark.open) for mark in self.syntax.marks)
        cut = len(self._held[: len(self._held) - keep].rstrip())
        if cut:
            self._say(found, self._held[:cut])
            self._held = self._held[cut:]
        return False

    def _place(self, mark: Mark) -> int | None:
        at = self._held.find(mark.open)
        while at >= 0:
            before = self._held[:at]
            if mark.where == "anywhere":
                return at
            if mark.where == "answer":
                return at if self._first and not before.strip() else None
            line = before.rpartition("\n")[2]
            if not line.strip() and ("\n" in before or self._line_start):
                return at
            at = self._held.find(mark.open, at + 1)
        return None

    def _close(self, found: list[str | Call], body: str, whole: str) -> None:
        mark, self._mark = self._mark, None
        assert mark is not None
        try:
            calls = mark.read(mark.open + body if mark.whole else body)
        except (AttributeError, TypeError):  # arguments that are no object
            calls = []
        if calls and all(call.error is None and (mark.sure or call.name in self._names) for call in calls):
            found.extend(calls)
            self._after_call = True
            self._line_start, self._first = True, False
        else:
            self._say(found, whole)

    def _say(self, found: list[str | Call], text: str) -> None:
        if self._after_call and text:
            text = text.lstrip()
            self._after_call = not text
        if text:
            found.append(text)
            self._line_start = text.endswith("\n") if text.strip() else self._line_start
            self._first = self._first and not text.strip()
