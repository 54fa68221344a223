"""From the name of a model that a user typed to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ascent.inference.store import Store


def model_folder(name: str, store: Store) -> Path:
    """Return the folder of a model, fetching it with a progress bar when only the catalogue has it.

    Raises:
        UnknownName: neither the store nor the catalogue has it.
        PullFailed: it could not be fetched.
    """
    from ascent.records.errors import UnknownName

    try:
        return store.resolve(name)
    except UnknownName:
        if name not in store.catalogue():
            raise
    return pull_model(name, store)


def pull_model(name: str, store: Store) -> Path:
    """Fetch a catalogue model with a progress bar; at once when it is there already."""
    from ascent.inference.pull import pull
    from ascent.observe import Progress

    with Progress(f"pull {name}", unit="bytes") as progress:
        return pull(name, store, lambda done, total: progress.update(done, total=total or None))
