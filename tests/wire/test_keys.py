"""Keys: what is kept of a secret, who may read the master key, and the command line."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ascent.cli.keys import command
from ascent.observe.database import open_database
from ascent.records.errors import BadInput, Corrupt, UnknownName
from ascent.serve.keys import Keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(open_database(tmp_path / "ascent.db"), tmp_path / "master.key")


def test_a_key_has_the_shapes_that_clients_expect_and_is_found_by_both(keys: Keys) -> None:
    new = keys.create("ana", "laptop", ("bedrock:*", "openai:Chat*"), time.time() + 60)
    assert re.fullmatch(r"AKIA[A-Z2-7]{16}", new.access_key_id) and len(new.secret) == 40
    assert new.bearer.startswith("ascent-") and len(new.bearer) > 45
    for found in (keys.find_access_key(new.access_key_id), keys.find_bearer(new.bearer)):
        assert found is not None and found.state == "active"
        assert (found.owner, found.name, found.secret) == ("ana", "laptop", new.secret)
        assert found.scopes == {"bedrock:*", "openai:Chat*"}
    assert keys.find_access_key("AKIA" + "A" * 16) is None and keys.find_bearer(new.bearer + "x") is None
    assert keys.find_bearer("\ud800") is None and keys.find_access_key("' OR 1=1 --") is None


def test_two_keys_share_nothing(keys: Keys) -> None:
    made = [keys.create("ana", "same", ("*",)) for _ in range(20)]
    for field in ("access_key_id", "secret", "bearer"):
        assert len({getattr(new, field) for new in made}) == 20


def test_no_secret_is_in_the_database_or_its_log(keys: Keys, tmp_path: Path) -> None:
    new = keys.create("ana", "laptop", ("*",))
    stored = b"".join(file.read_bytes() for file in tmp_path.glob("ascent.db*"))
    assert new.access_key_id.encode() in stored
    for text in (new.secret, new.bearer, new.bearer.removeprefix("ascent-")):
        assert text.encode() not in stored


def test_the_encryption_is_aes_gcm_bound_to_key_and_owner(keys: Keys) -> None:
    new = keys.create("ana", "laptop", ("*",))
    with keys.engine.begin() as connection:
        sealed = connection.exec_driver_sql("SELECT secret FROM access_keys").scalar()
    cipher = AESGCM(keys.derive("secrets of access keys"))
    assert cipher.decrypt(sealed[:12], sealed[12:], f"{new.access_key_id} ana".encode()).decode() == new.secret
    with keys.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE access_keys SET owner = 'eve'")
    with pytest.raises(Corrupt, match="another master key"):
        keys.find_access_key(new.access_key_id)


def test_another_master_key_opens_nothing(keys: Keys, tmp_path: Path) -> None:
    new = keys.create("ana", "laptop", ("*",))
    other = Keys(keys.engine, tmp_path / "other" / "master.key")
    with pytest.raises(Corrupt, match="bring the master key back"):
        other.find_bearer(new.bearer)
    again = Keys(open_database(tmp_path / "ascent.db"), tmp_path / "master.key")
    found = again.find_bearer(new.bearer)
    assert found is not None and found.secret == new.secret
    assert again.derive("a") == keys.derive("a") != keys.derive("b")


def test_the_master_key_is_private_and_whole(tmp_path: Path) -> None:
    file, engine = tmp_path / "deep" / "master.key", open_database(tmp_path / "ascent.db")
    before = os.umask(0)
    try:
        Keys(engine, file)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_bytes()) == 32
    assert [each.name for each in file.parent.iterdir()] == ["master.key"]
    for mode in (0o640, 0o604, 0o660):
        file.chmod(mode)
        with pytest.raises(BadInput, match=rf"{mode:04o}.*chmod 600"):
            Keys(engine, file)
    file.chmod(0o600)
    file.write_bytes(b"short")
    with pytest.raises(Corrupt, match="5 bytes"):
        Keys(engine, file)


def _derive(folder: str, queue: multiprocessing.Queue) -> None:
    queue.put(Keys(open_database(Path(folder) / "ascent.db"), Path(folder) / "master.key").derive("x"))


def test_processes_that_start_together_agree_on_one_master_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_derive, args=(str(tmp_path), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(found) == 1


def test_revoking_and_listing(keys: Keys) -> None:
    first, second = keys.create("ana", "one", ("*",)), keys.create("bob", "two", ("*",), time.time() - 1)
    keys.revoke(first.access_key_id)
    once = keys.find_access_key(first.access_key_id)
    keys.revoke(first.access_key_id)
    twice = keys.find_access_key(first.access_key_id)
    assert once is not None and twice is not None and once.revoked == twice.revoked is not None
    assert [(key.name, key.state, key.secret) for key in keys.list()] == [
        ("one", "revoked", ""),
        ("two", "expired", ""),
    ]
    assert [key.key_id for key in keys.list("bob")] == [second.access_key_id]
    with pytest.raises(UnknownName, match="unknown key 'AKIAX'"):
        keys.revoke("AKIAX")


@pytest.mark.parametrize("scopes", [(), ("bedrock",), ("bedrock:*", ""), ("a:b:c",), ("bedrock: Get",), ("bedrock:é",)])
def test_scopes_that_cannot_be_read_are_refused(keys: Keys, scopes: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match="SERVICE:OPERATION"):
        keys.create("ana", "laptop", scopes)


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 257])
def test_names_and_owners_must_be_printable(keys: Keys, name: str) -> None:
    with pytest.raises(BadInput, match="the owner of a key"):
        keys.create(name, "laptop", ("*",))
    with pytest.raises(BadInput, match="the name of a key"):
        keys.create("ana", name, ("*",))


def test_the_command_makes_lists_and_revokes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path))
    run = CliRunner().invoke
    made = run(command, ["create", "--name", "ci", "--owner", "ana", "--scope", "bedrock:*", "--days", "2"])
    assert made.exit_code == 0, made.output
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in made.output.splitlines())
    keys = Keys(open_database(tmp_path / "server" / "ascent.db"), tmp_path / "server" / "master.key")
    found = keys.find_bearer(shown["bearer key"])
    assert found is not None and found.secret == shown["secret access key"]
    assert found.expires == pytest.approx(time.time() + 2 * 86400, abs=60)
    listed = run(command, ["list"]).output
    assert found.key_id in listed and "active" in listed and found.secret not in listed
    assert run(command, ["revoke", found.key_id]).exit_code == 0
    assert "revoked" in run(command, ["list", "--owner", "ana"]).output
    assert found.key_id not in run(command, ["list", "--owner", "bob"]).output


def test_the_command_words_its_errors(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "ascent", "keys", "revoke", "AKIANONE"],
        env={**os.environ, "ASCENT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("ascent: unknown key 'AKIANONE'")
