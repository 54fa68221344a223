"""One server of the echoing services for all tests of the wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chat_parts import Served, serve
from laws.helpers import write_tiny_model
from wire.echo import Agents, Control, Endpoints, Memories, Running, Runtime, running

from ascent.inference.engines.torch import TorchEngine


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture(scope="session")
def control() -> Control:
    return Control()


@pytest.fixture(scope="session")
def wire(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime, control: Control) -> Iterator[Running]:
    services = [runtime, control, Endpoints(), Memories(), Agents()]
    with running(tmp_path_factory.mktemp("wire"), services) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for long conversations."""
    return write_tiny_model(tmp_path_factory.mktemp("served") / "tiny", context=4096)


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The three protocols in front of it, as `tiny`."""
    with serve(tmp_path_factory.mktemp("server"), {"tiny": str(folder)}) as found:
        yield found


@pytest.fixture(scope="module")
def theirs(folder: Path) -> TorchEngine:
    """The batch engine on the same model, to compare with."""
    return TorchEngine.load(folder, "tiny", torch.float32)
