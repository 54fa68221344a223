"""A model behind another server of the OpenAI protocol, such as vLLM, through the same door."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ascent.inference.engines.remote import WHOLE_DISTRIBUTION
from ascent.records.errors import AscentError, BadInput, Busy, MissingExtra
from ascent.serve.chat.template import tool_json
from ascent.serve.chat.types import (
    ChatRequest,
    Delta,
    Finish,
    Finished,
    ModelFailed,
    Reasoning,
    Text,
    TextToken,
    ToolArguments,
    ToolStart,
    Turn,
    Usage,
)

if TYPE_CHECKING:
    import httpx

CONNECT_S = 10.0
LONGEST_S = 600.0
ASKED_S = 5.0  # for the short questions: context and token counts
RETRY_S = 1.0
_REASONS: dict[str, Finished] = {"length": "length", "tool_calls": "tool", "function_call": "tool"}


class RemoteModel:
    """A `ChatModel` behind `url`, which ends in `/v1`; `model` is its name there, `key` a bearer key it may need."""

    def __init__(self, url: str, model: str, id: str, key: str | None = None) -> None:
        self.url, self.model, self.id = url.rstrip("/"), model, id
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._refused: set[str] = set()  # of the fields that are not part of every server's protocol
        # One a loop: connections are kept, and cannot be used from another.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    @cached_property
    def context(self) -> int:
        """The context in tokens as the server says it, 0 where it does not."""
        models = self._ask("GET", f"{self.url}/models").get("data") or []
        lengths = [one.get("max_model_len") for one in models if one.get("id") == self.model]
        return int(lengths[0] or 0) if lengths else 0

    def chat(self, request: ChatRequest) -> AsyncIterator[Delta]:
        """Answer a conversation.

        Raises:
            BadInput: the server refuses the request.
            Busy: it has too much to do.
            ModelFailed: it cannot be reached, fails, or breaks off.
        """
        body = _sampling(request) | {"messages": openai_messages(request.turns)}
        if request.tools and request.tool_choice != "none":
            body["tools"] = [tool_json(tool) for tool in request.tools]
            choice: Any = {"any": "required", "auto": "auto"}.get(request.tool_choice)
            body["tool_choice"] = choice or {"type": "function", "function": {"name": request.tool_choice}}
            body |= {} if request.parallel else {"parallel_tool_calls": False}
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return self._stream("/chat/completions", body, request)

    def complete(self, prompt: str, request: ChatRequest) -> AsyncIterator[Delta]:
        """Go on with a text. Raises as `chat`."""
        body = _sampling(request) | {"prompt": prompt}
        if request.logprobs:
            body["logprobs"] = request.top_logprobs
        return self._stream("/completions", body, request)

    def count(self, request: ChatRequest) -> int:
        """Return the tokens of a conversation, as vLLM's `/tokenize` counts them.

        Raises:
            ModelFailed: the server has no such route.
        """
        body: dict[str, Any] = {"model": self.model, "messages": openai_messages(request.turns)}
        if request.tools:
            body["tools"] = [tool_json(tool) for tool in request.tools]
        return int(self._ask("POST", f"{self.url.removesuffix('/v1')}/tokenize", body).get("count") or 0)

    async def _stream(self, path: str, body: dict[str, Any], request: ChatRequest) -> AsyncIterator[Delta]:
        reader = _Reader()
        body |= {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **WHOLE_DISTRIBUTION}
        try:
            async with self._sent(path, body, request.deadline_s) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        break
                    for delta in reader.read(data):
                        yield delta
        finally:
            if request.meter is not None and reader.chunks:
                request.meter(reader.usage)
        yield reader.finish(request)

    @asynccontextmanager
    async def _sent(self, path: str, body: dict[str, Any], deadline_s: float | None) -> AsyncIterator[httpx.Response]:
        """Send a request and give its answer while it streams; leaving the block closes the connection."""
        httpx = _httpx()
        limit = httpx.Timeout(deadline_s or LONGEST_S, connect=CONNECT_S)
        try:
            async with AsyncExitStack() as stack:
                while True:
                    sent = {name: value for name, value in body.items() if name not in self._refused}
                    asked = self._client().stream("POST", self.url + path, json=sent, timeout=limit)
                    answer = await stack.enter_async_context(asked)
                    if answer.status_code < 400:
                        break
                    await answer.aread()
                    refused = {name for name in WHOLE_DISTRIBUTION if name in sent and name in answer.text}
                    if not refused or answer.status_code not in (400, 422):
                        raise _refusal(answer)
                    self._refused |= refused
                yield answer
        except httpx.HTTPError as error:
            raise ModelFailed(f"{self.url}: {error or type(error).__name__}; see whether the server runs") from error

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            limits = _httpx().Limits(max_connections=None)  # it is the server behind that says when it is full
            self._clients[loop] = _httpx().AsyncClient(headers=self._headers, limits=limits)
        return self._clients[loop]

    def _ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        httpx = _httpx()
        try:
            answer = httpx.request(method, url, json=body, headers=self._headers, timeout=ASKED_S)
            if answer.status_code >= 400:
                raise _refusal(answer)
            found = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ModelFailed(f"{url}: {error or type(error).__name__}; see whether the server runs") from error
        return found if isinstance(found, dict) else {}


class _Reader:
    """Reads the chunks of one answer."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._first: float | None = None
        self._usage: Usage | None = None
        self.chunks = 0
        self._reason = ""
        self._stopped_by: str | None = None
        self._calls: dict[int, int] = {}  # their index → ours

    @property
    def usage(self) -> Usage:
        """What the server says; as long as it has not, one token a chunk, as servers of this protocol send them."""
        return self._usage or Usage(0, self.chunks)

    def read(self, data: str) -> list[Delta]:
        """Return the deltas of one chunk. Raises ModelFailed for one that cannot be read or says that it failed."""
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                raise ModelFailed(f"the model's server broke off: {chunk['error']}")
            if usage := chunk.get("usage"):
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                self._usage = Usage(usage["prompt_tokens"], usage.get("completion_tokens", 0), cached)
            return [delta for choice in chunk.get("choices") or () for delta in self._choice(choice)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFailed(f"the model's server sent what is no chunk: {data[:200]}") from error

    def finish(self, request: ChatRequest) -> Finish:
        """Return the last delta. Raises ModelFailed when the answer was cut off."""
        if not self._reason:
            raise ModelFailed("the model's server ended its answer without a finish reason; see its log")
        reason: Finished = _REASONS.get(self._reason, "stop")
        if self._stopped_by in request.stop:
            reason = "stop_sequence"
        return Finish(reason, self.usage, self._first, time.perf_counter() - self._begun, self._stopped_by)

    def _choice(self, choice: dict[str, Any]) -> list[Delta]:
        found: list[Delta] = []
        delta = choice.get("delta") or {"content": choice.get("text")}
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            found.append(Reasoning(thought))
        if text := delta.get("content"):
            found.append(Text(text, _tokens(choice.get("logprobs") or {})))
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            index = call.get("index", 0)
            if index not in self._calls:
                self._calls[index] = len(self._calls)
                found.append(ToolStart(self._calls[index], call.get("id") or f"call_{index}", function["name"]))
            if arguments := function.get("arguments"):
                found.append(ToolArguments(self._calls[index], arguments))
        if found:
            self.chunks += 1
            self._first = time.perf_counter() - self._begun if self._first is None else self._first
        if reason := choice.get("finish_reason"):
            self._reason = reason
            stopped_by = choice.get("stop_reason")
            self._stopped_by = stopped_by if isinstance(stopped_by, str) else None
        return found


def openai_messages(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    """Return turns as messages of the OpenAI protocol."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        found += [{"role": "tool", "tool_call_id": one.id, "content": one.text} for one in turn.tool_results]
        if turn.role != "assistant":
            if turn.text or not turn.tool_results:
                found.append({"role": turn.role, "content": turn.text})
            continue
        message: dict[str, Any] = {"role": "assistant", "content": turn.text}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_uses:
            message["tool_calls"] = [
                {
                    "id": use.id,
                    "type": "function",
                    "function": {"name": use.name, "arguments": json.dumps(use.arguments, ensure_ascii=False)},
                }
                for use in turn.tool_uses
            ]
        found.append(message)
    return found


def _sampling(request: ChatRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p}
    optional = {"max_tokens": request.max_tokens, "seed": request.seed, "stop": list(request.stop) or None}
    body |= {name: value for name, value in optional.items() if value is not None}
    if request.schema is not None:
        schema = {"name": "answer", "schema": request.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.regex is not None:
        body["structured_outputs"] = {"regex": request.regex}  # vLLM's own field
    return body


def _tokens(logprobs: dict[str, Any]) -> tuple[TextToken, ...]:
    if "token_logprobs" in logprobs:
        tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
        rows = zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
        return tuple(TextToken(text, logp, tuple((top or {}).items())) for text, logp, top in rows)
    return tuple(
        TextToken(
            one["token"],
            one["logprob"],
            tuple((other["token"], other["logprob"]) for other in one.get("top_logprobs") or ()),
        )
        for one in logprobs.get("content") or ()
    )


def _refusal(answer: httpx.Response) -> AscentError:
    """What an error answer means to a caller of this server."""
    try:
        said = answer.json()
        error = said.get("error", said.get("detail", said))
        text = str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        text = answer.text[:500]
    if answer.status_code == 429:
        after = answer.headers.get("retry-after", "")
        wait = float(after) if after.replace(".", "", 1).isdigit() else RETRY_S
        return Busy(f"the model's server has too much to do: {text}", retry_after_s=wait)
    if answer.status_code in (400, 413, 422):
        # The words that agent frameworks look for to shorten the history; see `ContextOverflow`.
        long = "context length" in text or "too long" in text
        return BadInput(f"Input is too long for requested model: {text}" if long else text)
    return ModelFailed(f"the model's server answered {answer.status_code}: {text}", answer.status_code)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise MissingExtra("serve", "a remote model") from error
    return httpx
