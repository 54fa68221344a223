from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from ascent.inference import store as store_module
from ascent.inference.catalogue import CATALOGUE, load_catalogue
from ascent.inference.store import Store
from ascent.records import ModelCard
from ascent.records.errors import BadInput, Corrupt, NoSpace, UnknownName


def model_folder(path: Path, weights: bytes = b"w") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


def card(name: str) -> ModelCard:
    return ModelCard(id=name, family="llama", source="file:x", licence="MIT", sha256="")


def test_id_is_the_digest_of_the_files_and_their_names(tmp_path):
    folder = model_folder(tmp_path / "m", b"weights")
    stored = Store(tmp_path / "s").add(folder, card("tiny"))
    files = {
        "config.json": hashlib.sha256(b"{}").hexdigest(),
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
    }
    expected = hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert stored == tmp_path / "s" / "models" / f"tiny@{expected[:12]}"
    found = Store(tmp_path / "s").card("tiny")
    assert (found.id, found.sha256) == (stored.name, expected)
    assert json.loads((stored / "files.json").read_text()) == files
    assert (stored / "model.safetensors").read_bytes() == b"weights"


def test_adding_twice_changes_nothing_and_other_bytes_make_another_model(tmp_path):
    store = Store(tmp_path / "s")
    first = store.add(model_folder(tmp_path / "m"), card("tiny"))
    before = (first / "card.json").read_bytes()
    assert store.add(tmp_path / "m", card("tiny").model_copy(update={"licence": "other"})) == first
    assert (first / "card.json").read_bytes() == before
    second = store.add(model_folder(tmp_path / "m", b"v"), card("tiny"))
    assert second != first and len(store.list()) == 2
    assert store.resolve("tiny") == second, "the latest version of a name wins"
    assert store.resolve(first.name) == first


def test_hidden_files_and_an_old_card_are_not_taken_along(tmp_path):
    folder = model_folder(tmp_path / "m")
    plain = Store(tmp_path / "a").add(folder, card("tiny"))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("x")
    (folder / "card.json").write_text("old")
    assert Store(tmp_path / "b").add(folder, card("tiny")).name == plain.name


def test_consume_moves_the_files(tmp_path):
    folder = model_folder(tmp_path / "m")
    stored = Store(tmp_path / "s").add(folder, card("tiny"), consume=True)
    assert (stored / "model.safetensors").read_bytes() == b"w"
    assert not (folder / "model.safetensors").exists()


def test_resolve_by_prefix_and_path_and_the_errors(tmp_path, monkeypatch):
    store = Store(tmp_path / "s")
    one = store.add(model_folder(tmp_path / "m"), card("tiny-one"))
    two = store.add(tmp_path / "m", card("tiny-two"))
    assert store.resolve("tiny-o") == one
    assert store.resolve(two.name[:-3]) == two
    assert store.resolve(str(tmp_path / "m")) == tmp_path / "m"
    with pytest.raises(BadInput, match=r"fits tiny-one@.*tiny-two@.*more of the name"):
        store.resolve("tiny")
    with pytest.raises(UnknownName, match="did you mean 'tiny-one'"):
        store.resolve("tinny-one")
    with pytest.raises(UnknownName, match="ascent models pull smollm2-135m-instruct"):
        store.resolve("smollm2-135m-instruct")
    with pytest.raises(UnknownName, match=r"exists but has neither config\.json"):
        store.resolve(str(tmp_path))
    with pytest.raises(BadInput, match=r"has no card\.json.*ascent models import"):
        store.card(str(tmp_path / "m"))
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "tiny-one")
    assert store.resolve("tiny-one") == one, "a stored name goes before a folder that happens to lie here"
    assert store.resolve("./tiny-one") == tmp_path / "tiny-one"


def test_the_default_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "h"))
    assert Store().root == tmp_path / "h"
    monkeypatch.delenv("ASCENT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store().root == tmp_path / ".cache" / "ascent"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes(b"W"),
            "model.safetensors: expected sha256 50e721.*got fcb5f4",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
        (lambda f: (f / "extra.py").write_text("x"), "extra.py: does not belong"),
        (lambda f: (f / "files.json").write_text("{}"), "files.json: does not have the sha256"),
        (lambda f: (f / "files.json").write_text("{"), "files.json: not readable"),
    ],
)
def test_verify_names_the_damaged_file(tmp_path, damage, message):
    store = Store(tmp_path / "s")
    stored = store.add(model_folder(tmp_path / "m"), card("tiny"))
    assert store.verify("tiny").id == stored.name
    damage(stored)
    with pytest.raises(Corrupt, match=message):
        store.verify("tiny")


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store = Store(tmp_path / "s")
    kept = store.add(model_folder(tmp_path / "m"), card("tiny"))
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(store_module.shutil, "disk_usage", lambda _: usage(9, 9, 0))
        with pytest.raises(NoSpace, match="Free some space"):
            store.add(model_folder(tmp_path / "n", b"new"), card("tiny"))

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.shutil, "copyfile", full)
    with pytest.raises(NoSpace):
        store.add(tmp_path / "n", card("tiny"))
    assert [path.name for path in store.models.iterdir()] == [kept.name]


def test_names_and_folders_that_cannot_be_stored(tmp_path):
    store = Store(tmp_path / "s")
    with pytest.raises(BadInput, match=r"neither config\.json nor adapter_config\.json"):
        store.add(tmp_path, card("tiny"))
    with pytest.raises(BadInput, match="cannot name a model"):
        store.add(model_folder(tmp_path / "m"), card("../escape"))
    assert store.list() == []


def _add(root: Path, folder: Path, start: multiprocessing.synchronize.Event, results: multiprocessing.Queue) -> None:
    start.wait()
    results.put(Store(root).add(folder, card("tiny")).name)


def test_processes_that_add_at_once_agree_and_nothing_is_left_over(tmp_path):
    folders = [model_folder(tmp_path / "a", os.urandom(1 << 20)), model_folder(tmp_path / "b", os.urandom(1 << 20))]
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=_add, args=(tmp_path / "s", folders[n % 2], start, results)) for n in range(6)]
    for worker in workers:
        worker.start()
    start.set()
    names = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    store = Store(tmp_path / "s")
    assert len(set(names)) == 2
    assert {path.name for path in store.models.iterdir()} == set(names)
    for name in names:
        store.verify(name)


def _die_half_way(root: Path, folder: Path) -> None:
    def dying(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        os._exit(9)

    store_module.shutil.copyfile = dying  # type: ignore[assignment]
    Store(root).add(folder, card("tiny"))


def test_a_process_killed_while_adding_leaves_no_model_and_no_lock(tmp_path):
    folder = model_folder(tmp_path / "m")
    worker = multiprocessing.get_context("fork").Process(target=_die_half_way, args=(tmp_path / "s", folder))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 9
    store = Store(tmp_path / "s")
    assert store.list() == []
    stored = store.add(folder, card("tiny"))
    assert store.verify("tiny").id == stored.name
    assert [path.name for path in store.models.iterdir()] == [stored.name], "the debris is gone"


def test_a_replacement_cut_off_between_its_renames_is_recovered(tmp_path):
    store = Store(tmp_path / "s")
    stored = store.add(model_folder(tmp_path / "m"), card("tiny"))
    shutil.move(stored, stored.with_name(f".{stored.name}.old"))
    assert store.add(tmp_path / "m", card("tiny")) == stored
    assert [path.name for path in store.models.iterdir()] == [stored.name]


def test_the_users_catalogue_extends_and_overrides(tmp_path):
    (tmp_path / "catalogue.yaml").write_text(
        "mine:\n  sources: ['file:/m.gguf']\n  sha256: " + "a" * 64 + "\n  licence: MIT\n  family: llama\n"
    )
    entries = load_catalogue(tmp_path)
    assert entries["mine"].sources == ("file:/m.gguf",)
    assert entries["smollm2-135m-instruct"] is CATALOGUE["smollm2-135m-instruct"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine: [", "not readable as YAML"),
        ("- mine", "must map model names to entries"),
        ("mine: 3", "mine: must be a mapping"),
        ("mine: {sources: [], sha256: x, licence: MIT, family: f}", "mine: field 'sources'"),
        (
            "mine: {sources: ['ftp:x'], sha256: " + "a" * 64 + ", licence: MIT, family: f}",
            "field 'sources': .*'ftp:x' is not a model source; write pypi:",
        ),
        (
            "mine: {sources: ['file:x'], sha256: " + "a" * 64 + ", licence: MIT, family: f, contxt: 1}",
            "field 'contxt'.*did you mean 'context'",
        ),
    ],
)
def test_a_malformed_catalogue_names_file_entry_and_field(tmp_path, text, message):
    (tmp_path / "catalogue.yaml").write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        load_catalogue(tmp_path)
    assert str(tmp_path / "catalogue.yaml") in str(caught.value)
