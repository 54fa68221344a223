"""From the name of a model to a running engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ascent.records.errors import BadInput

if TYPE_CHECKING:
    from ascent.inference.engine import Engine

REMOTE = "remote:"


def remote_address(model: str) -> tuple[str, str] | None:
    """Split `remote:URL#MODEL` into URL and model; None for any other name.

    Raises:
        BadInput: it begins like a remote model and lacks one of the two.
    """
    if not model.startswith(REMOTE):
        return None
    url, _, name = model.removeprefix(REMOTE).partition("#")
    if not url or not name:
        raise BadInput(f"{model!r} is not remote:URL#MODEL, such as remote:http://127.0.0.1:8000/v1#my-model")
    return url, name


def open_named(model: str) -> Engine:
    """Start an engine for `remote:URL#MODEL`, a model of the store, or a model folder.

    Raises:
        UnknownName: there is no such model here.
        BadInput: the remote address is incomplete, or the embedded engine cannot run the architecture.
    """
    from ascent.inference.engines.remote import RemoteEngine
    from ascent.inference.engines.torch import TorchEngine
    from ascent.inference.store import Store

    if (address := remote_address(model)) is not None:
        return RemoteEngine(*address)
    folder: Path = Store().resolve(model)
    return TorchEngine.load(folder, folder.name)
