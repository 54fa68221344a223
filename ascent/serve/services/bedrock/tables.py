"""What the control plane keeps beside queue and registry: deployments and tags."""

from __future__ import annotations

from ascent.jobs.tables import sa

METADATA = sa.MetaData()

DEPLOYMENTS = sa.Table(
    "bedrock_deployments",
    METADATA,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("owner", sa.String(256), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("version", sa.String(12), nullable=False),
    sa.Column("description", sa.Text),
    sa.Column("status", sa.String(16), nullable=False),  # Creating, Active or Failed
    sa.Column("message", sa.Text),
    sa.Column("next", sa.String(12)),  # the version that an update brings or brought
    sa.Column("update", sa.String(16)),  # Updating, UpdateCompleted or UpdateFailed
    sa.Column("token", sa.String(256)),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("updated", sa.Float, nullable=False),
    sa.UniqueConstraint("owner", "name"),
    sa.UniqueConstraint("owner", "token"),
)

TAGS = sa.Table(
    "bedrock_tags",
    METADATA,
    sa.Column("resource", sa.String(128), primary_key=True),
    sa.Column("key", sa.String(128), primary_key=True),
    sa.Column("value", sa.String(256), nullable=False),
)
