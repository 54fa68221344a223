"""Who is calling: SigV4 or a bearer key, verified against the keys of this server; and what the caller may do.

A signature is spent by an operation that changes something: a recorded request cannot be sent again while its clock is
good. Requests that only read may come again, and so may those with a `clientToken`, which get the first answer again.
Between the two are calls that compute an answer (Converse, InvokeModel): a client that asks the same twice within a
second makes the same signature twice, honestly, because the clock of a signature counts seconds; those may come again
for `BRIEFLY_S` after the first. What failed spends nothing, because boto3 may sign its retry in the same second. boto3
gives each creating call a `clientToken` of its own, so two of them never share a signature. What was spent is in
`spent.py`.
"""

from __future__ import annotations

import fnmatch
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ascent.serve.keys import Keys, StoredKey
from ascent.serve.wire.arns import ACCOUNT
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.model import Repeats
from ascent.serve.wire.sigv4 import CHUNKED, UNSIGNED, Signed, expected_signature, read_chunks, read_signed
from ascent.serve.wire.spent import Answered, Spent

SKEW_S = 300.0
BRIEFLY_S = 2.0
CACHE_S = 1.0
ADMIN = "admin:*"
_NOBODY = StoredKey("AKIA0000000000000000", "", "", frozenset(), "0" * 40, 0.0, None, None)


@dataclass(frozen=True)
class Caller:
    """Who a request is from. Resources belong to `owner`; `scopes` are patterns over `service:Operation`."""

    owner: str
    key_id: str
    name: str
    scopes: frozenset[str]
    request_id: str = ""
    region: str = "us-east-1"

    @property
    def account(self) -> str:
        """The account in ARNs: this server has one."""
        return ACCOUNT

    @property
    def admin(self) -> bool:
        """Whether the key sees what belongs to others too."""
        return ADMIN in self.scopes

    def may(self, action: str) -> bool:
        """Return whether one of the scopes matches `action`, such as `bedrock:GetCustomModel`."""
        return _may(self.scopes, action)

    def require(self, action: str) -> None:
        """Refuse what the key's scopes do not allow.

        Raises:
            ServiceError: AccessDeniedException.
        """
        if not self.may(action):
            raise ServiceError(
                "AccessDeniedException",
                f"the key {self.name!r} has no scope for {action}; its scopes are {', '.join(sorted(self.scopes))}. "
                f"Make one with: ascent keys create --name NAME --owner {self.owner} --scope '{action}'",
            )


@dataclass(frozen=True, slots=True)
class Claim:
    """A caller who is known but not yet believed: the signature waits for the body's hash."""

    key: StoredKey
    signed: Signed | None
    method: str
    raw_path: str
    query: str
    headers: Mapping[str, str]


class Authenticator:
    """Verifies requests against `keys`. A key that is revoked elsewhere is refused `cache_s` later.

    `clock` returns seconds since 1970.
    """

    def __init__(self, keys: Keys, *, cache_s: float = CACHE_S, clock: Callable[[], float] = time.time) -> None:
        self.keys = keys
        self._clock, self._cache_s = clock, cache_s
        self._cache: dict[str, tuple[float, StoredKey]] = {}
        self._answered, self._spent = Answered(), Spent(keys.engine)

    def authenticate(
        self,
        method: str,
        raw_path: str,
        query: str,
        headers: Mapping[str, str],
        payload_sha256: str,
        *,
        service: str | None = None,
        bearer: bool = False,
        repeats: Repeats = "never",
    ) -> Caller:
        """Return the caller of a whole request: `claim`, `verify` and `spend` in one.

        Raises:
            ServiceError: the request is not from a holder of a key; 403.
        """
        claim = self.claim(method, raw_path, query, headers, service=service, bearer=bearer)
        caller = self.verify(claim, payload_sha256)
        self.spend(claim, repeats)
        return caller

    def bearer(self, headers: Mapping[str, str]) -> Caller:
        """Return whose bearer key `Authorization` holds, for protocols that know no signatures.

        Args:
            headers: names in lower case.

        Raises:
            ServiceError: there is none, or it is not one of this server's; 403.
        """
        if not headers.get("authorization", "").lower().startswith("bearer "):
            raise ServiceError(
                "MissingAuthenticationTokenException",
                "there is no bearer key; make one with `ascent keys create` and send it as Authorization: Bearer KEY",
            )
        return self.verify(self.claim("", "", "", headers, bearer=True), "")

    def claim(
        self,
        method: str,
        raw_path: str,
        query: str,
        headers: Mapping[str, str],
        *,
        service: str | None = None,
        bearer: bool = False,
    ) -> Claim:
        """Check all that can be checked before the body is read: the key, the clock, the scope of the credential.

        Args:
            method: in upper case.
            raw_path: as on the wire.
            query: as on the wire.
            headers: names in lower case.
            service: the signing name that the credential must have; None takes any.
            bearer: whether a bearer key is accepted.

        Raises:
            ServiceError: with the code that AWS gives; 403.
        """
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            if not bearer:
                raise ServiceError(
                    "IncompleteSignatureException", "this service takes no bearer key; sign with an access key"
                )
            return Claim(self._bearer(token.strip()), None, method, raw_path, query, headers)
        signed = read_signed(headers, query)
        if "x-amz-security-token" in headers or "X-Amz-Security-Token=" in query:
            raise ServiceError(
                "UnrecognizedClientException",
                "keys of this server have no session token; unset AWS_SESSION_TOKEN at the client",
            )
        if service is not None and signed.service != service:
            raise ServiceError(
                "InvalidSignatureException",
                f"the credential must be scoped to the service {service!r}, not {signed.service!r}",
            )
        self._check_clock(signed)
        return Claim(self._access_key(signed.key_id), signed, method, raw_path, query, headers)

    def verify(self, claim: Claim, payload_sha256: str) -> Caller:
        """Check the signature over the body that arrived.

        Args:
            claim: of `claim`.
            payload_sha256: of the body, in hexadecimal.

        Raises:
            ServiceError: with the code that AWS gives; 403.
        """
        key, signed = claim.key, claim.signed
        caller = Caller(key.owner, key.key_id, key.name, key.scopes)
        if signed is None:
            return _alive(key, caller, self._clock())
        payload = payload_sha256 if signed.payload is None else signed.payload
        expected = expected_signature(
            key.secret, signed, claim.method, claim.raw_path, claim.query, claim.headers, payload
        )
        matches = hmac.compare_digest(expected, signed.signature)
        if key is _NOBODY:
            raise ServiceError(
                "UnrecognizedClientException",
                f"there is no access key {signed.key_id[:40]!r} here; list keys with `ascent keys list`",
            )
        if not matches:
            raise ServiceError(
                "InvalidSignatureException",
                "the signature does not match; check the secret, and that nothing between changes the request",
            )
        if payload not in (payload_sha256, UNSIGNED, CHUNKED):
            raise ServiceError("InvalidSignatureException", "the body is not the one that was signed")
        return _alive(key, replace(caller, region=signed.region), self._clock())

    def spend(self, claim: Claim, repeats: Repeats) -> None:
        """Note that a signature is used, and refuse one that was. For `never` this writes to the database.

        Args:
            claim: a verified one.
            repeats: whether the signature may come again.

        Raises:
            ServiceError: InvalidSignatureException.
        """
        signed = claim.signed
        if signed is None or repeats == "always":
            return
        now, signature = self._clock(), bytes.fromhex(signed.signature)
        lasts = signed.time.timestamp() + (SKEW_S if signed.expires_s is None else signed.expires_s)
        if repeats == "briefly":
            used = now - self._answered.first(signature, now, lasts) > BRIEFLY_S
        else:
            used = not self._spent.add(signature, now, lasts)
        if used:
            raise ServiceError(
                "InvalidSignatureException",
                "this signature was used before; sign each request anew, a second later or with its own clientToken",
            )

    def release(self, claim: Claim, repeats: Repeats) -> None:
        """Undo `spend`, because nothing came of the request."""
        if claim.signed is None or repeats == "always":
            return
        (self._answered if repeats == "briefly" else self._spent).forget(bytes.fromhex(claim.signed.signature))

    def content(self, claim: Claim, body: bytes) -> bytes:
        """Return the body without the frames of signed chunks, where it has them; each chunk is verified.

        Raises:
            ServiceError: InvalidSignatureException.
        """
        if claim.signed is None or claim.signed.payload != CHUNKED:
            return body
        return read_chunks(body, claim.key.secret, claim.signed, claim.headers.get("x-amz-decoded-content-length"))

    def _bearer(self, token: str) -> StoredKey:
        key = self._cached(f"bearer {token}", lambda: self.keys.find_bearer(token))
        if key is None:
            raise ServiceError(
                "UnrecognizedClientException",
                "the bearer key is not one of this server; make one with `ascent keys create`",
            )
        return key

    def _access_key(self, key_id: str) -> StoredKey:
        """Return the key, or one that nobody has: an unknown id then takes as long as a wrong secret."""
        return self._cached(key_id, lambda: self.keys.find_access_key(key_id)) or _NOBODY

    def _cached(self, name: str, find: Callable[[], StoredKey | None]) -> StoredKey | None:
        now = time.monotonic()
        if (known := self._cache.get(name)) is not None and now - known[0] < self._cache_s:
            return known[1]
        if len(self._cache) > 1000:
            self._cache.clear()
        key = find()
        if key is not None:
            self._cache[name] = (now, key)
        return key

    def _check_clock(self, signed: Signed) -> None:
        age = self._clock() - signed.time.timestamp()
        limit = SKEW_S if signed.expires_s is None else signed.expires_s
        if age > limit:
            raise ServiceError(
                "InvalidSignatureException",
                f"Signature expired: it was made at {signed.stamp}, {age:.0f} s ago, and is good for {limit:.0f} s; "
                "set the client's clock or sign again",
            )
        if age < -SKEW_S:
            raise ServiceError(
                "InvalidSignatureException",
                f"Signature not yet current: it is of {signed.stamp}, {-age:.0f} s ahead; set the client's clock",
            )


def _alive(key: StoredKey, caller: Caller, now: float) -> Caller:
    if key.revoked is not None:
        raise ServiceError("UnrecognizedClientException", f"the key {key.name!r} was revoked; ask for another one")
    if key.expires is not None and now >= key.expires:
        raise ServiceError("ExpiredTokenException", f"the key {key.name!r} has expired; ask for another one")
    return caller


@lru_cache(maxsize=4096)
def _may(scopes: frozenset[str], action: str) -> bool:
    return any(fnmatch.fnmatchcase(action, scope) for scope in scopes)
