"""The queue's tables, and what is asked of them in more than one place."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ascent.jobs.specs import Job, JobSpec, Limits
from ascent.records.errors import MissingExtra

try:
    import sqlalchemy as sa
    from sqlalchemy.exc import DBAPIError
except ImportError as error:
    raise MissingExtra("serve", "the job queue") from error

__all__ = [
    "ATTEMPTS",
    "JOBS",
    "METADATA",
    "OWNERS",
    "DBAPIError",
    "count_jobs",
    "job_of",
    "job_row",
    "lock_owner",
    "maybe",
    "moment",
    "sa",
    "stored_bytes",
]

METADATA = sa.MetaData()

OWNERS = sa.Table("job_owners", METADATA, sa.Column("owner", sa.String(256), primary_key=True))
"""One row per owner, locked while their quotas are looked at."""

JOBS = sa.Table(
    "jobs",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),  # the order of the line
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("owner", sa.String(256), nullable=False),
    sa.Column("kind", sa.String(128), nullable=False),
    sa.Column("name", sa.String(256), nullable=False),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Column("memory_mb", sa.Integer, nullable=False),  # raised when the job is to run alone
    sa.Column("seconds", sa.Float),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("token", sa.String(256)),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("phase", sa.String(256), nullable=False, default=""),
    sa.Column("done", sa.BigInteger, nullable=False, default=0),
    sa.Column("total", sa.BigInteger),
    sa.Column("lease", sa.Integer, nullable=False, default=0),
    sa.Column("beat", sa.Integer, nullable=False, default=0),
    sa.Column("worker", sa.String(256)),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
    sa.Column("not_before", sa.Float, nullable=False, default=0.0),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("ended", sa.Float),
    sa.Column("message", sa.Text),
    sa.Column("result", sa.JSON),
    sa.Column("stored", sa.BigInteger, nullable=False, default=0),
    sa.Column("removed", sa.Boolean, nullable=False, default=False),
    sa.UniqueConstraint("owner", "token"),
)

ATTEMPTS = sa.Table(
    "job_attempts",
    METADATA,
    sa.Column("job", sa.String(32), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("worker", sa.String(256), nullable=False),
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("message", sa.Text),
)


def job_row(connection: sa.Connection, id: str) -> sa.Row[Any]:
    """Return the row of a job that is there."""
    return connection.execute(sa.select(JOBS).where(JOBS.c.id == id)).one()


def job_of(connection: sa.Connection, folder: Path, row: sa.Row[Any]) -> Job:
    """Return a row as a job; `folder` holds the folders of all jobs."""
    position = None
    if row.status == "queued":
        ahead = sa.select(sa.func.count()).where(JOBS.c.status == "queued", JOBS.c.number < row.number)
        position = connection.execute(ahead).scalar_one() + 1
    limits = Limits(row.memory_mb, row.seconds, row.attempts)
    return Job(
        id=row.id,
        spec=JobSpec(row.kind, row.owner, row.name, row.payload, limits),
        status=row.status,
        phase=row.phase,
        done=row.done,
        total=row.total,
        attempts=row.lease,
        created=moment(row.created),
        started=maybe(row.started),
        ended=maybe(row.ended),
        message=row.message,
        result=row.result,
        folder=folder / row.id,
        position=position,
        stored=row.stored,
    )


def lock_owner(connection: sa.Connection, owner: str) -> None:
    """Let no other transaction about an owner's quotas begin before this one has ended."""
    connection.execute(sa.select(OWNERS).where(OWNERS.c.owner == owner).with_for_update())


def count_jobs(connection: sa.Connection, owner: str, status: Collection[str]) -> int:
    """Return how many jobs of an owner have one of these statuses."""
    query = sa.select(sa.func.count()).where(JOBS.c.owner == owner, JOBS.c.status.in_(status))
    return int(connection.execute(query).scalar_one())


def stored_bytes(connection: sa.Connection, owner: str) -> int:
    """Return the bytes in the folders of an owner's jobs."""
    return int(connection.execute(sa.select(sa.func.sum(JOBS.c.stored)).where(JOBS.c.owner == owner)).scalar() or 0)


def moment(seconds: float) -> datetime:
    """Return seconds since 1970 as a date."""
    return datetime.fromtimestamp(seconds, UTC)


def maybe(seconds: float | None) -> datetime | None:
    """Return a `moment`, if there is one."""
    return None if seconds is None else moment(seconds)
