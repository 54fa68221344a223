"""The ASGI application of the AWS services: one request from its first byte to its last.

Route on the raw path, check key and clock, read the body, verify the signature and the scopes, decode, call the
handler, encode. No middleware stands between, because this path is every call's overhead.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from ascent.records.errors import AscentError
from ascent.serve.logs import REQUEST_ID
from ascent.serve.wire import pages
from ascent.serve.wire.authenticate import Authenticator, Caller, Claim
from ascent.serve.wire.decode import decode_request
from ascent.serve.wire.encode import NO_BODY, Response, encode_error, encode_response
from ascent.serve.wire.errors import ServiceError, as_service_error
from ascent.serve.wire.events import CONTENT_TYPE, error_frame, event_frame
from ascent.serve.wire.idempotency import Idempotency
from ascent.serve.wire.incoming import GONE, Gone, Incoming, Limits, Receive, Scope, Send
from ascent.serve.wire.model import SERVICES, Operation, load_service
from ascent.serve.wire.router import Router
from ascent.serve.wire.services import Handler, handlers_of

LOG = logging.getLogger(__name__)
OnRequest = Callable[[str, int, float], None]


class AwsApp:
    """All operations of the five services; those without a handler are answered as unknown.

    Args:
        services: objects with a `service` name and handler methods.
        authenticator: knows the keys.
        limits: of one request.
        on_request: told (`service:Operation`, status, seconds) after the last byte of every answer.

    Raises:
        BadInput: a public method of a service is no operation.
    """

    def __init__(
        self,
        services: Sequence[object],
        authenticator: Authenticator,
        *,
        limits: Limits | None = None,
        on_request: OnRequest | None = None,
    ) -> None:
        self._router = Router(each for name in SERVICES for each in load_service(name).operations.values())
        self._handlers: dict[str, Handler] = {}
        for service in services:
            self._handlers |= handlers_of(service)
        self._authenticator, self._limits, self._on_request = authenticator, limits or Limits(), on_request
        self._idempotency = Idempotency(authenticator.keys.engine)
        self._pages_secret = authenticator.keys.derive("tokens of pages")
        self._threads = ThreadPoolExecutor(self._limits.threads, thread_name_prefix="handler")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request. Other protocols are refused; the lifespan is the outer application's."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        call = _Call(scope, receive, send, str(uuid.uuid4()))
        token = REQUEST_ID.set(call.request_id)
        try:
            await self._answer(call)
        finally:
            call.incoming.close()
            REQUEST_ID.reset(token)
            if self._on_request is not None:
                self._on_request(call.action, call.status, time.perf_counter() - call.begun)

    async def _answer(self, call: _Call) -> None:
        """Send what comes of a request, whatever that is."""
        events: AsyncIterator[bytes] | None = None
        first: bytes | None = None
        try:
            response = await self._respond(call)
            if response.stream is not None:
                events = _frames(call, response)
                first = await call.incoming.unless_gone(
                    _next(events)
                )  # what fails before anything was made has a status
        except Gone:
            call.status = GONE
            return
        except AscentError as error:
            response, events = encode_error(call.shown(error), call.operation), None
        except Exception:
            LOG.exception("%s failed", call.action)
            response, events = encode_error(call.defect(), call.operation), None
        if events is None:
            await call.send_whole(response)
        else:
            await self._stream(call, response, first, events)

    async def _respond(self, call: _Call) -> Response:
        operation, labels = self._route(call)
        call.operation = operation
        claim = self._authenticator.claim(
            call.method, call.raw_path, call.query, call.headers, service=operation.signing, bearer=operation.bearer
        )
        digest = hashlib.sha256()
        body = await call.incoming.body(self._limits, call.headers.get("content-length", ""), digest.update)
        caller = self._authenticator.verify(claim, digest.hexdigest())
        caller = replace(caller, request_id=call.request_id)
        caller.require(operation.action)
        handler = self._handlers.get(operation.action)
        if handler is None:
            raise ServiceError(
                "UnknownOperationException",
                f"{operation.action} is not served here; docs/api.md lists the operations that are",
            )
        body = self._authenticator.content(claim, body)
        request = decode_request(operation, labels, call.query, call.headers, body)
        pages.CURRENT.set(pages.Listing(self._pages_secret, caller.owner, operation.action))
        token = request.get(operation.token) if operation.token else None
        if token is not None:
            return await self._once(call, token, handler, request, caller)
        await self._spend(claim, operation)
        try:
            return await self._handle(call, handler, request, caller)
        except Exception:
            await self._in_thread(self._authenticator.release, claim, operation.repeats)
            raise

    def _route(self, call: _Call) -> tuple[Operation, Mapping[str, str]]:
        found = self._router.find(call.method, call.raw_path, call.query)
        if found is None:
            raise ServiceError(
                "UnknownOperationException",
                f"no operation of {', '.join(SERVICES)} is {call.method} {call.raw_path[:200]}; docs/api.md lists "
                "those that are served",
            )
        return found

    async def _spend(self, claim: Claim, operation: Operation) -> None:
        """Use up a signature: in a thread where that is a write, at once where a thread would cost more than it."""
        if operation.repeats == "never":
            await self._in_thread(self._authenticator.spend, claim, operation.repeats)
        else:
            self._authenticator.spend(claim, operation.repeats)

    async def _handle(self, call: _Call, handler: Handler, request: dict[str, Any], caller: Caller) -> Response:
        """Call a handler: on the loop if it is a coroutine, which a client that goes away cancels, else in a thread."""
        assert call.operation is not None
        if inspect.iscoroutinefunction(handler):
            result = await call.incoming.unless_gone(handler(request, caller))
        else:
            result = await self._in_thread(handler, request, caller)
        return encode_response(call.operation, result)

    async def _once(
        self, call: _Call, token: str, handler: Handler, request: dict[str, Any], caller: Caller
    ) -> Response:
        """Call a handler at most once for a token."""
        memory, operation, owner = self._idempotency, call.operation, caller.owner
        assert operation is not None
        known: Response | None = await self._in_thread(memory.begin, owner, operation, token, request)
        if known is not None:
            return known
        try:
            response = await self._handle(call, handler, request, caller)
        except Exception:
            await self._in_thread(memory.forget, owner, operation, token)
            raise
        if response.stream is None:
            await self._in_thread(memory.finish, owner, operation, token, response)
        return response

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, function, *arguments)

    async def _stream(self, call: _Call, response: Response, first: bytes | None, events: AsyncIterator[bytes]) -> None:
        """Send what a handler yields as it comes. A failure ends an event stream with a frame that says so."""
        operation = call.operation
        assert operation is not None and operation.stream is not None
        framed = operation.stream.shape.kind == "structure"
        response.headers.setdefault("content-type", CONTENT_TYPE if framed else "application/octet-stream")
        await call.start(response)
        data = first
        try:
            while data is not None:
                await call.send({"type": "http.response.body", "body": data, "more_body": True})
                data = await call.incoming.unless_gone(_next(events))
            last = b""
        except Gone:
            call.status = GONE
            return
        except AscentError as error:
            last = error_frame(operation.stream.shape, call.shown(error), operation, call.request_id)
        except Exception:
            LOG.exception("%s failed after its answer had begun", call.action)
            last = error_frame(operation.stream.shape, call.defect(), operation, call.request_id)
        finally:
            await _close(events)
        if last and not framed:
            return  # bytes without frames can only be cut off: the server closes the connection
        await call.send({"type": "http.response.body", "body": last, "more_body": False})


class _Call:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.send, self.request_id, self.begun = send, request_id, time.perf_counter()
        self.incoming = Incoming(receive)
        self.method: str = scope["method"]
        raw = scope.get("raw_path")
        self.raw_path = raw.decode("latin-1") if raw is not None else quote(scope["path"])
        self.query: str = scope["query_string"].decode("latin-1")
        self.headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self.headers[key] = f"{self.headers[key]},{text}" if key in self.headers else text
        self.operation: Operation | None = None
        self.status = 500

    @property
    def action(self) -> str:
        """`service:Operation`, or `unknown`."""
        return "unknown" if self.operation is None else self.operation.action

    async def send_whole(self, response: Response) -> None:
        """Send a response that is all here."""
        if response.body or response.status not in NO_BODY:
            response.headers["content-length"] = str(len(response.body))
        await self.start(response)
        await self.send({"type": "http.response.body", "body": response.body, "more_body": False})

    async def start(self, response: Response) -> None:
        """Send status and headers."""
        self.status = response.status
        headers = {**response.headers, "x-amzn-requestid": self.request_id}
        raw = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in headers.items()]
        await self.send({"type": "http.response.start", "status": response.status, "headers": raw})

    def shown(self, error: AscentError) -> ServiceError:
        """Return what the caller is told of an error; what is no caller's doing is logged, and not told in full."""
        found = as_service_error(error)
        if found.code not in ("InternalServerException", "ServiceUnavailableException"):
            return found
        LOG.error("%s: %s", self.action, error, exc_info=error)
        return found if found is error or found.code == "ServiceUnavailableException" else self.defect()

    def defect(self) -> ServiceError:
        """Return what a caller is told about a defect: nothing but where to look."""
        return ServiceError(
            "InternalServerException",
            f"this is a defect of the server, not of your request; its log has the cause under {self.request_id}",
        )


async def _frames(call: _Call, response: Response) -> AsyncIterator[bytes]:
    """Yield what is sent for each item of a handler's stream."""
    stream, operation = response.stream, call.operation
    assert operation is not None and operation.stream is not None
    shape = operation.stream.shape
    try:
        async for item in stream:
            yield event_frame(shape, *item) if shape.kind == "structure" else item
    finally:
        await _close(stream)


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)


async def _close(stream: Any) -> None:
    """Close an asynchronous generator, so that what feeds it ends now and not when the garbage is collected."""
    if (close := getattr(stream, "aclose", None)) is not None:
        await close()
