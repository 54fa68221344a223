"""Models out of the store: a Hugging Face folder with whole weights, or a PEFT adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

from ascent.inference.store import ADAPTER_MARK, CARD, FILES, Store, require_space
from ascent.records.errors import BadInput
from ascent.records.files import folder_atomic

ADAPTER_FILES = (ADAPTER_MARK, "adapter_model.safetensors")


def export_merged(model: str, out: Path, store: Store) -> None:
    """Write the whole weights of a model to `out` in Hugging Face layout; an adapter is merged into its base.

    Args:
        model: a name or id in the store, or a model folder.
        out: an empty or absent folder. It appears whole or not at all.
        store: where names are looked up.

    Raises:
        UnknownName: there is no such model.
        BadInput: `out` holds files, or the adapter's base is not known.
        NoSpace: the disk is full; nothing was written.
    """
    folder = _checked(model, out, store)
    if (folder / ADAPTER_MARK).is_file():
        _merge(folder, out, store)
        return
    found = (
        file for pattern in ("*", "[0-9]_*/*") for file in folder.glob(pattern)
    )  # an embedder's modules have folders
    _copy(folder, [file for file in found if file.is_file() and _belongs(file)], out)


def export_adapter(model: str, out: Path, store: Store) -> None:
    """Write the LoRA adapter of a model to `out` in PEFT format. Arguments and errors as in `export_merged`.

    Raises:
        BadInput: the model has no adapter of its own, being a base model or fully fine-tuned.
    """
    folder = _checked(model, out, store)
    places = [place for place in (folder, folder / "adapter") if (place / ADAPTER_MARK).is_file()]
    if not places:
        raise BadInput(f"{model} has no adapter: it is a base model or all its weights were trained; use --merged")
    _copy(places[0], [places[0] / name for name in ADAPTER_FILES], out)


def adapter_base(folder: Path, store: Store) -> Path:
    """Return the folder of the base model that an adapter folder was trained on.

    Raises:
        BadInput: the base is not in the store.
        UnknownName: the adapter's card or configuration names a model that is not here.
    """
    if (folder / CARD).is_file() and (parent := store.card(str(folder)).parent):
        return store.resolve(parent)
    from ascent.inference.lora import read_adapter_config  # loads torch

    _, base = read_adapter_config(folder)
    found = store.resolve(base)
    if (found / ADAPTER_MARK).is_file():
        raise BadInput(f"{folder}: its base {base!r} is itself an adapter; merge that one first")
    return found


def _checked(model: str, out: Path, store: Store) -> Path:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise BadInput(f"{out} exists and is not an empty folder; name another, or remove it")
    return store.resolve(model)


def _belongs(file: Path) -> bool:
    return file.name not in (CARD, FILES) and not file.name.startswith(".")


def _copy(folder: Path, files: list[Path], out: Path) -> None:
    require_space(out.absolute(), sum(file.stat().st_size for file in files), "the export")
    with folder_atomic(out.absolute()) as scratch:
        for file in files:
            target = scratch / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _merge(folder: Path, out: Path, store: Store) -> None:
    import torch

    from ascent.inference.convert import inspect_folder
    from ascent.inference.decoder import load_decoder
    from ascent.inference.lora import load_adapter, merge

    base = adapter_base(folder, store)
    weights = [file for file in base.iterdir() if file.suffix == ".safetensors"]
    require_space(out.absolute(), sum(file.stat().st_size for file in weights), "the export")
    decoder = load_decoder(base, getattr(torch, inspect_folder(base).dtype))
    load_adapter(decoder, folder)
    merge(decoder)
    with folder_atomic(out.absolute()) as scratch:
        for file in base.iterdir():
            if file.is_file() and _belongs(file) and ".safetensors" not in file.name:
                shutil.copyfile(file, scratch / file.name)
        decoder.save(scratch)
