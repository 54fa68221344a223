"""Random valid values for botocore's shapes, made from the models alone and from nothing of ours."""

from __future__ import annotations

import math
import random
import re
from datetime import UTC, datetime, timedelta
from functools import cache
from re import _constants as op  # the parse tree of a pattern has no public name
from re import _parser as parser
from typing import Any

DEEP = 5
PRINTABLE = [chr(code) for code in range(33, 127)]
WIDE = [*PRINTABLE, " ", "é", "Ж", "中", "🙂", '"', "\\", "/"]


class NoValueError(Exception):
    """No valid value was found; the shape's limits and pattern are too narrow for the generator."""


class Values:
    """A source of values. `text` says what free strings are made of."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, shape: Any, depth: int = 0, *, plain: bool = False) -> Any:
        """Return a value; `plain` strings can travel in a header."""
        if shape.metadata.get("document"):
            return self.document(depth)
        return getattr(self, f"_{shape.type_name}", self._number)(shape, depth, plain)

    def structure(self, shape: Any, depth: int, *, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
        names = [name for name in shape.members if name not in skip]
        required = [name for name in shape.metadata.get("required", ()) if name in names]
        if shape.metadata.get("union"):
            wanted = self.random.sample(names, len(names))  # one of them; the next where a value cannot be had
        else:
            share = 0.5 if depth < DEEP else 0.0
            wanted = [name for name in names if name in required or self.random.random() < share]
        found: dict[str, Any] = {}
        for name in wanted:
            member = shape.members[name]
            plain = member.serialization.get("location") is not None
            try:
                if member.serialization.get("jsonvalue"):
                    found[name] = {"a": [1, "x"]}
                else:
                    found[name] = self.value(member, depth + 1, plain=plain)
            except NoValueError:
                if name in required:
                    raise
            if shape.metadata.get("union") and found:
                break
        return found

    def document(self, depth: int) -> Any:
        kind = self.random.randrange(3 if depth > DEEP else 6)
        if depth == 0 or kind == 5:
            return {self.text(1, 8): self.document(depth + 1) for _ in range(self.random.randrange(3))}
        if kind == 4:
            return [self.document(depth + 1) for _ in range(self.random.randrange(3))]
        return [self.text(0, 12), self.random.randrange(-(10**12), 10**12), self.random.random(), True, None][kind]

    def text(self, low: int, high: int, letters: list[str] = WIDE) -> str:
        return "".join(self.random.choice(letters) for _ in range(self.random.randint(low, high)))

    def _structure(self, shape: Any, depth: int, plain: bool) -> dict[str, Any]:
        if depth > 4 * DEEP:
            raise NoValueError(shape.name)
        return self.structure(shape, depth)

    def _list(self, shape: Any, depth: int, plain: bool) -> list[Any]:
        low = shape.metadata.get("min", 0)
        high = min(shape.metadata.get("max", low + 2), low + 2)
        count = self.random.randint(low, max(low, high)) if depth < DEEP else low
        if plain:
            count = max(count, 1)  # an empty list has no place in a header or a query
        return [self.value(shape.member, depth + 1, plain=plain) for _ in range(count)]

    def _map(self, shape: Any, depth: int, plain: bool) -> dict[str, Any]:
        low = max(shape.metadata.get("min", 0), int(plain))
        count = min(low + self.random.randrange(2), shape.metadata.get("max", math.inf))
        keys = {self.value(shape.key, depth + 1, plain=plain) for _ in range(int(count))}
        if len(keys) < low:
            raise NoValueError(shape.name)
        return {key: self.value(shape.value, depth + 1, plain=plain) for key in sorted(keys)}

    def _string(self, shape: Any, depth: int, plain: bool) -> str:
        facts = shape.metadata
        if facts.get("enum"):
            return self.random.choice(facts["enum"])
        low, high = facts.get("min", 0), facts.get("max", math.inf)
        low = max(low, int(plain))
        if (pattern := facts.get("pattern")) and (tree := parsed(pattern)) is not None:
            return self.matching(tree, low, high, plain)
        wide = min(high, low + 12)
        return self.text(low, int(wide), PRINTABLE if plain or facts.get("pattern") else WIDE)

    def matching(self, pattern: re.Pattern[str], low: float, high: float, plain: bool) -> str:
        tree = parser.parse(pattern.pattern)
        for attempt in range(400):
            found = self._from(tree, 1 + 2 * (attempt % 60))
            fits = not plain or (found.isascii() and found.isprintable() and found == found.strip())
            if low <= len(found) <= high and fits and pattern.fullmatch(found):
                return found
        raise NoValueError(pattern.pattern)

    def _from(self, tree: Any, most: int) -> str:
        return "".join(self._piece(kind, what, most) for kind, what in tree)

    def _piece(self, kind: Any, what: Any, most: int) -> str:
        if kind is op.LITERAL:
            return chr(what)
        if kind is op.NOT_LITERAL:
            return self.random.choice([each for each in PRINTABLE if ord(each) != what])
        if kind is op.ANY:
            return self.random.choice(PRINTABLE)
        if kind is op.IN:
            return self._one_of(what)
        if kind is op.BRANCH:
            return self._from(self.random.choice(what[1]), most)
        if kind is op.SUBPATTERN:
            return self._from(what[3], most)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            low, high, inner = what
            count = self.random.randint(low, min(int(high), low + most))
            return "".join(self._from(inner, most) for _ in range(count))
        return ""  # anchors and look-arounds: the whole is matched afterwards

    def _one_of(self, what: Any) -> str:
        if what[0][0] is op.NEGATE:
            allowed = re.compile(f"[^{''.join(_class_text(each) for each in what[1:])}]")
            return self.random.choice([each for each in PRINTABLE if allowed.match(each)])
        kind, value = self.random.choice(what)
        if kind is op.LITERAL:
            return chr(value)
        if kind is op.RANGE:
            return chr(self.random.randint(value[0], min(value[1], max(value[0], 0x24F))))
        return self.random.choice([each for each in PRINTABLE if re.match(_class_text((kind, value)), each)] or [" "])

    def _blob(self, shape: Any, depth: int, plain: bool) -> bytes:
        low = shape.metadata.get("min", 0)
        return self.random.randbytes(self.random.randint(low, low + 9))

    def _boolean(self, shape: Any, depth: int, plain: bool) -> bool:
        return self.random.random() < 0.5

    def _timestamp(self, shape: Any, depth: int, plain: bool) -> datetime:
        whole = shape.serialization.get("location") == "header"
        past = timedelta(seconds=self.random.randrange(2**32), microseconds=self.random.choice([0, 1, 123000, 999999]))
        found = datetime(1970, 1, 1, tzinfo=UTC) + past
        return found.replace(microsecond=0) if whole else found

    def _number(self, shape: Any, depth: int, plain: bool) -> float:
        if shape.type_name in ("integer", "long"):
            low, high = shape.metadata.get("min", -(2**31)), shape.metadata.get("max", 2**31 - 1)
            return self.random.randint(int(low), int(max(low, high)))
        low, high = shape.metadata.get("min", -1e6), shape.metadata.get("max", 1e6)
        return self.random.uniform(low, max(low, high))


@cache
def parsed(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def _class_text(each: Any) -> str:
    kind, value = each
    if kind is op.LITERAL:
        return re.escape(chr(value))
    if kind is op.RANGE:
        return f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"
    names = {op.CATEGORY_DIGIT: r"\d", op.CATEGORY_SPACE: r"\s", op.CATEGORY_WORD: r"\w"}
    names |= {op.CATEGORY_NOT_DIGIT: r"\D", op.CATEGORY_NOT_SPACE: r"\S", op.CATEGORY_NOT_WORD: r"\W"}
    return names[value]
