from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from inference_files import serve, write_tokenizer

from ascent.inference.chat import Renderer
from ascent.inference.engine import Engine, Prompt, Sampling
from ascent.inference.engines.remote import RemoteEngine
from ascent.inference.engines.scripted import ScriptedEngine
from ascent.records import FinishReason, Message
from ascent.records.errors import BadInput


class Server:
    """A chat server of the OpenAI protocol that answers with the question in capitals, as vLLM words it."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.failures: list[tuple[int, dict[str, str], str]] = []
        self.unknown: set[str] = set()
        self.most = 99
        self.token_ids = True
        self.raw: str | None = None
        self.finish = "stop"
        self.delay_s = 0.0
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.paths.append(request.path)
            self.times.append(time.monotonic())
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
            failure = self.failures.pop(0) if self.failures else None
        time.sleep(self.delay_s)
        refused = next((name for name in sorted(self.unknown) if name in body), None)
        if failure:
            self.send(request, *failure)
        elif refused:
            self.send(request, 400, {}, f"Unrecognized request argument supplied: {refused}")
        else:
            self.send(request, 200, {}, self.raw if self.raw is not None else json.dumps(self.reply(body)))
        with self.lock:
            self.busy -= 1

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"].upper()
        choices = []
        for index in range(min(body["n"], self.most)):
            choice = {"index": index, "finish_reason": self.finish}
            choice["message"] = {"role": "assistant", "content": f"{text} {body.get('seed', 0) + index}"}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": "t", "logprob": -0.5 * k} for k in range(3)]}
            if body.get("return_token_ids") and self.token_ids:
                choice["token_ids"] = [7, 8, 9]
            choices.append(choice)
        return {"choices": choices, "prompt_token_ids": [1, 2] if body.get("return_token_ids") else None}

    def send(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], text: str) -> None:
        if status == 0:
            request.close_connection = True
            return
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        data = text.encode()
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def address(server):
    with serve(server) as address:
        yield address


def ask(*texts: str) -> list[Prompt]:
    return [Prompt((Message(role="system", content="s"), Message(role="user", content=text))) for text in texts]


def test_the_request_is_what_was_asked_for(server, address):
    engine = RemoteEngine(address, "m", api_key="key")
    assert isinstance(engine, Engine)
    engine.generate(ask("one"), Sampling(n=2, max_tokens=5, temperature=0.5, top_p=0.9, seed=3, stop=("\n",)))
    body = server.bodies[0]
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer key"
    assert body["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}]
    assert (body["model"], body["n"], body["max_tokens"]) == ("m", 2, 5)
    assert (body["temperature"], body["top_p"], body["stop"]) == (0.5, 0.9, ["\n"])
    RemoteEngine(address + "/v1/", "m").generate(ask("one"), Sampling())
    assert server.paths[-1] == "/v1/chat/completions"
    assert "stop" not in server.bodies[-1] and "Authorization" not in server.headers[-1]


def test_answers_come_in_prompt_order_with_tokens_and_log_probs(server, address):
    server.delay_s, done = 0.02, []
    texts = [f"q{number}" for number in range(20)]
    groups = RemoteEngine(address, "m", parallel=4).generate(ask(*texts), Sampling(n=3), done.append)
    assert [[one.text.split()[0] for one in group] for group in groups] == [[text.upper()] * 3 for text in texts]
    assert done == [1] * 60
    assert 1 < server.busiest <= 4
    first = groups[0][0]
    assert (first.token_ids, first.logps, first.prompt_ids) == ((7, 8, 9), (0.0, -0.5, -1.0), (1, 2))
    assert first.finish is FinishReason.stop


def test_seeds_repeat_with_the_call_and_differ_between_prompts_and_samples(server, address):
    def texts(seed: int) -> list[list[str]]:
        groups = RemoteEngine(address, "m").generate(ask("same", "same"), Sampling(n=2, seed=seed))
        return [[one.text for one in group] for group in groups]

    once = texts(1)
    assert once == texts(1) != texts(2)
    assert len({text for group in once for text in group}) == 4


def test_greedy_is_asked_once_and_given_n_times(server, address):
    done: list[int] = []
    groups = RemoteEngine(address, "m").generate(ask("one"), Sampling(n=4, temperature=0), done.append)
    assert [body["n"] for body in server.bodies] == [1]
    assert len(groups[0]) == 4 and len({one.text for one in groups[0]}) == 1 and done == [1] * 4


def test_a_server_that_gives_fewer_choices_is_asked_for_the_rest(server, address):
    server.most = 2
    groups = RemoteEngine(address, "m").generate(ask("one"), Sampling(n=5))
    assert [body["n"] for body in server.bodies] == [5, 3, 1]
    assert len({one.text for one in groups[0]}) == 5


def test_fields_that_a_server_does_not_know_are_left_out_from_then_on(server, address):
    server.unknown = {"return_token_ids", "logprobs"}
    engine = RemoteEngine(address, "m", parallel=1)
    groups = engine.generate(ask("one", "two"), Sampling())
    assert [one.finish for group in groups for one in group] == [FinishReason.stop] * 2
    assert [one.token_ids + one.logps for group in groups for one in group] == [(), ()]
    assert len(server.bodies) == 4, "two refusals are met once, not once per prompt"


def test_log_probs_without_token_ids_are_not_half_given(server, address):
    server.token_ids = False
    one = RemoteEngine(address, "m").generate(ask("one"), Sampling())[0][0]
    assert (one.token_ids, one.logps) == ((), ())


@pytest.mark.parametrize(("said", "finish"), [("length", "length"), ("content_filter", "error"), (None, "stop")])
def test_finish_reasons(server, address, said, finish):
    server.finish = said
    one = RemoteEngine(address, "m").generate(ask("one"), Sampling())[0][0]
    assert one.finish == finish and (one.error is not None) == (finish == "error")


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_passing_trouble_is_waited_out(server, address, status):
    server.failures = [(status, {}, "busy")] * 2
    one = RemoteEngine(address, "m", back_off_s=0.01).generate(ask("one"), Sampling())[0][0]
    assert one.text.startswith("ONE") and len(server.bodies) == 3


def test_back_off_doubles(server, address):
    server.failures = [(503, {}, "busy")] * 3
    RemoteEngine(address, "m", back_off_s=0.1).generate(ask("one"), Sampling())
    pauses = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True):
        assert pause >= least
    assert sum(pauses) < 0.7 * 1.25 + 1


def test_retry_after_goes_before_the_back_off(server, address):
    soon = format_datetime(datetime.now(UTC) - timedelta(seconds=5), usegmt=True)
    server.failures = [(429, {"Retry-After": "0.2"}, "slow"), (429, {"Retry-After": soon}, "slow")]
    began = time.monotonic()
    one = RemoteEngine(address, "m", back_off_s=30).generate(ask("one"), Sampling())[0][0]
    assert one.text.startswith("ONE")
    assert 0.2 <= time.monotonic() - began < 10


def test_lasting_trouble_is_a_completion_with_the_reason(server, address):
    server.failures = [(404, {}, "no model m")]
    engine = RemoteEngine(address, "m", parallel=1, attempts=2, back_off_s=0.01)
    done: list[int] = []
    bad, good = engine.generate(ask("one", "two"), Sampling(n=2), done.append)
    assert [one.finish for one in bad] == [FinishReason.error] * 2
    assert bad[0].error is not None and "answered 404: no model m" in bad[0].error
    assert [one.text.split()[0] for one in good] == ["TWO", "TWO"] and done == [1] * 4
    server.failures = [(500, {}, "broken")] * 2
    failed = engine.generate(ask("one"), Sampling())[0][0]
    assert failed.error is not None and "answered 500: broken (after 2 attempts)" in failed.error
    unreachable = RemoteEngine("http://127.0.0.1:9", "m", attempts=2, back_off_s=0.01)
    failed = unreachable.generate(ask("one"), Sampling())[0][0]
    assert failed.error is not None and "no answer" in failed.error


@pytest.mark.parametrize("raw", ["<html>", "[]", "{}", '{"choices": []}', '{"choices": [3]}', '{"choices": null}'])
def test_an_answer_outside_the_protocol_is_an_error_completion(server, address, raw):
    server.raw = raw
    one = RemoteEngine(address, "m").generate(ask("one"), Sampling())[0][0]
    assert one.finish is FinishReason.error and one.error is not None and "the answer" in one.error


def test_a_silent_server_times_out(server, address):
    server.delay_s = 1.0
    began = time.monotonic()
    one = RemoteEngine(address, "m", timeout_s=0.1, attempts=1).generate(ask("one"), Sampling())[0][0]
    assert one.finish is FinishReason.error and time.monotonic() - began < 0.9


def test_no_prompts_no_answers(server, address):
    assert RemoteEngine(address, "m").generate([], Sampling()) == []


def test_a_script_answers_in_turn_and_is_cut_like_a_model(tmp_path):
    renderer = Renderer(write_tokenizer(tmp_path))
    engine = ScriptedEngine({"one": ["ab", "the 12|rest"], "two": "x"}, renderer)
    assert isinstance(engine, Engine)
    first, second = engine.generate(ask("one", "two"), Sampling(n=3, stop=("|",)))
    assert [one.text for one in first] == ["ab", "the 12", "ab"]
    assert [one.text for one in second] == ["x"] * 3
    for prompt, group in zip(ask("one", "two"), (first, second), strict=True):
        for one in group:
            whole = renderer.render((*prompt.messages, Message(role="assistant", content=one.text)))
            assert one.prompt_ids + one.token_ids == whole.token_ids
            assert one.token_ids[-1] in renderer.end_ids and len(one.logps) == len(one.token_ids)
    short = engine.generate(ask("two"), Sampling(max_tokens=1))[0][0]
    assert (short.text, short.finish, len(short.token_ids)) == ("x", FinishReason.length, 1)
    with pytest.raises(BadInput, match="the script has no answer to 'three'"):
        engine.generate(ask("three"), Sampling())
    echo = ScriptedEngine(lambda prompt: prompt.messages[-1].content[::-1])
    assert [group[0].text for group in echo.generate(ask("abc", "de"), Sampling())] == ["cba", "ed"]
