"""The database that queue, registry, keys and ledger share: SQLite beside the models, or PostgreSQL by address."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent.records.errors import BadInput, MissingExtra

if TYPE_CHECKING:
    from sqlalchemy import Engine, MetaData

WAIT_S = 30.0  # how long a writer waits for another one of the same SQLite file


def open_database(place: Path | str) -> Engine:
    """Open the database at a file's path, or at an address such as `postgresql+psycopg://host/name`.

    SQLite keeps a write-ahead log, so that readers never wait for the writer, makes every commit durable, enforces
    foreign keys, and lets one process wait for another. Each room makes its own tables in it.

    Raises:
        MissingExtra: SQLAlchemy is not installed.
        BadInput: the address cannot be read, or names a driver that is not installed.
    """
    try:
        from sqlalchemy import create_engine, event
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError
    except ImportError as error:
        raise MissingExtra("serve", "a database") from error
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
    address = f"sqlite:///{place}" if isinstance(place, Path) else place
    try:
        engine = create_engine(address, pool_pre_ping=not address.startswith("sqlite"))
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise BadInput(
            f"{address!r} is no database that can be opened ({error}); give a file's path, or install its driver"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def make_tables(engine: Engine, tables: MetaData) -> None:
    """Create those that are missing. Two processes may do so at the same moment: who comes second finds it done."""
    from sqlalchemy.exc import DBAPIError

    try:
        tables.create_all(engine)
    except DBAPIError:
        tables.create_all(engine)


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver would begin too late for `BEGIN IMMEDIATE`
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={int(WAIT_S * 1000)}"):
        connection.execute(f"PRAGMA {setting}")


def _begin_sqlite(connection: Any) -> None:
    """Take the write lock at once: a reader that becomes a writer half-way would fail instead of waiting."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if not connection.get_execution_options().get("reads") else "BEGIN")
