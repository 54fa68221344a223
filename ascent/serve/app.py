"""The whole server as one ASGI application: AWS services, OpenAI protocol, health and metrics on one port."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ascent.inference.engines.named import remote_address
from ascent.inference.machine import this_machine
from ascent.inference.registry import Registry
from ascent.inference.store import Store
from ascent.jobs.ledger import Ledger
from ascent.jobs.prices import load_prices
from ascent.jobs.queue import Queue
from ascent.jobs.share import memory_mb_of
from ascent.jobs.specs import Status
from ascent.observe.database import open_database
from ascent.records.errors import AscentError
from ascent.serve.charge import Charges
from ascent.serve.config import ServerConfig, quota_of
from ascent.serve.keys import Keys
from ascent.serve.kinds.places import Rules
from ascent.serve.metrics import CONTENT_TYPE, Metrics
from ascent.serve.models import EVERYONE, Models, Target
from ascent.serve.openai import OpenAIApp
from ascent.serve.services.bedrock import Bedrock
from ascent.serve.services.bedrock_runtime import BedrockRuntime
from ascent.serve.services.sagemaker_runtime import SageMakerRuntime
from ascent.serve.wire.app import AwsApp
from ascent.serve.wire.authenticate import Authenticator
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.incoming import Limits, Receive, Scope, Send

if TYPE_CHECKING:
    from ascent.inference.serving.engine import ServingEngine

LOG = logging.getLogger(__name__)
SERVICES = (BedrockRuntime, Bedrock, SageMakerRuntime)
CLEAN_S = 3600.0  # between two looks for files that no longer need to be kept


class Server:
    """Everything that one server holds, and the ASGI application in front of it.

    Attributes:
        home: its folder.
        keys: who may enter.

    Raises:
        AscentError: a part cannot be opened; see `Keys`, `Queue`, `load_prices` and `Models.deploy`.
    """

    def __init__(self, config: ServerConfig, store: Store | None = None) -> None:
        self.config, self.store = config, store or Store()
        self.home = (config.home or self.store.root / "server").absolute()
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        database = open_database(config.database or self.home / "ascent.db")
        self.keys = Keys(database, self.home / "master.key")
        memory_mb = config.jobs.memory_mb or memory_mb_of(this_machine())
        self.queue = Queue(database, self.home / "jobs", memory_mb=memory_mb, quota=quota_of(config))
        self.registry = Registry(database, self.store)
        self.ledger = Ledger(database, load_prices(config.prices))
        self.metrics = Metrics()
        self.models = Models(self.store, engine=self._engine, longest_s=config.engine.seconds)
        self._charges = Charges(self.ledger)
        self.models.on_call += [self.metrics.call, self._charges]
        self.metrics.watch(self._gauges)
        authenticator = Authenticator(self.keys)
        closed = (str(self.home), str(self.store.root.absolute()))
        rules = Rules(config.data if config.data is not None or config.loopback else (), closed)
        bedrock = Bedrock(self.queue, self.registry, self.models, self.store, self.ledger, self.home, rules=rules)
        self._deployer = bedrock.deployer
        self.models.route = self._deployer.route
        limits = Limits(body_bytes=config.max_body_mb << 20)
        services = (BedrockRuntime(self.models, self.home / "guardrails"), bedrock, SageMakerRuntime(self.models))
        self._aws = AwsApp(services, authenticator, limits=limits, on_request=self.metrics.request)
        self._openai = OpenAIApp(self.models, authenticator, limits=limits, on_request=self.metrics.request)
        self._authenticator = authenticator
        self._draining, self._loaded, self._failed = False, threading.Event(), ""
        self._background: list[asyncio.Task[None]] = []
        self._engines: weakref.WeakSet[ServingEngine] = weakref.WeakSet()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path = scope.get("path", "")
        if path.startswith("/v1/"):
            await self._openai(scope, receive, send)
        elif (page := _PAGES.get(path)) is not None and scope["type"] == "http":
            await page(self, scope, send)
        else:
            await self._aws(scope, receive, send)

    def drain(self) -> None:
        """Say on `/readyz` from now on that no more requests should come."""
        self._draining = True

    async def _live(self, receive: Receive, send: Send) -> None:
        """The lifespan: load what is to be deployed after the port is open, close everything at the end."""
        await receive()
        self._background = [asyncio.create_task(self._load()), asyncio.create_task(self._clean())]
        for task in self._background:
            task.add_done_callback(self._told)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in self._background:
            task.cancel()
        self._deployer.close()
        await asyncio.to_thread(self.models.close)
        await asyncio.to_thread(self._charges.close)
        await send({"type": "lifespan.shutdown.complete"})

    async def _load(self) -> None:
        """Deploy what the configuration names, and what was deployed when the server last ran."""
        try:
            for each in self.config.models:
                if remote_address(each.model) is None:
                    await asyncio.to_thread(self.store.resolve, each.model)
                await asyncio.to_thread(self.models.deploy, each.name, Target(each.model), EVERYONE)
                LOG.info("deployed", extra={"deployment": each.name, "model": each.model})
            restored = await asyncio.to_thread(self._deployer.restore)
            await asyncio.wrap_future(restored)
        except AscentError as error:
            self._failed = str(error)
            LOG.error("a model cannot be deployed", extra={"cause": str(error)})
        else:
            self._loaded.set()

    def _told(self, task: asyncio.Task[None]) -> None:
        """Notice that work in the background ended by a defect: such a server is not ready."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed = f"{type(error).__name__}: {error}"
            LOG.error("work in the background failed", exc_info=error)

    async def _clean(self) -> None:
        """Remove the files of jobs that ended long ago."""
        while True:
            gone = await asyncio.to_thread(self.queue.clean, self.config.jobs.keep_days * 86_400)
            if gone:
                LOG.info("files of old jobs removed", extra={"jobs": len(gone)})
            await asyncio.sleep(CLEAN_S)

    def _engine(self, folder: Path, name: str) -> ServingEngine:
        from ascent.inference.serving.engine import ServingEngine

        limits = self.config.engine
        made = ServingEngine(folder, name, rows=limits.rows, waiting=limits.waiting, cache_tokens=limits.cache_tokens)
        self._engines.add(made)
        return made

    def _gauges(self) -> Iterator[tuple[str, str, dict[str, str], float]]:
        for name, stats in self.models.stats().items():
            yield "ascent_engine_running", "Requests being answered.", {"engine": name}, stats.running
            yield "ascent_engine_waiting", "Requests waiting for a place.", {"engine": name}, stats.waiting
        running: tuple[Status, ...] = ("running",)
        for job in self.queue.list(status=running):
            yield "ascent_job_progress", "Share of a running job that is done.", {"job": job.id}, job.progress or 0.0

    async def _health(self, scope: Scope, send: Send) -> None:
        await _text(send, 200, b"ok\n")

    async def _ready(self, scope: Scope, send: Send) -> None:
        trouble = self._trouble()
        await _text(send, 503 if trouble else 200, f"{trouble or 'ready'}\n".encode())

    def _trouble(self) -> str:
        """Why no request should be sent here now; empty when all is well."""
        if self._draining:
            return "draining"
        if self._failed:
            return f"a model cannot be deployed: {self._failed}"
        if not self._loaded.is_set():
            return "loading models"
        failed = [engine.name for engine in self._engines if not engine.healthy]
        return f"engines failed: {', '.join(failed)}" if failed else ""

    async def _metrics(self, scope: Scope, send: Send) -> None:
        if not self.config.loopback:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            try:
                caller = self._authenticator.bearer(headers)
                caller.require("metrics:Read")
            except ServiceError as error:
                await _text(send, 403, f"{error.message}\n".encode())
                return
        page = await asyncio.to_thread(self.metrics.page)
        await _text(send, 200, page, CONTENT_TYPE)


_PAGES: dict[str, Callable[[Server, Scope, Send], Awaitable[None]]] = {
    "/healthz": Server._health,
    "/readyz": Server._ready,
    "/metrics": Server._metrics,
}


async def _text(send: Send, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
