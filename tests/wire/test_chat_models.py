from __future__ import annotations

import asyncio
import contextlib
import gc
import json

import pytest
import torch
from chat_parts import Scripted, install, running, said, serve, small_engine, until
from laws.helpers import write_tiny_model
from oracles import test_vllm as vllm

from ascent.inference.decoder import load_decoder
from ascent.inference.lora import LoraConfig, attach, save_adapter
from ascent.inference.store import Store
from ascent.records import ModelCard
from ascent.records.errors import BadInput, Busy, UnknownName
from ascent.serve.chat import ChatRequest, Finish, ModelFailed, Text, ToolArguments, ToolSpec, ToolStart, Turn, Usage
from ascent.serve.chat.local import LocalModel
from ascent.serve.chat.remote import RemoteModel
from ascent.serve.models import EVERYONE, Models, Target
from ascent.serve.wire import Caller

HELLO = ChatRequest((Turn("user", "Hello, name a tree."),), max_tokens=24, temperature=0)
ANN, BEN = (Caller(name, f"KEY{name}", name, frozenset({"*"})) for name in ("ann", "ben"))
ROOT = Caller("root", "KEYROOT", "root", frozenset({"*", "admin:*"}))


def card(name: str, kind: str, parent: str | None = None) -> ModelCard:
    return ModelCard(id=name, family="tiny", source="test", licence="none", sha256="", kind=kind, parent=parent)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """A base model, two adapters of it, and another base with an adapter of its own."""
    root = tmp_path_factory.mktemp("models")
    store = Store(root / "store")
    for base, seed in (("tiny", 0), ("other", 1)):
        folder = store.add(write_tiny_model(root / base, seed=seed, context=1024), card(base, "base"))
        for number in range(2 if base == "tiny" else 1):
            config = LoraConfig(4, 8.0)
            decoder = load_decoder(folder)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for parameter in attach(decoder, config):
                    parameter += torch.randn(parameter.shape, generator=generator) * 0.5
            made = root / f"{base}-adapter-{number}"
            made.mkdir()
            save_adapter(decoder, config, made, folder.name)
            store.add(made, card(f"{base}-adapter-{number}", "adapter", folder.name))
    return store


@pytest.fixture
def models(store):
    made = Models(store, engine=small_engine)
    made.calls = []
    made.on_call.append(made.calls.append)
    yield made
    made.close()


def answer(models: Models, name: str, caller: Caller = ANN, request: ChatRequest = HELLO) -> str:
    return asyncio.run(gather(models, name, caller, request))


async def gather(models: Models, name: str, caller: Caller = ANN, request: ChatRequest = HELLO) -> str:
    model = await models.opened(name, caller, "test:Chat")
    return said([delta async for delta in model.chat(request)])


def test_base_models_of_the_store_are_called_by_name_id_or_arn(models, store):
    id = store.resolve("tiny").name
    texts = {
        answer(models, name)
        for name in ("tiny", id, f"arn:aws:bedrock:us-east-1::foundation-model/{id}", "arn:aws:x:::y/tiny")
    }
    assert len(texts) == 1 and list(models.stats()) == [id]


@pytest.mark.parametrize("name", ["nothing", "../tiny", "{folder}", "tin", ""])
def test_what_callers_name_is_no_path_and_no_beginning(models, store, name):
    with pytest.raises(UnknownName):
        models.find(name.format(folder=store.resolve("tiny")), ANN)


def test_tuned_models_of_the_store_are_not_everybodys(models):
    with pytest.raises(UnknownName, match="tiny-adapter-0"):
        models.find("tiny-adapter-0", ANN)
    assert answer(models, "tiny-adapter-0", ROOT) != answer(models, "tiny")
    assert {each.name for each in models.list(ANN)} == {"tiny", "other"}
    assert {each.name for each in models.list(ROOT)} > {"tiny-adapter-0"}


def test_a_deployment_is_its_owners_or_everyones(models):
    models.deploy("mine", Target("tiny-adapter-0"), "ann")
    models.deploy("shared", Target("tiny-adapter-1"), EVERYONE)
    assert answer(models, "mine") != answer(models, "shared") == answer(models, "shared", BEN)
    with pytest.raises(UnknownName):
        models.find("mine", BEN)
    assert answer(models, "mine", ROOT) == answer(models, "mine")
    with pytest.raises(UnknownName):
        models.undeploy("mine", "ben")
    names = [{each.name for each in models.list(caller)} & {"mine", "shared"} for caller in (ANN, BEN)]
    assert names == [{"mine", "shared"}, {"shared"}]


def test_owners_share_a_model_and_nothing_that_was_computed_for_the_other(models):
    turns = (Turn("user", "a question that fills some pages of the cache, asked by more than one owner"),)
    request = ChatRequest(turns, max_tokens=2, temperature=0)
    texts = [answer(models, "tiny", caller, request) for caller in (ANN, BEN, ANN)]
    assert len(set(texts)) == 1
    assert [call.cached_tokens > 0 for call in models.calls] == [False, False, True]


def test_adapters_share_the_engine_of_their_base(models, store):
    models.deploy("a", Target("tiny-adapter-0"), "ann")
    models.deploy("b", Target("tiny-adapter-1"), "ann")
    models.deploy("c", Target("other-adapter-0"), "ann")
    texts = [answer(models, name) for name in ("a", "b", "c", "tiny")]
    assert len(set(texts)) == 4
    assert set(models.stats()) == {store.resolve(base).name for base in ("tiny", "other")}


def test_undeploying_lets_running_answers_end(models):
    models.deploy("kept", Target("tiny"), EVERYONE)
    models.deploy("gone", Target("tiny-adapter-0"), "ann")
    long = ChatRequest(HELLO.turns, max_tokens=300, temperature=0)

    async def main() -> tuple[str, str]:
        model = await models.opened("gone", ANN, "test:Chat")
        deltas = model.chat(long)
        begun = [await anext(deltas)]
        models.undeploy("gone", "ann")
        with pytest.raises(UnknownName):
            models.find("gone", ANN)
        return said(begun + [delta async for delta in deltas])

    expected = answer(models, "gone", ANN, long)
    assert asyncio.run(main()) == expected
    gc.collect()
    until(lambda: not [name for stats in models.stats().values() for name in stats.adapters if "gone" in name])
    assert answer(models, "kept")


def test_a_replaced_deployment_ends_its_answers_with_the_old_model(models):
    models.deploy("x", Target("tiny-adapter-0"), "ann")
    old = answer(models, "x")

    async def main() -> str:
        model = await models.opened("x", ANN, "test:Chat")
        deltas = model.chat(HELLO)
        begun = [await anext(deltas)]
        await asyncio.to_thread(models.deploy, "x", Target("tiny-adapter-1"), "ann")
        return said(begun + [delta async for delta in deltas])

    assert asyncio.run(main()) == old != answer(models, "x")


def test_an_engine_that_nothing_can_call_any_more_is_closed(models, store):
    models.deploy("whole", Target(str(store.resolve("other"))), "ann")
    engine = next(iter(models._engines.values())).engine
    assert answer(models, "whole")
    models.undeploy("whole", "ann")
    gc.collect()
    until(lambda: not engine.healthy)
    assert models.stats() == {}


def test_calls_at_the_same_time_load_an_engine_once(store):
    made = []
    models = Models(store, engine=lambda folder, name: made.append(name) or small_engine(folder, name))

    async def main() -> list[str]:
        return await asyncio.gather(*(gather(models, "tiny") for _ in range(6)))

    assert len(set(asyncio.run(main()))) == 1 and len(made) == 1
    models.close()


def test_each_call_is_reported_once(models):
    async def leave() -> None:
        deltas = (await models.opened("tiny", ANN, "test:Left")).chat(ChatRequest(HELLO.turns, max_tokens=500))
        await anext(deltas)
        await deltas.aclose()

    text = answer(models, "tiny")
    asyncio.run(leave())
    with pytest.raises(BadInput):
        answer(models, "tiny", request=ChatRequest())
    ok, left, bad = models.calls
    assert (ok.owner, ok.key_id, ok.deployment, ok.operation, ok.status) == ("ann", "KEYann", "tiny", "test:Chat", "ok")
    assert text and ok.completion_tokens == 24 and ok.prompt_tokens > 10 and 0 < ok.first_token_s <= ok.seconds
    assert (left.operation, left.status) == ("test:Left", "cancelled")
    assert left.prompt_tokens == ok.prompt_tokens and 1 <= left.completion_tokens < 500
    assert (bad.status, bad.prompt_tokens, bad.completion_tokens) == ("BadInput", 0, 0)


def test_an_alias_is_resolved_and_its_shadow_sees_the_request(models):
    models.deploy("one", Target("tiny-adapter-0"), "ann")
    models.deploy("two", Target("tiny-adapter-1"), "ann")
    expected = answer(models, "one")
    models.calls.clear()
    models.route = lambda name, caller: ("one", "two") if (name, caller.owner) == ("tree:champion", "ann") else None

    async def main() -> str:
        text = await gather(models, "tree:champion")
        while len(models.calls) < 2:
            await asyncio.sleep(0.01)
        return text

    assert asyncio.run(main()) == expected
    by_operation = {record.operation: record for record in models.calls}
    assert set(by_operation) == {"test:Chat", "Shadow"}
    assert (by_operation["test:Chat"].model, by_operation["Shadow"].model) == ("one", "two")
    with pytest.raises(UnknownName):
        models.open("tree:champion", BEN, "test:Chat")


def test_the_server_side_limit_ends_an_answer(store):
    models = Models(store, engine=small_engine, longest_s=0.05)

    async def main() -> Finish:
        model = await models.opened("tiny", ANN, "test:Chat")
        request = ChatRequest(HELLO.turns, max_tokens=900, deadline_s=60, regex="a{900}")
        return [delta async for delta in model.chat(request)][-1]

    models.find("tiny", ANN)
    assert asyncio.run(main()).reason == "timeout"
    models.close()


WEATHER = ToolSpec("weather", "", {"type": "object", "properties": {"city": {"type": "string"}}})


@pytest.fixture(scope="module")
def behind(store, tmp_path_factory):
    """Another server of the OpenAI protocol, with a tiny model and a scripted one."""
    with serve(tmp_path_factory.mktemp("behind"), {}, store.root) as served:
        scripted = Scripted(
            "caller",
            [
                [
                    Text("Look: "),
                    ToolStart(0, "call_a", "weather"),
                    ToolArguments(0, '{"city": '),
                    ToolArguments(0, '"Bern"}'),
                    ToolStart(1, "call_b", "weather"),
                    ToolArguments(1, "{}"),
                    Finish("tool", Usage(7, 5, 3)),
                ]
            ],
        )
        install(served.models, scripted)
        yield served


def remote(behind, model: str) -> RemoteModel:
    return RemoteModel(f"{behind.url}/v1", model, "remote", behind.key.bearer)


def ask(model: RemoteModel | LocalModel, request: ChatRequest) -> list:
    async def main() -> list:
        return [delta async for delta in model.chat(request)]

    return asyncio.run(main())


def test_a_remote_model_says_what_the_server_behind_it_says(behind, models):
    local = answer(models, "tiny")
    deltas = ask(remote(behind, "tiny"), HELLO)
    end = deltas[-1]
    assert said(deltas) == local and (end.reason, end.usage.completion) == ("length", 24) and end.usage.prompt > 10
    models.deploy("far", Target(f"remote:{behind.url}/v1#tiny", key=behind.key.bearer), "ann")
    assert answer(models, "far") == local
    stop = local[3:6]
    cut = ask(remote(behind, "tiny"), ChatRequest(HELLO.turns, max_tokens=24, temperature=0, stop=(stop,)))
    assert said(cut) == local[: local.index(stop)]
    assert (cut[-1].reason, cut[-1].stop_sequence) == ("stop_sequence", stop)


def test_calls_and_log_probs_come_through(behind, models):
    deltas = ask(remote(behind, "caller"), ChatRequest(HELLO.turns, tools=(WEATHER,)))
    assert deltas[0] == Text("Look: ") and deltas[-1].reason == "tool" and deltas[-1].usage == Usage(7, 5, 3)
    assert [delta for delta in deltas if isinstance(delta, ToolStart)] == [
        ToolStart(0, "call_a", "weather"),
        ToolStart(1, "call_b", "weather"),
    ]
    arguments = "".join(delta.text for delta in deltas if isinstance(delta, ToolArguments) and delta.index == 0)
    assert arguments == '{"city": "Bern"}'
    request = ChatRequest(HELLO.turns, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2)
    far = [token for delta in ask(remote(behind, "tiny"), request) if isinstance(delta, Text) for token in delta.tokens]

    async def gathered() -> list:
        model = await models.opened("tiny", ANN, "test:Chat")
        deltas = [delta async for delta in model.chat(request)]
        return [token for delta in deltas if isinstance(delta, Text) for token in delta.tokens]

    close = asyncio.run(gathered())
    assert [token.text for token in far] == [token.text for token in close]
    assert [token.logp for token in far] == pytest.approx([token.logp for token in close], abs=1e-5)
    assert all(len(token.top) == 2 for token in far)


def test_leaving_a_remote_answer_cancels_it_behind(behind):
    stats = lambda: next(iter(behind.models.stats().values()))  # noqa: E731

    async def leave() -> None:
        deltas = remote(behind, "tiny").chat(ChatRequest(HELLO.turns, max_tokens=900, temperature=0))
        await anext(deltas)
        await deltas.aclose()

    before = stats().cancelled
    asyncio.run(leave())
    until(lambda: stats().cancelled == before + 1 and stats().running == 0)


def test_refusals_of_a_remote_server_keep_their_meaning(behind):
    with pytest.raises(BadInput, match=r"^Input is too long for requested model"):
        ask(remote(behind, "tiny"), ChatRequest((Turn("user", "x " * 3000),), max_tokens=5))
    with pytest.raises(BadInput, match="uniqueItems"):
        ask(
            remote(behind, "tiny"),
            ChatRequest(HELLO.turns, max_tokens=5, schema={"type": "array", "uniqueItems": True}),
        )
    with pytest.raises(ModelFailed, match=r"404.*nothing"):
        ask(remote(behind, "nothing"), HELLO)
    with pytest.raises(ModelFailed, match=r"401.*bearer key"):
        ask(RemoteModel(f"{behind.url}/v1", "tiny", "remote", "wrong"), HELLO)
    with pytest.raises(ModelFailed, match="see whether the server runs"):
        ask(RemoteModel("http://127.0.0.1:9/v1", "tiny", "remote"), HELLO)


def test_a_full_engine_says_when_to_come_back(store):
    models = Models(store, engine=small_engine)
    model = models.find("tiny", ANN)

    async def main() -> None:
        long = ChatRequest(HELLO.turns, max_tokens=900, regex="a{900}")  # an answer that no end token ends early
        answers = [model.chat(long) for _ in range(8 + 16)]
        firsts = [asyncio.ensure_future(anext(each)) for each in answers]
        while (stats := next(iter(models.stats().values()))).running + stats.waiting < len(answers):
            await asyncio.sleep(0.01)
        with pytest.raises(Busy) as error:
            await anext(model.chat(HELLO))
        assert error.value.retry_after_s >= 1
        for first in firsts:
            first.cancel()
        await asyncio.gather(*firsts, return_exceptions=True)
        for each in answers:
            await each.aclose()

    asyncio.run(main())
    until(lambda: next(iter(models.stats().values())).running == 0)
    models.close()


def test_importing_the_door_loads_no_model_library():
    import subprocess
    import sys

    code = (
        "import sys, ascent.serve.chat, ascent.serve.models, ascent.serve.openai\n"
        "import ascent.serve.services.bedrock_runtime, ascent.serve.services.sagemaker_runtime\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'llguidance', 'httpx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fields_that_a_strict_server_refuses_are_left_out_from_then_on():
    seen = []

    async def strict(scope, receive, send) -> None:
        body = json.loads((await receive())["body"])
        seen.append(body.keys() & {"top_k", "min_p", "repetition_penalty"})
        extra = sorted(seen[-1])
        status, kind = (400, b"application/json") if extra else (200, b"text/event-stream")
        chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
        refusal = {"error": {"message": f"Unrecognized request argument supplied: {extra[0]}"}} if extra else {}
        data = json.dumps(refusal) if extra else f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": data.encode()})

    with running(strict) as url:
        model = RemoteModel(f"{url}/v1", "strict", "strict")
        assert said(ask(model, HELLO)) == said(ask(model, HELLO)) == "hi"
    assert [len(fields) for fields in seen] == [3, 2, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.skipif(not vllm.PYTHON.is_file(), reason="no vLLM; `make bench` makes its environment")
def test_a_real_vllm_behind_the_door_says_what_this_engine_says(tiny_model, tmp_path_factory):
    """Its generation config asks for a repetition penalty, which must not reach callers who did not."""
    with contextlib.contextmanager(vllm.served.__wrapped__)(tiny_model, tmp_path_factory) as server:
        far = RemoteModel(f"{server.address}/v1", vllm.NAME, "far")
        near = LocalModel(small_engine(server.folder, "near"), None, "near")
        request = ChatRequest(HELLO.turns, max_tokens=16, temperature=0)
        deltas, ours = ask(far, request), ask(near, request)
        assert said(deltas) == said(ours) and deltas[-1].usage.prompt == ours[-1].usage.prompt
        assert (far.context, far.count(request)) == (vllm.CONTEXT, near.count(request))
        held = ask(far, ChatRequest(HELLO.turns, max_tokens=60, regex="(oak|elm){2}"))
        assert said(held) in ("oakoak", "oakelm", "elmoak", "elmelm")
        with pytest.raises(BadInput, match=r"^Input is too long"):
            ask(far, ChatRequest((Turn("user", "x " * 600),), max_tokens=5))
        near.engine.close()
