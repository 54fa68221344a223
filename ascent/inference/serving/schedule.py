"""Which rows compute how many tokens in a step: every row that answers one, and prompts a stretch at a time.

A row is known by its tokens, those of them that are computed, and the pages that hold these. Everything else follows:
a prompt is computed in stretches, between which others answer (Agrawal et al. 2023, arXiv 2308.16369); when pages run
out, the row that entered last gives its own back and computes its tokens again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ascent.inference.serving.pages import PAGE, Pages
from ascent.inference.serving.request import Ended, Finish, Running

if TYPE_CHECKING:
    from ascent.inference.serving.adapters import Adapter


@dataclass(eq=False)
class Row:
    """A request as the engine sees it. `uniforms` has one number a token to be drawn."""

    run: Running
    adapter: Adapter | None
    root: int
    uniforms: Sequence[float]
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    entered_s: float | None = None
    first_token_s: float = 0.0

    @property
    def drawn(self) -> int:
        """How many tokens were drawn so far."""
        return len(self.tokens) - len(self.run.generation.prompt_ids)

    @property
    def answers(self) -> bool:
        """Whether all but the last drawn token is computed, so that a step gives the next one."""
        return self.drawn > 0 and len(self.tokens) - self.computed == 1

    def ended(self, finish: Finish, now: float) -> Ended:
        """How the request went, ended now for this reason."""
        began = now if self.entered_s is None else self.entered_s
        return Ended(finish, self.cached, began - self.run.submitted_s, self.first_token_s)


class Rows:
    """The rows in flight, in the order in which they entered, and those that wait, in the order they came."""

    def __init__(self, pages: Pages, limit: int) -> None:
        self.pages, self.limit = pages, limit
        self.flying: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.preempted = 0

    def enter(self, now: float) -> None:
        """Let rows enter while there is room for them and their tokens; `now` is in seconds of the monotonic clock.

        Nobody overtakes: the first that waits for pages holds up those behind it.
        """
        free = self.pages.count - self.pages.used - sum(map(_wanted, self.flying))
        while self.waiting and len(self.flying) < self.limit:
            free -= _wanted(self.waiting[0])
            if free < 0 and self.flying:
                return
            row = self.waiting.popleft()
            row.entered_s = now if row.entered_s is None else row.entered_s
            self.flying.append(row)

    def plan(self, prefill: int) -> list[tuple[Row, int]]:
        """Return how many tokens each row computes next, those of prompts `prefill` together, and make room for them.

        The row that entered first always goes on, since the pages suffice for one.
        """
        planned: list[tuple[Row, int]] = []
        at = 0
        while at < len(self.flying):
            row = self.flying[at]
            count = 1
            if not row.answers:
                self._find(row)
                count = min(len(row.tokens) - row.computed, prefill)
                prefill -= count
            if count and self._make_room(row, count):
                planned.append((row, count))
            at += 1
        return planned

    def advance(self, row: Row, count: int) -> None:
        """Note that the row's next `count` tokens are computed; pages that this filled can be found from now on."""
        full, row.computed = row.computed // PAGE, row.computed + count
        for at in range(full, row.computed // PAGE):
            before = row.pages[at - 1] if at else None
            row.pages[at] = self.pages.know(row.root, before, row.pages[at], row.tokens[at * PAGE : (at + 1) * PAGE])

    def remove(self, rows: Iterable[Row]) -> None:
        """Let rows leave, in flight or waiting."""
        gone = set(rows)
        for row in gone:
            self._give_back(row)
        self.flying = [row for row in self.flying if row not in gone]
        if any(row in gone for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if row not in gone)

    def all(self) -> list[Row]:
        """Rows in flight, then those that wait."""
        return [*self.flying, *self.waiting]

    def _find(self, row: Row) -> None:
        """Take what others have computed of the row's next tokens; the last is always its own, to draw from."""
        if row.computed % PAGE == 0:
            found = self.pages.find(row.root, row.tokens[:-1], row.pages)
            row.pages += found
            row.computed += len(found) * PAGE
            if not row.drawn:
                row.cached += len(found) * PAGE

    def _make_room(self, row: Row, count: int) -> bool:
        """Whether the row has pages for its next tokens; rows that entered later give up theirs for it."""
        while len(row.pages) * PAGE < row.computed + count:
            page = self.pages.take()
            if page is not None:
                row.pages.append(page)
                continue
            last = self.flying.pop()
            self._give_back(last)
            self.waiting.appendleft(last)
            self.preempted += 1
            if last is row:
                return False
        return True

    def _give_back(self, row: Row) -> None:
        self.pages.leave(row.pages)
        row.pages, row.computed = [], 0


def _wanted(row: Row) -> int:
    """How many pages more a row needs for the tokens it has and the next one."""
    return -(-(len(row.tokens) + 1) // PAGE) - len(row.pages)
