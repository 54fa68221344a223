"""AWS Signature Version 4: reading a signed request, and computing what its signature must be.

Canonical form: method, path (quoted once more), sorted query, signed headers, their names, and the SHA-256 of the body.
The same as in AWS' documentation "Create a signed AWS API request" and, for chunks, "Signature calculations for the
Authorization header: transferring payload in multiple chunks".
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from urllib.parse import parse_qsl, quote

from ascent.serve.wire.errors import ServiceError

ALGORITHM = "AWS4-HMAC-SHA256"
UNSIGNED = "UNSIGNED-PAYLOAD"
CHUNKED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
PRESIGNED_MAX_S = 7 * 24 * 3600

_CREDENTIAL = re.compile(r"([\w-]{1,128})/(\d{8})/([a-z0-9-]{1,64})/([a-z0-9.-]{1,64})/aws4_request", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}")
_STAMP = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True, slots=True)
class Signed:
    """What a request says of its own signature. `expires_s` is set for a presigned address only."""

    key_id: str
    date: str
    region: str
    service: str
    headers: tuple[str, ...]
    signature: str
    stamp: str
    time: datetime
    payload: str | None
    expires_s: int | None

    @property
    def scope(self) -> str:
        """The credential scope."""
        return f"{self.date}/{self.region}/{self.service}/aws4_request"


def read_signed(headers: Mapping[str, str], query: str) -> Signed:
    """Read the signature of a request, from its Authorization header or from a presigned address.

    Args:
        headers: names in lower case.
        query: as on the wire.

    Raises:
        ServiceError: IncompleteSignatureException, or MissingAuthenticationTokenException where there is none.
    """
    presigned = {name: value for name, value in parse_qsl(query, keep_blank_values=True) if name.startswith("X-Amz-")}
    written = headers.get("authorization")
    if written is not None:
        algorithm, _, rest = written.partition(" ")
        parts = dict(part.strip().partition("=")[::2] for part in rest.split(","))
        stamp = headers.get("x-amz-date") or _stamp_of(headers.get("date", ""))
        expires = None
    elif "X-Amz-Signature" in presigned:
        algorithm = presigned.get("X-Amz-Algorithm", "")
        parts = {name: presigned.get(f"X-Amz-{name}", "") for name in ("Credential", "SignedHeaders", "Signature")}
        stamp, expires = presigned.get("X-Amz-Date", ""), presigned.get("X-Amz-Expires", "")
    else:
        raise ServiceError(
            "MissingAuthenticationTokenException",
            "the request is not signed; make a key with `ascent keys create` and give it to the client",
        )
    if algorithm != ALGORITHM:
        raise _incomplete(f"the algorithm must be {ALGORITHM}, not {algorithm[:40]!r}")
    credential = _CREDENTIAL.fullmatch(parts.get("Credential", ""))
    if credential is None:
        raise _incomplete("Credential must be KEY/YYYYMMDD/REGION/SERVICE/aws4_request")
    if not _HEX.fullmatch(parts.get("Signature", "")):
        raise _incomplete("Signature must be 64 hexadecimal digits")
    names = tuple(parts.get("SignedHeaders", "").split(";"))
    must = {"host"} | {name for name in headers if name.startswith("x-amz-")}
    if missing := must - set(names):
        raise _incomplete(f"SignedHeaders must name {', '.join(sorted(missing))}")
    if expires is not None and not (re.fullmatch(r"[0-9]{1,6}", expires) and 1 <= int(expires) <= PRESIGNED_MAX_S):
        raise _incomplete(f"X-Amz-Expires must be 1 to {PRESIGNED_MAX_S} seconds")
    key_id, date, region, service = credential.groups()
    time = _time(stamp)
    if stamp[:8] != date:
        raise _incomplete(f"the credential is of {date}, the request of {stamp[:8]}")
    payload = headers.get("x-amz-content-sha256")
    seconds = None if expires is None else int(expires)
    return Signed(key_id, date, region, service, names, parts["Signature"], stamp, time, payload, seconds)


def expected_signature(
    secret: str, signed: Signed, method: str, raw_path: str, query: str, headers: Mapping[str, str], payload: str
) -> str:
    """Return the signature that the holder of `secret` makes for a request.

    Args:
        secret: of the access key.
        signed: what `read_signed` found.
        method: in upper case.
        raw_path: as on the wire, percent-encoded; it is quoted a second time here.
        query: as on the wire.
        headers: names in lower case; several values of one joined by commas.
        payload: the body's SHA-256 in hexadecimal, or what stands for it.
    """
    request = "\n".join(
        (
            method,
            quote(raw_path or "/", safe="/~"),
            canonical_query(query),
            *(f"{name}:{' '.join(headers.get(name, '').split())}" for name in signed.headers),
            "",
            ";".join(signed.headers),
            payload,
        )
    )
    text = "\n".join((ALGORITHM, signed.stamp, signed.scope, hashlib.sha256(request.encode()).hexdigest()))
    return _sign(signing_key(secret, signed.scope), text)


def canonical_query(query: str) -> str:
    """Return a query sorted and encoded as it is signed, without the signature itself."""
    if not query:
        return ""
    pairs = (pair.partition("=") for pair in query.split("&") if pair)
    encoded = ((_recoded(name), _recoded(value)) for name, _, value in pairs)
    return "&".join(f"{name}={value}" for name, value in sorted(encoded) if name != "X-Amz-Signature")


@lru_cache(maxsize=1024)
def signing_key(secret: str, scope: str) -> bytes:
    """Return the key of one day, region and service, derived from an access key's secret."""
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


def read_chunks(body: bytes, secret: str, signed: Signed, length: str | None) -> bytes:
    r"""Return the content of a body sent in signed chunks (`SIZE;chunk-signature=…\r\n…\r\n`), each one verified.

    Raises:
        ServiceError: InvalidSignatureException; a chunk is not what was signed, or the last one is missing.
    """
    key, before, at = signing_key(secret, signed.scope), signed.signature, 0
    content: list[bytes] = []
    while True:
        end = body.find(b"\r\n", at, at + 200)
        match = re.fullmatch(rb"([0-9a-fA-F]{1,8});chunk-signature=([0-9a-f]{64})", body[at : max(end, at)])
        if match is None:
            raise _forged("a chunk does not begin with its size and signature")
        size, begin = int(match[1], 16), end + 2
        data = body[begin : begin + size]
        digest = hashlib.sha256(data).hexdigest()
        text = "\n".join((f"{ALGORITHM}-PAYLOAD", signed.stamp, signed.scope, before, EMPTY_SHA256, digest))
        before = _sign(key, text)
        if len(data) != size or not hmac.compare_digest(before, match[2].decode()):
            raise _forged(f"chunk {len(content) + 1} is not what was signed")
        at = begin + size + 2
        if body[at - 2 : at] not in (b"\r\n", b"")[: 1 if size else 2]:
            raise _forged(f"chunk {len(content) + 1} does not end with a line break")
        if size == 0:
            break
        content.append(data)
    whole = b"".join(content)
    if at < len(body) or (length is not None and length != str(len(whole))):
        raise _forged("the chunks do not make up x-amz-decoded-content-length")
    return whole


def _sign(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _recoded(text: str) -> str:
    """Percent-encode as AWS does, whatever the client's own habits."""
    plain = text.encode("latin-1", "replace")
    return quote(re.sub(rb"%([0-9a-fA-F]{2})", lambda match: bytes.fromhex(match[1].decode()), plain), safe="-_.~")


def _stamp_of(date: str) -> str:
    try:
        return parsedate_to_datetime(date).astimezone(UTC).strftime(_STAMP)
    except (TypeError, ValueError, OverflowError, IndexError):
        return ""


def _time(stamp: str) -> datetime:
    try:
        return datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC)
    except ValueError as error:
        raise _incomplete("X-Amz-Date must be a time such as 20260131T120000Z") from error


def _incomplete(text: str) -> ServiceError:
    return ServiceError("IncompleteSignatureException", f"the signature cannot be checked: {text}")


def _forged(text: str) -> ServiceError:
    return ServiceError("InvalidSignatureException", f"{text}; sign the body that is sent, with the secret of the key")
