"""Answers in the OpenAI protocol: whole ones, chunks of a stream, and errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ascent.records.errors import AscentError, BadInput, Busy, Unavailable, UnknownName
from ascent.serve.chat.collect import Whole
from ascent.serve.chat.text import BROKEN
from ascent.serve.chat.types import (
    ContextOverflow,
    Delta,
    Finish,
    Reasoning,
    Text,
    TextToken,
    ToolArguments,
    ToolStart,
    Usage,
)
from ascent.serve.openai.request import BadField
from ascent.serve.wire.errors import ServiceError

Kind = Literal["chat", "text"]
FINISH_REASONS = {"stop": "stop", "stop_sequence": "stop", "length": "length", "tool": "tool_calls"}
_STATUS = {"AccessDeniedException": 403, "ResourceNotFoundException": 404, "ThrottlingException": 429}


class Reply:
    """One answer of `/v1/chat/completions` (kind chat) or `/v1/completions` (kind text), with `n` choices a prompt."""

    def __init__(self, kind: Kind, model: str, n: int = 1) -> None:
        self.kind, self._n = kind, n
        self._head = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """Return the answer in one piece, one choice for each of `answers`."""
        choices = [self._choice(index, whole) for index, whole in enumerate(answers)]
        usage = usage_field([whole.finish.usage for whole in answers], self._n)
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": usage}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """Return a delta as a chunk; None where it says nothing in this protocol."""
        finish = FINISH_REASONS[delta.reason] if isinstance(delta, Finish) else None
        if self.kind == "text":
            if not isinstance(delta, Text | Finish):
                return None
            text, tokens = (delta.text, delta.tokens) if isinstance(delta, Text) else ("", ())
            logprobs = self._text_logprobs(index, tokens) if tokens else None
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        else:
            choice = {"index": index, "delta": self._delta(index, delta), "logprobs": None, "finish_reason": finish}
            if isinstance(delta, Text) and delta.tokens:
                choice["logprobs"] = {"content": [_chat_logprob(token) for token in delta.tokens], "refusal": None}
        if isinstance(delta, Finish) and delta.stop_sequence is not None:
            choice["stop_reason"] = delta.stop_sequence  # vLLM's field: which of the stop strings it was
        return {**self._head, "object": self._chunk_name, "choices": [choice]}

    def usage_chunk(self, usages: Iterable[Usage]) -> dict[str, Any]:
        """Return the chunk that carries the usage and no choice."""
        return {**self._head, "object": self._chunk_name, "choices": [], "usage": usage_field(list(usages), self._n)}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _delta(self, index: int, delta: Delta) -> dict[str, Any]:
        first = index not in self._begun
        self._begun.add(index)
        found: dict[str, Any] = {"role": "assistant"} if first else {}
        if isinstance(delta, Text):
            found["content"] = delta.text
        elif isinstance(delta, Reasoning):
            found["reasoning_content"] = delta.text
        elif isinstance(delta, ToolStart):
            function = {"name": delta.name, "arguments": ""}
            found["tool_calls"] = [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]
        elif isinstance(delta, ToolArguments):
            found["tool_calls"] = [{"index": delta.index, "function": {"arguments": delta.text}}]
        return found

    def _choice(self, index: int, whole: Whole) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": FINISH_REASONS[whole.finish.reason]}
        if whole.finish.stop_sequence is not None:
            choice["stop_reason"] = whole.finish.stop_sequence
        if self.kind == "text":
            logprobs = self._text_logprobs(index, whole.tokens) if whole.tokens else None
            return choice | {"text": whole.text, "logprobs": logprobs}
        message: dict[str, Any] = {"role": "assistant", "content": whole.text or (None if whole.calls else "")}
        if whole.reasoning:
            message["reasoning_content"] = whole.reasoning
        if whole.calls:
            message["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for id, name, arguments in whole.calls
            ]
        tokens = [_chat_logprob(token) for token in whole.tokens]
        return choice | {"message": message, "logprobs": {"content": tokens, "refusal": None} if tokens else None}

    def _text_logprobs(self, index: int, tokens: Sequence[TextToken]) -> dict[str, Any]:
        offsets, at = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        self._offsets[index] = at
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logp for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
            "text_offset": offsets,
        }


def usage_field(usages: Sequence[Usage], n: int = 1) -> dict[str, Any]:
    """Return `usage` of answers in order; a prompt, which its `n` choices share, counts once."""
    prompt = sum(usage.prompt for usage in usages[::n])
    completion = sum(usage.completion for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached for usage in usages[::n])},
    }


def error_reply(error: AscentError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return (status, body, headers) of an error of the house."""
    headers: dict[str, str] = {}
    kind, code, status = "invalid_request_error", None, 400
    if isinstance(error, ServiceError):
        status = error.status or _STATUS.get(error.code, 401)
        code = {403: "permission_denied", 404: "model_not_found", 413: "request_too_large"}.get(
            status, "invalid_api_key" if status == 401 else error.code
        )
    elif isinstance(error, Busy):
        status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    elif isinstance(error, UnknownName):
        status, code = 404, "model_not_found"
    elif isinstance(error, ContextOverflow):
        code = "context_length_exceeded"
    elif isinstance(error, Unavailable):
        status, kind, code = 503, "server_error", "unavailable"
    elif not isinstance(error, BadInput):
        status, kind, code = 500, "server_error", "internal_error"
    param = error.param if isinstance(error, BadField) else None
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code}}, headers


def _chat_logprob(token: TextToken) -> dict[str, Any]:
    return _logprob(token.text, token.logp) | {"top_logprobs": [_logprob(text, logp) for text, logp in token.top]}


def _logprob(text: str, logp: float) -> dict[str, Any]:
    """`bytes` is null where the token is a part of a character, whose bytes the text does not show."""
    return {"token": text, "logprob": logp, "bytes": None if BROKEN in text else list(text.encode())}
