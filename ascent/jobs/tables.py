"""The queue's tables."""

from __future__ import annotations

from ascent.records.errors import MissingExtra

try:
    import sqlalchemy as sa
    from sqlalchemy.exc import DBAPIError
except ImportError as error:
    raise MissingExtra("serve", "the job queue") from error

__all__ = ["ATTEMPTS", "JOBS", "METADATA", "OWNERS", "DBAPIError", "sa"]

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
