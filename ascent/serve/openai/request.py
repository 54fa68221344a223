"""Bodies of the OpenAI protocol: what is understood, what may be passed over, and what must be refused.

A field that would change the answer and is not served is refused, so that nobody takes an answer for what it is not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ascent.records.errors import BadInput, nearest
from ascent.serve.chat.types import ChatRequest, ToolResult, ToolSpec, ToolUse, Turn

MOST_CHOICES = 16
MOST_TOP = 20
HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction"),
        *("prompt_cache_retention", "stream_options", "model", "stream", "return_token_ids"),
    }
)
"""Fields that change nothing about the answer, or that the route reads itself."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "top_k": (0, -1),
    "min_p": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "functions": ([],),
}
"""Fields of which only the values that change nothing are served."""
_SAMPLING = frozenset(
    {*("max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed", "n"), "response_format"}
)
_CHAT = frozenset({"messages", "tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs"})
_COMPLETION = frozenset({"prompt", "logprobs"})
_STRUCTURED = "structured_outputs"  # vLLM's field: json or regex


class BadField(BadInput):
    """A field of a body that cannot be served; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        self.param = param
        super().__init__(f"{param}: {message}")


@dataclass(frozen=True)
class Asked:
    """A body that was read: the request, the texts to go on with (completions only), and the form of the answer."""

    request: ChatRequest
    n: int = 1
    prompts: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read_chat(body: dict[str, Any]) -> Asked:
    """Return what a body of `/v1/chat/completions` asks for.

    Raises:
        BadField: a field is malformed, unknown, or would change the answer and is not served.
    """
    _known(body, _CHAT | _SAMPLING)
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(_list(body, "tools")))
    logprobs, top = bool(body.get("logprobs")), number(body, "top_logprobs", int, 0, MOST_TOP) or 0
    if top and not logprobs:
        raise BadField("top_logprobs", "needs logprobs to be true")
    turns = read_messages(body.get("messages"))
    extra = {"turns": turns, "tools": tools, "tool_choice": _choice(body, tools), "logprobs": logprobs}
    parallel = body.get("parallel_tool_calls", True) is not False
    return _asked(body, extra | {"top_logprobs": int(top), "parallel": parallel})


def read_completion(body: dict[str, Any]) -> Asked:
    """Return what a body of `/v1/completions` asks for. Raises as `read_chat`."""
    _known(body, _COMPLETION | _SAMPLING)
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise BadField("prompt", "give a text or a list of texts; lists of token ids are not served")
    top = number(body, "logprobs", int, 0, MOST_TOP)
    asked = _asked(body, {"logprobs": top is not None, "top_logprobs": int(top or 0)})
    return Asked(asked.request, asked.n, tuple(prompts), asked.stream, asked.include_usage)


def read_messages(messages: Any) -> tuple[Turn, ...]:
    """Return messages as turns; results of tools that follow each other become one turn of the user.

    Raises:
        BadField: one is malformed or holds what no model here reads.
    """
    if not isinstance(messages, list) or not messages:
        raise BadField("messages", "give a list of at least one message")
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadField(where, "must be a JSON object")
        role = message.get("role")
        text = _content(message.get("content"), f"{where}.content")
        if role == "tool":
            result = ToolResult(_text(message, "tool_call_id", where), text)
            if turns and turns[-1].tool_results and not turns[-1].text:
                turns[-1] = Turn("user", tool_results=(*turns[-1].tool_results, result))
            else:
                turns.append(Turn("user", tool_results=(result,)))
        elif role == "assistant":
            uses = tuple(
                _use(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(_list(message, "tool_calls"))
            )
            thought = message.get("reasoning_content") or message.get("reasoning") or ""
            turns.append(Turn("assistant", text, str(thought), uses))
        elif role in ("system", "developer"):
            turns.append(Turn("system", text))
        elif role == "user":
            turns.append(Turn("user", text))
        else:
            raise BadField(f"{where}.role", f"is {role!r}; it must be system, developer, user, assistant or tool")
    return tuple(turns)


def _asked(body: dict[str, Any], extra: dict[str, Any]) -> Asked:
    stop = body.get("stop") or []
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else (0,)
    if not all(isinstance(one, str) for one in stops):
        raise BadField("stop", "give a text or a list of texts")
    limit = number(body, "max_completion_tokens", int, 1) or number(body, "max_tokens", int, 1)
    temperature, top_p = number(body, "temperature", float, 0, 2), number(body, "top_p", float, 0, 1)
    schema, regex = _format(body)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadField("stream_options", "must be a JSON object")
    request = ChatRequest(
        max_tokens=None if limit is None else int(limit),
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p or 1e-6,  # the protocol allows 0, which leaves the likeliest token alone
        stop=tuple(one for one in stops if one),
        seed=_seed(body),
        schema=schema,
        regex=regex,
        **extra,
    )
    n = number(body, "n", int, 1, MOST_CHOICES)
    return Asked(request, int(n or 1), (), body.get("stream") is True, options.get("include_usage") is True)


def _known(body: dict[str, Any], served: frozenset[str]) -> None:
    for name, value in body.items():
        if value is None or name in served or name in HARMLESS or name == _STRUCTURED:
            continue
        if name not in NEUTRAL:
            known = served | HARMLESS | NEUTRAL.keys()
            raise BadField(name, f"is not served here and could change the answer{nearest(name, known)}; leave it out")
        if value not in NEUTRAL[name]:
            raise BadField(name, f"is served with {NEUTRAL[name][0]!r} only, which changes nothing; leave it out")


def number(body: dict[str, Any], name: str, kind: type, low: float, high: float | None = None) -> float | None:
    """Return the number under `name`, None where it is absent or null. Raises BadField when it is none in range."""
    value = body.get(name)
    if value is None:
        return None
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):
        limits = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise BadField(name, f"must be a {'whole ' if kind is int else ''}number {limits}, got {value!r}")
    return float(value) if kind is float else value


def _seed(body: dict[str, Any]) -> int | None:
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise BadField("seed", "must be a whole number")
    return None if seed is None else seed % (1 << 48)


def _format(body: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """Return (schema, expression) that the answer is held to."""
    structured = body.get(_STRUCTURED) or {}
    if not isinstance(structured, dict) or not structured.keys() <= {"json", "regex"}:
        raise BadField(_STRUCTURED, "may hold json, a schema, or regex, a text")
    schema, regex = structured.get("json"), structured.get("regex")
    form = body.get("response_format") or {"type": "text"}
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_object":
        schema = {"type": "object"}
    elif kind == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema")
    elif kind != "text":
        raise BadField("response_format", 'its type must be "text", "json_object" or "json_schema"')
    if not isinstance(schema, dict | None) or (kind == "json_schema" and schema is None):
        raise BadField("response_format", "json_schema.schema must be a JSON object")
    if not isinstance(regex, str | None):
        raise BadField(_STRUCTURED, "regex must be a text")
    return schema, regex


def _choice(body: dict[str, Any], tools: Sequence[ToolSpec]) -> str:
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        if choice == "required" and not tools:
            raise BadField("tool_choice", "is required, but there are no tools")
        return "any" if choice == "required" else choice
    name = (choice.get("function") or {}).get("name") if isinstance(choice, dict) else None
    if name not in [tool.name for tool in tools]:
        names = ", ".join(tool.name for tool in tools) or "none"
        raise BadField("tool_choice", f"must be auto, none, required, or the function of a tool; the tools are {names}")
    return str(name)


def _tool(tool: Any, where: str) -> ToolSpec:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise BadField(where, 'must be {"type": "function", "function": {…}}')
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(schema, dict):
        raise BadField(f"{where}.function.parameters", "must be a JSON object")
    return ToolSpec(_text(function, "name", f"{where}.function"), str(function.get("description") or ""), schema)


def _use(call: Any, where: str) -> ToolUse:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadField(where, "must be the call of a function")
    arguments = function.get("arguments") or "{}"
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise BadField(f"{where}.function.arguments", "must be a JSON object, as text")
    return ToolUse(_text(call, "id", where), _text(function, "name", f"{where}.function"), parsed)


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadField(where, "must be a text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        field = {"text": "text", "refusal": "refusal"}.get(str(kind))
        if field is None or not isinstance(part.get(field), str):
            raise BadField(f"{where}[{index}]", f"is {kind or 'no part'}, and the models here read text alone")
        texts.append(part[field])
    return "\n".join(texts)


def _list(body: dict[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list | None):
        raise BadField(name, "must be a list")
    return value or []


def _text(body: dict[str, Any], name: str, where: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise BadField(f"{where}.{name}", "must be a text that is not empty")
    return value
