"""What the tests of the chat door and its protocols share: real engines, and a real server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import torch
import uvicorn
from botocore.config import Config

from ascent.inference.serving.engine import ServingEngine
from ascent.inference.store import Store
from ascent.observe.database import open_database
from ascent.serve.chat import CallRecord, ChatRequest, Delta, Text
from ascent.serve.keys import Keys, NewKey
from ascent.serve.models import EVERYONE, Deployment, Models, Target
from ascent.serve.openai import OpenAIApp
from ascent.serve.services.bedrock_runtime import BedrockRuntime
from ascent.serve.services.sagemaker_runtime import SageMakerRuntime
from ascent.serve.wire import Authenticator, AwsApp

REGION = "us-east-1"


def small_engine(folder: Path, name: str) -> ServingEngine:
    """An engine for tiny models: fp32, so that texts can be compared with other fp32 engines."""
    return ServingEngine(folder, name, rows=8, waiting=16, cache_tokens=8192, dtype=torch.float32)


@dataclass
class Served:
    """A server on loopback with its keys, and what was reported of its calls."""

    url: str
    models: Models
    keys: Keys
    key: NewKey
    guardrails: Path
    calls: list[CallRecord] = field(default_factory=list)

    def aws(self, service: str, key: NewKey | None = None, **config: Any) -> Any:
        """An unmodified boto3 client."""
        key = key or self.key
        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=key.access_key_id,
            aws_secret_access_key=key.secret,
            config=Config(retries={"total_max_attempts": 1}, **config),
        )

    def openai(self, key: NewKey | None = None) -> Any:
        """An unmodified openai client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=(key or self.key).bearer, max_retries=0)


@contextlib.contextmanager
def serve(folder: Path, deployments: dict[str, str], store: Path | None = None) -> Iterator[Served]:
    """Run the three protocols on a free port of this process, and stop them at the end."""
    database = open_database(folder / "ascent.db")
    keys = Keys(database, folder / "master.key")
    key = keys.create("tester", "test", ["bedrock-runtime:*", "sagemaker-runtime:*", "openai:*"])
    models = Models(Store(store or folder / "store"), engine=small_engine)
    for name, target in deployments.items():
        models.deploy(name, Target(target), EVERYONE)
    guardrails = folder / "guardrails"
    guardrails.mkdir()
    authenticator = Authenticator(keys)
    aws = AwsApp([BedrockRuntime(models, guardrails), SageMakerRuntime(models)], authenticator)
    openai = OpenAIApp(models, authenticator)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (openai if scope.get("path", "").startswith("/v1/") else aws)(scope, receive, send)

    with running(app) as url:
        served = Served(url, models, keys, key, guardrails)
        models.on_call.append(served.calls.append)
        yield served
    models.close()
    database.dispose()


@contextlib.contextmanager
def running(app: Callable[..., Any]) -> Iterator[str]:
    """Run an ASGI application under uvicorn in a thread; yield its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not web.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join(10)
        listening.close()


class Scripted:
    """A chat model that says what a test wrote down, one answer a request; it keeps the requests."""

    def __init__(self, id: str, answers: Iterable[list[Delta]]) -> None:
        self.id, self.context = id, 4096
        self.answers, self.requests = list(answers), list[ChatRequest]()

    async def chat(self, request: ChatRequest) -> AsyncIterator[Delta]:
        self.requests.append(request)
        for delta in self.answers.pop(0):
            await asyncio.sleep(0)
            yield delta

    def complete(self, prompt: str, request: ChatRequest) -> AsyncIterator[Delta]:
        return self.chat(request)

    def count(self, request: ChatRequest) -> int:
        return sum(len(turn.text) for turn in request.turns)


def install(models: Models, model: Any) -> None:
    """Make any chat model callable under its id."""
    deployment = Deployment(model.id, EVERYONE, Target(model.id), "scripted", 0.0)
    models._deployed[EVERYONE, model.id] = (deployment, model)


def said(deltas: Iterable[Delta]) -> str:
    """The text of an answer."""
    return "".join(delta.text for delta in deltas if isinstance(delta, Text))


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.01)
