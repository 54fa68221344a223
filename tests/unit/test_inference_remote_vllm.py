"""What the remote engine does beyond the chat protocol, against a fake that words its replies as vLLM 0.32 does.

tests/oracles/test_vllm.py asks a real one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from inference_files import serve, write_tokenizer

from ascent.inference.chat import Renderer
from ascent.inference.engine import Prompt, Sampling
from ascent.inference.engines.remote import RemoteEngine
from ascent.records import FinishReason, Message
from ascent.records.errors import BadInput, Unavailable

LOGITS = {"a": 2.0, "b": 1.0, "c": 0.0, "d": -1.0, "e": -2.0, "f": -3.0}


class Fake:
    """One token after any prompt, from fixed logits; log-probs at the temperature or at 1, as `scaled` says."""

    def __init__(self) -> None:
        self.scaled = True
        self.shows = True
        self.finish = "stop"
        self.adapters: dict[str, str] = {}
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        self.asked.append((request.path, body))
        status, reply = self.refusal or (200, self.reply(request.path, body))
        data = json.dumps(reply).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("_lora_adapter"):
            return {}
        temperature = (body["temperature"] or 1.0) if self.scaled else 1.0
        total = math.log(sum(math.exp(logit / temperature) for logit in LOGITS.values()))
        logps = {token: logit / temperature - total for token, logit in LOGITS.items()}
        token = "a" if body["temperature"] < 2 else "f"  # the drawn token joins the likeliest ones, first
        top = {token: logps[token]} | dict(list(logps.items())[: body.get("top_logprobs", body.get("logprobs"))])
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish, "token_ids": [ord(token)]}
        if path == "/v1/completions":
            choice["text"] = f"after {body['prompt']}"
            choice["logprobs"] = {"token_logprobs": [logps[token]], "top_logprobs": [top]}
        else:
            choice["message"] = {"role": "assistant", "content": token}
            shown = [{"token": one, "logprob": logp} for one, logp in top.items()]
            shown = shown[: body.get("top_logprobs", 0)]
            choice["logprobs"] = {"content": [{"token": token, "logprob": logps[token], "top_logprobs": shown}]}
        if not (self.shows and body.get("logprobs")):
            choice["logprobs"] = None
        if path == "/v1/completions":
            return {"choices": [choice | {"prompt_token_ids": body["prompt"]}]}
        return {"choices": [choice], "prompt_token_ids": [1]}


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def address(fake: Fake) -> Iterator[str]:
    with serve(fake) as address:
        yield address


SAID = (Message(role="user", content="one"), Message(role="assistant", content="two"))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rendered", [True, False])
@pytest.mark.parametrize(
    ("temperature", "top_p", "right"),
    [
        (0, 0.5, {True, False}),
        (1, 1, {True, False}),
        (0.5, 1, {True}),
        (2, 1, {True}),
        (1, 0.5, {False}),
        (0.5, 0.5, set()),
    ],
)
def test_log_probs_are_given_where_they_are_those_before_the_cut_at_the_temperature(
    fake, address, tmp_path, scaled, rendered, temperature, top_p, right
):
    fake.scaled = scaled
    engine = RemoteEngine(address, "m", renderer=Renderer(write_tokenizer(tmp_path)) if rendered else None)
    for _ in range(2):
        (one,) = engine.generate([Prompt(SAID[:1])], Sampling(temperature=temperature, top_p=top_p))[0]
        assert len(one.token_ids) == len(one.logps) == (scaled in right) and one.text and one.error is None
    probed = (temperature not in (0, 1) and top_p == 1) or (temperature, top_p) == (1, 0.5)
    assert len(fake.asked) == 2 + 2 * probed, "it is found out once"


def test_a_server_without_log_probs_is_asked_for_them_once(fake, address):
    fake.shows = False
    engine = RemoteEngine(address, "m")
    for _ in range(2):
        assert engine.generate([Prompt(SAID[:1])], Sampling(temperature=0.5))[0][0].logps == ()
    assert len(fake.asked) == 3


def test_a_checkpoints_own_sampling_defaults_are_overruled(fake, address):
    RemoteEngine(address, "m").generate([Prompt(SAID[:1])], Sampling())
    body = fake.asked[0][1]
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)


def test_continued_prompts_go_as_tokens_where_they_can(fake, address, tmp_path):
    renderer = Renderer(write_tokenizer(tmp_path))
    ids = (5, 6, min(renderer.end_ids))
    since = Message(role="user", content="three")
    plain, rendering = RemoteEngine(address, "m"), RemoteEngine(address, "m", renderer=renderer)
    (one,) = plain.generate([Prompt(SAID, ids)], Sampling())[0]
    assert (one.text, one.token_ids, one.prompt_ids) == (f"after {list(ids)}", (ord("a"),), ids)
    continued = Prompt((*SAID, since), ids)
    plain.generate([continued], Sampling())
    rendering.generate([continued], Sampling())
    (whole, _), (path, messages), (_, rendered) = fake.asked
    assert (whole, path) == ("/v1/completions", "/v1/chat/completions")
    assert [message["content"] for message in messages["messages"]] == ["one", "two", "three"]
    assert rendered["prompt"] == renderer.tokens_of(continued) and tuple(rendered["prompt"][:3]) == ids
    assert rendered["stop_token_ids"] == sorted(renderer.end_ids)


def test_a_continued_prompt_without_room_is_an_answer_of_no_length(fake, address):
    fake.refusal = (400, {"error": {"message": "This model's maximum context length is 8 tokens. However, ..."}})
    engine = RemoteEngine(address, "m")
    (full,) = engine.generate([Prompt(SAID, (1, 2))], Sampling())[0]
    assert (full.finish, full.text, full.prompt_ids, full.error) == (FinishReason.length, "", (1, 2), None)
    (long,) = engine.generate([Prompt(SAID[:1])], Sampling())[0]
    assert long.finish is FinishReason.error and "answered 400: This model's maximum" in (long.error or "")


@pytest.mark.parametrize("finish", ["abort", "error"])
def test_answers_that_the_server_broke_off_are_errors(fake, address, finish):
    fake.finish = finish
    (one,) = RemoteEngine(address, "m").generate([Prompt(SAID[:1])], Sampling())[0]
    assert one.finish is FinishReason.error and one.error == f"the server ended this answer: {finish}"


def test_an_adapter_is_the_model_of_later_requests_until_it_is_unloaded(fake, address, tmp_path):
    engine = RemoteEngine(address + "/v1", "m")
    assert engine.load_adapter("step-1", tmp_path) == engine.model == "step-1"
    engine.generate([Prompt(SAID[:1])], Sampling())
    engine.load_adapter("step-2", tmp_path / "b")
    engine.unload_adapter("step-1")
    assert engine.model == "step-2"
    engine.unload_adapter("step-2")
    assert engine.model == "m"
    load, asked, _, unload, _ = fake.asked
    assert load == ("/v1/load_lora_adapter", {"lora_name": "step-1", "lora_path": str(tmp_path)})
    assert unload == ("/v1/unload_lora_adapter", {"lora_name": "step-1"})
    assert asked[1]["model"] == "step-1"
    with pytest.raises(BadInput, match="'step-1' was used before"):
        engine.load_adapter("step-1", tmp_path / "c")
    assert len(fake.asked) == 5


@pytest.mark.parametrize(
    ("status", "reply", "kind", "match"),
    [
        (404, {"detail": "Not Found"}, Unavailable, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (500, "LoRA is not enabled. Use --enable-lora to enable LoRA.", Unavailable, "with --enable-lora"),
        (500, "LoRA rank 32 is greater than max_lora_rank 16.", Unavailable, "rank 32 .* 16; .*--max-lora-rank"),
        (400, "The lora adapter 'x' has already been loaded. If you ...", BadInput, "unload that adapter first"),
        (404, "Loading lora x failed: No adapter found for /x", BadInput, "under the same path"),
        (500, "something else", Unavailable, "answered 500: something else$"),
    ],
)
def test_refused_adapters_say_what_to_do(fake, address, status, reply, kind, match):
    fake.refusal = (status, reply if isinstance(reply, dict) else {"error": {"message": reply, "code": status}})
    engine = RemoteEngine(address, "m")
    with pytest.raises(kind, match=match):
        engine.load_adapter("x", Path("x"))
    assert engine.model == "m" and len(fake.asked) == 1
    fake.refusal = None
    assert engine.load_adapter("x", Path("x")) == "x", "a name is used up only by success"


def test_no_server_is_an_error_too():
    with pytest.raises(Unavailable, match="load_lora_adapter: no answer"):
        RemoteEngine("http://127.0.0.1:9", "m").load_adapter("x", Path("x"))
