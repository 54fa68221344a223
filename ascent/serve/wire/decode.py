"""From an HTTP request to what a handler gets, checked against the model: one message names up to five problems."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.jsonbody import read_json
from ascent.serve.wire.model import Member, Operation, Shape
from ascent.serve.wire.timestamps import parse_timestamp

NAMED_PROBLEMS, KEPT_PROBLEMS = 5, 50
PATTERN_CHARS = 2048  # a pattern's time can grow faster than its text; longer texts are not matched
QUERY_FIELDS = 1000
_LIST_ITEM = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([^,]*))\s*(?:,|$)')


class Problems:
    """What is wrong with a request: how much, and the first (path, rule) pairs."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self.count = 0

    def add(self, path: str, rule: str) -> None:
        """Note that the member at `path` breaks a rule; `rule` is a sentence that follows its name."""
        self.count += 1
        if self.count <= KEPT_PROBLEMS:
            self.found.append((path, rule))

    def error(self) -> ServiceError:
        """Return all of it as one error; the first five are named."""
        named = self.found[:NAMED_PROBLEMS]
        count = self.count
        text = "; ".join(f"{path or 'the body'} {rule}" for path, rule in named)
        more = f"; and {count - len(named)} more" if count > len(named) else ""
        fields = [{"name": path, "message": f"{path or 'the body'} {rule}"} for path, rule in named]
        return ServiceError(
            "ValidationException",
            f"{count} validation error{'s' * (count != 1)} detected: {text}{more}",
            reason="FieldValidationFailed",
            fieldList=fields,
        )


def decode_request(
    operation: Operation, labels: Mapping[str, str], query: str, headers: Mapping[str, str], body: bytes
) -> dict[str, Any]:
    """Return the request by the model's member names: blobs as bytes, times aware and in UTC, what is null left out.

    Args:
        operation: what is asked for.
        labels: parts of the path, percent-encoded.
        query: as on the wire.
        headers: names in lower case.
        body: whole.

    Raises:
        ServiceError: ValidationException, with the path of each member and the rule that it breaks.
    """
    shape = operation.input
    if shape is None:
        return {}
    problems, found = Problems(), {}
    outside = [member for member in shape.members.values() if member.location]
    if outside:
        texts = _Texts(operation, labels, query, headers, problems)
        for member in outside:
            if (value := texts.read(member)) is not None:
                found[member.name] = value
    if shape.payload is not None:
        value = _payload(shape.members[shape.payload], body, shape.payload in shape.required, problems)
        if value is not None:
            found[shape.payload] = value
    elif len(outside) < len(shape.members):
        found |= _members(shape, _object(body, problems), "", problems, found)
    _require(shape, found, "", problems)
    if problems.found:
        raise problems.error()
    return found


def _object(body: bytes, problems: Problems) -> dict[str, Any]:
    try:
        value = read_json(body) if body.strip() else {}
    except ValueError as error:
        problems.add("", f"cannot be read: {error}")
        raise problems.error() from error
    if not isinstance(value, dict):
        problems.add("", f"must be a JSON object, not {_kind_of(value)}")
        raise problems.error()
    return value


def _payload(member: Member, body: bytes, required: bool, problems: Problems) -> Any:
    if member.shape.kind in ("blob", "string"):
        if not body and not required:
            return None
        if member.shape.kind == "blob":
            return _limited(member.shape, body, len(body), member.name, problems, "bytes")
        try:
            return _string(member.shape, body.decode(), member.name, problems)
        except UnicodeDecodeError:
            problems.add(member.name, "must be UTF-8")
            return None
    return decode_value(member.shape, _object(body, problems), member.name, problems) if body.strip() else None


class _Texts:
    """The parts of a request that are text: path, query and headers."""

    def __init__(
        self,
        operation: Operation,
        labels: Mapping[str, str],
        query: str,
        headers: Mapping[str, str],
        problems: Problems,
    ) -> None:
        self._operation, self._labels, self._headers, self._problems = operation, labels, headers, problems
        self._query: dict[str, list[str]] = {}
        try:
            pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS)
        except ValueError:  # UnicodeDecodeError is one
            problems.add("the query", f"must be UTF-8 and have at most {QUERY_FIELDS} fields")
            pairs = []
        for name, value in pairs:
            self._query.setdefault(name, []).append(value)

    def read(self, member: Member) -> Any:
        """Return a member's value, or None where it is absent or wrong."""
        if member.location == "uri":
            try:
                return self._value(member, unquote(self._labels[member.wire], errors="strict"))
            except UnicodeDecodeError:
                self._problems.add(member.name, "must be percent-encoded UTF-8")
                return None
        if member.location == "querystring":
            return self._from_query(member)
        if member.location == "header":
            text = self._headers.get(member.wire.lower())
            return None if text is None else self._from_header(member, text)
        if member.location == "headers":
            prefix = member.wire.lower()
            named = {name[len(prefix) :]: text for name, text in self._headers.items() if name.startswith(prefix)}
            return decode_value(member.shape, named, member.name, self._problems) if named else None
        return None  # statusCode belongs to responses

    def _from_query(self, member: Member) -> Any:
        if member.shape.kind == "map":
            return self._rest_of_query(member)
        texts = self._query.get(member.wire)
        if texts is None:
            return None
        if member.shape.item is not None:
            return self._list(member.shape, texts, member.name)
        if len(texts) > 1:
            self._problems.add(member.name, "must be given once")
            return None
        return self._value(member, texts[0])

    def _rest_of_query(self, member: Member) -> Any:
        """Read the fields that are no other member's, no part of the path's template, and no signature."""
        assert self._operation.input is not None and member.shape.item is not None
        taken = {each.wire for each in self._operation.input.members.values() if each.location == "querystring"}
        taken |= {name for name, _ in parse_qsl(self._operation.uri.partition("?")[2], keep_blank_values=True)}
        many = member.shape.item.kind == "list"
        rest = {
            name: texts if many else texts[0]
            for name, texts in self._query.items()
            if name not in taken and not name.lower().startswith("x-amz-")
        }
        return decode_value(member.shape, rest, member.name, self._problems) if rest else None

    def _from_header(self, member: Member, text: str) -> Any:
        if member.json:
            try:
                return read_json(base64.b64decode(text, validate=True))
            except (ValueError, binascii.Error):
                self._problems.add(member.name, "must be JSON in base64")
                return None
        if member.shape.item is not None:
            parts = [quoted.replace('\\"', '"') or plain.strip() for quoted, plain in _LIST_ITEM.findall(text)]
            return self._list(member.shape, parts[:-1] if text else [], member.name)
        return self._value(member, text)

    def _list(self, shape: Shape, texts: list[str], path: str) -> Any:
        item = shape.item or shape
        values = [self._scalar(item, text, f"{path}[{at}]") for at, text in enumerate(texts)]
        return decode_value(shape, values, path, self._problems) if item.kind == "string" else values

    def _value(self, member: Member, text: str) -> Any:
        value = self._scalar(member.shape, text, member.name)
        if value is None:
            return None
        return decode_value(member.shape, value, member.name, self._problems) if isinstance(value, str) else value

    def _scalar(self, shape: Shape, text: str, path: str) -> Any:
        """Read a number, truth value or time from text; text stays as it is, to be checked by the caller."""
        if "\x00" in text:
            self._problems.add(path, "must not hold a NUL character")
            return None
        if shape.kind in ("string", "timestamp", "blob"):
            return text if shape.kind == "string" else decode_value(shape, text, path, self._problems)
        raw: Any = text
        if shape.kind == "boolean":
            raw = {"true": True, "false": False}.get(text.lower(), text)
        elif shape.kind in ("integer", "number") and re.fullmatch(r"[+-]?[\d.]{1,40}(?:[eE][+-]?\d{1,4})?", text):
            try:
                raw = int(text) if shape.kind == "integer" else float(text)
            except ValueError:
                raw = text
        return decode_value(shape, raw, path, self._problems)


def decode_value(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    """Return one value of a JSON text as the model's type; None, and a problem noted, where it is none."""
    return _READ[shape.kind](shape, raw, path, problems)


def _structure(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    if not isinstance(raw, dict):
        return _wrong(raw, "a JSON object", path, problems)
    found = _members(shape, raw, path, problems, {})
    _require(shape, found, path, problems)
    if shape.union and len(raw := {name for name, value in raw.items() if value is not None and name != "__type"}) != 1:
        problems.add(path, f"must have exactly one of {', '.join(sorted(shape.members))}; it has {len(raw)} members")
    return found


def _members(shape: Shape, raw: dict[str, Any], path: str, problems: Problems, found: dict[str, Any]) -> dict[str, Any]:
    """Read the members that travel in the body; one that the model does not have is passed over, as AWS does."""
    for member in shape.members.values():
        value = None if member.location else raw.get(member.wire)
        if value is not None:
            found[member.name] = decode_value(member.shape, value, _below(path, member.name), problems)
    return found


def _require(shape: Shape, found: dict[str, Any], path: str, problems: Problems) -> None:
    for name in shape.required:
        inside = _below(path, name)
        if found.get(name) is None and not any(each.startswith(inside) for each, _ in problems.found):
            problems.add(inside, "is required")


def _list(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    if not isinstance(raw, list):
        return _wrong(raw, "a JSON array", path, problems)
    assert shape.item is not None
    item, read = shape.item, _READ[shape.item.kind]
    _limited(shape, raw, len(raw), path, problems, "entries")
    found = []
    for at, value in enumerate(raw):
        if value is None:
            problems.add(f"{path}[{at}]", "must not be null")
        else:
            found.append(read(item, value, f"{path}[{at}]", problems))
    return found


def _map(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    if not isinstance(raw, dict):
        return _wrong(raw, "a JSON object", path, problems)
    assert shape.item is not None and shape.key is not None
    _limited(shape, raw, len(raw), path, problems, "entries")
    found = {}
    for name, value in raw.items():
        inside = f"{path}[{name[:64]!r}]"
        decode_value(shape.key, name, f"{inside} (the key)", problems)
        if value is not None:
            found[name] = decode_value(shape.item, value, inside, problems)
    return found


def _string(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    if not isinstance(raw, str):
        return _wrong(raw, "a string", path, problems)
    if shape.enum is not None and raw not in shape.enum:
        problems.add(path, f"must be one of {', '.join(sorted(shape.enum))}")
    elif _limited(shape, raw, len(raw), path, problems, "characters") is None or shape.pattern is None:
        return raw
    elif len(raw) <= PATTERN_CHARS and not shape.pattern.fullmatch(raw):
        problems.add(path, f"must match the pattern {shape.pattern.pattern}")
    return raw


def _integer(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    if isinstance(raw, bool) or not isinstance(raw, int):
        return _wrong(raw, "a whole number", path, problems)
    return _ranged(shape, raw, path, problems)


def _number(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        return _wrong(raw, "a finite number", path, problems)
    return _ranged(shape, float(raw), path, problems)


def _boolean(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    return raw if isinstance(raw, bool) else _wrong(raw, "true or false", path, problems)


def _blob(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    try:
        value = base64.b64decode(raw, validate=True) if isinstance(raw, str) else None
    except (ValueError, binascii.Error):
        value = None
    if value is None:
        return _wrong(raw, "bytes in base64", path, problems)
    return _limited(shape, value, len(value), path, problems, "bytes")


def _timestamp(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    try:
        if isinstance(raw, str | int | float) and not isinstance(raw, bool):
            return parse_timestamp(raw)
    except ValueError:
        pass
    return _wrong(raw, "a time: seconds since 1970, ISO 8601 or an HTTP date", path, problems)


def _document(shape: Shape, raw: Any, path: str, problems: Problems) -> Any:
    return raw


_READ: dict[str, Callable[[Shape, Any, str, Problems], Any]] = {
    "structure": _structure,
    "list": _list,
    "map": _map,
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "blob": _blob,
    "timestamp": _timestamp,
    "document": _document,
}


def _limited(shape: Shape, value: Any, length: int, path: str, problems: Problems, unit: str) -> Any:
    """Check a length; return the value, or None where it is wrong."""
    low, high = shape.low or 0, math.inf if shape.high is None else shape.high
    if low <= length <= high:
        return value
    allowed = f"at least {low:g}" if length < low else f"at most {high:g}"
    problems.add(path, f"must have {allowed} {unit}; it has {length}")
    return None


def _ranged(shape: Shape, value: float, path: str, problems: Problems) -> Any:
    if shape.low is not None and value < shape.low:
        problems.add(path, f"must be at least {shape.low}")
    elif shape.high is not None and value > shape.high:
        problems.add(path, f"must be at most {shape.high}")
    return value


def _wrong(raw: Any, expected: str, path: str, problems: Problems) -> None:
    problems.add(path, f"must be {expected}, not {_kind_of(raw)}")


def _kind_of(raw: Any) -> str:
    if raw is None or isinstance(raw, bool):
        return json.dumps(raw)
    names = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(raw), "something else")


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
