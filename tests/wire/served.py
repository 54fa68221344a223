"""`ascent serve` as its own process on a free port of loopback, with a home and keys of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import requests
from botocore.config import Config

from ascent.serve.config import load_config
from ascent.serve.keys import NewKey, open_keys

START_S = 60.0


@dataclass
class Served:
    """A running server: its process, its address and where its log lies."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    home: Path

    def lines(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def client(self, service: str, key: NewKey, **config: Any) -> Any:
        """An unmodified boto3 client."""
        return boto3.client(
            service,
            endpoint_url=self.address,
            region_name="us-east-1",
            aws_access_key_id=key.access_key_id,
            aws_secret_access_key=key.secret,
            config=Config(**config),
        )

    def wait_ready(self, *, verify: str | bool = True) -> None:
        """Return when `/readyz` says so."""
        until = time.monotonic() + START_S
        while True:
            try:
                if requests.get(f"{self.address}/readyz", timeout=2, verify=verify).ok:
                    return
            except requests.RequestException:
                pass
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.05)


def make_key(home: Path, owner: str = "ann", *scopes: str) -> NewKey:
    """Make a key as `ascent keys create` does."""
    return open_keys(load_config(None, {"home": home}, {})).create(owner, f"{owner}'s", scopes or ("*",))


@contextmanager
def serving(
    home: Path, options: Sequence[str] = (), *, environment: dict[str, str] | None = None, scheme: str = "http"
) -> Iterator[Served]:
    """Start a server; at the end it gets SIGTERM, and SIGKILL if it does not heed it."""
    home.mkdir(parents=True, exist_ok=True)
    log = home.parent / f"{home.name}-{time.monotonic_ns()}.log"
    variables = os.environ | {"ASCENT_SERVER_HOME": str(home), "OMP_NUM_THREADS": "1"} | (environment or {})
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ascent", "serve", "--port", "0", *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
    try:
        yield Served(process, address_of(process, log), log, home)
    finally:
        end(process)


def address_of(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address that a starting server logs."""
    until = time.monotonic() + START_S
    while True:
        for line in log.read_text().splitlines():
            if line.startswith("{") and "address" in (found := json.loads(line)):
                return str(found["address"])
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server that is still there."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
