"""One server of the echoing services for all tests of the wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from wire.echo import Agents, Control, Endpoints, Memories, Running, Runtime, running


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
