"""Shared fixtures: a tiny, real model folder, so that no test downloads anything."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.helpers import write_tiny_model, write_use_case
from sqlalchemy import Engine

from ascent.inference.pull import pull
from ascent.inference.store import Store
from ascent.observe.database import open_database
from ascent.records.errors import UnknownName

torch.set_num_threads(1)  # sums round by thread count, and some tests compare with a one-thread process bit for bit


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A store of the tests' own, so that nothing they learn of this machine is kept; stored models are seen from it."""
    real, home = Store().models, tmp_path_factory.mktemp("home")
    if real.is_dir():
        (home / "models").symlink_to(real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCENT_HOME", str(home))
        yield


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct: of this machine's store, else fetched where slow tests run, which have the time for it."""
    name = "smollm2-135m-instruct"
    try:
        return Store().resolve(name)
    except UnknownName:
        if request.config.option.markexpr == "not slow":
            pytest.skip(f"{name} is not in this machine's model store; fetch it with: ascent models pull {name}")
    return pull(name, Store())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with a trained byte-level tokenizer and a ChatML template, in Hugging Face layout."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def use_case(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files, a program and one recipe per row for the tiny model."""
    return write_use_case(tmp_path_factory.mktemp("use_case"), tiny_model)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server on a socket in its own folder, run as nobody where the tests are root, which it refuses."""
    pytest.importorskip("psycopg")
    places = [shutil.which("postgres"), *glob.glob("/usr/lib/postgresql/*/bin/postgres")]
    programs = next((Path(place).parent for place in places if place), None)
    if programs is None:
        pytest.skip("there is no PostgreSQL server on this machine; install Debian's postgresql")
    who: dict[str, Any] = {"user": "nobody", "extra_groups": ()} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="ascent-postgres-", ignore_cleanup_errors=True) as folder:
        if who:
            shutil.chown(folder, "nobody")
        data, log = Path(folder) / "data", Path(folder) / "log"
        make = [programs / "initdb", "-D", data, "-U", "ascent", "-A", "trust", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, **who)
        control = [programs / "pg_ctl", "-D", data, "-w"]
        options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
        subprocess.run([*control, "start", "-l", log, "-o", options], check=True, stdout=subprocess.DEVNULL, **who)
        try:
            yield f"postgresql+psycopg://ascent@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "stop", "-m", "fast"], check=True, stdout=subprocess.DEVNULL, **who)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database, of either kind that the server runs on."""
    if request.param == "sqlite":
        found = open_database(tmp_path / "ascent.db")
    else:
        found = open_database(request.getfixturevalue("postgres"))
        with found.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
    yield found
    found.dispose()
