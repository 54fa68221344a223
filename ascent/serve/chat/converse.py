"""Converse's JSON and the chat door: requests in, messages and events out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ascent.records.errors import BadInput, nearest
from ascent.serve.chat.collect import Whole
from ascent.serve.chat.types import (
    ChatRequest,
    Delta,
    Finish,
    Reasoning,
    Text,
    ToolArguments,
    ToolResult,
    ToolSpec,
    ToolStart,
    ToolUse,
    Turn,
)

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool": "tool_use", "stop_sequence": "stop_sequence"}
PLAIN = ("txt", "md", "csv", "html")
FIELDS = ("seed", "regex", "parallel_tool_calls")
"""What `additionalModelRequestFields` may hold."""
_UNREAD = ("image", "video", "audio")
_BLOCKS = ("text", "document", "toolUse", "toolResult", "reasoningContent", "guardContent", "citationsContent")


def read_request(request: dict[str, Any]) -> ChatRequest:
    """Return what a Converse or CountTokens request asks for.

    Raises:
        BadInput: it holds what no model here can read, or a field that would change the answer and is not known.
    """
    turns: list[Turn] = []
    if system := _texts(request.get("system") or (), "system"):
        turns.append(Turn("system", "\n".join(system)))
    for index, message in enumerate(request.get("messages") or ()):
        turns.append(_turn(message, f"messages[{index}]"))
    config = request.get("inferenceConfig") or {}
    tools, choice = _tools(request.get("toolConfig") or {})
    extra = request.get("additionalModelRequestFields") or {}
    if not isinstance(extra, dict):
        raise BadInput("additionalModelRequestFields must be a JSON object")
    for name in extra:
        if name not in FIELDS:
            raise BadInput(
                f"additionalModelRequestFields.{name} is not known here{nearest(name, FIELDS)}; the fields are "
                f"{', '.join(FIELDS)}"
            )
    if request.get("promptVariables"):
        raise BadInput("promptVariables belong to Prompt management, which is not here; put them into the text")
    seed, regex, parallel = extra.get("seed"), extra.get("regex"), extra.get("parallel_tool_calls", True)
    if not isinstance(seed, int | None) or not isinstance(regex, str | None) or not isinstance(parallel, bool):
        raise BadInput("in additionalModelRequestFields, seed is a whole number, regex a text, the rest true or false")
    return ChatRequest(
        turns=tuple(turns),
        tools=tools,
        tool_choice=choice,
        max_tokens=config.get("maxTokens"),
        temperature=config.get("temperature", 1.0),
        top_p=config.get("topP", 1.0) or 1e-6,  # the service allows 0, which leaves the likeliest token alone
        stop=tuple(stop for stop in config.get("stopSequences") or () if stop),
        seed=seed,
        schema=_schema(request.get("outputConfig") or {}),
        regex=regex,
        parallel=parallel,
    )


def marked(request: dict[str, Any]) -> list[str]:
    """Return the texts that a request marks by `guardContent`; where there are none, all that the user says counts."""
    blocks = [block for message in request.get("messages") or () for block in message["content"]]
    guards = [block["guardContent"] for block in [*blocks, *(request.get("system") or ())] if "guardContent" in block]
    return [guard["text"]["text"] for guard in guards if "text" in guard]


def usage_member(finish: Finish) -> dict[str, int]:
    """Return `TokenUsage`: as at Amazon, prompt tokens that were found computed are counted apart from the others."""
    usage = finish.usage
    found = {
        "inputTokens": max(0, usage.prompt - usage.cached),
        "outputTokens": usage.completion,
        "totalTokens": usage.prompt + usage.completion,
    }
    return found | ({"cacheReadInputTokens": usage.cached} if usage.cached else {})


def message_member(whole: Whole) -> dict[str, Any]:
    """Return the assistant's message."""
    content: list[dict[str, Any]] = []
    if whole.reasoning:
        content.append({"reasoningContent": {"reasoningText": {"text": whole.reasoning}}})
    if whole.text or not (whole.calls or content):
        content.append({"text": whole.text})
    for index, (id, name, _) in enumerate(whole.calls):
        content.append({"toolUse": {"toolUseId": id, "name": name, "input": whole.arguments(index)}})
    return {"role": "assistant", "content": content}


class Blocks:
    """Numbers the content blocks of a stream and opens and closes them."""

    def __init__(self) -> None:
        self._index, self._open = -1, ""

    def events(self, delta: Delta) -> list[tuple[str, dict[str, Any]]]:
        """Return the events of a delta that is no `Finish`."""
        if isinstance(delta, ToolStart):
            tool = {"toolUse": {"toolUseId": delta.id, "name": delta.name}}
            events = self._turn(f"tool {delta.index}")
            return [*events, ("contentBlockStart", {"start": tool, "contentBlockIndex": self._index})]
        if isinstance(delta, ToolArguments):
            return [self._delta({"toolUse": {"input": delta.text}})]
        if isinstance(delta, Reasoning):
            return [*self._turn("reasoning"), self._delta({"reasoningContent": {"text": delta.text}})]
        if isinstance(delta, Text) and delta.text:
            return [*self._turn("text"), self._delta({"text": delta.text})]
        return []

    def end(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what ends the last block. A message has at least one, so an empty answer is an empty text."""
        events = [] if self._open else [*self._turn("text"), self._delta({"text": ""})]
        return [*events, ("contentBlockStop", {"contentBlockIndex": self._index})]

    def _turn(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        if self._open == kind:
            return []
        events = [("contentBlockStop", {"contentBlockIndex": self._index})] if self._open else []
        self._open = kind
        self._index += 1
        return events

    def _delta(self, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "contentBlockDelta", {"delta": delta, "contentBlockIndex": self._index}


def _turn(message: dict[str, Any], where: str) -> Turn:
    texts: list[str] = []
    uses: list[ToolUse] = []
    results: list[ToolResult] = []
    reasoning = ""
    role = message["role"]
    for index, block in enumerate(message["content"]):
        place = f"{where}.content[{index}]"
        if use := block.get("toolUse"):
            if not isinstance(use["input"], dict):
                raise BadInput(f"{place}.toolUse.input must be a JSON object")
            uses.append(ToolUse(use["toolUseId"], use["name"], use["input"]))
        elif result := block.get("toolResult"):
            text = "\n".join(_texts(result["content"], f"{place}.toolResult.content"))
            results.append(ToolResult(result["toolUseId"], text, result.get("status") == "error"))
        elif thought := block.get("reasoningContent"):
            reasoning += (thought.get("reasoningText") or {}).get("text", "")
        else:
            texts += _texts([block], f"{where}.content", index)
    if uses and role != "assistant":
        raise BadInput(f"{where}: only the assistant uses tools; a toolUse block stands in a message of the {role}")
    if results and role != "user":
        raise BadInput(f"{where}: results of tools are the user's; a toolResult block stands in one of the {role}")
    return Turn(role, "\n".join(texts), reasoning, tuple(uses), tuple(results))


def _texts(blocks: Sequence[dict[str, Any]], where: str, first: int = 0) -> list[str]:
    """Return the texts of blocks. Cache points are passed over: what was computed before is found by itself."""
    found = []
    for index, block in enumerate(blocks, first):
        if "cachePoint" in block:
            continue
        text = _text(block, f"{where}[{index}]")
        if text is None:
            kind = next(iter(block), "an empty block")
            what = "which this model cannot read" if kind in _UNREAD else "which is not served here"
            raise BadInput(f"{where}[{index}] is {kind}, {what}; use {', '.join(_BLOCKS)} blocks")
        found.append(text)
    return found


def _text(block: dict[str, Any], where: str) -> str | None:
    if (text := block.get("text")) is not None:
        return str(text)
    if "json" in block:
        return json.dumps(block["json"], ensure_ascii=False)
    if (guard := block.get("guardContent")) is not None:
        return str(guard["text"]["text"]) if "text" in guard else None
    if (document := block.get("document")) is not None:
        return _document(document, where)
    if (cited := block.get("citationsContent")) is not None:
        return "".join(part.get("text", "") for part in cited.get("content") or ())
    if (result := block.get("searchResult")) is not None:
        body = "\n".join(part["text"] for part in result["content"])
        return f"<search_result source={json.dumps(result['source'])}>\n{result['title']}\n{body}\n</search_result>"
    return None


def _document(document: dict[str, Any], where: str) -> str:
    """A document that is plain text, set into the conversation under its name."""
    source = document["source"]
    if "text" in source:
        body = source["text"]
    elif "content" in source:
        body = "\n".join(part.get("text", "") for part in source["content"])
    elif "bytes" in source and document.get("format", "txt") in PLAIN:
        try:
            body = source["bytes"].decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}.document.source.bytes is not UTF-8; send plain text") from error
    else:
        kind = document.get("format") if "bytes" in source else "an S3 location"
        raise BadInput(
            f"{where}.document is {kind}, which is not read here; send the text, in a format of {', '.join(PLAIN)}"
        )
    context = f"{document['context']}\n" if document.get("context") else ""
    return f"<document name={json.dumps(document['name'])}>\n{context}{body}\n</document>"


def _tools(config: dict[str, Any]) -> tuple[tuple[ToolSpec, ...], str]:
    tools = []
    for index, tool in enumerate(config.get("tools") or ()):
        if "cachePoint" in tool:
            continue
        if "toolSpec" not in tool:
            raise BadInput(f"toolConfig.tools[{index}] is {next(iter(tool), 'empty')}; this server has toolSpec alone")
        spec = tool["toolSpec"]
        schema = spec["inputSchema"].get("json")
        if not isinstance(schema, dict):
            raise BadInput(f"toolConfig.tools[{index}].toolSpec.inputSchema.json must be a JSON object")
        tools.append(ToolSpec(spec["name"], spec.get("description", ""), schema))
    choice = config.get("toolChoice") or {"auto": {}}
    if "tool" in choice:
        return tuple(tools), choice["tool"]["name"]
    return tuple(tools), "any" if "any" in choice else "auto"


def _schema(config: dict[str, Any]) -> dict[str, Any] | None:
    if config.get("effort"):
        raise BadInput("outputConfig.effort is not served: the models here have no such setting; leave it out")
    if (form := config.get("textFormat")) is None:
        return None
    try:
        schema = json.loads(form["structure"]["jsonSchema"]["schema"])
    except (KeyError, ValueError) as error:
        raise BadInput(f"outputConfig.textFormat.structure.jsonSchema.schema is no JSON ({error})") from error
    if not isinstance(schema, dict):
        raise BadInput("outputConfig.textFormat.structure.jsonSchema.schema must be a JSON object")
    return schema
