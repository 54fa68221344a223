"""`ascent models`: the catalogue and the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ascent.cli.console import facts, megabytes, say, table

if TYPE_CHECKING:
    from ascent.inference.store import Store


@click.group("models")
def command() -> None:
    """List, fetch, show, export and import models.

    Models rest in the store: $ASCENT_HOME, or ~/.cache/ascent.
    """


@command.command("list")
def list_models() -> None:
    """List the models that are here and those that can be fetched."""
    store = _store()
    catalogue, rows = store.catalogue(), []
    cards = store.list()
    for card in cards:
        size = _size(store.models / card.id)
        rows.append((card.id, megabytes(size), card.licence, card.family, card.kind, "yes", _short(card.source)))
    here = {card.id.partition("@")[0] for card in cards}
    for name, entry in catalogue.items():
        if name not in here:
            source = ", ".join(entry.sources)
            rows.append((name, megabytes(entry.bytes), entry.licence, entry.family, entry.kind, "no", _short(source)))
    table(("model", "size", "licence", "family", "kind", "here", "source"), rows)


@command.command("pull")
@click.argument("name")
def pull(name: str) -> None:
    """Fetch a model of the catalogue, check its sha256 and convert it.

    An interrupted fetch goes on where it stopped. A model that is here already is left as it is.
    """
    from ascent.cli.engines import pull_model

    say(pull_model(name, _store()).name)


@command.command("show")
@click.argument("model")
def show(model: str) -> None:
    """Show where a model came from, its licence, its parent and its checksum.

    MODEL is a name or id in the store, the beginning of an id, or a model folder.
    """
    store = _store()
    card = store.card(model)
    folder = store.resolve(model)
    facts(
        [
            ("id", card.id),
            ("kind", card.kind),
            ("family", card.family),
            ("parameters", f"{card.parameters:,}"),
            ("dtype", card.dtype),
            ("context", f"{card.context:,} tokens" if card.context else "not known"),
            ("licence", card.licence),
            ("source", card.source),
            ("parent", card.parent or "none"),
            ("run", card.run or "none"),
            ("sha256", card.sha256),
            ("created", card.created),
            ("size", megabytes(_size(folder))),
            ("folder", folder),
        ]
    )


@command.command("verify")
@click.argument("model")
def verify(model: str) -> None:
    """Hash a stored model's files again and compare them with its card."""
    card = _store().verify(model)
    say(f"{card.id}: every file has the sha256 it was stored with")


@command.command("export")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--merged", "form", flag_value="merged", default=True, help="Whole weights (the default).")
@click.option("--adapter", "form", flag_value="adapter", help="The LoRA adapter alone, PEFT format.")
@click.option("--gguf", "form", flag_value="gguf", help="A GGUF file in 16-bit floats, tokenizer included.")
def export(model: str, out: Path, form: Literal["merged", "adapter", "gguf"]) -> None:
    """Copy a model to OUT: a folder that must be empty or absent, or with --gguf a file that must be absent.

    MODEL is a name or id in the store, or a folder such as that of a trained stage. transformers and peft load what is
    written; no part of Ascent is needed for it.
    """
    from ascent.cli.engines import pinned
    from ascent.inference.export import export_adapter, export_merged
    from ascent.inference.gguf_export import export_gguf

    store = _store()
    write = {"merged": export_merged, "adapter": export_adapter, "gguf": export_gguf}[form]
    write(pinned(model, store), out, store)
    say(f"wrote {megabytes(out.stat().st_size if out.is_file() else _size(out))} to {out}")


@command.command("import")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--name", help="What to call it; by default, what the file or folder is called.")
@click.option("--licence", default="unknown", show_default=True, help="SPDX identifier of the weights.")
@click.option("--base", help="For an adapter: the stored model it was trained on.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="For GGUF: the precision to keep; by default float32 below 300 million parameters.",
)
def import_(
    path: Path,
    name: str | None,
    licence: str,
    base: str | None,
    dtype: Literal["float32", "bfloat16"] | None,
) -> None:
    """Bring a GGUF file, a safetensors folder, a PEFT adapter folder or an embedder into the store."""
    from ascent.inference.convert import import_model

    called = name or (path.resolve().name if path.is_dir() else path.stem).lower().replace(" ", "-")
    folder = import_model(path, called, _store(), licence=licence, base=base, dtype=dtype)
    say(folder.name)


def _store() -> Store:
    from ascent.inference.store import Store

    return Store()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _short(source: str) -> str:
    """Return a source without the file's checksum, which `models show` gives in full."""
    place, at, checksum = source.rpartition("@")
    return place if at and len(checksum) == 64 else source
