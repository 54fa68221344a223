"""Bodies of InvokeModel and InvokeEndpoint: the OpenAI protocol's chat body, and those of models' own runtimes.

| fields | form | answer |
|---|---|---|
| `messages`, … | OpenAI chat | `chat.completion`, in a stream its chunks |
| `prompt`, `max_gen_len`, `temperature`, `top_p` | Llama on Bedrock | `generation`, `stop_reason`, token counts |
| `prompt`, `max_tokens`, `stop`, `temperature`, `top_p` | Mistral on Bedrock | `outputs`: `text`, `stop_reason` |
| `inputs`, `parameters` | text generation on SageMaker | `generated_text` |

A `prompt` and `inputs` are gone on with as they are: the caller has written the chat template's tokens into them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ascent.records.errors import BadInput
from ascent.serve.chat.collect import Whole
from ascent.serve.chat.types import ChatModel, ChatRequest, Delta, Finish, Text
from ascent.serve.openai.reply import Reply
from ascent.serve.openai.request import BadField, number, read_chat

Form = Literal["chat", "llama", "mistral", "generation"]
_FIELDS: dict[Form, frozenset[str]] = {
    "llama": frozenset({"prompt", "max_gen_len", "temperature", "top_p"}),
    "mistral": frozenset({"prompt", "max_tokens", "stop", "temperature", "top_p"}),
    "generation": frozenset({"inputs", "parameters", "stream"}),
}
_PARAMETERS = frozenset(
    {
        *("max_new_tokens", "temperature", "top_p", "do_sample", "stop", "stop_sequences", "seed", "details"),
        *("return_full_text", "decoder_input_details", "watermark", "truncate"),
    }
)


@dataclass(frozen=True)
class NativeBody:
    """A body that was read. `prompt` is the text to go on with, None where the request has turns."""

    form: Form
    request: ChatRequest
    prompt: str | None = None
    stream: bool = False
    full_text: bool = False

    def deltas(self, model: ChatModel) -> AsyncIterator[Delta]:
        """Ask a model."""
        return model.chat(self.request) if self.prompt is None else model.complete(self.prompt, self.request)

    def whole(self, answer: Whole, model: str) -> Any:
        """Return an answer in one piece, in the body's own form."""
        finish = answer.finish
        if self.form == "chat":
            return Reply("chat", model).whole([answer])
        if self.form == "llama":
            return self._llama(answer.text, finish)
        if self.form == "mistral":
            return {"outputs": [{"text": answer.text, "stop_reason": _stop(finish)}]}
        text = f"{self.prompt}{answer.text}" if self.full_text else answer.text
        return [{"generated_text": text}]

    def chunks(self, delta: Delta, model: str) -> list[dict[str, Any]]:
        """Return the chunks of a delta, in the body's own form."""
        if self.form == "chat":
            chunk = self._reply.chunk(0, delta)
            usage = [self._reply.usage_chunk([delta.usage])] if isinstance(delta, Finish) else []
            return [each | {"model": model} for each in [*([chunk] if chunk else []), *usage]]
        finish = delta if isinstance(delta, Finish) else None
        text = delta.text if isinstance(delta, Text) else ""
        if not text and finish is None:
            return []
        if self.form == "llama":
            return [self._llama(text, finish)]
        if self.form == "mistral":
            return [{"outputs": [{"text": text, "stop_reason": None if finish is None else _stop(finish)}]}]
        token = {"id": None, "text": text, "logprob": None, "special": False}
        if finish is None:
            return [{"token": token, "generated_text": None, "details": None}]
        reason = {"length": "length", "stop_sequence": "stop_sequence"}.get(finish.reason, "eos_token")
        details = {"finish_reason": reason, "generated_tokens": finish.usage.completion}
        return [{"token": token, "generated_text": None, "details": details}]

    @cached_property
    def _reply(self) -> Reply:
        return Reply("chat", "")

    @staticmethod
    def _llama(text: str, finish: Finish | None) -> dict[str, Any]:
        return {
            "generation": text,
            "prompt_token_count": None if finish is None else finish.usage.prompt,
            "generation_token_count": None if finish is None else finish.usage.completion,
            "stop_reason": None if finish is None else _stop(finish),
        }


def native_body(body: bytes) -> NativeBody:
    """Return what a body asks for.

    Raises:
        BadInput: it is no JSON object, or of none of the forms in this module's table.
        BadField: a field is malformed or not served.
    """
    try:
        asked = json.loads(body)
    except ValueError as error:
        raise BadInput(f"the body is no JSON ({error}); send an OpenAI chat body, or a prompt") from error
    if isinstance(asked, dict) and "messages" in asked:
        read = read_chat(asked)
        if read.n != 1:
            raise BadField("n", "is 1 here; ask /v1/chat/completions for several choices")
        return NativeBody("chat", read.request, stream=read.stream)
    if isinstance(asked, dict) and "inputs" in asked:
        return _generation(asked)
    if isinstance(asked, dict) and isinstance(asked.get("prompt"), str):
        return _prompt(asked)
    raise BadInput('the body needs "messages" as in the OpenAI protocol, or a "prompt" or "inputs" text')


def _prompt(asked: dict[str, Any]) -> NativeBody:
    form: Form = "mistral" if asked.keys() & {"max_tokens", "stop"} else "llama"
    _check(asked, _FIELDS[form], "")
    limit = number(asked, "max_tokens" if form == "mistral" else "max_gen_len", int, 1)
    return NativeBody(form, _sampled(asked, limit, asked.get("stop")), asked["prompt"])


def _generation(asked: dict[str, Any]) -> NativeBody:
    _check(asked, _FIELDS["generation"], "")
    parameters = asked.get("parameters") or {}
    if not isinstance(parameters, dict) or not isinstance(asked["inputs"], str):
        raise BadField("inputs", "must be a text, and parameters a JSON object")
    _check(parameters, _PARAMETERS, "parameters.")
    for name in ("watermark", "truncate", "decoder_input_details"):
        if parameters.get(name):
            raise BadField(f"parameters.{name}", "is not served; leave it out")
    # As in those containers: greedy, unless sampling or a temperature is asked for.
    sampled = parameters.get("do_sample", parameters.get("temperature") is not None)
    values = parameters if sampled else parameters | {"temperature": 0}
    stop = parameters.get("stop") or parameters.get("stop_sequences")
    request = _sampled(values, number(parameters, "max_new_tokens", int, 1), stop)
    return NativeBody(
        "generation", request, asked["inputs"], asked.get("stream") is True, parameters.get("return_full_text") is True
    )


def _sampled(asked: dict[str, Any], limit: float | None, stop: Any) -> ChatRequest:
    temperature, top_p = number(asked, "temperature", float, 0), number(asked, "top_p", float, 0, 1)
    stops = stop or []
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise BadField("stop", "give a list of texts")
    seed = number(asked, "seed", int, 0)
    return ChatRequest(
        max_tokens=None if limit is None else int(limit),
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p or 1e-6,
        stop=tuple(one for one in stops if one),
        seed=None if seed is None else int(seed),
    )


def _check(asked: dict[str, Any], known: frozenset[str], where: str) -> None:
    for name, value in asked.items():
        if name not in known and value is not None:
            raise BadField(f"{where}{name}", f"is not known in this form; its fields are {', '.join(sorted(known))}")


def _stop(finish: Finish) -> str:
    return "length" if finish.reason == "length" else "stop"
