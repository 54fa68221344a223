"""The unmodified openai client, and Strands' OpenAIModel, against a real server."""

from __future__ import annotations

import base64
import json

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import torch
from chat_parts import Scripted, install, serve, until
from laws.helpers import write_tiny_model

from ascent.inference.engine import Prompt, Sampling
from ascent.records import Message
from ascent.serve.chat import Finish, Reasoning, Text, ToolArguments, ToolStart, Usage

HELLO = [{"role": "user", "content": "Hello é, name a tree."}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}}
DONE = Finish("stop", Usage(5, 2))


@pytest.fixture(scope="module")
def client(served):
    return served.openai()


def chat(client, **fields):
    return client.chat.completions.create(**({"model": "tiny", "messages": HELLO, "max_tokens": 30} | fields))


def test_the_text_is_the_other_engines_whole_and_streamed(client, theirs):
    prompt = Prompt((Message(role="user", content=HELLO[0]["content"]),))
    expected = theirs.generate([prompt], Sampling(max_tokens=30, temperature=0))[0][0]
    whole = chat(client, temperature=0)
    assert whole.choices[0].message.content == expected.text and whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == len(expected.prompt_ids) and whole.usage.completion_tokens == 30
    chunks = list(chat(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    *parts, usage = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    assert usage.choices == [] and usage.usage.completion_tokens == 30
    assert {part.id for part in chunks} == {parts[0].id} and parts[0].usage is None
    assert 0 < usage.usage.prompt_tokens_details.cached_tokens < usage.usage.prompt_tokens  # asked before


def test_choices_differ_and_a_seed_repeats_them(client):
    first, again, other = (chat(client, n=3, seed=seed) for seed in (5, 5, 6))
    texts = [[choice.message.content for choice in one.choices] for one in (first, again, other)]
    assert len(set(texts[0])) == 3 and texts[0] == texts[1] != texts[2]
    assert first.usage.completion_tokens > 30 and first.usage.prompt_tokens < 60
    found = {0: "", 1: "", 2: ""}
    for chunk in chat(client, n=3, seed=5, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    assert list(found.values()) == texts[0]


def test_log_probs_sum_to_the_text(client):
    choice = chat(client, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert len(content) == 12 and all(len(token.top_logprobs) == 3 for token in content)
    for token in content:
        tops = [one.logprob for one in token.top_logprobs]
        assert tops == sorted(tops, reverse=True) and token.logprob == tops[0]
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    streamed = [
        token
        for chunk in chat(client, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in content]


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_kept_to(client, seed):
    schema = {"name": "answer", "schema": CITY, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    answer = chat(client, seed=seed, max_tokens=300, response_format=form, temperature=1.5)
    jsonschema.validate(json.loads(answer.choices[0].message.content), CITY)


def test_an_expression_is_kept_to(client):
    answer = chat(client, extra_body={"structured_outputs": {"regex": "(oak|elm){2}"}})
    assert answer.choices[0].message.content in ("oakoak", "oakelm", "elmoak", "elmelm")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_comes_in_the_protocols_form(client, choice):
    answer = chat(client, tools=[TOOL], tool_choice=choice, max_tokens=400, seed=1).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None and call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), CITY)


def test_calls_stream_and_conversations_with_results_are_read(served, client):
    model = Scripted(
        "scripted",
        [
            [
                Reasoning("hm"),
                Text("Look: "),
                ToolStart(0, "call_a", "weather"),
                ToolArguments(0, '{"city": "Bern"}'),
                ToolStart(1, "call_b", "weather"),
                ToolArguments(1, '{"city": "Genf"}'),
                Finish("tool", Usage(9, 4)),
            ],
            [Text("Rain and sun."), DONE],
        ],
    )
    install(served.models, model)
    with client.chat.completions.stream(model="scripted", messages=HELLO, tools=[TOOL]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Look: " and [call.id for call in message.tool_calls] == ["call_a", "call_b"]
    assert [json.loads(call.function.arguments)["city"] for call in message.tool_calls] == ["Bern", "Genf"]
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(message.tool_calls, ("rain", "sun"), strict=True)
    ]
    asked = [*HELLO, message.model_dump(include={"role", "content", "tool_calls"}), *results]
    assert chat(client, model="scripted", messages=asked).choices[0].message.content == "Rain and sun."
    _, spoken, answered = model.requests[1].turns
    assert [(use.id, use.name, use.arguments) for use in spoken.tool_uses] == [
        ("call_a", "weather", {"city": "Bern"}),
        ("call_b", "weather", {"city": "Genf"}),
    ]
    assert [(result.id, result.text) for result in answered.tool_results] == [("call_a", "rain"), ("call_b", "sun")]


def test_completions_go_on_with_texts(client, theirs):
    ids = tuple(theirs.renderer.tokenizer.encode("Take one"))
    expected = theirs.generate([Prompt(token_ids=ids)], Sampling(max_tokens=9, temperature=0))[0][0]
    answer = client.completions.create(
        model="tiny", prompt=["Take one", "At night"], max_tokens=9, temperature=0, logprobs=2
    )
    first, second = answer.choices
    assert first.text == expected.text != second.text
    assert first.logprobs.token_logprobs == pytest.approx(list(expected.logps), abs=1e-4)
    assert first.logprobs.text_offset[0] == 0 and len(first.logprobs.text_offset) == 9
    assert answer.usage.prompt_tokens == len(ids) + len(theirs.renderer.tokenizer.encode("At night"))
    streamed = client.completions.create(model="tiny", prompt="Take one", max_tokens=9, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected.text


def test_stop_ends_the_text(client):
    text = chat(client, temperature=0).choices[0].message.content
    choice = chat(client, temperature=0, stop=[text[4:7], "nowhere"]).choices[0]
    assert choice.message.content == text[: text.index(text[4:7])] and choice.finish_reason == "stop"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list() if model.id != "scripted"] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ascent"
    with pytest.raises(openai.NotFoundError, match="unknown model 'none'"):
        client.models.retrieve("none")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"extra_body": {"temprature": 0.5}}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 100}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, None),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **fields)
    assert error.value.type == "invalid_request_error"
    assert param is None or error.value.param == param


def test_what_changes_nothing_is_passed_over(client):
    plain = chat(client, temperature=0).choices[0].message.content
    fields = {"user": "me", "metadata": {"a": "b"}, "store": False, "frequency_penalty": 0, "logit_bias": {}}
    assert chat(client, temperature=0, **fields).choices[0].message.content == plain


def test_errors_have_the_protocols_statuses(served, client):
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="none")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, messages=[{"role": "user", "content": "x " * 9000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError, match="ascent keys create"):
        chat(openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0))
    narrow = served.keys.create("tester", "narrow", ["openai:ListModels"])
    assert served.openai(narrow).models.list().data
    with pytest.raises(openai.PermissionDeniedError, match="openai:ChatCompletions"):
        chat(served.openai(narrow))
    served.keys.revoke(narrow.access_key_id)
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    headers = {"authorization": f"Bearer {served.key.bearer}"}
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=b"{", headers=headers)
    assert answer.status_code == 400 and "no JSON" in answer.json()["error"]["message"]
    assert httpx.post(f"{served.url}/v1/else", json={}, headers=headers).status_code == 404


def test_a_client_that_leaves_cancels_its_request(served, client):
    stats = served.models.stats()["tiny"]
    stream = chat(client, stream=True, max_tokens=900, extra_body={"structured_outputs": {"regex": "a{900}"}})
    next(iter(stream))
    stream.close()
    until(lambda: served.models.stats()["tiny"].cancelled == stats.cancelled + 1)
    until(lambda: served.models.stats()["tiny"].running == 0)
    until(lambda: served.calls[-1].status == "cancelled")
    assert served.calls[-1].operation == "openai:ChatCompletions" and served.calls[-1].completion_tokens > 0


def test_a_client_that_leaves_before_the_first_byte_cancels_too(served):
    before = served.models.stats()["tiny"].cancelled
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 900, "structured_outputs": {"regex": "a{900}"}}
    headers = {"authorization": f"Bearer {served.key.bearer}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=0.15)
    until(lambda: served.models.stats()["tiny"].cancelled == before + 1)
    until(lambda: served.models.stats()["tiny"].running == 0)


def test_strands_holds_a_conversation_with_a_tool(served):
    from strands import Agent, tool
    from strands.models.openai import OpenAIModel

    asked = []

    @tool
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: where.
        """
        asked.append(city)
        return f"rain in {city}"

    call = [ToolStart(0, "call_a", "weather"), ToolArguments(0, '{"city": "Bern"}'), Finish("tool", Usage(9, 4))]
    model = Scripted("agent", [call, [Text("It rains."), DONE]])
    install(served.models, model)
    arguments = {"api_key": served.key.bearer, "base_url": f"{served.url}/v1"}
    agent = Agent(OpenAIModel(client_args=arguments, model_id="agent"), tools=[weather], callback_handler=None)
    result = agent("Weather in Bern?")
    assert asked == ["Bern"] and str(result).strip() == "It rains."
    assert [spec.name for spec in model.requests[0].tools] == ["weather"]
    assert model.requests[1].turns[-1].tool_results[0].text == "rain in Bern"


def test_strands_gets_structured_output_from_a_random_model(served):
    """The tiny model cannot know what to say; that it can be parsed at all is the grammar's doing."""
    from pydantic import BaseModel, Field
    from strands import Agent
    from strands.models.openai import OpenAIModel

    class Tree(BaseModel):
        name: str = Field(max_length=5)
        height_m: int = Field(ge=1, le=99)

    arguments = {"api_key": served.key.bearer, "base_url": f"{served.url}/v1"}
    model = OpenAIModel(client_args=arguments, model_id="tiny", params={"max_tokens": 300, "seed": 3})
    agent = Agent(model, callback_handler=None)
    tree = agent.structured_output(Tree, "Name a tree.")
    assert isinstance(tree, Tree) and 1 <= tree.height_m <= 99


def test_embeddings_are_those_of_the_model(tmp_path_factory):
    """Against sentence-transformers' own layout and a plain computation with transformers."""
    from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("embedder")
    tiny = PreTrainedTokenizerFast.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("x") / "tiny"))
    tiny.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    bert = BertModel(config).eval()
    bert.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    texts = ["Take one tablet.", "naïve café", "x"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with serve(tmp_path_factory.mktemp("embed-server"), {"embedder": str(folder)}) as served:
        client = served.openai()
        answer = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
        for text, row in zip(texts, answer.data, strict=True):
            with torch.no_grad():
                states = bert(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
            np.testing.assert_allclose(row.embedding, states.mean(0).numpy(), atol=1e-5)
        packed = client.embeddings.create(model="embedder", input=texts, encoding_format="base64").data[0].embedding
        vector = np.frombuffer(base64.b64decode(packed), "<f4") if isinstance(packed, str) else np.array(packed)
        np.testing.assert_allclose(vector, answer.data[0].embedding, atol=1e-7)
        assert answer.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
        assert served.calls[-1].prompt_tokens == answer.usage.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="cannot chat"):
            chat(client, model="embedder")
        with pytest.raises(openai.BadRequestError, match="is 16 for this model"):
            client.embeddings.create(model="embedder", input="x", dimensions=8)


@pytest.mark.slow
def test_a_real_model_answers_and_follows_a_schema(smollm2, tmp_path):
    with serve(tmp_path, {"smol": str(smollm2)}) as served:
        client = served.openai()
        messages = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
        answer = chat(client, model="smol", messages=messages, temperature=0).choices[0]
        assert "Paris" in answer.message.content and answer.finish_reason == "stop"
        schema = {"type": "object", "properties": {"capital": {"type": "string"}}, "required": ["capital"]}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
        held = chat(client, model="smol", messages=messages, temperature=0, max_tokens=60, response_format=form)
        assert "Paris" in json.loads(held.choices[0].message.content)["capital"]
