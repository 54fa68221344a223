"""Constrained decoding: JSON schemas, regular expressions and forced tool calls as masks over the vocabulary.

The grammars are llguidance's. JSON is written on one line, as `json.dumps` would, so that a model cannot spend its
tokens on white space, and objects have no other properties than a schema names.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from ascent.records.errors import BadInput, MissingExtra, UnknownName
from ascent.serve.chat.syntax import Syntax
from ascent.serve.chat.text import THOUGHT
from ascent.serve.chat.types import ChatRequest, ToolSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Mask = npt.NDArray[np.int32]

KEPT = 64  # grammars compiled and kept; the usual server sees the same few schemas all day
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_SYMBOLS = 200_000  # of a grammar; llguidance itself takes half a million
_TAIL = 12  # tokens that hold the end of the reasoning, however it is split


class Grammars:
    """Compiles constraints for one vocabulary of `vocab` entries. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocab: int, end_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab, self._end_ids = tokenizer, vocab, sorted(end_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._table: Any = None

    def constraint(self, request: ChatRequest, syntax: Syntax, *, reasoning: bool = False) -> Constraint | None:
        """Return what the answer must keep to, or None where everything is allowed.

        Args:
            request: its schema or expression, or a tool that must be called.
            syntax: how the model writes calls.
            reasoning: whether the answer begins inside the reasoning, which stays free.

        Raises:
            BadInput: the schema uses a keyword that cannot be enforced, which is named, or cannot be met at all.
            UnknownName: the tool to be called is not among the tools.
            MissingExtra: llguidance is not installed.
        """
        if request.tools and request.tool_choice not in ("auto", "none"):
            grammar = self._forced(request, syntax)
        elif request.schema is not None:
            grammar = _matcher_type().grammar_from_json_schema(closed(request.schema), overrides=_STYLE)
        elif request.regex is not None:
            grammar = _matcher_type().grammar_from_regex(request.regex)
        else:
            return None
        return Constraint(self._matcher(grammar), self._vocab, self._end_ids, self._decode if reasoning else None)

    def _forced(self, request: ChatRequest, syntax: Syntax) -> str:
        """Return the grammar of exactly one call."""
        tools: Sequence[ToolSpec] = request.tools
        if request.tool_choice != "any":
            tools = [tool for tool in tools if tool.name == request.tool_choice]
            if not tools:
                raise UnknownName("tool", request.tool_choice, [tool.name for tool in request.tools])
        before, after = (self._literal(text, syntax) for text in syntax.frame)
        rules = [f"start: {before} body {after}", "body: " + " | ".join(f"tool_{i}" for i in range(len(tools)))]
        for index, tool in enumerate(tools):
            arguments = closed(tool.schema or {"type": "object"})
            # Definitions are looked up from the root, so they move there with the schema that uses them.
            moved = {name: arguments[name] for name in ("$defs", "definitions") if name in arguments}
            call = {
                "type": "object",
                "properties": {
                    "name": {"const": tool.name},
                    syntax.arguments: {name: value for name, value in arguments.items() if name not in moved},
                },
                "required": ["name", syntax.arguments],
                "additionalProperties": False,
                "x-guidance": _STYLE,
            }
            rules.append(f"tool_{index}: %json {json.dumps(call | moved)}")
        return str(_matcher_type().grammar_from_lark("%llguidance {}\n" + "\n".join(rules)))

    def _literal(self, text: str, syntax: Syntax) -> str:
        """Return a text of the frame for a grammar: special tokens by their ids, the rest in quotes."""
        special = {str(token): int(i) for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        for mark in syntax.special:
            if mark in special and mark in text:
                before, _, after = text.partition(mark)
                return f"{self._literal(before, syntax)} <[{special[mark]}]> {self._literal(after, syntax)}"
        return json.dumps(text) if text else ""

    def _matcher(self, grammar: str) -> Any:
        """Return a matcher at its beginning; compiled once for each grammar."""
        with self._lock:
            known = self._compiled.get(grammar)
            if known is None:
                known = self._compile(grammar)
                self._compiled[grammar] = known
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return known.deep_copy()

    def _compile(self, grammar: str) -> Any:
        import llguidance
        from llguidance.hf import from_tokenizer

        if self._table is None:
            self._table = from_tokenizer(self._tokenizer, n_vocab=self._vocab, eos_token=self._end_ids)
        limits = llguidance.LLParserLimits(max_grammar_size=MOST_SYMBOLS, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._table, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise BadInput(f"the answer cannot be held to this schema: {_reason(matcher.get_error())}")
        return matcher

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))


class Constraint:
    """One answer's constraint: which tokens may come next. With `decode` it begins where the reasoning ends."""

    def __init__(
        self, matcher: Any, vocab: int, end_ids: Collection[int], decode: Callable[[Sequence[int]], str] | None
    ) -> None:
        import numpy

        self._matcher, self._decode = matcher, decode
        self._words = numpy.empty((vocab + 31) // 32, numpy.int32)
        self._ends = numpy.zeros_like(self._words)
        for end in end_ids:
            self._ends.view(numpy.uint32)[end // 32] |= numpy.uint32(1 << (end % 32))
        self._thoughts: list[int] = []

    def allowed(self) -> Mask | None:
        """Return the mask of what may come next, int32 [ceil(V/32)], lowest bit first; None allows everything.

        The array is written anew at the next call. Where the grammar has become too much for its limits the answer
        ends.
        """
        if self._decode is not None:
            return None
        if self._matcher.is_stopped():
            return self._ends
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        return self._ends if self._matcher.is_error() else self._words

    def accept(self, token: int) -> None:
        """Take the token that was sampled."""
        if self._decode is None:
            self._matcher.consume_token(token)
            return
        self._thoughts.append(token)
        if THOUGHT in self._decode(self._thoughts[-_TAIL:]):
            self._decode = None


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose objects have only the properties that it names, unless it speaks of others itself.

    What fits it fits the given one too. Most schemas do not say `additionalProperties`, and a model that may go on
    with properties of its own invention may do so until its tokens end.
    """
    if "allOf" in json.dumps(schema):  # its parts add to each other, so none of them may be closed
        return schema
    found: dict[str, Any] = _closed(schema)
    return found


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name in ("properties", "$defs", "definitions", "patternProperties"):
        if isinstance(schema.get(name), dict):
            found[name] = {key: _closed(value) for key, value in schema[name].items()}
    for name in ("items", "additionalProperties"):
        if name in schema:
            found[name] = _closed(schema[name])
    if "properties" not in schema:
        for name in ("anyOf", "oneOf", "prefixItems"):
            if isinstance(schema.get(name), list):
                found[name] = [_closed(value) for value in schema[name]]
    elif not schema.keys() & {"additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref"}:
        found["additionalProperties"] = False
    return found


def _matcher_type() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise MissingExtra("serve", "constrained decoding") from error
    return LLMatcher


def _reason(text: str) -> str:
    """The first line of llguidance's message that says something, without its place in our grammar."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].removeprefix("Error: ")[:300] if lines else "it is too large"
