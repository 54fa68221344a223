"""From sampled tokens to deltas: characters, stop strings, reasoning and tool calls, in that order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ascent.inference.calls import Call
from ascent.serve.chat.syntax import CallReader, arguments_of
from ascent.serve.chat.text import Detokeniser, Stopper, Thinking
from ascent.serve.chat.types import ChatRequest, Delta, Reasoning, Text, TextToken, ToolArguments, ToolStart

if TYPE_CHECKING:
    from ascent.inference.serving.request import Token


class Answer:
    """One answer as it grows. `stopped` says that nothing that still comes belongs to it.

    Args:
        request: what was asked for.
        detokeniser: of the model's vocabulary.
        decode: the text of some tokens, special ones included; for log-probs.
        thinking: tells reasoning apart; None takes all as the answer.
        reader: tells tool calls apart; None takes all as text.
        new_id: makes ids of calls.
    """

    def __init__(
        self,
        request: ChatRequest,
        detokeniser: Detokeniser,
        decode: Callable[[Sequence[int]], str],
        thinking: Thinking | None,
        reader: CallReader | None,
        new_id: Callable[[], str],
    ) -> None:
        self._request, self._detokeniser, self._decode = request, detokeniser, decode
        self._thinking, self._reader, self._new_id = thinking, reader, new_id
        self._stopper = Stopper(request.stop)
        self._tokens: list[TextToken] = []
        self.calls = 0

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stopper.found

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, or the one call that is allowed was made."""
        return self._stopper.found is not None or (self.calls > 0 and not self._request.parallel)

    def feed(self, token: Token) -> Iterator[Delta]:
        """Yield what a token completes."""
        if self._request.logprobs:
            top = tuple((self._decode([other]), logp) for other, logp in token.top)
            self._tokens.append(TextToken(self._decode([token.id]), token.logp, top))
        text = self._detokeniser.feed(token.id)
        if text:
            yield from self._read(self._stopper.feed(text))

    def flush(self) -> Iterator[Delta]:
        """Yield what was held back, once the answer is over."""
        if self._stopper.found is None:
            yield from self._read(self._stopper.feed(self._detokeniser.flush()) if not self.stopped else "")
        if self._stopper.found is None and not self.stopped:
            yield from self._read(self._stopper.flush())
        if self._thinking is not None:
            thought, text = self._thinking.flush()
            yield from self._parted(thought, text)
        if self._reader is not None:
            yield from self._deltas(self._reader.flush())
        if self._tokens:
            yield self._text("")

    def _read(self, text: str) -> Iterator[Delta]:
        if text:
            yield from self._parted(*(("", text) if self._thinking is None else self._thinking.feed(text)))

    def _parted(self, thought: str, text: str) -> Iterator[Delta]:
        if thought:
            self._tokens.clear()
            yield Reasoning(thought)
        if text:
            yield from self._deltas([text] if self._reader is None else self._reader.feed(text))

    def _deltas(self, parts: Sequence[str | Call]) -> Iterator[Delta]:
        for part in parts:
            if self.calls and not self._request.parallel:
                return
            if isinstance(part, str):
                yield self._text(part)
                continue
            self._tokens.clear()
            arguments = json.dumps(arguments_of(part, self._request.tools), ensure_ascii=False)
            yield ToolStart(self.calls, self._new_id(), part.name)
            yield ToolArguments(self.calls, arguments)
            self.calls += 1

    def _text(self, text: str) -> Text:
        tokens, self._tokens = tuple(self._tokens), []
        return Text(text, tokens)
