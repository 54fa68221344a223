"""The routes under `/v1`: chat and text completions, embeddings, and the list of models."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ascent.records.errors import AscentError, BadInput, Unavailable, UnknownName
from ascent.serve.chat.collect import collect_all, merged
from ascent.serve.chat.types import ChatModel, ChatRequest, Delta, Finish, Usage
from ascent.serve.logs import REQUEST_ID
from ascent.serve.openai.http import Exchange
from ascent.serve.openai.reply import Reply, error_reply
from ascent.serve.openai.request import Asked, BadField, read_chat, read_completion
from ascent.serve.wire.app import OnRequest
from ascent.serve.wire.incoming import GONE, Gone, Limits, Receive, Scope, Send

if TYPE_CHECKING:
    from ascent.serve.models import Deployment, Models
    from ascent.serve.wire.authenticate import Authenticator, Caller

LOG = logging.getLogger(__name__)
MOST_INPUTS = 2048  # as OpenAI's own limit
SEED_SPAN = 1 << 48


class OpenAIApp:
    """The OpenAI protocol as an ASGI application. Callers show a bearer key, with scopes like `openai:ChatCompletions`.

    Args:
        models: what can be called.
        authenticator: knows the keys.
        limits: of one request's body.
        on_request: told (`openai:Operation`, status, seconds) after the last byte of every answer.
    """

    def __init__(
        self,
        models: Models,
        authenticator: Authenticator,
        *,
        limits: Limits | None = None,
        on_request: OnRequest | None = None,
    ) -> None:
        self._models, self._authenticator = models, authenticator
        self._limits, self._on_request = limits or Limits(), on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, str(uuid.uuid4()))
        token = REQUEST_ID.set(exchange.request_id)
        try:
            await self._answer(exchange)
        finally:
            exchange.incoming.close()
            REQUEST_ID.reset(token)
            if self._on_request is not None:
                self._on_request(exchange.action, exchange.status, time.perf_counter() - exchange.begun)

    async def _answer(self, exchange: Exchange) -> None:
        """Send what comes of a request, whatever that is."""
        try:
            await exchange.incoming.unless_gone(self._respond(exchange))
        except Gone:
            exchange.status = GONE
        except AscentError as error:
            status, body, headers = error_reply(error)
            if status >= 500:
                LOG.error("%s: %s", exchange.action, error, exc_info=error)
            await exchange.fail(status, body, headers)
        except Exception:
            LOG.exception("%s failed", exchange.action)
            text = (
                "this is a defect of the server, not of your request; its log has the cause under request "
                f"{exchange.request_id}"
            )
            defect = {"message": text, "type": "server_error", "param": None, "code": "internal_error"}
            await exchange.fail(500, {"error": defect}, {})

    async def _respond(self, exchange: Exchange) -> None:
        method, path = exchange.method, exchange.path
        if path == "/v1/models" and method == "GET":
            found = self._models.list(self._caller(exchange, "ListModels"))
            await exchange.json({"object": "list", "data": [_model(each) for each in found]})
        elif path.startswith("/v1/models/") and method == "GET":
            await self._model(exchange, unquote(path.removeprefix("/v1/models/")))
        elif path in _ROUTES and method == "POST":
            operation, handler = _ROUTES[path]
            caller = self._caller(exchange, operation)
            body = await self._body(exchange)
            name = body.get("model")
            if not isinstance(name, str) or not name:
                raise BadField("model", "give the name of a model; GET /v1/models lists them")
            await handler(self, exchange, caller, name, body)
        else:
            raise UnknownName("route", f"{method} {path}", [*_ROUTES, "/v1/models"])

    def _caller(self, exchange: Exchange, operation: str) -> Caller:
        """Return who calls, if a bearer key says so and has the scope."""
        exchange.action = f"openai:{operation}"
        caller = replace(self._authenticator.bearer(exchange.headers), request_id=exchange.request_id)
        caller.require(exchange.action)
        return caller

    async def _body(self, exchange: Exchange) -> dict[str, Any]:
        raw = await exchange.incoming.body(self._limits, exchange.headers.get("content-length", ""))
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"the body is no JSON ({error})") from error
        if not isinstance(body, dict):
            raise BadInput("the body must be a JSON object")
        return body

    async def _model(self, exchange: Exchange, name: str) -> None:
        caller = self._caller(exchange, "RetrieveModel")
        known = {each.name: each for each in self._models.list(caller)}
        if name not in known:
            raise UnknownName("model", name, known)
        await exchange.json(_model(known[name]))

    async def _chat(self, exchange: Exchange, caller: Caller, name: str, body: dict[str, Any]) -> None:
        asked = read_chat(body)
        model = await self._models.opened(name, caller, exchange.action)
        answers = [model.chat(request) for request in _seeded(asked)]
        await _send(exchange, asked, Reply("chat", name, asked.n), answers)

    async def _complete(self, exchange: Exchange, caller: Caller, name: str, body: dict[str, Any]) -> None:
        asked = read_completion(body)
        model: ChatModel = await self._models.opened(name, caller, exchange.action)
        answers = [model.complete(prompt, request) for prompt in asked.prompts for request in _seeded(asked)]
        await _send(exchange, asked, Reply("text", name, asked.n), answers)

    async def _embed(self, exchange: Exchange, caller: Caller, name: str, body: dict[str, Any]) -> None:
        texts, form = _embedding_inputs(body)
        embedder = await asyncio.to_thread(self._models.embedder, name, caller)
        if body.get("dimensions") not in (None, embedder.width):
            raise BadField("dimensions", f"is {embedder.width} for this model; leave it out")
        begun = time.perf_counter()
        vectors, tokens = await asyncio.to_thread(_embed_texts, embedder, texts)
        self._models.report_embedding(name, caller, tokens, time.perf_counter() - begun)
        data = [
            {"object": "embedding", "index": index, "embedding": _vector(row, form)}
            for index, row in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await exchange.json({"object": "list", "model": name, "data": data, "usage": usage})


_Handler = Callable[[OpenAIApp, Exchange, "Caller", str, dict[str, Any]], Any]
_ROUTES: dict[str, tuple[str, _Handler]] = {
    "/v1/chat/completions": ("ChatCompletions", OpenAIApp._chat),
    "/v1/completions": ("Completions", OpenAIApp._complete),
    "/v1/embeddings": ("Embeddings", OpenAIApp._embed),
}


async def _send(exchange: Exchange, asked: Asked, reply: Reply, answers: list[AsyncIterator[Delta]]) -> None:
    if asked.stream:
        await _stream(exchange, asked, reply, answers)
        return
    wholes = await collect_all(answers)
    for whole in wholes:
        _check_end(whole.finish)
    await exchange.json(reply.whole(wholes))


async def _stream(exchange: Exchange, asked: Asked, reply: Reply, answers: list[AsyncIterator[Delta]]) -> None:
    """Send server-sent events. The first waits for the first delta, so that a refusal still has a status."""
    usages: dict[int, Usage] = {}
    async with aclosing(merged(answers)) as deltas:  # type: ignore[type-var]
        async for index, delta in deltas:
            if isinstance(delta, Finish):
                _check_end(delta)
                usages[index] = delta.usage
            if (chunk := reply.chunk(index, delta)) is not None:
                await exchange.event(json.dumps(chunk, ensure_ascii=False))
    if asked.include_usage:
        await exchange.event(json.dumps(reply.usage_chunk([usages[index] for index in sorted(usages)])))
    await exchange.event("[DONE]", last=True)


def _check_end(finish: Finish) -> None:
    """Raise Unavailable for an answer that the server cut off: the protocol has no reason for that."""
    if finish.reason == "timeout":
        raise Unavailable(f"the answer was not complete after {finish.seconds:.0f} s; ask for fewer tokens")
    if finish.reason == "cancelled":
        raise Unavailable("the server is stopping; ask again")


def _seeded(asked: Asked) -> list[ChatRequest]:
    """One request a choice, each with a seed of its own that follows from the call's."""
    seed = asked.request.seed
    if seed is None or asked.n == 1:
        return [asked.request] * asked.n
    return [replace(asked.request, seed=(seed + index) % SEED_SPAN) for index in range(asked.n)]


def _model(deployment: Deployment) -> dict[str, Any]:
    return {
        "id": deployment.name,
        "object": "model",
        "created": int(deployment.created),
        "owned_by": "ascent" if deployment.owner == "*" else deployment.owner,
    }


def _embedding_inputs(body: dict[str, Any]) -> tuple[list[str], str]:
    texts = body.get("input")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise BadField("input", "give a text or a list of texts, none of them empty; token ids are not served")
    if len(texts) > MOST_INPUTS:
        raise BadField("input", f"has {len(texts)} texts; send at most {MOST_INPUTS} at a time")
    form = body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise BadField("encoding_format", "must be float or base64")
    for name in body.keys() - {"model", "input", "encoding_format", "dimensions", "user"}:
        raise BadField(name, "is not known; leave it out")
    return texts, form


def _embed_texts(embedder: Any, texts: list[str]) -> tuple[Any, int]:
    from ascent.inference.serving.kernels import release_threads

    ids = embedder.tokenise(texts)
    try:
        return embedder.embed_all(ids).numpy(), sum(map(len, ids))
    finally:
        release_threads()  # or those of this thread would halve the speed of the engines


def _vector(row: Any, form: str) -> Any:
    """A vector as numbers, or as base64 of little-endian float32."""
    return row.tolist() if form == "float" else base64.b64encode(row.astype("<f4").tobytes()).decode()
