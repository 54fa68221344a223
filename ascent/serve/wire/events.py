"""Binary event streams (`application/vnd.amazon.eventstream`): one frame an event.

A frame is its length and the length of its headers (big-endian, 4 bytes each), the CRC-32 of those eight bytes, the
headers, the payload, and the CRC-32 of all that. A header is the length of its name, the name, 7 for text, the length
of the value in two bytes, and the value.
"""

from __future__ import annotations

import json
import struct
import zlib
from functools import lru_cache
from typing import Any

from ascent.serve.wire.encode import dump, json_value
from ascent.serve.wire.errors import ServiceError, modelled
from ascent.serve.wire.model import Operation, Shape

CONTENT_TYPE = "application/vnd.amazon.eventstream"


def frame(headers: bytes, payload: bytes) -> bytes:
    """Return one frame around encoded headers."""
    prelude = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    message = b"".join((prelude, struct.pack(">I", zlib.crc32(prelude)), headers, payload))
    return message + struct.pack(">I", zlib.crc32(message))


@lru_cache(maxsize=256)
def text_headers(*pairs: tuple[str, str]) -> bytes:
    """Return headers whose values are text."""
    return b"".join(
        struct.pack(">B", len(name)) + name.encode() + struct.pack(">BH", 7, len(value.encode())) + value.encode()
        for name, value in pairs
    )


def event_frame(stream: Shape, name: str, value: dict[str, Any]) -> bytes:
    """Return the frame of one event of the union `stream`.

    Raises:
        TypeError: the stream has no such event, or the value does not fit it.
    """
    member = stream.members.get(name)
    if member is None:
        raise TypeError(f"{stream.name} has no event {name}; it has {', '.join(stream.members)}")
    content, payload = "application/json", None
    for part in member.shape.members.values():
        if part.event_payload:
            payload = value.get(part.name, b"")
            if part.shape.kind == "blob":
                content = "application/octet-stream"
            elif part.shape.kind != "string":
                payload = dump(json_value(part.shape, payload, f"{name}.{part.name}"))
    if payload is None:
        payload = dump(json_value(member.shape, value, name))
    data = payload.encode() if isinstance(payload, str) else payload
    return frame(text_headers((":event-type", name), (":content-type", content), (":message-type", "event")), data)


def error_frame(stream: Shape, error: ServiceError, operation: Operation, request_id: str) -> bytes:
    """Return the last frame of a stream that failed: the stream's own exception, or an error frame if it has none."""
    code, _ = modelled(error.code, operation)
    message = str(error)
    for name, member in stream.members.items():
        if member.shape.name == code:
            spelled = next((each for each in member.shape.members if each.lower() == "message"), "message")
            body = {spelled: message} | {k: v for k, v in error.members.items() if k in member.shape.members}
            kind = ((":exception-type", name), (":content-type", "application/json"), (":message-type", "exception"))
            return frame(text_headers(*kind), json.dumps(body).encode())
    text = f"{message} (request {request_id})".encode()[:2000].decode(errors="ignore")
    headers = ((":error-code", code), (":error-message", text), (":message-type", "error"))
    return frame(text_headers.__wrapped__(*headers), b"")
