"""`sagemaker-runtime`: endpoints are deployments, called by their names."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ascent.serve.chat.collect import collect
from ascent.serve.chat.types import Delta, Finish
from ascent.serve.openai.native import NativeBody, native_body
from ascent.serve.wire.errors import ServiceError

if TYPE_CHECKING:
    from ascent.serve.models import Models
    from ascent.serve.wire.authenticate import Caller

_JSON = "application/json"


class SageMakerRuntime:
    """The service. Bodies are those of `ascent/serve/openai/native.py`: an OpenAI chat body, or `inputs`.

    A stream is server-sent events, as text generation containers send them; of an OpenAI body it ends with `[DONE]`.
    """

    service = "sagemaker-runtime"

    def __init__(self, models: Models) -> None:
        self._models = models

    async def invoke_endpoint(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer a body in its own form."""
        name, body = request["EndpointName"], native_body(request["Body"])
        model = await self._models.opened(name, caller, "sagemaker-runtime:InvokeEndpoint")
        whole = await collect(body.deltas(model))
        _complete(whole.finish)
        return {
            "Body": json.dumps(body.whole(whole, name), ensure_ascii=False).encode("utf-8", "replace"),
            "ContentType": _JSON,
            "InvokedProductionVariant": "AllTraffic",
        }

    async def invoke_endpoint_with_response_stream(self, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer a body as it is made."""
        name, body = request["EndpointName"], native_body(request["Body"])
        operation = "sagemaker-runtime:InvokeEndpointWithResponseStream"
        model = await self._models.opened(name, caller, operation)
        return {
            "Body": _parts(body, body.deltas(model), name),
            "ContentType": "text/event-stream",
            "InvokedProductionVariant": "AllTraffic",
        }


async def _parts(
    body: NativeBody, deltas: AsyncIterator[Delta], name: str
) -> AsyncIterator[tuple[str, dict[str, bytes]]]:
    async with aclosing(deltas) as opened:  # type: ignore[type-var]
        async for delta in opened:
            if isinstance(delta, Finish):
                _complete(delta)
            lines = [json.dumps(chunk, ensure_ascii=False) for chunk in body.chunks(delta, name)]
            if isinstance(delta, Finish) and body.form == "chat":
                lines.append("[DONE]")
            if lines:
                data = "".join(f"data: {line}\n\n" for line in lines)
                yield "PayloadPart", {"Bytes": data.encode("utf-8", "replace")}


def _complete(finish: Finish) -> None:
    """Raise ServiceError for an answer that did not come to its end."""
    if finish.reason in ("timeout", "cancelled"):
        cause = "it took too long; ask for fewer tokens" if finish.reason == "timeout" else "the server is stopping"
        raise ServiceError("ModelErrorException", f"the answer was cut off: {cause}", OriginalStatusCode=503)
