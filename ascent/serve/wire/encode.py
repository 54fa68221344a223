"""From what a handler returns, or raises, to an HTTP response as the model has it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any

from ascent.serve.wire.errors import STATUS, ServiceError, modelled
from ascent.serve.wire.model import Member, Operation, Shape
from ascent.serve.wire.timestamps import format_timestamp

JSON_TYPE = "application/json"
NO_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


@dataclass(slots=True)
class Response:
    """Status, headers in lower case, and a body, or the `stream` that a handler returned in its place."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    stream: Any = None


def encode_response(operation: Operation, result: dict[str, Any] | None) -> Response:
    """Return the response that carries `result`, named as in the model.

    Raises:
        TypeError: the result holds a member that the model does not have, or a value of another type.
    """
    response = Response(operation.status, {})
    shape, result = operation.output, {} if result is None else result
    if shape is None:
        if result:
            raise TypeError(f"{operation.name} returns nothing; the result holds {', '.join(result)}")
        return _with_json(response, {}) if operation.status not in NO_BODY else response
    _check_names(shape, result, operation.name)
    for member in shape.members.values():
        if member.location and (value := result.get(member.name)) is not None:
            _place(response, member, value)
    if shape.payload is None:
        inside = {name: value for name, value in result.items() if not shape.members[name].location}
        has_body = any(not member.location for member in shape.members.values())
        if response.status in NO_BODY and not has_body:
            return response
        return _with_json(response, json_value(shape, inside, "", whole=False))
    payload, value = shape.members[shape.payload], result.get(shape.payload)
    if operation.stream is None:
        return _with_json(response, {} if value is None else json_value(payload.shape, value, payload.name))
    if payload.shape.kind == "blob" and (value is None or isinstance(value, bytes)):
        response.body = value or b""
        response.headers.setdefault("content-type", "application/octet-stream")
    else:
        response.stream = value
    return response


def encode_error(error: ServiceError, operation: Operation | None) -> Response:
    """Return the response for an error: the modelled one with its members, where there is a model of it."""
    code, kind = modelled(error.code, operation)
    status = error.status or (kind.status if kind is not None else STATUS.get(code, 400))
    body: dict[str, Any] = {}
    members = {} if kind is None else kind.members
    for name, member in members.items():
        if name.lower() == "message":
            body[member.wire] = str(error)
        elif name in error.members:
            body[member.wire] = json_value(member.shape, error.members[name], name)
    response = _with_json(Response(status, {"x-amzn-errortype": code}), body or {"message": str(error)})
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return response


def dump(value: Any) -> bytes:
    """Return JSON as UTF-8; half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_value(shape: Shape, value: Any, path: str, *, whole: bool = True) -> Any:
    """Return a value as JSON has it; members that are None are left out. `whole`: no member travels elsewhere.

    Raises:
        TypeError: the value does not fit the shape; with its path.
    """
    if shape.kind == "structure":
        if not isinstance(value, dict):
            raise TypeError(f"{path}: a dict was expected, not {type(value).__name__}")
        if whole:
            _check_names(shape, value, path)
        members = shape.members
        return {
            members[name].wire: json_value(members[name].shape, inner, f"{path}.{name}")
            for name, inner in value.items()
            if inner is not None
        }
    if shape.kind == "list" and shape.item is not None and not isinstance(value, str | bytes | dict):
        item = shape.item
        return [json_value(item, inner, path) for inner in value]
    if shape.kind == "map" and shape.item is not None and isinstance(value, dict):
        item = shape.item
        return {str(name): json_value(item, inner, f"{path}.{name}") for name, inner in value.items()}
    if shape.kind == "document":
        return value
    if (write := _WRITE.get(shape.kind)) is None or (written := write(shape, value)) is None:
        raise TypeError(f"{path}: a {shape.kind} was expected, not {type(value).__name__}")
    return written


def _text(shape: Shape, value: Any) -> str | None:
    return str(value) if isinstance(value, str) else None


def _truth(shape: Shape, value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _whole(shape: Shape, value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(shape: Shape, value: Any) -> float | str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _blob(shape: Shape, value: Any) -> str | None:
    return base64.b64encode(value).decode() if isinstance(value, bytes | bytearray) else None


def _time(shape: Shape, value: Any) -> str | float | None:
    return format_timestamp(value, shape.timestamp or "unixtimestamp") if isinstance(value, datetime) else None


_WRITE: dict[str, Callable[[Shape, Any], Any]] = {
    "string": _text,
    "boolean": _truth,
    "integer": _whole,
    "number": _number,
    "blob": _blob,
    "timestamp": _time,
}


def _with_json(response: Response, value: Any) -> Response:
    response.body = dump(value)
    response.headers["content-type"] = JSON_TYPE
    return response


def _check_names(shape: Shape, value: dict[str, Any], path: str) -> None:
    if unknown := value.keys() - shape.members.keys():
        raise TypeError(f"{path or shape.name} has no {', '.join(sorted(unknown))}; it has {', '.join(shape.members)}")


def _place(response: Response, member: Member, value: Any) -> None:
    """Put a member into the status or the headers."""
    if member.location == "statusCode":
        response.status = int(value)
    elif member.location == "headers":
        for name, text in value.items():
            _header(response, f"{member.wire}{name}", text)
    elif member.json:
        _header(response, member.wire, base64.b64encode(dump(value)).decode())
    elif member.shape.item is not None:
        _header(response, member.wire, ",".join(_header_text(member.shape.item, each, member.name) for each in value))
    else:
        _header(response, member.wire, _header_text(member.shape, value, member.name))


def _header_text(shape: Shape, value: Any, path: str) -> str:
    if shape.kind == "timestamp" and isinstance(value, datetime):
        return str(format_timestamp(value, shape.timestamp or "rfc822"))
    written = json_value(shape, value, path)
    return written if isinstance(written, str) else json.dumps(written)


def _header(response: Response, name: str, text: str) -> None:
    if not (text.isascii() and text.isprintable()):
        raise TypeError(f"the header {name} would hold {text[:80]!r}; only printable ASCII can travel in one")
    response.headers[name.lower()] = text
