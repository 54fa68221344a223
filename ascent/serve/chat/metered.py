"""What a call used is reported once, however it ends; and a shadow may see it too."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from ascent.records.errors import AscentError
from ascent.serve.chat.types import CallRecord, ChatModel, ChatRequest, Delta, Finish, Usage

if TYPE_CHECKING:
    from ascent.serve.wire import Caller


class Metered:
    """A model whose answers are reported, once each, whether they end well, fail or are left."""

    def __init__(
        self,
        model: ChatModel,
        called: str,
        caller: Caller,
        operation: str,
        report: Callable[[CallRecord], None],
        longest_s: float | None = None,
    ) -> None:
        self._model, self._called, self._caller = model, called, caller
        self._operation, self._report, self._longest_s = operation, report, longest_s
        self.id = model.id

    @property
    def context(self) -> int:
        """The model's context in tokens."""
        return self._model.context

    def count(self, request: ChatRequest) -> int:
        """Return the number of tokens of a conversation."""
        return self._model.count(request)

    def chat(self, request: ChatRequest) -> AsyncIterator[Delta]:
        """Answer a conversation, and report it."""
        return self._measured(lambda metered: self._model.chat(metered), request)

    def complete(self, prompt: str, request: ChatRequest) -> AsyncIterator[Delta]:
        """Go on with a text, and report it."""
        return self._measured(lambda metered: self._model.complete(prompt, metered), request)

    async def _measured(
        self, answer: Callable[[ChatRequest], AsyncIterator[Delta]], request: ChatRequest
    ) -> AsyncGenerator[Delta, None]:
        begun, status, first, used = time.perf_counter(), "cancelled", None, [Usage(0, 0)]
        limits = [limit for limit in (request.deadline_s, self._longest_s) if limit is not None]
        metered = dataclasses.replace(
            request, meter=used.append, deadline_s=min(limits, default=None), tenant=self._caller.owner
        )
        try:
            async with aclosing(answer(metered)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    if isinstance(delta, Finish):
                        first, status = delta.first_token_s, "ok"
                        used.append(delta.usage)
                    yield delta
        except Exception as error:
            status = type(error).__name__
            raise
        finally:
            caller, usage = self._caller, used[-1]
            self._report(
                CallRecord(
                    owner=caller.owner,
                    key_id=caller.key_id,
                    model=self.id,
                    deployment=self._called,
                    operation=self._operation,
                    prompt_tokens=usage.prompt,
                    completion_tokens=usage.completion,
                    cached_tokens=usage.cached,
                    seconds=time.perf_counter() - begun,
                    first_token_s=first,
                    status=status,
                )
            )


class Shadowed:
    """A model whose requests another one answers too, unheard; the shadow's calls are reported as `Shadow`."""

    def __init__(self, model: Metered, shadow: Metered) -> None:
        self._model, self._shadow = model, shadow
        self.id = model.id

    @property
    def context(self) -> int:
        """The answering model's context in tokens."""
        return self._model.context

    def count(self, request: ChatRequest) -> int:
        """Return the number of tokens of a conversation."""
        return self._model.count(request)

    def chat(self, request: ChatRequest) -> AsyncIterator[Delta]:
        """Answer a conversation."""
        _in_background(self._shadow.chat(request))
        return self._model.chat(request)

    def complete(self, prompt: str, request: ChatRequest) -> AsyncIterator[Delta]:
        """Go on with a text."""
        _in_background(self._shadow.complete(prompt, request))
        return self._model.complete(prompt, request)


_SHADOWS: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected


def _in_background(deltas: AsyncIterator[Delta]) -> None:
    task = asyncio.ensure_future(_unheard(deltas))
    _SHADOWS.add(task)
    task.add_done_callback(_SHADOWS.discard)


async def _unheard(deltas: AsyncIterator[Delta]) -> None:
    """Read an answer for its report alone; a shadow that fails must not disturb who answers."""
    with contextlib.suppress(AscentError):
        async for _ in deltas:
            pass
