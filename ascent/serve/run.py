"""A server's life: checks before it listens, the job worker beside it, signals, and a drain at the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ascent.jobs.worker import WorkerSettings
from ascent.records.errors import BadInput, MissingExtra
from ascent.serve.config import ServerConfig, quota_of
from ascent.serve.kinds.home import DATABASE
from ascent.serve.logs import set_up

if TYPE_CHECKING:
    import uvicorn

    from ascent.serve.app import Server

LOG = logging.getLogger(__name__)
WORKER_EXIT_S = 60.0  # long enough for training to finish its step and write a checkpoint
WATCH_S = 1.0
KINDS = "ascent.serve.kinds:KINDS"


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; then let running requests end, and jobs write their checkpoints.

    Raises:
        MissingExtra: the web server is not installed.
        BadInput: the address is beyond loopback and there is no key, or neither TLS nor `plain_http`; the port is
            taken; a model to deploy is unknown.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("serve", "ascent serve") from error
    from ascent.serve.app import Server

    set_up(config.log_format)
    server = Server(config)
    require_safe(config, server)
    listening = listen(config)
    worker = WorkerKeeper(config, server.home) if config.jobs.slots != 0 else None
    web = uvicorn.Config(
        server,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, int(config.drain_s)),
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
        server_header=False,
    )
    try:
        asyncio.run(_run(uvicorn.Server(web), server, listening, worker))
    finally:
        if worker is not None:
            worker.stop()


async def _run(web: uvicorn.Server, server: Server, listening: socket.socket, worker: WorkerKeeper | None) -> None:
    """Answer requests until a signal; say when the server is ready and when it begins to drain."""
    loop, config = asyncio.get_running_loop(), server.config

    def drain(number: signal.Signals) -> None:
        LOG.info("draining", extra={"signal": number.name, "at_most_s": config.drain_s})
        notify("STOPPING=1")
        server.drain()
        web.handle_exit(number, None)  # a second one ends it at once

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain, number)
    watch = asyncio.ensure_future(worker.watch()) if worker is not None else None
    task = asyncio.ensure_future(web._serve([listening]))  # `serve` would raise the signal again, past the worker's end
    while not web.started and not task.done():
        await asyncio.sleep(0.02)
    if web.started:
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        LOG.info("ready", extra={"address": f"{'https' if config.tls_cert else 'http'}://{shown}:{port}"})
        notify("READY=1")
    await task
    if watch is not None:
        watch.cancel()


def require_safe(config: ServerConfig, server: Server) -> None:
    """Refuse an address that others can reach while anyone, or nobody, could use it. Raises BadInput."""
    if config.loopback:
        return
    if not any(key.state == "active" for key in server.keys.list()):
        raise BadInput(
            f"{config.host} can be reached from other machines, and there is no key yet: make one with "
            f"`ascent keys create --name NAME --owner OWNER --scope 'bedrock-runtime:*'`, or listen on 127.0.0.1"
        )
    if config.tls_cert is None and not config.plain_http:
        raise BadInput(
            f"{config.host} can be reached from other machines, and bearer keys would cross the network in clear: give "
            f"tls_cert and tls_key, or plain_http behind a proxy that speaks TLS"
        )


def listen(config: ServerConfig) -> socket.socket:
    """Bind the address. Raises BadInput when it is taken or not this machine's."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise BadInput(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}); stop what holds it, or give another port"
        ) from error
    return listening


class WorkerKeeper:
    """Keeps the job worker running in a process of its own: one that dies is started again, and its jobs go on."""

    def __init__(self, config: ServerConfig, home: Path) -> None:
        database = config.database or str(home / "ascent.db")
        self._settings = WorkerSettings(
            database=database,
            folder=home / "jobs",
            kinds=KINDS,
            slots=config.jobs.slots,
            memory_mb=config.jobs.memory_mb,
            prices=config.prices,
            quota=quota_of(config),
            passed=("ASCENT_NATIVE", *config.jobs.environment, *((DATABASE,) if config.database else ())),
            parent=os.getpid(),
        ).model_dump_json()
        self._environment = os.environ | {DATABASE: database}
        self._process = self._start()

    async def watch(self) -> None:
        """Start the worker again whenever it has ended, without haste when it keeps ending."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self._process.poll() is not None:
                LOG.error("the job worker ended and is started again", extra={"exit": self._process.returncode})
                await asyncio.sleep(WATCH_S)
                self._process = self._start()

    def stop(self) -> None:
        """Let the worker drain; kill it when it takes too long, and its jobs go on after the next start."""
        self._process.terminate()
        try:
            self._process.wait(WORKER_EXIT_S)
        except subprocess.TimeoutExpired:
            LOG.warning("the job worker did not end in time and is killed; its jobs go on after the next start")
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        """Start a worker. The kernel ends it with this thread, the main one, which lives as long as the server."""
        process = subprocess.Popen(
            [sys.executable, "-m", "ascent.jobs.worker"],
            stdin=subprocess.PIPE,
            text=True,
            env=self._environment,
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(self._settings)
        process.stdin.close()
        LOG.info("job worker started", extra={"pid": process.pid})
        return process


def notify(text: str) -> None:
    """Tell systemd, where it started this process (sd_notify(3))."""
    place = os.environ.get("NOTIFY_SOCKET")
    if place:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.connect(f"\0{place[1:]}" if place.startswith("@") else place)
            link.sendall(text.encode())
