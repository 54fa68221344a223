"""An answer as a whole, for protocols that are asked for it in one piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ascent.serve.chat.types import (
    Delta,
    Finish,
    ModelFailed,
    Reasoning,
    Text,
    TextToken,
    ToolArguments,
    ToolStart,
    Usage,
)


@dataclass
class Whole:
    """Everything of one answer. `calls` are [id, name, arguments as JSON text]."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    tokens: list[TextToken] = field(default_factory=list)
    finish: Finish = field(default_factory=lambda: Finish("stop", Usage(0, 0)))

    def add(self, delta: Delta) -> None:
        """Take the next delta."""
        if isinstance(delta, Text):
            self.text += delta.text
            self.tokens += delta.tokens
        elif isinstance(delta, Reasoning):
            self.reasoning += delta.text
        elif isinstance(delta, ToolStart):
            self.calls.append([delta.id, delta.name, ""])
        elif isinstance(delta, ToolArguments):
            self.calls[delta.index][2] += delta.text
        else:
            self.finish = delta

    def arguments(self, index: int) -> dict[str, Any]:
        """Return a call's arguments.

        Raises:
            ModelFailed: they are no JSON object, which only a remote model can bring about.
        """
        text = self.calls[index][2]
        try:
            found = json.loads(text or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ModelFailed(f"the model called {self.calls[index][1]} with arguments that are no JSON object: {text}")
        return found


async def collect(deltas: AsyncIterator[Delta]) -> Whole:
    """Read an answer to its end."""
    whole = Whole()
    async with aclosing(deltas) as opened:  # type: ignore[type-var]
        async for delta in opened:
            whole.add(delta)
    return whole


async def collect_all(answers: list[AsyncIterator[Delta]]) -> list[Whole]:
    """Read several answers side by side; when one fails the others are cancelled."""
    if len(answers) == 1:
        return [await collect(answers[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(answer)) for answer in answers]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


async def merged(answers: list[AsyncIterator[Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """Yield (answer, delta) of several answers as they come; leaving it ends them all."""
    if len(answers) == 1:
        async with aclosing(answers[0]) as only:  # type: ignore[type-var]
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()

    async def read(index: int, answer: AsyncIterator[Delta]) -> None:
        try:
            async with aclosing(answer) as opened:  # type: ignore[type-var]
                async for delta in opened:
                    queue.put_nowait((index, delta))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.ensure_future(read(index, answer)) for index, answer in enumerate(answers)]
    try:
        for _ in tasks:
            while (item := await queue.get())[1] is not None:
                yield item[0], item[1]
            await tasks[item[0]]  # raises what ended it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
