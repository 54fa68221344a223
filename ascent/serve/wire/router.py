"""Routing by method and raw path: split before decoding, because ids hold `%2F`, and ARNs hold slashes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from ascent.records.errors import BadInput
from ascent.serve.wire.model import Operation


@dataclass(slots=True)
class _Leaf:
    operation: Operation
    labels: tuple[str, ...]
    query: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Node:
    literals: dict[str, _Node] = field(default_factory=dict)
    label: _Node | None = None
    greedy: _Node | None = None
    leaves: dict[str, list[_Leaf]] = field(default_factory=dict)


class Router:
    """All operations of some services, found by method, raw path and raw query.

    A literal segment wins over a label, a label over a greedy one; of two that differ by a literal in the query, the
    one with more literals wins.

    Raises:
        BadInput: two operations have the same method and path.
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._root = _Node()
        for operation in operations:
            self._add(operation)

    def find(self, method: str, raw_path: str, raw_query: str = "") -> tuple[Operation, dict[str, str]] | None:
        """Return the operation and its labels, still percent-encoded; None for an unknown path."""
        values: list[str] = []
        leaves = _walk(self._root, raw_path.split("/"), 0, values, method)
        if leaves is None:
            return None
        for leaf in leaves:
            if not leaf.query or set(leaf.query) <= set(_pairs(raw_query)):
                return leaf.operation, dict(zip(leaf.labels, values, strict=True))
        return None

    def _add(self, operation: Operation) -> None:
        path, _, query = operation.uri.partition("?")
        node, labels = self._root, []
        for segment in path.split("/"):
            if not segment.startswith("{"):
                node = node.literals.setdefault(segment, _Node())
                continue
            labels.append(segment.strip("{}+"))
            if segment.endswith("+}"):
                node.greedy = node = node.greedy or _Node()
            else:
                node.label = node = node.label or _Node()
        leaf = _Leaf(operation, tuple(labels), tuple(_pairs(query)))
        leaves = node.leaves.setdefault(operation.method, [])
        if any(other.query == leaf.query for other in leaves):
            raise BadInput(f"{operation.action}: another operation has {operation.method} {operation.uri} already")
        leaves.append(leaf)
        leaves.sort(key=lambda each: -len(each.query))


def _walk(node: _Node, segments: list[str], at: int, values: list[str], method: str) -> list[_Leaf] | None:
    """Return the leaves that the segments from `at` on lead to; the labels' values are left in `values`."""
    if at == len(segments):
        return node.leaves.get(method)
    segment = segments[at]
    if (child := node.literals.get(segment)) is not None:
        found = _walk(child, segments, at + 1, values, method)
        if found is not None:
            return found
    if node.label is not None and segment:
        values.append(segment)
        found = _walk(node.label, segments, at + 1, values, method)
        if found is not None:
            return found
        values.pop()
    if node.greedy is not None:
        for end in range(len(segments), at, -1):
            values.append("/".join(segments[at:end]))
            found = _walk(node.greedy, segments, end, values, method)
            if found is not None:
                return found
            values.pop()
    return None


def _pairs(query: str) -> list[tuple[str, str]]:
    """Return the pairs of a query; a literal without a value is (name, "")."""
    return parse_qsl(query, keep_blank_values=True)
