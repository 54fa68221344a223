"""From the name of a model that a user typed to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ascent.inference.engine import Engine
    from ascent.inference.store import Store


def model_folder(name: str, store: Store) -> Path:
    """Return the folder of a model, fetching it with a progress bar when only the catalogue has it.

    A checkpoint, or the folder of an unfinished run, becomes a model of the store first.

    Raises:
        UnknownName: neither the store nor the catalogue has it.
        PullFailed: it could not be fetched.
        BadInput, Corrupt: it is a run or a checkpoint that no model can be made of.
    """
    from ascent.records.errors import UnknownName

    try:
        return store.resolve(name)
    except UnknownName:
        if name in store.catalogue():
            return pull_model(name, store)
        from ascent.customize.checkpoint import checkpoint_model, checkpoint_of, refuse_run

        if (checkpoint := checkpoint_of(name)) is not None:
            return checkpoint_model(checkpoint, store)
        refuse_run(name)
        raise


def pinned(name: str, store: Store) -> str:
    """Return `name`, but for a checkpoint or an unfinished run, which moves on and ends, the id of its stored model.

    Raises:
        BadInput, Corrupt: no model can be made of it.
    """
    if not Path(name).is_dir():
        return name
    from ascent.customize.checkpoint import checkpoint_of

    return name if checkpoint_of(name) is None else model_folder(name, store).name


def pull_model(name: str, store: Store) -> Path:
    """Fetch a catalogue model with a progress bar; at once when it is there already."""
    from ascent.inference.pull import pull
    from ascent.observe import Progress

    with Progress(f"pull {name}", unit="bytes") as progress:
        return pull(name, store, lambda done, total: progress.update(done, total=total or None))


def open_engine(model: str) -> Engine:
    """Start an engine for a model of the store or catalogue, a model or adapter folder, or `remote:URL#MODEL`.

    Raises:
        UnknownName: there is no such model.
        BadInput: the remote address is incomplete, or the embedded engine cannot run the architecture.
    """
    from ascent.inference.engines.named import open_named, remote_address
    from ascent.inference.store import Store

    if remote_address(model) is not None:
        return open_named(model)
    return open_named(str(model_folder(model, Store())))
