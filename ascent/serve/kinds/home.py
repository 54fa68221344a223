"""What a job's process finds of the server: the registry, models, and engines for them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent.inference.store import ADAPTER_MARK, Store
from ascent.records.errors import BadInput, UnknownName
from ascent.records.files import append_jsonl, read_jsonl

if TYPE_CHECKING:
    from ascent.inference.registry import Registry
    from ascent.jobs.context import JobContext

DATABASE = "ASCENT_SERVER_DATABASE"
"""The environment's name of the database; jobs are given it where the address holds a password."""
PHASES = "phases.jsonl"


def open_registry(payload: Mapping[str, Any] | None = None) -> Registry:
    """Open the registry: for a job at its `database`, else at the environment's, else in the server's default folder.

    Raises:
        MissingExtra: SQLAlchemy is not installed.
        BadInput: the job's database has a password, and the worker does not pass its address on.
    """
    from ascent.inference.registry import Registry
    from ascent.observe.database import open_database

    store = Store()
    address = (payload or {}).get("database") or os.environ.get(DATABASE)
    if address is None and payload is not None:
        raise BadInput(f"the job does not know the database; let the worker pass {DATABASE} on to its jobs")
    return Registry(open_database(address or store.root / "server" / "ascent.db"), store)


def begin(job: JobContext, phase: str) -> None:
    """Say which phase begins, to the queue, to the log and in the job's folder with its time."""
    job.phase(phase)
    job.log(phase)
    append_jsonl(job.folder / PHASES, [{"phase": phase, "at": datetime.now(UTC).timestamp()}])


def phases_of(folder: Path) -> dict[str, datetime]:
    """Return when each phase of a job first began."""
    found: dict[str, datetime] = {}
    for row in read_jsonl(folder / PHASES):
        found.setdefault(row["phase"], datetime.fromtimestamp(row["at"], UTC))
    return found


def stored_model(name: str, store: Store) -> Path:
    """Return a stored model's folder, fetching it first when only the catalogue has it.

    Raises:
        UnknownName: neither has it.
        PullFailed: it could not be fetched.
    """
    try:
        return store.resolve(name)
    except UnknownName:
        if name not in store.catalogue():
            raise
        from ascent.inference.pull import pull

        return pull(name, store)


def whole_model(folder: Path, scratch: Path, store: Store) -> Path:
    """Return a folder with whole weights: the model's own, or `scratch`, with an adapter merged into its base."""
    if not (folder / ADAPTER_MARK).is_file():
        return folder
    if not (scratch / "config.json").is_file():
        from ascent.inference.export import export_merged

        export_merged(str(folder), scratch, store)
    return scratch


def own_model(registry: Registry, model: str, owner: str) -> None:
    """Refuse a stored model that belongs to somebody else.

    Raises:
        BadInput: versions of other owners point to it, and none of this owner's does.
    """
    owners = {version.owner for version in registry.versions() if version.model == model}
    if owners and owner not in owners:
        raise BadInput(f"there is no model {model!r} that you may use; import it under a name of your own")


def read_state(folder: Path, name: str) -> dict[str, Any] | None:
    """Return what an earlier attempt left under `name`, if it got so far."""
    file = folder / name
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
