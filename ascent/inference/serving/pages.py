"""Which pages of the key/value cache hold what: a tree of prompts found again by their tokens.

A page holds the keys and values of `PAGE` tokens. A full page is known by the page before it and its own tokens, so
that what two requests share is there once; the root of an adapter's pages is its own, since its keys differ. Pages of
ended requests stay until their place is needed, the longest unused first (RadixAttention, Zheng et al. 2024, arXiv
2312.07104, on pages).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 16
Key = tuple[int, tuple[int, ...]]


@dataclass(eq=False)
class _Known:
    """A full page in the tree: its number among all nodes there ever were, and how it is found."""

    node: int
    key: Key


class Pages:
    """Counts the users of each page. Pages are numbers from 0 on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._nodes = itertools.count()
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._known: dict[int, _Known] = {}
        self._found: dict[Key, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    def root(self) -> int:
        """A new root: what is kept under it is found under no other."""
        return next(self._nodes)

    @property
    def used(self) -> int:
        """Pages with a user."""
        return self.count - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        """Pages without a user that can still be found."""
        return len(self._kept)

    def find(self, root: int, tokens: Sequence[int], held: Sequence[int]) -> list[int]:
        """Return the known pages that continue those `held` at the beginning of `tokens`, each with one user more."""
        found: list[int] = []
        at = self._known[held[-1]].node if held else root
        for begin in range(len(held) * PAGE, len(tokens) - PAGE + 1, PAGE):
            page = self._found.get((at, tuple(tokens[begin : begin + PAGE])))
            if page is None:
                break
            self._users[page] += 1
            self._kept.pop(page, None)
            found.append(page)
            at = self._known[page].node
        return found

    def take(self) -> int | None:
        """Return an empty page for one user, or None when all are used."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._found[self._known.pop(page).key]
        else:
            return None
        self._users[page] = 1
        return page

    def know(self, root: int, before: int | None, page: int, tokens: Sequence[int]) -> int:
        """Let a full page be found; return it, or the page that held the same already and takes its place."""
        key = (root if before is None else self._known[before].node, tuple(tokens))
        there = self._found.get(key)
        if there is None:
            self._found[key], self._known[page] = page, _Known(next(self._nodes), key)
            return page
        self._users[there] += 1
        self._kept.pop(there, None)
        self.leave([page])
        return there

    def leave(self, pages: Sequence[int]) -> None:
        """Take a user from each page of a request; the later ones will be given up before those they continue."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._known:
                self._kept[page] = None
            else:
                self._free.append(page)
