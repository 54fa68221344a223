"""A model of this server: a serving engine, perhaps one of its adapters, behind the chat door."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from ascent.records.errors import BadInput
from ascent.serve.chat.answer import Answer
from ascent.serve.chat.grammar import Grammars
from ascent.serve.chat.syntax import CallReader
from ascent.serve.chat.template import ChatTemplate
from ascent.serve.chat.text import Detokeniser, Thinking
from ascent.serve.chat.types import ChatRequest, ContextOverflow, Delta, Finish, Finished, Usage

if TYPE_CHECKING:
    from ascent.inference.serving.engine import ServingEngine
    from ascent.inference.serving.request import Running
    from ascent.serve.chat.grammar import Constraint

SHORT = 2000  # characters of a conversation that are rendered on the loop: a thread would cost more than it saves


class Voice:
    """What all models on one engine share: template, grammars, and which tokens write what."""

    def __init__(self, engine: ServingEngine) -> None:
        renderer = engine.renderer
        self.template = ChatTemplate(renderer)
        self.grammars = Grammars(renderer.tokenizer, engine.vocab, renderer.end_ids)
        added = renderer.tokenizer.added_tokens_decoder
        self.special = {int(i) for i, token in added.items() if token.special} | renderer.end_ids
        shown = self.template.syntax.special
        self.shown = {int(i): str(token) for i, token in added.items() if token.special and str(token) in shown}

    def detokeniser(self) -> Detokeniser:
        """Return a fresh one for an answer."""
        return Detokeniser(self.template.renderer.decode, self.special, self.shown)


class LocalModel:
    """A `ChatModel` on a serving engine; `adapter` is the name of one that the engine has loaded, None its base.

    Models on the same engine should share its `Voice`.
    """

    def __init__(self, engine: ServingEngine, adapter: str | None, id: str, voice: Voice | None = None) -> None:
        self.engine, self.adapter, self.id = engine, adapter, id
        self.context = engine.context
        self.voice = voice or Voice(engine)
        self.holds: object = None  # kept alive as long as this model is

    async def chat(self, request: ChatRequest) -> AsyncIterator[Delta]:
        """Answer a conversation.

        Raises:
            ContextOverflow: it does not fit.
            BadInput: it cannot be rendered, or its schema cannot be enforced.
            Busy: too many requests wait.
        """
        size = 500 * len(request.tools)
        for turn in request.turns:
            size += len(turn.text) + 100 * len(turn.tool_uses) + sum(len(result.text) for result in turn.tool_results)
        constrained = request.schema or request.regex or request.tool_choice not in ("auto", "none")
        if size > SHORT or constrained:
            ids, constraint = await asyncio.to_thread(self._prepare, request)
        else:
            ids, constraint = self._prepare(request)
        calls = request.tools and request.tool_choice != "none"
        template = self.voice.template
        answer = Answer(
            request,
            self.voice.detokeniser(),
            template.tokenizer.decode,
            Thinking(template.opens_reasoning),
            CallReader(template.syntax, request.tools) if calls else None,
            template.new_id,
        )
        async with aclosing(self._answer(ids, request, constraint, answer)) as deltas:
            async for delta in deltas:
                yield delta

    async def complete(self, prompt: str, request: ChatRequest) -> AsyncIterator[Delta]:
        """Go on with a text as it is; control tokens in it count as such, and a beginning token is added if it lacks.

        Raises:
            ContextOverflow: it does not fit.
            BadInput: it is empty.
            Busy: too many requests wait.
        """
        template = self.voice.template
        ids = await asyncio.to_thread(self.prompt_ids, prompt)
        constraint = await asyncio.to_thread(self.voice.grammars.constraint, request, template.syntax)
        decode = template.tokenizer.decode
        answer = Answer(request, self.voice.detokeniser(), decode, None, None, template.new_id)
        async with aclosing(self._answer(ids, request, constraint, answer)) as deltas:
            async for delta in deltas:
                yield delta

    def count(self, request: ChatRequest) -> int:
        """Return the number of tokens of a conversation."""
        return len(self.voice.template.prompt_ids(request))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a text that is gone on with.

        Raises:
            BadInput: there are none.
        """
        tokenizer = self.voice.template.tokenizer
        begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        ids = [int(token) for token in tokenizer.encode(prompt, add_special_tokens=not begun)]
        if not ids:
            raise BadInput("the prompt is empty; give at least one character")
        return ids

    def _prepare(self, request: ChatRequest) -> tuple[list[int], Constraint | None]:
        voice = self.voice
        ids = voice.template.prompt_ids(request)
        thinks = voice.template.opens_reasoning
        return ids, voice.grammars.constraint(request, voice.template.syntax, reasoning=thinks)

    def _submit(self, ids: Sequence[int], request: ChatRequest, constraint: Constraint | None) -> Running:
        from ascent.inference.serving.request import Generation

        room = self.context - len(ids)
        if room < (request.max_tokens or 1):
            raise ContextOverflow(len(ids), request.max_tokens or 1, self.context)
        return self.engine.submit(
            Generation(
                prompt_ids=tuple(ids),
                max_tokens=request.max_tokens or room,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                top_logprobs=request.top_logprobs,
                adapter=self.adapter,
                constraint=constraint,
                deadline_s=request.deadline_s,
                tenant=request.tenant,
            )
        )

    async def _answer(
        self, ids: Sequence[int], request: ChatRequest, constraint: Constraint | None, answer: Answer
    ) -> AsyncGenerator[Delta, None]:
        begun = time.perf_counter()
        first: float | None = None
        ends, completion, cached = self.engine.renderer.end_ids, 0, 0
        running = self._submit(ids, request, constraint)
        try:
            async with aclosing(aiter(running)) as tokens:  # type: ignore[type-var]
                async for token in tokens:
                    if answer.stopped:
                        continue  # drawn before the engine heard that the answer is over
                    completion += 1
                    first = time.perf_counter() - begun if first is None else first
                    if token.id in ends:
                        continue
                    for delta in answer.feed(token):
                        yield delta
                    if answer.stopped:
                        running.cancel()
            cached = running.ended.cached_tokens
            for delta in answer.flush():
                yield delta
        finally:
            running.cancel()
            if request.meter is not None:
                request.meter(Usage(len(ids), completion, cached))
        yield Finish(
            reason=_reason(answer, running.ended.finish.value),
            usage=Usage(len(ids), completion, cached),
            first_token_s=first,
            seconds=time.perf_counter() - begun,
            stop_sequence=answer.stop_sequence,
        )


def _reason(answer: Answer, engine: Finished) -> Finished:
    """Why an answer ended, from what was found in it and what the engine says."""
    if answer.stop_sequence is not None:
        return "stop_sequence"
    return "tool" if answer.calls and (engine == "stop" or answer.stopped) else engine
