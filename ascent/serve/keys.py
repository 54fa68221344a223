"""The keys that callers need: an access key for SigV4 and a bearer key, both of one owner and with the same scopes.

A secret is shown once. SigV4 needs it back to verify a signature, so it is kept encrypted (AES-256-GCM, bound to its
key and owner) under a master key that lies in a file of mode 0600 beside the database, never in it. Of a bearer key
only the SHA-256 is kept: it has 256 random bits, so nothing can be guessed from that.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent.observe.database import make_tables
from ascent.records.errors import BadInput, Corrupt, MissingExtra, UnknownName
from ascent.records.files import sync_folder

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from ascent.serve.config import ServerConfig

MASTER_BYTES = 32
_NONCE_BYTES = 12
_SCOPE = re.compile(r"\*|[\w*?.-]+:[\w*?-]+", re.ASCII)
_BASE32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


@dataclass(frozen=True)
class NewKey:
    """A key that was just made. `secret` and `bearer` are nowhere else."""

    access_key_id: str
    secret: str
    bearer: str
    owner: str
    name: str
    scopes: frozenset[str]
    expires: float | None


@dataclass(frozen=True)
class StoredKey:
    """A key as it is kept. Times are seconds since 1970; `secret` is empty in lists."""

    key_id: str
    owner: str
    name: str
    scopes: frozenset[str]
    secret: str
    created: float
    expires: float | None
    revoked: float | None

    @property
    def state(self) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= time.time() else "active"


class Keys:
    """The keys of a server: in its database, under the master key in `master_key_file`, which is made if absent.

    Raises:
        MissingExtra: SQLAlchemy or cryptography is not installed.
        BadInput: others can read the master key.
        Corrupt: the master key file does not hold one.
    """

    def __init__(self, engine: Engine, master_key_file: Path) -> None:
        try:
            import sqlalchemy as sql
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise MissingExtra("serve", "keys") from error
        self.engine = engine
        self._master = _master_key(master_key_file)
        self._file, self._sql = master_key_file, sql
        self._cipher = AESGCM(self.derive("secrets of access keys"))
        tables = sql.MetaData()
        self._table = sql.Table(
            "access_keys",
            tables,
            sql.Column("key_id", sql.String(32), primary_key=True),
            sql.Column("owner", sql.String(256), nullable=False, index=True),
            sql.Column("name", sql.String(256), nullable=False),
            sql.Column("scopes", sql.Text, nullable=False),
            sql.Column("secret", sql.LargeBinary, nullable=False),
            sql.Column("bearer_sha256", sql.String(64), nullable=False, unique=True),
            sql.Column("created", sql.Float, nullable=False),
            sql.Column("expires", sql.Float),
            sql.Column("revoked", sql.Float),
        )
        make_tables(engine, tables)

    def derive(self, purpose: str) -> bytes:
        """Return a key of 32 bytes for one purpose, the same in every process that has the master key."""
        return hmac.new(self._master, f"ascent: {purpose}".encode(), hashlib.sha256).digest()

    def create(self, owner: str, name: str, scopes: Iterable[str], expires: float | None = None) -> NewKey:
        """Make a key.

        Args:
            owner: who resources made with it belong to.
            name: for people and logs.
            scopes: patterns over `service:Operation`: `bedrock-runtime:*`, `openai:ChatCompletions`, `*`; `admin:*`
                lets the key see other owners' resources too.
            expires: seconds since 1970.

        Raises:
            BadInput: a scope cannot be read, there is none, or owner or name is empty.
        """
        wanted = frozenset(scopes)
        wrong = sorted(scope for scope in wanted if not _SCOPE.fullmatch(scope))
        if wrong or not wanted:
            what = f"the scope {wrong[0]!r} cannot be read" if wrong else "a key needs a scope"
            raise BadInput(f"{what}; write SERVICE:OPERATION with * for any, such as 'bedrock-runtime:*'")
        for field, text in (("owner", owner), ("name", name)):
            if not text.strip() or len(text) > 256 or not text.isprintable():
                raise BadInput(f"the {field} of a key must be 1 to 256 printable characters, not {text[:80]!r}")
        key_id = "AKIA" + "".join(secrets.choice(_BASE32) for _ in range(16))
        secret, bearer = secrets.token_urlsafe(30), f"ascent-{secrets.token_urlsafe(32)}"
        nonce = secrets.token_bytes(_NONCE_BYTES)
        row = {
            "key_id": key_id,
            "owner": owner,
            "name": name,
            "scopes": json.dumps(sorted(wanted)),
            "secret": nonce + self._cipher.encrypt(nonce, secret.encode(), f"{key_id} {owner}".encode()),
            "bearer_sha256": _sha256(bearer),
            "created": time.time(),
            "expires": expires,
        }
        with self.engine.begin() as connection:
            connection.execute(self._sql.insert(self._table).values(**row))
        return NewKey(key_id, secret, bearer, owner, name, wanted, expires)

    def find_access_key(self, key_id: str) -> StoredKey | None:
        """Return the key of that id with its secret, revoked and expired ones too; None if there is none.

        Raises:
            Corrupt: the secret was not encrypted with this master key.
        """
        return self._find(self._table.c.key_id == key_id)

    def find_bearer(self, token: str) -> StoredKey | None:
        """Return the key whose bearer key `token` is, or None. It is looked up by its hash, so timing tells nothing."""
        return self._find(self._table.c.bearer_sha256 == _sha256(token))

    def revoke(self, key_id: str) -> None:
        """Refuse a key from now on. Revoking it twice keeps the first time.

        Raises:
            UnknownName: there is no such key.
        """
        table = self._table
        with self.engine.begin() as connection:
            known = connection.execute(self._sql.select(table.c.revoked).where(table.c.key_id == key_id)).first()
            if known is None:
                raise UnknownName("key", key_id, (key.key_id for key in self._rows(connection, None)))
            if known.revoked is None:
                change = self._sql.update(table).where(table.c.key_id == key_id).values(revoked=time.time())
                connection.execute(change)

    def list(self, owner: str | None = None) -> Sequence[StoredKey]:
        """Return the keys of an owner, or all, oldest first and without their secrets."""
        with self._reading() as connection:
            return self._rows(connection, owner)

    def _rows(self, connection: Any, owner: str | None) -> Sequence[StoredKey]:
        found = self._sql.select(self._table).order_by(self._table.c.created)
        if owner is not None:
            found = found.where(self._table.c.owner == owner)
        return [_stored(row, "") for row in connection.execute(found)]

    def _find(self, condition: Any) -> StoredKey | None:
        from cryptography.exceptions import InvalidTag

        with self._reading() as connection:
            row = connection.execute(self._sql.select(self._table).where(condition)).first()
        if row is None:
            return None
        nonce, sealed = row.secret[:_NONCE_BYTES], row.secret[_NONCE_BYTES:]
        try:
            secret = self._cipher.decrypt(nonce, sealed, f"{row.key_id} {row.owner}".encode())
        except InvalidTag as error:
            raise Corrupt(
                f"the key {row.key_id} was made under another master key than {self._file}, or its row was changed; "
                "bring the master key back, or make new keys"
            ) from error
        return _stored(row, secret.decode())

    def _reading(self) -> Any:
        return self.engine.connect().execution_options(reads=True)


def _stored(row: Any, secret: str) -> StoredKey:
    scopes = frozenset(json.loads(row.scopes))
    return StoredKey(row.key_id, row.owner, row.name, scopes, secret, row.created, row.expires, row.revoked)


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _master_key(file: Path) -> bytes:
    """Read the master key, made first where there is none: whole or absent, and never readable for others."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as written:
                written.write(secrets.token_bytes(MASTER_BYTES))
                written.flush()
                os.fsync(written.fileno())
            with contextlib.suppress(FileExistsError):  # another process was quicker, and its key counts
                os.link(draft, file)
            sync_folder(file.parent)
        finally:
            draft.unlink(missing_ok=True)
    facts = file.stat()
    if facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or facts.st_uid != os.geteuid():
        raise BadInput(
            f"the master key {file} has mode {stat.S_IMODE(facts.st_mode):04o}, or belongs to another user; all "
            f"secrets hang on it. Make it yours alone: chmod 600 {file}"
        )
    key = file.read_bytes()
    if len(key) != MASTER_BYTES:
        raise Corrupt(f"{file} has {len(key)} bytes, and a master key {MASTER_BYTES}; bring it back from a copy")
    return key


def open_keys(config: ServerConfig) -> Keys:
    """Return the keys of the server that `config` describes: its database, and `master.key` in its home.

    Raises:
        MissingExtra, BadInput, Corrupt: as from `open_database` and `Keys`.
    """
    from ascent.inference.store import Store
    from ascent.observe.database import open_database

    home = config.home or Store().root / "server"
    return Keys(open_database(config.database or home / "ascent.db"), home / "master.key")
