"""From tokens to text while they arrive: whole characters only, stop strings held back, reasoning told apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character (yet)
LONGEST_HELD, KEPT_BACK = 32, 8  # a character has four bytes, so at most four tokens of those held can still change
THINK, THOUGHT = "<think>", "</think>"


class Detokeniser:
    """Turns tokens into text one by one; joined, the pieces equal the decoding of all tokens at once.

    Special tokens write nothing, except those in `kept`, which write themselves: they mark a tool call.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], special: Collection[int], kept: dict[int, str]) -> None:
        self._decode, self._special, self._kept = decode, special, kept
        self._done: list[int] = []  # already written; what follows is decoded after them, for the space between words
        self._base = 0  # length of the text of what is done
        self._open: list[int] = []

    def feed(self, token: int) -> str:
        """Return the text that `token` completes, perhaps none."""
        if token in self._kept:
            text = self.flush() + self._kept[token]
            self._done, self._base = [], 0
            return text
        if token in self._special:
            return ""
        self._open.append(token)
        text = self._written(self._open)
        if text and not text.endswith(BROKEN):
            return self._settle(len(self._open), text)
        if len(self._open) > LONGEST_HELD:
            cut = len(self._open) - KEPT_BACK
            head = self._written(self._open[:cut])
            if head + self._decode(self._open[cut:]) == text:
                return self._settle(cut, head)
        return ""

    def flush(self) -> str:
        """Return what is still held, with a mark for each character that stayed incomplete."""
        return self._settle(len(self._open), self._written(self._open)) if self._open else ""

    def _written(self, tokens: list[int]) -> str:
        return self._decode([*self._done, *tokens])[self._base :]

    def _settle(self, count: int, text: str) -> str:
        self._done, self._open = self._open[:count], self._open[count:]
        self._base = len(self._decode(self._done))
        return text


@dataclass
class Stopper:
    """Finds stop strings in a stream and holds back what may still become one."""

    stops: tuple[str, ...]
    found: str | None = None
    _held: str = ""

    def feed(self, text: str) -> str:
        """Return the text that is certain; after a stop string was `found` there is no more."""
        if not self.stops:
            return text
        text = self._held + text
        self._held = ""
        places = [(at, -len(stop), stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            at, _, self.found = min(places)
            return text[:at]
        keep = max(overlap(text, stop) for stop in self.stops)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


@dataclass
class Thinking:
    """Tells reasoning between `<think>` tags, at the beginning of an answer, from the answer itself.

    `open` says that the prompt ended inside the reasoning, as some templates make it. White space beside the tags
    belongs to neither.
    """

    open: bool = False
    _held: str = ""
    _state: str = field(default="before")

    def __post_init__(self) -> None:
        if self.open:
            self._state = "opened"

    def feed(self, text: str) -> tuple[str, str]:
        """Return (reasoning, answer) as far as they are certain."""
        if self._state == "answer":
            return "", text
        text = self._held + text
        self._held = ""
        if self._state == "before":
            start = text.lstrip()
            if start.startswith(THINK):
                self._state, text = "opened", start[len(THINK) :]
            elif THINK.startswith(start):
                self._held = text
                return "", ""
            else:
                self._state = "answer"
                return "", text
        if self._state == "opened":
            text = text.lstrip()
            if not text:
                return "", ""
            self._state = "inside"
        if self._state == "inside":
            return self._inside(text)
        return "", self._after(text)

    def flush(self) -> tuple[str, str]:
        """Return what was held back, as (reasoning, answer)."""
        held, self._held = self._held, ""
        return (held, "") if self._state == "inside" else ("", held)

    def _inside(self, text: str) -> tuple[str, str]:
        thought, closed, rest = text.partition(THOUGHT)
        if closed:
            self._state = "after"
            return thought.rstrip(), self._after(rest)
        cut = len(text) - overlap(text, THOUGHT)
        cut = len(text[:cut].rstrip())
        self._held = text[cut:]
        return text[:cut], ""

    def _after(self, text: str) -> str:
        text = text.lstrip()
        if text:
            self._state = "answer"
        return text


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that `mark` begins with, short of all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
