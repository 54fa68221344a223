"""A few real operations of four services, kept in memory, and a server that answers them over a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import uvicorn
from botocore.config import Config

from ascent.observe.database import open_database
from ascent.records.errors import BadInput, Busy, Corrupt, UnknownName
from ascent.serve.keys import Keys, NewKey
from ascent.serve.wire import Authenticator, AwsApp, Caller, Limits, ServiceError, arn, id_of, page

START_S = 20.0


class Runtime:
    """Answers with what it was asked; some texts make it fail in a way of their own."""

    service = "bedrock-runtime"

    def __init__(self) -> None:
        self.busy = 0
        self.calls = 0
        self.cancelled = threading.Event()

    async def converse(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        self.calls += 1
        text = _last_text(request)
        if text == "busy" and self.busy > 0:
            self.busy -= 1
            raise Busy("32 requests are waiting; try again", retry_after_s=0.4)
        if text == "wait":
            await self._wait()
        _fail(text)
        content = [{"text": f"{request['modelId']}|{caller.owner}|{text}"}]
        usage = {"inputTokens": 1, "outputTokens": 2, "totalTokens": 3}
        return {
            "output": {"message": {"role": "assistant", "content": content}},
            "stopReason": "end_turn",
            "usage": usage,
            "metrics": {"latencyMs": 5},
            "additionalModelResponseFields": request.get("additionalModelRequestFields"),
        }

    async def converse_stream(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        return {"stream": self._events(_last_text(request))}

    async def _events(self, text: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        if text == "busy at once":
            raise Busy("no place", retry_after_s=1)
        yield "messageStart", {"role": "assistant"}
        for at, word in enumerate(text.split()):
            if word == "slow":
                await asyncio.sleep(0.3)
            if word == "wait":
                await self._wait()
            _fail(word)
            yield "contentBlockDelta", {"contentBlockIndex": at, "delta": {"text": word}}
        yield "messageStop", {"stopReason": "end_turn"}

    async def _wait(self) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def invoke_model(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        return {"body": request.get("body", b"")[::-1], "contentType": request.get("contentType", "text/plain")}

    def list_async_invokes(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        after = request.get("submitTimeAfter", datetime(2000, 1, 1, tzinfo=UTC))
        job = {"invocationArn": arn("bedrock", "async-invoke", "a1b2c3d4e5f6", caller.region), "modelArn": "m"}
        where = {"s3OutputDataConfig": {"s3Uri": "file:///data"}}
        return {"asyncInvokeSummaries": [job | {"submitTime": after, "outputDataConfig": where}]}


class Control:
    """Jobs that nobody works on."""

    service = "bedrock"

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.deleted: list[str] = []
        self.slow_s = 0.0
        self.entered = threading.Event()

    def create_model_customization_job(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        self.entered.set()
        time.sleep(self.slow_s)
        if request["jobName"] == "refuse-me":
            raise BadInput("train.jsonl:7: no answer")
        job_id = f"{len(self.jobs):012d}"
        self.jobs[job_id] = request | {"owner": caller.owner, "made": datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)}
        return {"jobArn": arn("bedrock", "model-customization-job", job_id, caller.region)}

    def get_model_customization_job(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        job = self._job(id_of(request["jobIdentifier"]), caller)
        return {
            "jobArn": request["jobIdentifier"],
            "jobName": job["jobName"],
            "outputModelName": job["customModelName"],
            "roleArn": job["roleArn"],
            "creationTime": job["made"],
            "baseModelArn": job["baseModelIdentifier"],
            "trainingDataConfig": job["trainingDataConfig"],
            "outputDataConfig": job["outputDataConfig"],
            "hyperParameters": job.get("hyperParameters"),
        }

    def list_model_customization_jobs(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        mine = [job_id for job_id, job in self.jobs.items() if caller.admin or job["owner"] == caller.owner]
        found, token = page(mine, request, key=lambda job_id: job_id)
        rows = [
            {
                "jobArn": arn("bedrock", "model-customization-job", job_id, caller.region),
                "baseModelArn": self.jobs[job_id]["baseModelIdentifier"],
                "jobName": self.jobs[job_id]["jobName"],
                "status": "InProgress",
                "creationTime": self.jobs[job_id]["made"],
            }
            for job_id in found
        ]
        return {"modelCustomizationJobSummaries": rows, "nextToken": token}

    def delete_custom_model(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        name = id_of(request["modelIdentifier"])
        if name == "missing":
            raise UnknownName("model", name, ["here"])
        self.deleted.append(name)
        return {}

    def _job(self, job_id: str, caller: Caller) -> dict[str, Any]:
        job = self.jobs.get(job_id)
        if job is None or (job["owner"] != caller.owner and not caller.admin):
            raise UnknownName("job", job_id, [])
        return job


class Endpoints:
    service = "sagemaker-runtime"

    async def invoke_endpoint(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        if request["EndpointName"] == "absent":
            raise UnknownName("endpoint", "absent", [])
        return {"Body": request["Body"].upper(), "ContentType": request.get("ContentType", "text/plain")}

    async def invoke_endpoint_with_response_stream(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        async def parts() -> AsyncIterator[tuple[str, dict[str, Any]]]:
            for part in request["Body"].split():
                yield "PayloadPart", {"Bytes": part}

        return {"Body": parts()}


class Memories:
    """One memory that is active when it is looked at for the third time: what a waiter waits for."""

    service = "bedrock-agentcore-control"

    def __init__(self) -> None:
        self.looks = 0

    def get_memory(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        self.looks += 1
        now = datetime.now(UTC)
        facts = {"name": "m", "eventExpiryDuration": 7, "createdAt": now, "updatedAt": now, "strategies": []}
        status = "ACTIVE" if self.looks > 2 else "CREATING"
        return {"memory": facts | {"id": request["memoryId"], "arn": "arn", "status": status}}


class Agents:
    service = "bedrock-agentcore"

    async def invoke_agent_runtime(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        async def body() -> AsyncIterator[bytes]:
            yield b"data: "
            yield request["payload"]

        facts = {"contentType": "text/event-stream", "statusCode": 202}
        return {"response": body(), "runtimeSessionId": request["agentRuntimeArn"].rpartition("/")[2], **facts}


def _last_text(request: dict[str, Any]) -> str:
    texts = [part["text"] for turn in request.get("messages", ()) for part in turn["content"] if "text" in part]
    if not texts:
        raise BadInput("messages has no text; send one")
    return str(texts[-1])


def _fail(text: str) -> None:
    if text == "defect":
        raise RuntimeError("the secret cause")
    if text == "corrupt":
        raise Corrupt("the secret folder is broken")
    if text == "throttle":
        raise ServiceError("ThrottlingException", "too fast")
    if text == "denied":
        raise ServiceError("AccessDeniedException", "not yours")


@dataclass
class Running:
    """A server on loopback, its keys, and clients for it."""

    url: str
    keys: Keys
    authenticator: Authenticator
    seen: list[tuple[str, int, float]] = field(default_factory=list)

    def key(self, owner: str = "ana", scopes: Sequence[str] = ("*",), expires: float | None = None) -> NewKey:
        return self.keys.create(owner, f"key of {owner}", scopes, expires)

    def client(self, service: str, key: NewKey | None = None, *, attempts: int = 1, **more: Any) -> Any:
        key = key or self.key()
        options = {"retries": {"total_max_attempts": attempts, "mode": "standard"}, "read_timeout": 20}
        verify = more.pop("verify", None)
        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name=more.pop("region_name", "eu-central-1"),
            verify=verify,
            aws_access_key_id=key.access_key_id,
            aws_secret_access_key=key.secret,
            config=Config(**{**options, **more}),
        )


@contextmanager
def running(
    folder: Path,
    services: Sequence[object],
    *,
    limits: Limits | None = None,
    clock: Callable[[], float] = time.time,
    **options: Any,
) -> Any:
    """Serve `services` from a thread until the block ends."""
    keys = Keys(open_database(folder / "ascent.db"), folder / "master.key")
    authenticator = Authenticator(keys, cache_s=0.05, clock=clock)
    seen: list[tuple[str, int, float]] = []
    app = AwsApp(services, authenticator, limits=limits, on_request=lambda *facts: seen.append(facts))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1, **options)
        )
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        until = time.monotonic() + START_S
        while not server.started:
            assert time.monotonic() < until and thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        scheme = "https" if "ssl_certfile" in options else "http"
        try:
            yield Running(f"{scheme}://127.0.0.1:{port}", keys, authenticator, seen)
        finally:
            server.should_exit = True
            thread.join(START_S)
            assert not thread.is_alive(), "the server did not stop"
