"""Pages of a listing, and the opaque tokens that lead from one to the next.

A token says after which item the next page begins, so that nothing is skipped or shown twice when items come and go. It
is signed for one caller, one operation and one set of filters: elsewhere it is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from ascent.serve.wire.errors import ServiceError

PAGE = 100
_MAC_BYTES = 16
Item = TypeVar("Item")


@dataclass(frozen=True)
class Listing:
    """Whose tokens these are: the signing key of this server, the caller's owner, and the operation."""

    secret: bytes
    owner: str
    action: str


CURRENT: ContextVar[Listing] = ContextVar("listing", default=Listing(secrets.token_bytes(32), "", ""))  # noqa: B039


def page(
    items: Iterable[Item],
    request: dict[str, Any],
    *,
    key: Callable[[Item], Any],
    reverse: bool = False,
    size: int = PAGE,
) -> tuple[list[Item], str | None]:
    """Return one page of `items`, sorted by `key`, and the token of the next page, None after the last.

    Args:
        items: everything that the caller may see and asked for.
        request: as the handler got it; `maxResults` and `nextToken` are read, the rest is what the token is bound to.
        key: a sortable, unique place of an item: text, a number, or a tuple of these.
        reverse: largest first.
        size: of a page, where the request does not say.

    Raises:
        ServiceError: ValidationException; the token is not of this listing.
    """
    ordered = sorted(items, key=key, reverse=reverse)
    count = request.get("maxResults") or size
    if token := request.get("nextToken"):
        last = _read(token, request)
        ordered = [item for item in ordered if (key(item) < last if reverse else key(item) > last)]
    found = ordered[:count]
    return found, _write(key(found[-1]), request) if len(ordered) > count else None


def _write(last: Any, request: dict[str, Any]) -> str:
    text = json.dumps(last, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_mac(text, request) + text).decode().rstrip("=")


def _read(token: str, request: dict[str, Any]) -> Any:
    try:
        raw = base64.urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4))
    except (ValueError, binascii.Error):
        raw = b""
    mac, text = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
    if not text or not hmac.compare_digest(mac, _mac(text, request)):
        raise ServiceError(
            "ValidationException",
            "nextToken is not of this listing; send the one that the page before returned, by the same caller and with "
            "the same filters, or leave it out to begin again",
        )
    last = json.loads(text)
    return tuple(last) if isinstance(last, list) else last


def _mac(text: bytes, request: dict[str, Any]) -> bytes:
    listing = CURRENT.get()
    filters = {name: value for name, value in request.items() if name not in ("nextToken", "maxResults")}
    bound = json.dumps([listing.owner, listing.action, filters], sort_keys=True, default=str).encode()
    return hmac.new(listing.secret, hashlib.sha256(bound).digest() + text, hashlib.sha256).digest()[:_MAC_BYTES]
