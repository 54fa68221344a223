"""A guardrail over one conversation: what the user says before the model sees it, the answer before the caller does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ascent.serve.chat.collect import Whole
from ascent.serve.chat.guardrails import Rules, assess
from ascent.serve.chat.types import ChatRequest, Delta, Finish, Reasoning, Text


class Guard:
    """The rules of guardrail `name`, applied to one conversation.

    Attributes:
        asked: the request as it may go to the model, after `ask`.
        intervened: whether a rule was met so far.
        trace: `GuardrailTraceAssessment` under `guardrail`, where a trace was asked for.
    """

    def __init__(self, name: str, rules: Rules, traced: bool) -> None:
        self.name, self.rules, self._traced = name, rules, traced
        self.asked = ChatRequest()
        self.intervened = self._blocked = False
        self.trace: dict[str, Any] = {}

    def ask(self, asked: ChatRequest, marked: Sequence[str]) -> str | None:
        """Check the user's side; return what to say instead of an answer, or None and `asked` is set.

        Args:
            asked: the request.
            marked: the texts to check; without any, all that the user says is checked.
        """
        texts = list(marked) or [turn.text for turn in asked.turns if turn.role == "user"]
        found = assess(self.rules, texts)
        instead = dict(zip(texts, found.texts, strict=True))
        turns = []
        for turn in asked.turns:
            text = turn.text
            for given, kept in instead.items():
                text = text.replace(given, kept) if given else text
            turns.append(replace(turn, text=text))
        self.asked = replace(asked, turns=tuple(turns))
        self.intervened = found.blocked
        if self._traced:
            self.trace = {"guardrail": {"inputAssessment": {self.name: found.as_member()}}}
        return self.rules.blocked_input if found.blocked else None

    def check(self, whole: Whole) -> None:
        """Check an answer and put what may be said in its place."""
        kept = self._output([whole.text, whole.reasoning])
        if kept is None:
            whole.text, whole.reasoning = self.rules.blocked_output, ""
            whole.calls.clear()
        else:
            whole.text, whole.reasoning = kept

    async def checked(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        """Yield an answer's deltas, each stretch of text or reasoning once all of it was checked."""
        held: list[Text | Reasoning] = []
        async with aclosing(deltas) as opened:  # type: ignore[type-var]
            async for delta in opened:
                if isinstance(delta, Text | Reasoning):
                    if held and type(held[0]) is not type(delta):
                        for done in self._stretch(held):
                            yield done
                        held = []
                    held.append(delta)
                    continue
                for done in self._stretch(held):
                    yield done
                held = []
                if not self._blocked or isinstance(delta, Finish):
                    yield delta

    def _stretch(self, held: Sequence[Text | Reasoning]) -> list[Delta]:
        if not held or self._blocked:
            return []
        kept = self._output(["".join(delta.text for delta in held)])
        if kept is None:
            self._blocked = True
            return [Text(self.rules.blocked_output)]
        return [type(held[0])(kept[0])]

    def _output(self, texts: list[str]) -> list[str] | None:
        """Return what may be said of an answer's texts; None when none of it may."""
        found = assess(self.rules, texts)
        self.intervened = self.intervened or found.intervened
        if self._traced:
            rows = self.trace["guardrail"].setdefault("outputAssessments", {}).setdefault(self.name, [])
            rows.append(found.as_member())
        return None if found.blocked else found.texts
