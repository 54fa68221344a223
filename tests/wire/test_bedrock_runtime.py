"""Unmodified boto3 clients and Strands' BedrockModel against a real server."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Literal

import jsonschema
import pytest
from botocore.exceptions import ClientError, EventStreamError, ReadTimeoutError
from chat_parts import Scripted, install, serve, until

from ascent.inference.engine import Prompt, Sampling
from ascent.records import Message
from ascent.records.errors import Busy
from ascent.serve.chat import Finish, Reasoning, Text, ToolArguments, ToolStart, Usage
from ascent.serve.chat.guardrails import Rules, assess, luhn

TEXT = "Hello é, name a tree."
HELLO = [{"role": "user", "content": [{"text": TEXT}]}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"toolSpec": {"name": "weather", "description": "Tells it.", "inputSchema": {"json": CITY}}}
DONE = Finish("stop", Usage(5, 2))
GREEDY = {"maxTokens": 30, "temperature": 0}


@pytest.fixture(scope="module")
def client(served):
    return served.aws("bedrock-runtime")


@pytest.fixture
def scripted(served):
    """Installs a model that says what a test wrote down."""

    def make(*answers):
        model = Scripted("scripted", answers)
        install(served.models, model)
        return model

    return make


def converse(client, **fields):
    return client.converse(**({"modelId": "tiny", "messages": HELLO, "inferenceConfig": GREEDY} | fields))


def stream(client, **fields) -> list[tuple[str, dict]]:
    asked = {"modelId": "tiny", "messages": HELLO, "inferenceConfig": GREEDY} | fields
    return [next(iter(event.items())) for event in client.converse_stream(**asked)["stream"]]


def refused(code: str, call, **fields) -> str:
    with pytest.raises(ClientError) as error:
        call(**fields)
    assert error.value.response["Error"]["Code"] == code
    return error.value.response["Error"]["Message"]


def test_the_text_is_the_other_engines_whole_and_streamed(client, theirs):
    expected = theirs.generate([Prompt((Message(role="user", content=TEXT),))], Sampling(max_tokens=30, temperature=0))
    whole = converse(client)
    assert whole["output"]["message"] == {"role": "assistant", "content": [{"text": expected[0][0].text}]}
    assert whole["stopReason"] == "max_tokens" and whole["metrics"]["latencyMs"] >= 1
    usage = whole["usage"]
    assert usage["outputTokens"] == 30 and usage["totalTokens"] == 30 + len(expected[0][0].prompt_ids)
    events = stream(client)
    names = [name for name, _ in events]
    assert names[0] == "messageStart" and names[-3:] == ["contentBlockStop", "messageStop", "metadata"]
    assert set(names[1:-3]) == {"contentBlockDelta"}
    assert "".join(event["delta"]["text"] for _, event in events[1:-3]) == expected[0][0].text
    end = events[-1][1]
    assert end["usage"]["totalTokens"] == usage["totalTokens"] and end["metrics"]["latencyMs"] >= 1
    # The prompt was computed before: what was found is counted apart, as at Amazon.
    assert end["usage"]["inputTokens"] + end["usage"]["cacheReadInputTokens"] + 30 == end["usage"]["totalTokens"]


def test_tokens_are_counted_as_they_are_used(client, theirs):
    counted = client.count_tokens(modelId="tiny", input={"converse": {"messages": HELLO, "system": [{"text": "s"}]}})
    messages = [Message(role="system", content="s"), Message(role="user", content=TEXT)]
    assert counted["inputTokens"] == len(theirs.renderer.prompt_ids(messages))
    body = json.dumps({"messages": [{"role": "user", "content": TEXT}]}).encode()
    native = client.count_tokens(modelId="tiny", input={"invokeModel": {"body": body}})["inputTokens"]
    assert native == len(theirs.renderer.prompt_ids(messages[1:])) == converse(client)["usage"]["totalTokens"] - 30


def test_stop_sequences_end_the_text_and_are_told(client):
    text = converse(client)["output"]["message"]["content"][0]["text"]
    stop = text[4:7]
    config = GREEDY | {"stopSequences": [stop]}
    answer = converse(client, inferenceConfig=config, additionalModelResponseFieldPaths=["/stop_sequence"])
    assert answer["stopReason"] == "stop_sequence"
    assert answer["output"]["message"]["content"][0]["text"] == text[: text.index(stop)]
    assert answer["additionalModelResponseFields"] == {"stop_sequence": stop}
    assert dict(stream(client, inferenceConfig=config))["messageStop"]["stopReason"] == "stop_sequence"


@pytest.mark.parametrize("choice", [{"any": {}}, {"tool": {"name": "weather"}}])
def test_a_forced_call_fits_its_schema(client, choice):
    config = {"tools": [WEATHER, {"cachePoint": {"type": "default"}}], "toolChoice": choice}
    fields = {"seed": 4}
    asked = {
        "toolConfig": config,
        "inferenceConfig": {"maxTokens": 400},
        "additionalModelRequestFields": fields,
    }
    whole = converse(client, **asked)
    (block,) = whole["output"]["message"]["content"]
    assert whole["stopReason"] == "tool_use" and block["toolUse"]["name"] == "weather"
    jsonschema.validate(block["toolUse"]["input"], CITY)
    events = dict(stream(client, **asked))
    assert events["contentBlockStart"]["start"]["toolUse"]["name"] == "weather"
    assert json.loads(events["contentBlockDelta"]["delta"]["toolUse"]["input"]) == block["toolUse"]["input"]
    assert events["messageStop"]["stopReason"] == "tool_use"


def test_a_schema_and_an_expression_are_kept_to(client):
    schema = {"type": "json_schema", "structure": {"jsonSchema": {"schema": json.dumps(CITY)}}}
    answer = converse(client, inferenceConfig={"maxTokens": 300}, outputConfig={"textFormat": schema})
    jsonschema.validate(json.loads(answer["output"]["message"]["content"][0]["text"]), CITY)
    held = converse(client, additionalModelRequestFields={"regex": "(oak|elm){2}"})
    assert held["output"]["message"]["content"][0]["text"] in ("oakoak", "oakelm", "elmoak", "elmelm")


ALL = [
    Reasoning("So "),
    Reasoning("so."),
    Text("Look: "),
    ToolStart(0, "call_a", "weather"),
    ToolArguments(0, '{"city": '),
    ToolArguments(0, '"Bern", "days": 1}'),
    ToolStart(1, "call_b", "weather"),
    ToolArguments(1, '{"city": "Genf", "days": 2}'),
    Finish("tool", Usage(9, 4, 3)),
]


def test_blocks_of_all_kinds_come_in_order(client, scripted):
    scripted(ALL, ALL)
    blocks = converse(client, modelId="scripted")["output"]["message"]["content"]
    assert blocks == [
        {"reasoningContent": {"reasoningText": {"text": "So so."}}},
        {"text": "Look: "},
        {"toolUse": {"toolUseId": "call_a", "name": "weather", "input": {"city": "Bern", "days": 1}}},
        {"toolUse": {"toolUseId": "call_b", "name": "weather", "input": {"city": "Genf", "days": 2}}},
    ]
    events = stream(client, modelId="scripted")
    found: dict[int, str] = {}
    for name, event in events:
        if name == "contentBlockDelta":
            delta = event["delta"]
            text = delta.get("text") or delta.get("reasoningContent", {}).get("text") or delta["toolUse"]["input"]
            found[event["contentBlockIndex"]] = found.get(event["contentBlockIndex"], "") + text
    assert found[0] == "So so." and found[1] == "Look: " and json.loads(found[2])["city"] == "Bern" and len(found) == 4
    assert [event["contentBlockIndex"] for name, event in events if name == "contentBlockStop"] == [0, 1, 2, 3]
    usage = dict(events)["metadata"]["usage"]
    assert usage == {"inputTokens": 6, "outputTokens": 4, "totalTokens": 13, "cacheReadInputTokens": 3}


def test_a_conversation_with_results_and_documents_is_read(client, scripted):
    model = scripted([Text("Good."), DONE])
    use = {"toolUseId": "call_a", "name": "weather", "input": {"city": "Bern", "days": 1}}
    result = {"toolUseId": "call_a", "content": [{"json": {"sky": "grey"}}, {"text": "soon rain"}], "status": "error"}
    document = {"format": "md", "name": "notes", "source": {"bytes": b"# It rains"}}
    thought = {"reasoningContent": {"reasoningText": {"text": "hm"}}}
    converse(
        client,
        modelId="scripted",
        system=[{"text": "Be brief."}, {"cachePoint": {"type": "default"}}],
        messages=[
            {"role": "user", "content": [{"document": document}, {"text": "Weather?"}]},
            {"role": "assistant", "content": [thought, {"text": "I look."}, {"toolUse": use}]},
            {"role": "user", "content": [{"toolResult": result}, {"cachePoint": {"type": "default"}}]},
        ],
        toolConfig={"tools": [WEATHER]},
    )
    system, user, spoken, answered = model.requests[0].turns
    assert system.text == "Be brief." and user.text == '<document name="notes">\n# It rains\n</document>\nWeather?'
    assert (spoken.text, spoken.reasoning, spoken.tool_uses[0].arguments) == ("I look.", "hm", use["input"])
    (given,) = answered.tool_results
    assert (given.id, given.text, given.error) == ("call_a", '{"sky": "grey"}\nsoon rain', True)


PNG = {"format": "png", "source": {"bytes": b"x"}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"messages": [{"role": "user", "content": [{"image": PNG}]}]},
            ["messages[0].content[0] is image", "cannot read"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"video": {"format": "mp4", "source": {"bytes": b"x"}}}]},
                ]
            },
            ["is video"],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"text": "x"},
                            {"document": {"format": "pdf", "name": "a", "source": {"bytes": b"x"}}},
                        ],
                    }
                ]
            },
            ["messages[0].content[1].document is pdf", "txt"],
        ),
        ({"additionalModelRequestFields": {"top_k": 5}}, ["additionalModelRequestFields.top_k is not known", "seed"]),
        ({"additionalModelRequestFields": {"sede": 5}}, ["did you mean 'seed'"]),
        ({"messages": [*HELLO, {"role": "assistant", "content": [{"text": "x"}]}]}, ["must end with"]),
        ({"inferenceConfig": {"maxTokens": 9000}}, ["Input is too long for requested model", "9000 more"]),
        (
            {"toolConfig": {"tools": [WEATHER], "toolChoice": {"tool": {"name": "other"}}}},
            ["'other'"],
        ),
        (
            {
                "outputConfig": {
                    "textFormat": {
                        "type": "json_schema",
                        "structure": {"jsonSchema": {"schema": '{"type": "array", "uniqueItems": true}'}},
                    }
                }
            },
            ["uniqueItems"],
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_to_change(client, fields, words):
    code = "ResourceNotFoundException" if words == ["'other'"] else "ValidationException"
    for call in (client.converse, client.converse_stream):
        message = refused(code, call, **({"modelId": "tiny", "messages": HELLO, "inferenceConfig": GREEDY} | fields))
        assert all(word in message for word in words), message


def test_a_model_that_is_not_there_has_its_modelled_error(client):
    with pytest.raises(client.exceptions.ResourceNotFoundException, match=r"known: .*tiny"):
        converse(client, modelId="none")
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.invoke_model(modelId="arn:aws:bedrock:us-east-1::foundation-model/none", body=b'{"prompt": "x"}')


def test_scopes_hold(served):
    narrow = served.keys.create("tester", "narrow", ["bedrock-runtime:Converse"])
    client = served.aws("bedrock-runtime", narrow)
    assert converse(client)["stopReason"] == "max_tokens"
    assert "ConverseStream" in refused("AccessDeniedException", client.converse_stream, modelId="tiny", messages=HELLO)


def test_what_fails_in_the_middle_ends_the_stream_with_an_error(client, served):
    class Breaks(Scripted):
        async def chat(self, request):
            yield Text("so far")
            raise Busy("the model ran out of room", retry_after_s=2)

    install(served.models, Breaks("breaks", []))
    with pytest.raises(EventStreamError, match="ran out of room"):
        stream(client, modelId="breaks")
    assert "ran out of room" in refused("ThrottlingException", client.converse, modelId="breaks", messages=HELLO)


def test_timeouts_have_their_modelled_error(client, scripted):
    scripted([Text("x"), Finish("timeout", Usage(1, 1), seconds=9.0)])
    with pytest.raises(client.exceptions.ModelTimeoutException, match="not complete after 9 s"):
        converse(client, modelId="scripted")


def test_a_client_that_leaves_cancels_its_request(served, client):
    before = served.models.stats()["tiny"].cancelled
    asked = {"maxTokens": 900, "temperature": 0}
    response = client.converse_stream(
        modelId="tiny", messages=HELLO, inferenceConfig=asked, additionalModelRequestFields={"regex": "a{900}"}
    )
    next(iter(response["stream"]))
    response["stream"].close()
    until(lambda: served.models.stats()["tiny"].cancelled == before + 1)
    until(lambda: served.models.stats()["tiny"].running == 0)
    until(lambda: served.calls[-1].status == "cancelled" and served.calls[-1].completion_tokens > 0)


def test_a_client_that_gives_up_waiting_cancels_its_request_too(served):
    before = served.models.stats()["tiny"].cancelled
    client = served.aws("bedrock-runtime", read_timeout=0.2)
    with pytest.raises(ReadTimeoutError):
        converse(client, inferenceConfig={"maxTokens": 900}, additionalModelRequestFields={"regex": "a{900}"})
    until(lambda: served.models.stats()["tiny"].cancelled == before + 1)
    until(lambda: served.models.stats()["tiny"].running == 0)


def test_native_bodies_are_answered_in_their_own_form(client, theirs):
    ids = tuple(theirs.renderer.tokenizer.encode("Take one"))
    expected = theirs.generate([Prompt(token_ids=ids)], Sampling(max_tokens=9, temperature=0))[0][0].text

    def invoke(body):
        return json.loads(client.invoke_model(modelId="tiny", body=json.dumps(body))["body"].read())

    llama = invoke({"prompt": "Take one", "max_gen_len": 9, "temperature": 0})
    assert llama == {
        "generation": expected,
        "prompt_token_count": len(ids),
        "generation_token_count": 9,
        "stop_reason": "length",
    }
    mistral = invoke({"prompt": "Take one", "max_tokens": 9, "temperature": 0, "stop": ["zzz"]})
    assert mistral == {"outputs": [{"text": expected, "stop_reason": "length"}]}
    chat = invoke({"messages": [{"role": "user", "content": TEXT}], "max_tokens": 30, "temperature": 0})
    assert chat["choices"][0]["message"]["content"] == converse(client)["output"]["message"]["content"][0]["text"]
    body = json.dumps({"prompt": "Take one", "max_gen_len": 9, "temperature": 0})
    events = client.invoke_model_with_response_stream(modelId="tiny", body=body)["body"]
    chunks = [json.loads(event["chunk"]["bytes"]) for event in events]
    assert "".join(chunk["generation"] for chunk in chunks) == expected
    assert chunks[-1]["amazon-bedrock-invocationMetrics"]["outputTokenCount"] == 9
    assert all("amazon-bedrock-invocationMetrics" not in chunk for chunk in chunks[:-1])
    for body, word in (({"prompt": "x", "top_k": 3}, "top_k"), ({"text": "x"}, "messages"), ([], "messages")):
        message = refused("ValidationException", client.invoke_model, modelId="tiny", body=json.dumps(body))
        assert word in message


def test_endpoints_of_sagemaker_are_deployments(served, theirs):
    client = served.aws("sagemaker-runtime")
    ids = tuple(theirs.renderer.tokenizer.encode("Take one"))
    expected = theirs.generate([Prompt(token_ids=ids)], Sampling(max_tokens=9, temperature=0))[0][0].text
    body = json.dumps({"inputs": "Take one", "parameters": {"max_new_tokens": 9}})  # greedy unless asked otherwise
    answer = client.invoke_endpoint(EndpointName="tiny", Body=body, ContentType="application/json")
    assert json.loads(answer["Body"].read()) == [{"generated_text": expected}]
    events = client.invoke_endpoint_with_response_stream(EndpointName="tiny", Body=body)["Body"]
    lines = b"".join(event["PayloadPart"]["Bytes"] for event in events).decode().split("\n\n")
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(part["token"]["text"] for part in parts) == expected
    assert parts[-1]["details"] == {"finish_reason": "length", "generated_tokens": 9}
    chat = json.dumps({"messages": [{"role": "user", "content": TEXT}], "max_tokens": 5, "temperature": 0})
    events = client.invoke_endpoint_with_response_stream(EndpointName="tiny", Body=chat)["Body"]
    assert b"".join(event["PayloadPart"]["Bytes"] for event in events).endswith(b"data: [DONE]\n\n")
    with pytest.raises(client.exceptions.ValidationError, match="unknown model 'none'"):
        client.invoke_endpoint(EndpointName="none", Body=body)
    with pytest.raises(client.exceptions.ValidationError, match=r"parameters\.watermark"):
        client.invoke_endpoint(EndpointName="tiny", Body=json.dumps({"inputs": "x", "parameters": {"watermark": True}}))


GUARDRAIL = r"""
versions:
  "1":
    words: [competitor, hostile takeover]
    pii: {EMAIL: ANONYMIZE, CREDIT_DEBIT_CARD_NUMBER: BLOCK}
    regexes: [{name: order, pattern: 'ORD-\d{6}', action: ANONYMIZE}]
    blocked_input: I cannot talk about that.
    blocked_output: I would rather not say.
"""


@pytest.fixture(scope="module")
def guardrail(served):
    (served.guardrails / "house.yaml").write_text(GUARDRAIL)
    (served.guardrails / "theirs.yaml").write_text(GUARDRAIL.replace("versions", "owner: other\nversions"))
    return {"guardrailIdentifier": "house", "guardrailVersion": "1", "trace": "enabled"}


def apply(client, *texts, source="OUTPUT", id="house", version="1"):
    content = [{"text": {"text": text}} for text in texts]
    return client.apply_guardrail(guardrailIdentifier=id, guardrailVersion=version, source=source, content=content)


def test_a_guardrail_blocks_and_makes_anonymous(client, guardrail):
    clean = apply(client, "A fine day.")
    assert clean["action"] == "NONE" and clean["outputs"] == [] and clean["assessments"] == []
    kept = apply(client, "Write to a.b@c.org about ORD-123456.", "Fine.")
    assert kept["action"] == "GUARDRAIL_INTERVENED"
    assert kept["outputs"] == [{"text": "Write to {EMAIL} about {order}."}, {"text": "Fine."}]
    policy = kept["assessments"][0]["sensitiveInformationPolicy"]
    assert policy["piiEntities"] == [{"match": "a.b@c.org", "type": "EMAIL", "action": "ANONYMIZED", "detected": True}]
    assert policy["regexes"][0]["match"] == "ORD-123456" and kept["usage"]["wordPolicyUnits"] == 1
    blocked = apply(client, "Ask our Competitor.", source="INPUT")
    assert blocked["outputs"] == [{"text": "I cannot talk about that."}]
    assert blocked["assessments"][0]["wordPolicy"]["customWords"][0]["match"] == "Competitor"
    assert apply(client, "Card 4111 1111 1111 1111")["outputs"] == [{"text": "I would rather not say."}]
    for id, version in (("nothing", "1"), ("theirs", "1"), ("house", "2")):
        refused(
            "ResourceNotFoundException",
            client.apply_guardrail,
            guardrailIdentifier=id,
            guardrailVersion=version,
            source="INPUT",
            content=[{"text": {"text": "x"}}],
        )


def test_a_guardrail_stands_around_converse(client, scripted, guardrail):
    model = scripted(
        [Text("Mail a.b@"), Text("c.org now."), DONE],
        [Text("Mail a.b@"), Text("c.org now."), DONE],
        [Text("Ask the compe"), Text("titor."), DONE],
        [Text("Ask the compe"), Text("titor."), ToolStart(0, "c", "w"), ToolArguments(0, "{}"), DONE],
        [Text("Fine."), DONE],
    )
    asked = {"modelId": "scripted", "guardrailConfig": guardrail}
    whole = converse(client, **asked)
    assert whole["stopReason"] == "guardrail_intervened"
    assert whole["output"]["message"]["content"] == [{"text": "Mail {EMAIL} now."}]
    assert whole["trace"]["guardrail"]["outputAssessments"]["house"][0]["sensitiveInformationPolicy"]["piiEntities"]
    events = stream(client, **asked)
    assert [event["delta"]["text"] for name, event in events if name == "contentBlockDelta"] == ["Mail {EMAIL} now."]
    assert dict(events)["messageStop"]["stopReason"] == "guardrail_intervened"
    assert converse(client, **asked)["output"]["message"]["content"] == [{"text": "I would rather not say."}]
    events = stream(client, **asked)
    deltas = [event["delta"] for name, event in events if name == "contentBlockDelta"]
    assert deltas == [{"text": "I would rather not say."}]  # and no call beside it
    fine = converse(client, **asked)
    assert fine["stopReason"] == "end_turn" and "guardrail" in fine["trace"]
    evil = [{"role": "user", "content": [{"text": "What of the competitor?"}]}]
    for answer in (
        converse(client, messages=evil, **asked)["output"]["message"]["content"][0]["text"],
        "".join(e["delta"]["text"] for n, e in stream(client, messages=evil, **asked) if n == "contentBlockDelta"),
    ):
        assert answer == "I cannot talk about that."
    assert len(model.requests) == 5  # what was blocked never came to the model


def test_the_users_text_is_made_anonymous_before_the_model_sees_it(client, scripted, guardrail):
    model = scripted([Text("ok"), DONE], [Text("ok"), DONE])
    mail = [{"role": "user", "content": [{"text": "I am a.b@c.org"}]}]
    answer = converse(client, modelId="scripted", messages=mail, guardrailConfig=guardrail)
    assert model.requests[0].turns[0].text == "I am {EMAIL}" and answer["stopReason"] == "end_turn"
    marked = [
        {
            "role": "user",
            "content": [{"text": "From a.b@c.org:"}, {"guardContent": {"text": {"text": "ORD-123456 is late"}}}],
        }
    ]
    converse(client, modelId="scripted", messages=marked, guardrailConfig=guardrail)
    assert model.requests[1].turns[0].text == "From a.b@c.org:\n{order} is late"


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("EMAIL", ["a@b.co", "x.y+z@mail.example.org"], ["a@b", "@b.co", "a b.co"]),
        (
            "CREDIT_DEBIT_CARD_NUMBER",
            ["4111-1111-1111-1111", "378282246310005"],
            ["4111111111111112", "0000000000000000"],
        ),
        ("US_SOCIAL_SECURITY_NUMBER", ["536-90-4399"], ["000-12-3456", "536-00-4399", "536904399", "1536-90-4399"]),
        ("IP_ADDRESS", ["192.168.0.1", "2001:0db8:0000:0000:0000:ff00:0042:8329"], ["256.1.1.1", "1.2.3", "1.2.3.4.5"]),
        ("URL", ["https://a.example/b?c=1", "www.example.org/x"], ["a.example"]),
        ("PHONE", ["+1 415 555 2671", "(030) 123 4567", "079 123 45 67"], ["12 34", "5 tablets", "2026"]),
    ],
)
def test_patterns_of_personal_data(name, yes, no):
    rules = Rules(pii={name: "ANONYMIZE"})
    for text in yes:
        assert assess(rules, [f"see {text} there"]).texts == [f"see {{{name}}} there"], text
    for text in no:
        assert not assess(rules, [f"see {text} there"]).intervened, text


def test_luhns_check_digit_is_the_only_one_that_fits():
    import random

    dice = random.Random(0)
    for _ in range(50):
        head = [dice.randrange(10) for _ in range(15)]
        fitting = [digit for digit in range(10) if luhn([*head, digit])]
        assert len(fitting) == 1


def test_words_are_whole_words_and_overlaps_go_to_what_blocks():
    assert not assess(Rules(words=("art",)), ["start cart"]).intervened
    assert assess(Rules(words=("art",)), ["Art!"]).blocked
    both = assess(Rules(words=("a@b.co",), pii={"EMAIL": "ANONYMIZE"}), ["to a@b.co"])
    assert both.blocked and len(both.found) == 1


def test_strands_holds_a_conversation_with_a_tool(served, scripted):
    import boto3
    from strands import Agent, tool
    from strands.models import BedrockModel

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
    model = scripted(call, [Text("It "), Text("rains."), DONE])
    session = boto3.Session(
        aws_access_key_id=served.key.access_key_id, aws_secret_access_key=served.key.secret, region_name="us-east-1"
    )
    bedrock = BedrockModel(boto_session=session, endpoint_url=served.url, model_id="scripted")
    result = Agent(bedrock, tools=[weather], callback_handler=None)("Weather in Bern?")
    assert asked == ["Bern"] and str(result).strip() == "It rains."
    assert model.requests[1].turns[-1].tool_results[0].text == "rain in Bern"
    assert result.metrics.accumulated_usage["totalTokens"] == 13 + 7


def test_strands_makes_a_random_model_use_a_tool_and_shortens_what_is_too_long(served):
    """The grammar makes the tiny model call the tool; the words of the refusal make Strands drop old turns."""
    import boto3
    from pydantic import BaseModel
    from strands import Agent
    from strands.agent.conversation_manager import SlidingWindowConversationManager
    from strands.models import BedrockModel
    from strands.types.exceptions import MaxTokensReachedException

    class Tree(BaseModel):  # nothing a random model could go on with for ever: Strands drops the limits of texts
        kind: Literal["oak", "elm"]
        evergreen: bool

    session = boto3.Session(
        aws_access_key_id=served.key.access_key_id, aws_secret_access_key=served.key.secret, region_name="us-east-1"
    )
    model = BedrockModel(boto_session=session, endpoint_url=served.url, model_id="tiny", max_tokens=600)
    tree = Agent(model, callback_handler=None).structured_output(Tree, "Name a tree.")
    assert tree.kind in ("oak", "elm")
    old = [{"role": role, "content": [{"text": "word " * 250}]} for _ in range(3) for role in ("user", "assistant")]
    agent = Agent(
        BedrockModel(boto_session=session, endpoint_url=served.url, model_id="tiny", max_tokens=20),
        messages=old,
        conversation_manager=SlidingWindowConversationManager(window_size=40),
        callback_handler=None,
    )
    with contextlib.suppress(MaxTokensReachedException):  # a random model seldom ends an answer by itself
        agent("And now?")
    assert agent.conversation_manager.removed_message_count > 0


@pytest.mark.slow
def test_a_real_model_answers_quickly_whole_and_streamed(smollm2, tmp_path):
    with serve(tmp_path, {"smol": str(smollm2)}) as served:
        client = served.aws("bedrock-runtime")
        asked = [{"role": "user", "content": [{"text": "What is the capital of France? Answer in one sentence."}]}]
        whole = converse(client, modelId="smol", messages=asked)
        text = whole["output"]["message"]["content"][0]["text"]
        assert "Paris" in text and whole["stopReason"] == "end_turn"
        begun = time.monotonic()
        events = stream(client, modelId="smol", messages=asked)
        assert "".join(e["delta"]["text"] for n, e in events if n == "contentBlockDelta") == text
        assert time.monotonic() - begun < 30
