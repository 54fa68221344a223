"""One token, one effect: the answer to a creating request is kept for a day and given again to the same token.

A request whose first copy is still being worked on is told to come back; a copy that died with the server counts as
never sent after `LEASE_S`, so handlers must pass the token on to what they start.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ascent.observe.database import make_tables
from ascent.records.errors import MissingExtra
from ascent.serve.wire.encode import Response
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.model import Operation

if TYPE_CHECKING:
    from sqlalchemy import Engine

KEPT_S = 24 * 3600.0
LEASE_S = 30.0
_CLEAN_EVERY_S = 600.0


class Idempotency:
    """What was answered to which token, by owner and operation. `clock` returns seconds since 1970.

    Raises:
        MissingExtra: SQLAlchemy is not installed.
    """

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        try:
            import sqlalchemy as sql
        except ImportError as error:
            raise MissingExtra("serve", "idempotency") from error
        self._engine, self._clock, self._sql, self._cleaned = engine, clock, sql, 0.0
        tables = sql.MetaData()
        self._table = sql.Table(
            "answered_tokens",
            tables,
            sql.Column("owner", sql.String(256), primary_key=True),
            sql.Column("action", sql.String(128), primary_key=True),
            sql.Column("token", sql.String(256), primary_key=True),
            sql.Column("request_sha256", sql.String(64), nullable=False),
            sql.Column("begun", sql.Float, nullable=False),
            sql.Column("status", sql.Integer),
            sql.Column("headers", sql.Text),
            sql.Column("body", sql.LargeBinary),
        )
        make_tables(engine, tables)

    def begin(self, owner: str, operation: Operation, token: str, request: dict[str, Any]) -> Response | None:
        """Return the answer that was given already, or None: then answer, and `finish` or `forget`.

        Raises:
            ServiceError: ConflictException where the token came with another request, ThrottlingException while the
                first copy is being worked on.
        """
        rest = {name: value for name, value in request.items() if name != operation.token}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()
        now, sql, place = self._clock(), self._sql, self._place(owner, operation, token)
        row = {"owner": owner, "action": operation.action, "token": token, "request_sha256": digest, "begun": now}
        try:
            with self._engine.begin() as connection:
                self._clean(connection, now)
                known = connection.execute(sql.select(self._table).where(*place)).first()
                if known is None or (known.status is None and now - known.begun > LEASE_S):
                    connection.execute(sql.delete(self._table).where(*place))
                    connection.execute(sql.insert(self._table).values(**row))
                    return None
        except sql.exc.IntegrityError as error:  # PostgreSQL: another process began in this moment
            raise _busy(token) from error
        if known.request_sha256 != digest:
            raise ServiceError(
                "ConflictException",
                f"the {operation.token} {token[:64]!r} came before with other parameters; take a new one",
                reason="IdempotentParameterMismatchException",
            )
        if known.status is None:
            raise _busy(token)
        return Response(known.status, json.loads(known.headers), known.body)

    def finish(self, owner: str, operation: Operation, token: str, response: Response) -> None:
        """Keep the answer."""
        values = {"status": response.status, "headers": json.dumps(response.headers), "body": response.body}
        with self._engine.begin() as connection:
            place = self._place(owner, operation, token)
            connection.execute(self._sql.update(self._table).where(*place).values(**values))

    def forget(self, owner: str, operation: Operation, token: str) -> None:
        """Let the token be used again: the request failed, and nothing came of it."""
        with self._engine.begin() as connection:
            connection.execute(self._sql.delete(self._table).where(*self._place(owner, operation, token)))

    def _place(self, owner: str, operation: Operation, token: str) -> tuple[Any, ...]:
        columns = self._table.c
        return columns.owner == owner, columns.action == operation.action, columns.token == token

    def _clean(self, connection: Any, now: float) -> None:
        if now - self._cleaned > _CLEAN_EVERY_S:
            connection.execute(self._sql.delete(self._table).where(self._table.c.begun < now - KEPT_S))
            self._cleaned = now


def _busy(token: str) -> ServiceError:
    return ServiceError(
        "ThrottlingException",
        f"the first request with the token {token[:64]!r} is still being worked on; ask again in a second",
        status=429,
        retry_after_s=1.0,
    )
