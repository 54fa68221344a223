"""Conversations with tools through a checkpoint's own chat template; what the template lacks is written out as text.

What a template can do is found by rendering a probe and looking for it in the text, never by its name.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ascent.records.errors import BadInput
from ascent.serve.chat.syntax import Syntax, syntax_of
from ascent.serve.chat.text import THINK
from ascent.serve.chat.types import ChatRequest, ToolSpec, ToolUse, Turn

if TYPE_CHECKING:
    from ascent.inference.chat import Renderer

_PROBE = "probe_e1f09b"  # in no template
_ID = re.compile(r"[A-Za-z0-9]+")


class ChatTemplate:
    """Renders requests for one checkpoint. Safe to use from several threads."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer, self.tokenizer = renderer, renderer.tokenizer
        self._lock = threading.Lock()  # the tokenizer's settings are not safe to share
        self.syntax: Syntax = syntax_of(str(self.tokenizer.chat_template))

    def prompt_ids(self, request: ChatRequest) -> list[int]:
        """Return the tokens of a conversation up to where the assistant is to speak.

        Control tokens inside a text are read as text: what a user or tool says cannot forge a turn. Other texts give
        the tokens that `Renderer.prompt_ids` gives.

        Raises:
            BadInput: the conversation does not end with the user, or the template refuses it.
        """
        if not request.turns or request.turns[-1].role == "assistant":
            raise BadInput("the conversation must end with a message of the user or a tool's result")
        tools = request.tools if request.tool_choice != "none" else ()
        messages = self.messages(request.turns)
        if tools and not self._knows_tools:
            messages = _with_tools(messages, tools)
        return self._render(messages, tools if self._knows_tools else ())

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Return turns as the template takes them: results before the user's text, calls in the template's own way."""
        found: list[dict[str, Any]] = []
        names = {use.id: use.name for turn in turns for use in turn.tool_uses}
        for turn in turns:
            for result in turn.tool_results:
                if not self._takes_results:
                    text = f"<tool_response>\n{result.text}\n</tool_response>"
                    found.append({"role": "user", "content": text})
                    continue
                answer = {"role": "tool", "content": result.text, "tool_call_id": self._id(result.id)}
                found.append(answer | ({"name": names[result.id]} if result.id in names else {}))
            if turn.role == "assistant":
                found.append(self._spoken(turn))
            elif turn.text or not turn.tool_results:
                found.append({"role": turn.role, "content": turn.text})
        return found

    def new_id(self) -> str:
        """Return an id for a call, of the form that the template takes."""
        name = uuid.uuid4().hex
        return name[: self.syntax.id_length] if self.syntax.id_length else f"call_{name[:24]}"

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether the template's prompt ends inside the reasoning."""
        ids = self._render([{"role": "user", "content": "x"}], ())
        return str(self.tokenizer.decode(ids[-8:])).rstrip().endswith(THINK)

    def _spoken(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": turn.text}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_uses and self._writes_calls:
            message["tool_calls"] = [_call(use, self._id(use.id)) for use in turn.tool_uses]
        elif turn.tool_uses:
            calls = [
                f"<tool_call>\n{_json({'name': use.name, 'arguments': use.arguments})}\n</tool_call>"
                for use in turn.tool_uses
            ]
            message["content"] = "\n".join([*([turn.text] if turn.text else []), *calls])
        return message

    def _id(self, given: str) -> str:
        """A call's id as the template takes it; the same id gives the same."""
        length = self.syntax.id_length
        if length is None or (len(given) == length and _ID.fullmatch(given)):
            return given
        return hashlib.sha256(given.encode()).hexdigest()[:length]

    @cached_property
    def _knows_tools(self) -> bool:
        return self._shows([{"role": "user", "content": "x"}], (ToolSpec(_PROBE, _PROBE, {"type": "object"}),))

    @cached_property
    def _writes_calls(self) -> bool:
        call = _call(ToolUse("abcdefghi", _PROBE, {}), "abcdefghi")
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        return self._shows([{"role": "user", "content": "x"}, said, *self._answer("y")])

    @cached_property
    def _takes_results(self) -> bool:
        call = _call(ToolUse("abcdefghi", "x", {}), "abcdefghi")
        said = {"role": "assistant", "content": "y", "tool_calls": [call]}
        return self._shows([{"role": "user", "content": "x"}, said, *self._answer(_PROBE)])

    @staticmethod
    def _answer(text: str) -> list[dict[str, Any]]:
        return [{"role": "tool", "content": text, "tool_call_id": "abcdefghi", "name": "x"}]

    def _shows(self, messages: list[dict[str, Any]], tools: Sequence[ToolSpec] = ()) -> bool:
        """Whether the template takes messages and tools, and the probe is in what it makes of them."""
        try:
            return _PROBE in self.tokenizer.decode(self._render(messages, tools))
        except BadInput:
            return False

    def _render(self, messages: list[dict[str, Any]], tools: Sequence[ToolSpec]) -> list[int]:
        from jinja2 import TemplateError

        try:
            with self._lock:
                ids = self.tokenizer.apply_chat_template(
                    messages,
                    tools=[tool_json(tool) for tool in tools] or None,
                    add_generation_prompt=True,
                    sanitize_control_tokens=True,
                    return_dict=False,
                )
        except (TemplateError, TypeError, ValueError) as error:  # templates fail in Python's own ways too
            roles = ", ".join(message["role"] for message in messages)
            raise BadInput(f"the model's chat template refuses a conversation of {roles}: {error}") from error
        return [int(token) for token in ids]


def tool_json(tool: ToolSpec) -> dict[str, Any]:
    """Return a tool as chat templates and the OpenAI protocol write it."""
    schema = tool.schema or {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": schema},
    }


def _with_tools(messages: list[dict[str, Any]], tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """Describe the tools in the system message, in the form that Hermes models are trained on."""
    listed = "\n".join(_json(tool_json(tool)) for tool in tools)
    text = (
        "You may call functions to help with the request. Their signatures are between <tools> tags:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "For each call, write a JSON object with the function's name and its arguments between <tool_call> tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
    )
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _call(use: ToolUse, id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": use.name, "arguments": use.arguments}}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
