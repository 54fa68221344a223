"""Signatures that were used, each kept until its clock ends it.

Those of calls that change something are in the database: neither a restart nor a second server on the same database
lets one be used twice. Those of calls that compute an answer are in memory, because a write would cost such a call more
than all else on the wire; a restart forgets them, and a recorded question may be asked again while its clock is good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ascent.observe.database import make_tables

if TYPE_CHECKING:
    from sqlalchemy import Engine

MINUTE_S = 60


class Answered:
    """When signatures were first used, in memory. Times are seconds since 1970."""

    def __init__(self) -> None:
        self._first: dict[bytes, float] = {}
        self._ending: dict[int, list[bytes]] = {}
        self._cleaned = 0

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._first)

    def first(self, signature: bytes, now: float, lasts: float) -> float:
        """Return when a signature was first used: `now`, and it is kept until `lasts`, if it is new."""
        minute = int(now // MINUTE_S)
        if minute != self._cleaned:
            for ended in [each for each in self._ending if each < minute]:
                for old in self._ending.pop(ended):
                    self._first.pop(old, None)
            self._cleaned = minute
        if (known := self._first.get(signature)) is not None:
            return known
        self._first[signature] = now
        self._ending.setdefault(int(lasts // MINUTE_S), []).append(signature)
        return now

    def forget(self, signature: bytes) -> None:
        """Drop a signature."""
        self._first.pop(signature, None)


class Spent:
    """Signatures that may never come again, in the database `engine`."""

    def __init__(self, engine: Engine) -> None:
        import sqlalchemy as sql

        self._engine, self._sql, self._cleaned = engine, sql, 0.0
        tables = sql.MetaData()
        self._table = sql.Table(
            "spent_signatures",
            tables,
            sql.Column("signature", sql.LargeBinary(32), primary_key=True),
            sql.Column("lasts", sql.Float, nullable=False, index=True),
        )
        make_tables(engine, tables)

    def add(self, signature: bytes, now: float, lasts: float) -> bool:
        """Keep a signature until `lasts`; False, and nothing changes, if it is kept already."""
        sql, columns = self._sql, self._table.c
        try:
            with self._engine.begin() as connection:
                if now - self._cleaned > MINUTE_S:
                    connection.execute(sql.delete(self._table).where(columns.lasts < now))
                    self._cleaned = now
                connection.execute(sql.insert(self._table).values(signature=signature, lasts=lasts))
        except sql.exc.IntegrityError:
            return False
        return True

    def forget(self, signature: bytes) -> None:
        """Drop a signature."""
        with self._engine.begin() as connection:
            connection.execute(self._sql.delete(self._table).where(self._table.c.signature == signature))
