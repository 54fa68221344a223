"""What comes from a client over ASGI: the body of its request, and then nothing until it goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ascent.serve.wire.errors import ServiceError

GONE = 499  # logged for a client that went away; never sent

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one request may take: bytes of its body, seconds until they are here, and handlers in threads at a time."""

    body_bytes: int = 64 * 2**20
    body_s: float = 120.0
    threads: int = 32


class Gone(Exception):
    """The client went away."""


class Incoming:
    """The client's side of one request."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._whole = asyncio.Event()  # the body is here, and what comes next can only be a disconnect
        self._gone: asyncio.Future[None] | None = None

    async def body(
        self, limits: Limits, announced: str = "", each: Callable[[bytes], object] = lambda part: None
    ) -> bytes:
        """Return the body.

        Args:
            limits: too large a body is refused before it is here, a slow one after a while.
            announced: the header `content-length`.
            each: told every part as it comes.

        Raises:
            ServiceError: it is too large, or too slow.
            Gone: the client went away.
        """
        if announced.isdecimal() and int(announced[:20]) > limits.body_bytes:
            raise _too_large(limits)
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.body_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limits.body_bytes:
                        raise _too_large(limits)
                    each(part)
                    parts.append(part)
                    if not message.get("more_body"):
                        self._whole.set()
                        return b"".join(parts)
        except TimeoutError as error:
            raise ServiceError(
                "RequestTimeoutException", f"the body was not here after {limits.body_s:g} s; send it faster"
            ) from error

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """Return what `work` returns; cancel it if the client goes away first. `work` may read the body.

        Raises:
            Gone: it went away.
        """
        if self._gone is None:
            self._gone = asyncio.ensure_future(self._wait_until_gone())
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Gone
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    def close(self) -> None:
        """Stop waiting for the client to go away."""
        if self._gone is not None:
            self._gone.cancel()

    async def _wait_until_gone(self) -> None:
        await self._whole.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _too_large(limits: Limits) -> ServiceError:
    return ServiceError(
        "ValidationException",
        f"the body is larger than {limits.body_bytes} bytes, the most that this server takes; send less, or raise "
        "max_body_mb in its configuration",
        status=413,
    )
