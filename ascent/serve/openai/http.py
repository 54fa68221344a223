"""One request of the OpenAI routes and its answer, on plain ASGI: no framework stands in a token's way."""

from __future__ import annotations

import json
import time
from typing import Any

from ascent.serve.wire.incoming import Incoming, Receive, Scope, Send


class Exchange:
    """One request and its answer.

    Attributes:
        incoming: the client's side.
        path: percent-decoded once, except what is decoded by the route.
        headers: names in lower case.
        action: `openai:Operation`, for logs and scopes.
        status: what was sent.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self._send, self.request_id, self.begun = send, request_id, time.perf_counter()
        self.incoming = Incoming(receive)
        self.method: str = scope["method"]
        raw = scope.get("raw_path")
        self.path: str = (raw.decode("latin-1") if raw else scope["path"]).partition("?")[0]
        self.headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        self.action, self.status = "openai:unknown", 500
        self._started = False

    async def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a whole answer."""
        body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        await self._start(status, "application/json", {"content-length": str(len(body)), **(headers or {})})
        await self._body(body, more=False)

    async def event(self, data: str, *, last: bool = False) -> None:
        """Send one server-sent event; the first opens the answer."""
        if not self._started:
            await self._start(200, "text/event-stream; charset=utf-8", {"cache-control": "no-cache"})
        await self._body(f"data: {data}\n\n".encode("utf-8", "replace"), more=not last)

    async def fail(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        """Send an error: with its status, or as the last event of an answer that has begun."""
        if self._started:
            await self.event(json.dumps(body, ensure_ascii=False), last=True)
        else:
            await self.json(body, status, headers)

    async def _start(self, status: int, content_type: str, headers: dict[str, str]) -> None:
        self._started, self.status = True, status
        named = {"content-type": content_type, "x-request-id": self.request_id, **headers}
        raw = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in named.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
