"""What goes into the serving engine and what comes out: no torch here.

Log-probs follow vLLM's default and OpenAI's practice: they are those of the model's own distribution, at temperature 1,
before `top_p` and before a constraint, whatever the token was drawn with.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from ascent.records.errors import AscentError, BadInput

if TYPE_CHECKING:
    import numpy as np

_NUMBERS = itertools.count(1)


class Constraint(Protocol):
    """What a grammar allows next. A `ValueError` or `RuntimeError` of it ends its own request and no other."""

    def allowed(self) -> np.ndarray[Any, Any] | None:
        """Return an int32 bit mask [ceil(V/32)] of the tokens allowed next, lowest bit first; None allows all."""

    def accept(self, token: int) -> None:
        """Hear of the token that was drawn, end tokens included."""


@dataclass(frozen=True)
class Generation:
    """One request. The same one with the same `seed` draws the same tokens whatever runs beside it.

    `temperature` 0 is greedy. `adapter` is a name given to `load_adapter`; None is the base. `deadline_s` counts from
    submission. `stop_ids` end the answer like the renderer's end ids. The end token is delivered like every other. What
    was computed of a prompt is found again by requests of the same `tenant` only, so that none can tell from its own
    waiting what another one asked.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0
    adapter: str | None = None
    constraint: Constraint | None = None
    deadline_s: float | None = None
    stop_ids: frozenset[int] = frozenset()
    tenant: str = ""

    def __post_init__(self) -> None:
        """Raise `BadInput` for numbers out of range."""
        if not self.prompt_ids or self.max_tokens < 1:
            raise BadInput(
                f"a request needs a prompt and max_tokens of at least 1; got {len(self.prompt_ids)} prompt tokens and "
                f"max_tokens {self.max_tokens}"
            )
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise BadInput(
                f"temperature must be 0 or more and top_p in (0, 1]; got {self.temperature} and {self.top_p}"
            )
        if not 0 <= self.top_logprobs <= MOST_LOGPROBS:
            raise BadInput(f"top_logprobs must be from 0 to {MOST_LOGPROBS}; got {self.top_logprobs}")


MOST_LOGPROBS = 20  # as OpenAI's protocol


@dataclass(frozen=True)
class Token:
    """A drawn token, its log-prob, and the `top_logprobs` likeliest as (id, log-prob), best first."""

    id: int
    logp: float
    top: tuple[tuple[int, float], ...] = ()


class Finish(StrEnum):
    """Why an answer ended: an end token, `max_tokens`, `deadline_s`, or `cancel`."""

    stop = "stop"
    length = "length"
    timeout = "timeout"
    cancelled = "cancelled"


@dataclass(frozen=True)
class Ended:
    """How a request went.

    `cached_tokens` of its prompt were found in the prefix cache; it waited `queue_s` for a place, and its first token
    came `first_token_s` after submission (0 where there was none).
    """

    finish: Finish
    cached_tokens: int = 0
    queue_s: float = 0.0
    first_token_s: float = 0.0


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine began, and what is there now (`running`, `waiting`, `cache_*`).

    `cached` prompt tokens were found in the prefix cache. `cache_used` tokens of `cache_tokens` belong to running
    requests, `cache_kept` more wait to be found again.
    """

    running: int
    waiting: int
    requests: int
    finished: int
    cancelled: int
    preempted: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    steps: int
    cache_tokens: int
    cache_used: int
    cache_kept: int
    adapters: tuple[str, ...]


@dataclass(eq=False)
class Running:
    """A submitted request: iterate over its tokens, from one place at a time.

    Leaving the iteration early cancels it. Raises what ended it where the engine, and not the request, failed.
    """

    generation: Generation
    number: int = field(default_factory=lambda: next(_NUMBERS))
    submitted_s: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    _arrived: deque[Token] = field(default_factory=deque)
    _end: Ended | AscentError | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> Ended:
        """How the request went, once the iteration is over; raises `RuntimeError` before."""
        if not isinstance(self._end, Ended):
            raise RuntimeError("the request has not ended; iterate over its tokens first") from self._end
        return self._end

    def cancel(self) -> None:
        """Free the request's place within one step; without effect once it has ended."""
        self.cancelled = True

    def collect(self, timeout_s: float | None = None) -> list[Token]:
        """Wait for the end without an event loop and return the tokens not yet read.

        Raises:
            TimeoutError: it did not end in time; it goes on.
        """
        if not self._over.wait(timeout_s):
            raise TimeoutError(f"the request did not end within {timeout_s} s; it is still running")
        if isinstance(self._end, AscentError):
            raise self._end
        tokens = list(self._arrived)
        self._arrived.clear()
        return tokens

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Yield tokens as they come."""
        try:
            while True:
                while self._arrived:
                    yield self._arrived.popleft()
                if self._end is None:
                    await self._news()
                elif not self._arrived:
                    break
            if isinstance(self._end, AscentError):
                raise self._end
        finally:
            self.cancel()

    async def _news(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        if not self._arrived and self._end is None:  # what came before the waiter was there woke nobody
            await self._waiter
        self._waiter = None

    def put(self, token: Token) -> None:
        """Deliver a token; the engine's thread does this, and then `wake`."""
        self._arrived.append(token)

    def finish(self, end: Ended | AscentError) -> None:
        """End the request; the engine's thread does this, and then `wake`."""
        self._end = end
        self._over.set()


def wake(runs: Iterable[Running]) -> None:
    """Let event loops know of what was put: one call into each loop, however many requests wait there."""
    listening: dict[asyncio.AbstractEventLoop, list[Running]] = {}
    for run in runs:
        if (waiter := run._waiter) is not None:
            listening.setdefault(waiter.get_loop(), []).append(run)
    for loop, of_loop in listening.items():
        try:
            loop.call_soon_threadsafe(_resolve, of_loop)
        except RuntimeError:  # the loop was closed: nobody listens any more
            for run in of_loop:
                run.cancel()


def _resolve(runs: Iterable[Running]) -> None:
    for run in runs:
        if run._waiter is not None and not run._waiter.done():
            run._waiter.set_result(None)
