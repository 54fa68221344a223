"""The registry's tables. Rows of history and evidence are only ever added."""

from __future__ import annotations

from ascent.records.errors import MissingExtra

try:
    import sqlalchemy as sa
except ImportError as error:
    raise MissingExtra("serve", "the model registry") from error

__all__ = ["EVIDENCE", "HISTORY", "HOLDS", "METADATA", "NAMES", "ROUTES", "VERSIONS", "sa"]

METADATA = sa.MetaData()

NAMES = sa.Table(
    "registry_names",
    METADATA,
    sa.Column("owner", sa.String(256), primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("last", sa.Integer, nullable=False, default=0),  # the highest number given, deleted versions included
)
"""One row per name, locked while its versions, aliases and routes change."""

VERSIONS = sa.Table(
    "registry_versions",
    METADATA,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("owner", sa.String(256), nullable=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("model", sa.String(256), nullable=False, index=True),
    sa.Column("base", sa.String(256)),
    sa.Column("parent", sa.String(12)),
    sa.Column("lineage", sa.JSON, nullable=False),
    sa.Column("job", sa.String(64)),
    sa.Column("created", sa.Float, nullable=False),
    sa.UniqueConstraint("owner", "name", "number"),
    sa.UniqueConstraint("owner", "job"),
)

EVIDENCE = sa.Table(
    "registry_evidence",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("version", sa.String(12), nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),  # report, verdict or override
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("content", sa.Text, nullable=False),  # JSON whose numbers may be NaN, which PostgreSQL's type refuses
    sa.Column("by", sa.String(256), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.UniqueConstraint("version", "kind", "digest"),
)

ROUTES = sa.Table(
    "registry_routes",
    METADATA,
    sa.Column("owner", sa.String(256), primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("alias", sa.String(64), primary_key=True),
    sa.Column("weights", sa.JSON, nullable=False),  # version id → share; one entry for a plain alias
    sa.Column("shadow", sa.String(12)),
)

HOLDS = sa.Table(
    "registry_holds",
    METADATA,
    sa.Column("version", sa.String(12), sa.ForeignKey("registry_versions.id"), primary_key=True),
    sa.Column("holder", sa.String(128), primary_key=True),
)
"""What keeps a version from being deleted, such as a deployment."""

HISTORY = sa.Table(
    "registry_history",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("owner", sa.String(256), nullable=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("event", sa.String(16), nullable=False),
    sa.Column("version", sa.String(12)),
    sa.Column("alias", sa.String(64)),
    sa.Column("by", sa.String(256), nullable=False),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
