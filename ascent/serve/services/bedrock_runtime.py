"""`bedrock-runtime`: conversations, raw invocations, token counts and guardrails."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent.records.errors import BadInput
from ascent.serve.chat.collect import Whole, collect
from ascent.serve.chat.converse import STOP_REASONS, Blocks, marked, message_member, read_request, usage_member
from ascent.serve.chat.guard import Guard
from ascent.serve.chat.guardrails import Guardrails, Rules, assess
from ascent.serve.chat.types import Delta, Finish, Text, Turn
from ascent.serve.openai.native import NativeBody, native_body
from ascent.serve.wire.arns import id_of
from ascent.serve.wire.errors import ServiceError

if TYPE_CHECKING:
    from ascent.serve.models import Models
    from ascent.serve.wire.authenticate import Caller

Event = tuple[str, dict[str, Any]]
_JSON = "application/json"


class BedrockRuntime:
    """The service. Guardrails are read from `guardrails`, a folder of YAML files (`ascent/serve/chat/guardrails.py`).

    InvokeModel takes three bodies, told apart by their fields: the OpenAI protocol's chat body (`messages`), Llama's
    (`prompt`, `max_gen_len`) and Mistral's (`prompt`, `max_tokens`, `stop`); see `ascent/serve/openai/native.py`.
    """

    service = "bedrock-runtime"

    def __init__(self, models: Models, guardrails: Path) -> None:
        self._models, self._guardrails = models, Guardrails(guardrails)

    async def converse(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer a conversation."""
        asked = read_request(request)
        guard = self._guard(request, caller)
        model = await self._models.opened(request["modelId"], caller, "bedrock-runtime:Converse")
        begun = time.perf_counter()
        if guard is not None and (blocked := guard.ask(asked, marked(request))) is not None:
            whole = Whole(text=blocked)
        else:
            whole = await collect(model.chat(asked if guard is None else guard.asked))
            if guard is not None:
                guard.check(whole)
        finish = _complete(whole.finish)
        result: dict[str, Any] = {
            "output": {"message": message_member(whole)},
            "stopReason": _stop_reason(finish, guard),
            "usage": usage_member(finish),
            "metrics": {"latencyMs": int(1000 * (time.perf_counter() - begun))},
        }
        if guard is not None and guard.trace:
            result["trace"] = guard.trace
        if (fields := _more(request, finish)) is not None:
            result["additionalModelResponseFields"] = fields
        return result

    async def converse_stream(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer a conversation as it is made. With a guardrail a block of text comes once all of it was checked."""
        asked = read_request(request)
        guard = self._guard(request, caller)
        model = await self._models.opened(request["modelId"], caller, "bedrock-runtime:ConverseStream")
        if guard is not None and (blocked := guard.ask(asked, marked(request))) is not None:
            deltas = _said(blocked)
        else:
            deltas = model.chat(asked if guard is None else guard.asked)
            deltas = deltas if guard is None else guard.checked(deltas)
        return {"stream": _events(deltas, request, guard)}

    async def invoke_model(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer a body of one of the native forms in the same form."""
        body = _native(request)
        model = await self._models.opened(request["modelId"], caller, "bedrock-runtime:InvokeModel")
        whole = await collect(body.deltas(model))
        _complete(whole.finish)
        return {"body": _dump(body.whole(whole, request["modelId"])), "contentType": _JSON}

    async def invoke_model_with_response_stream(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """As InvokeModel, in chunks of the same form; the last one carries `amazon-bedrock-invocationMetrics`."""
        body = _native(request)
        operation = "bedrock-runtime:InvokeModelWithResponseStream"
        model = await self._models.opened(request["modelId"], caller, operation)
        return {"body": _chunks(body, body.deltas(model), request["modelId"]), "contentType": _JSON}

    async def count_tokens(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Count the tokens of a conversation, or of a native body, as the model reads them."""
        model = await self._models.opened(request["modelId"], caller, "bedrock-runtime:CountTokens")
        asked = request["input"]
        if "converse" in asked:
            counted = read_request(asked["converse"])
        else:
            native = native_body(asked["invokeModel"]["body"])
            counted = native.request
            if native.prompt is not None:
                counted = replace(counted, turns=(Turn("user", native.prompt),))
        return {"inputTokens": await asyncio.to_thread(model.count, counted)}

    async def apply_guardrail(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Check texts against a guardrail, without a model."""
        version, source = request["guardrailVersion"], request["source"]
        rules = self._guardrails.rules(id_of(request["guardrailIdentifier"]), version, caller.owner)
        texts = []
        for index, block in enumerate(request["content"]):
            if "text" not in block:
                raise BadInput(f"content[{index}] is {next(iter(block), 'empty')}; guardrails here check text alone")
            texts.append(block["text"]["text"])
        found = assess(rules, texts)
        blocked = rules.blocked_input if source == "INPUT" else rules.blocked_output
        outputs = [] if not found.intervened else [blocked] if found.blocked else found.texts
        characters = sum(map(len, texts))
        assessments = [found.as_member()] if found.intervened or request.get("outputScope") == "FULL" else []
        return {
            "usage": _units(rules, characters),
            "action": "GUARDRAIL_INTERVENED" if found.intervened else "NONE",
            "outputs": [{"text": text} for text in outputs],
            "assessments": assessments,
            "guardrailCoverage": {"textCharacters": {"guarded": characters, "total": characters}},
        }

    def _guard(self, request: dict[str, Any], caller: Caller) -> Guard | None:
        config = request.get("guardrailConfig") or {}
        if not config.get("guardrailIdentifier"):
            return None
        name, version = id_of(config["guardrailIdentifier"]), config.get("guardrailVersion") or "DRAFT"
        rules = self._guardrails.rules(name, version, caller.owner)
        traced = config.get("trace", "disabled") != "disabled"
        return Guard(name, rules, traced)


async def _events(deltas: AsyncIterator[Delta], request: dict[str, Any], guard: Guard | None) -> AsyncIterator[Event]:
    """Yield ConverseStream's events; the first comes with the first delta, so that a refusal still has a status."""
    blocks, begun, started = Blocks(), time.perf_counter(), False
    async with aclosing(deltas) as opened:  # type: ignore[type-var]
        async for delta in opened:
            if not started:
                started = True
                yield "messageStart", {"role": "assistant"}
            if not isinstance(delta, Finish):
                for event in blocks.events(delta):
                    yield event
                continue
            finish = _complete(delta)
            for event in blocks.end():
                yield event
            stop: dict[str, Any] = {"stopReason": _stop_reason(finish, guard)}
            if (fields := _more(request, finish)) is not None:
                stop["additionalModelResponseFields"] = fields
            yield "messageStop", stop
            metadata: dict[str, Any] = {
                "usage": usage_member(finish),
                "metrics": {"latencyMs": int(1000 * (time.perf_counter() - begun))},
            }
            if guard is not None and guard.trace:
                metadata["trace"] = guard.trace
            yield "metadata", metadata


async def _chunks(body: NativeBody, deltas: AsyncIterator[Delta], model: str) -> AsyncIterator[Event]:
    async with aclosing(deltas) as opened:  # type: ignore[type-var]
        async for delta in opened:
            chunks = body.chunks(delta, model)
            for chunk in chunks:
                if isinstance(delta, Finish) and chunk is chunks[-1]:
                    finish = _complete(delta)
                    chunk["amazon-bedrock-invocationMetrics"] = {
                        "inputTokenCount": finish.usage.prompt,
                        "outputTokenCount": finish.usage.completion,
                        "invocationLatency": int(1000 * finish.seconds),
                        "firstByteLatency": int(1000 * (finish.first_token_s or 0.0)),
                    }
                yield "chunk", {"bytes": _dump(chunk)}


async def _said(text: str) -> AsyncIterator[Delta]:
    yield Text(text)
    yield Whole().finish


def _complete(finish: Finish) -> Finish:
    """Return the end of an answer that came to its end.

    Raises:
        ServiceError: it took too long, or the server stopped it.
    """
    if finish.reason == "timeout":
        raise ServiceError(
            "ModelTimeoutException", f"the answer was not complete after {finish.seconds:.0f} s; ask for fewer tokens"
        )
    if finish.reason == "cancelled":
        raise ServiceError("ServiceUnavailableException", "the server is stopping; ask again")
    return finish


def _stop_reason(finish: Finish, guard: Guard | None) -> str:
    if guard is not None and guard.intervened:
        return "guardrail_intervened"
    return STOP_REASONS[finish.reason]


def _more(request: dict[str, Any], finish: Finish) -> dict[str, Any] | None:
    """What `additionalModelResponseFieldPaths` asks for: the stop string is all that there is; others are left out."""
    paths = request.get("additionalModelResponseFieldPaths") or ()
    return {"stop_sequence": finish.stop_sequence} if "/stop_sequence" in paths and finish.stop_sequence else None


def _native(request: dict[str, Any]) -> NativeBody:
    if request.get("guardrailIdentifier"):
        raise BadInput("guardrails work with Converse and ApplyGuardrail; use one of those instead of InvokeModel")
    return native_body(request.get("body", b""))


def _units(rules: Rules, characters: int) -> dict[str, int]:
    """Text units of 1,000 characters by policy, as the service counts them."""
    units = -(-characters // 1000)
    sensitive = units if rules.pii or rules.regexes else 0
    return {
        "topicPolicyUnits": 0,
        "contentPolicyUnits": 0,
        "wordPolicyUnits": units if rules.words else 0,
        "sensitiveInformationPolicyUnits": sensitive,
        "sensitiveInformationPolicyFreeUnits": sensitive if rules.regexes else 0,
        "contextualGroundingPolicyUnits": 0,
    }


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
