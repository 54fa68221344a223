"""The model store: content-addressed folders in Hugging Face layout, each with a card.

    root/models/<name>@<sha256[:12]>/   card.json, files.json, config.json, model.safetensors, tokenizer.json,
    … root/downloads/                     what `pull` is fetching or has fetched but not yet converted
    root/catalogue.yaml                 the user's own catalogue entries (optional)

A model's sha256 is the digest of `files.json`, which lists the sha256 of every file; the card is not part of
it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ascent.inference.catalogue import CatalogueEntry, load_catalogue
from ascent.records import ModelCard, digest
from ascent.records.errors import BadInput, Corrupt, NoSpace, UnknownName
from ascent.records.files import folder_atomic, recover_folder, sha256_file

CARD, FILES = "card.json", "files.json"
ADAPTER_MARK = "adapter_config.json"
MODEL_MARKS = ("config.json", ADAPTER_MARK)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Store:
    """Models on this machine, found by id, by name, or by path."""

    def __init__(self, root: Path | None = None) -> None:
        """Open the store at `root`; the default is `$ASCENT_HOME`, or `~/.cache/ascent`."""
        if root is None:
            root = Path(os.environ.get("ASCENT_HOME") or Path.home() / ".cache" / "ascent")
        self.root = Path(root).expanduser().absolute()
        self.models = self.root / "models"

    def catalogue(self) -> dict[str, CatalogueEntry]:
        """Return what can be pulled: the built-in entries and the user's own."""
        return load_catalogue(self.root)

    def resolve(self, name: str) -> Path:
        """Return the folder of a model.

        `name` is a model id, an unambiguous beginning of one, a model's name (its latest version wins), or
        the path of a folder that holds `config.json` or `adapter_config.json`.

        Raises:
            UnknownName: nothing of that name is here; the message says so when the catalogue could supply it.
            BadInput: the beginning fits several models of different names.
        """
        if (path := self._as_path(name)) is not None:
            return path
        return self.models / self._find(name).id

    def card(self, name: str) -> ModelCard:
        """Return the card of a stored model, or of a folder that has a `card.json`.

        Raises:
            UnknownName: nothing of that name is here.
            BadInput: `name` is a folder without a card.
        """
        if (path := self._as_path(name)) is not None:
            if not (path / CARD).is_file():
                raise BadInput(f"{path} has no {CARD}; bring it into the store with: ascent models import {path}")
            return ModelCard.from_json((path / CARD).read_bytes())
        return self._find(name)

    def list(self) -> list[ModelCard]:
        """Return the cards of all stored models, oldest first within each name."""
        if not self.models.is_dir():
            return []
        cards = []
        for folder in self.models.iterdir():
            if not folder.name.startswith(".") and (folder / CARD).is_file():
                cards.append(ModelCard.from_json((folder / CARD).read_bytes()))
        return sorted(cards, key=lambda card: (_base(card.id), card.created, card.id))

    def add(self, folder: Path, card: ModelCard, *, consume: bool = False) -> Path:
        """Put the files of `folder` into the store and return the stored folder.

        The id becomes `<name>@<first 12 digits of the content's sha256>`, where the name is `card.id` up to
        any `@`; `card.sha256` and an empty `card.created` are filled in. A model that is already there is
        left as it is, its first card included. The model appears whole or not at all, also with several
        processes adding at once.

        Args:
            folder: a model or adapter folder; hidden files and an old card are not taken along.
            card: what is known of the model.
            consume: move the files instead of copying them; `folder` is left without them.

        Raises:
            BadInput: the folder holds neither a model nor an adapter, or the name is not usable.
            NoSpace: the disk is full; the store is as it was.
        """
        name = _base(card.id)
        if not _NAME.fullmatch(name):
            raise BadInput(f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-'")
        if not any((folder / mark).is_file() for mark in MODEL_MARKS):
            raise BadInput(f"{folder} is not a model folder: it has neither {' nor '.join(MODEL_MARKS)}")
        files = manifest(folder)
        sha256 = digest(files)
        target = self.models / f"{name}@{sha256[:12]}"
        with self.lock("store"):
            recover_folder(target)
            for debris in self.models.glob(".*.tmp"):  # of a process that was killed: all others wait for the lock
                shutil.rmtree(debris, ignore_errors=True)
            if (target / CARD).is_file():
                return target
            if not consume:
                require_space(self.models, sum((folder / file).stat().st_size for file in files), f"model {name!r}")
            with folder_atomic(target) as scratch:
                for file in files:
                    (scratch / file).parent.mkdir(parents=True, exist_ok=True)
                    (shutil.move if consume else shutil.copyfile)(folder / file, scratch / file)
                stamp = card.created or datetime.now(UTC).isoformat()
                stored = card.model_copy(update={"id": target.name, "sha256": sha256, "created": stamp})
                (scratch / FILES).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
                (scratch / CARD).write_text(stored.to_json(indent=1) + "\n", encoding="utf-8")
        return target

    def verify(self, name: str) -> ModelCard:
        """Hash a stored model again and return its card.

        Raises:
            Corrupt: a file was changed, is missing or was added; the message names it.
        """
        card = self._find(name)
        folder = self.models / card.id
        remedy = f"remove {folder} and pull or import the model again"
        try:
            expected = json.loads((folder / FILES).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Corrupt(f"{folder / FILES}: not readable ({error}); {remedy}") from error
        if digest(expected) != card.sha256:
            raise Corrupt(f"{folder / FILES}: does not have the sha256 {card.sha256} of the card; {remedy}")
        found = manifest(folder)
        for file in sorted(expected.keys() | found.keys()):
            if file not in found:
                raise Corrupt(f"{folder / file}: is missing; {remedy}")
            if file not in expected:
                raise Corrupt(f"{folder / file}: does not belong to the model; remove it")
            if expected[file] != found[file]:
                raise Corrupt(f"{folder / file}: expected sha256 {expected[file]}, got {found[file]}; {remedy}")
        return card

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold an exclusive lock across processes and threads; it ends with the process if that dies."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _as_path(self, name: str) -> Path | None:
        """Return `name` as a model folder, if it is one; a name in the store goes before a folder here."""
        path = Path(name).expanduser()
        if os.sep not in name and any(_base(card.id) == name or card.id == name for card in self.list()):
            return None
        return path.absolute() if any((path / mark).is_file() for mark in MODEL_MARKS) else None

    def _find(self, name: str) -> ModelCard:
        cards = self.list()
        for card in cards:
            if card.id == name:
                return card
        named = [card for card in cards if _base(card.id) == name]
        if named:
            return named[-1]
        begun = [card for card in cards if name and card.id.startswith(name)]
        if len({_base(card.id) for card in begun}) == 1:
            if "@" in name and len(begun) > 1:
                raise BadInput(f"{name!r} fits {', '.join(card.id for card in begun)}; give more of the id")
            return begun[-1]
        if begun:
            raise BadInput(f"{name!r} fits {', '.join(card.id for card in begun)}; give more of the name")
        catalogue = self.catalogue()
        hint = ""
        if Path(name).expanduser().is_dir():
            hint = f". The folder {name} exists but has neither {' nor '.join(MODEL_MARKS)}"
        if name in catalogue:
            hint = f". It is in the catalogue; fetch it with: ascent models pull {name}"
        known = {_base(card.id) for card in cards} | (catalogue.keys() - {name})
        raise UnknownName("model", name, known, hint=hint)


def require_space(place: Path, needed: int, what: str) -> None:
    """Raise `NoSpace` when the disk that holds `place` has fewer than `needed` bytes left for `what`."""
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise NoSpace(
            f"{what} needs {needed / 1e6:,.0f} MB in {place}, but only {free / 1e6:,.0f} MB are free; "
            f"nothing was changed. Free some space, or set ASCENT_HOME to a folder on another disk"
        )


def manifest(folder: Path) -> dict[str, str]:
    """Return relative path → sha256 of a model's files, without hidden ones, card and file list."""
    found = {}
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            found[relative.as_posix()] = file
    return {name: sha256_file(file) for name, file in found.items() if name not in (CARD, FILES)}


def _base(model_id: str) -> str:
    return model_id.partition("@")[0]
