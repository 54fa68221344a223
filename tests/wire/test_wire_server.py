"""Unmodified boto3 clients against a real server: routing, streams, pages, waiters, retries, idempotency, limits."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError, ReadTimeoutError
from wire.echo import Control, Memories, Running, Runtime, running

from ascent.records.errors import BadInput
from ascent.serve.services.bedrock import Bedrock
from ascent.serve.services.bedrock_runtime import BedrockRuntime
from ascent.serve.services.sagemaker_runtime import SageMakerRuntime
from ascent.serve.wire import Limits, served_operations
from ascent.serve.wire.services import handlers_of

JOB = {
    "customModelName": "doses-v1",
    "roleArn": "none",
    "baseModelIdentifier": "Qwen/Qwen3-0.6B",
    "trainingDataConfig": {"s3Uri": "file:///data/train.jsonl"},
    "outputDataConfig": {"s3Uri": "memory://out"},
}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"text": text}]}]


def error_of(call: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
    with pytest.raises(ClientError) as caught:
        call(*arguments, **named)
    return caught.value.response


@pytest.mark.parametrize(
    "model", ["smollm2", "org/model name", "arn:aws:bedrock:eu-central-1:000000000000:custom-model/a/b"]
)
def test_ids_with_slashes_and_arns_arrive_whole(wire: Running, model: str) -> None:
    client = wire.client("bedrock-runtime", wire.key("ana"))
    extra = {"k": [1, {"deep": None}], "f": 0.5}
    answer = client.converse(modelId=model, messages=said("hällo"), additionalModelRequestFields=extra)
    assert answer["output"]["message"]["content"] == [{"text": f"{model}|ana|hällo"}]
    assert answer["additionalModelResponseFields"] == extra
    assert uuid.UUID(answer["ResponseMetadata"]["RequestId"])


def test_bodies_headers_and_queries_go_both_ways(wire: Running) -> None:
    runtime = wire.client("bedrock-runtime")
    answer = runtime.invoke_model(modelId="m", body=bytes(range(256)), contentType="application/x-test")
    assert answer["body"].read() == bytes(range(256))[::-1] and answer["contentType"] == "application/x-test"
    after = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
    assert runtime.list_async_invokes(submitTimeAfter=after)["asyncInvokeSummaries"][0]["submitTime"] == after
    endpoint = wire.client("sagemaker-runtime")
    assert endpoint.invoke_endpoint(EndpointName="e", Body=b"abc")["Body"].read() == b"ABC"
    parts = endpoint.invoke_endpoint_with_response_stream(EndpointName="e", Body=b"one two")["Body"]
    assert [event["PayloadPart"]["Bytes"] for event in parts] == [b"one", b"two"]


def test_a_streaming_body_and_its_status_come_through(wire: Running) -> None:
    runtime_arn = "arn:aws:bedrock-agentcore:us-west-2:000000000000:runtime/agent-abcdefghij"
    answer = wire.client("bedrock-agentcore").invoke_agent_runtime(agentRuntimeArn=runtime_arn, payload=b"hi")
    assert answer["response"].read() == b"data: hi" and answer["statusCode"] == 202
    assert answer["runtimeSessionId"] == "agent-abcdefghij"


def test_events_arrive_as_they_are_made(wire: Running) -> None:
    stream = wire.client("bedrock-runtime").converse_stream(modelId="m", messages=said("one slow two"))["stream"]
    began, events, times = time.monotonic(), [], []
    for event in stream:
        events.append(event)
        times.append(time.monotonic() - began)
    texts = [event["contentBlockDelta"]["delta"]["text"] for event in events if "contentBlockDelta" in event]
    assert texts == ["one", "slow", "two"] and "messageStop" in events[-1]
    assert times[-1] - times[1] > 0.25, "the first events waited for the last"


def test_a_stream_that_fails_half_way_raises_what_the_model_names(
    wire: Running, caplog: pytest.LogCaptureFixture
) -> None:
    client = wire.client("bedrock-runtime")
    for word, code in (
        ("throttle", "throttlingException"),
        ("defect", "internalServerException"),
        ("denied", "AccessDeniedException"),
    ):
        seen = []
        with pytest.raises(EventStreamError) as caught:
            for event in client.converse_stream(modelId="m", messages=said(f"one {word}"))["stream"]:
                seen.append(event)
        assert len(seen) == 2 and caught.value.response["Error"]["Code"] == code
        assert "secret" not in str(caught.value)
    assert "the secret cause" in caplog.text


def test_a_stream_that_fails_before_it_began_has_a_status(wire: Running) -> None:
    client = wire.client("bedrock-runtime")
    failed = error_of(client.converse_stream, modelId="m", messages=said("busy at once"))
    assert failed["Error"]["Code"] == "ThrottlingException"
    assert failed["ResponseMetadata"]["HTTPStatusCode"] == 429


def test_a_client_that_goes_away_cancels_its_request(wire: Running, runtime: Runtime) -> None:
    runtime.cancelled.clear()
    impatient = wire.client("bedrock-runtime", read_timeout=0.3)
    with pytest.raises(ReadTimeoutError):
        impatient.converse(modelId="m", messages=said("wait"))
    assert runtime.cancelled.wait(10), "the call went on"
    runtime.cancelled.clear()
    stream = impatient.converse_stream(modelId="m", messages=said("one wait"))["stream"]
    next(iter(stream))
    stream.close()
    assert runtime.cancelled.wait(10), "the stream went on"


def test_busy_is_retried_by_boto3_and_says_when(wire: Running, runtime: Runtime) -> None:
    runtime.busy = 2
    answer = wire.client("bedrock-runtime", attempts=3).converse(modelId="m", messages=said("busy"))
    assert answer["ResponseMetadata"]["RetryAttempts"] == 2
    runtime.busy = 1
    failed = error_of(wire.client("bedrock-runtime").converse, modelId="m", messages=said("busy"))
    assert failed["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "1"
    assert failed["Error"]["Code"] == "ThrottlingException"


def test_paginators_see_everything_once(wire: Running, control: Control) -> None:
    client = wire.client("bedrock", wire.key("page turner"))
    names = [f"job-{at}" for at in range(7)]
    for name in names:
        client.create_model_customization_job(jobName=name, **JOB)
    pages = client.get_paginator("list_model_customization_jobs").paginate(PaginationConfig={"PageSize": 3})
    found = [[job["jobName"] for job in each["modelCustomizationJobSummaries"]] for each in pages]
    assert found == [names[:3], names[3:6], names[6:]]


def test_a_token_of_another_listing_is_refused(wire: Running) -> None:
    client = wire.client("bedrock", wire.key("token maker"))
    for at in range(3):
        client.create_model_customization_job(jobName=f"job-{at}", **JOB)
    token = client.list_model_customization_jobs(maxResults=1)["nextToken"]
    other = wire.client("bedrock", wire.key("token thief"))
    for call, more in ((other, {}), (client, {"nameContains": "job"}), (client, {"nextToken": f"x{token}"})):
        refused = error_of(call.list_model_customization_jobs, **{"nextToken": token, **more})
        assert refused["Error"]["Code"] == "ValidationException" and "nextToken" in refused["Error"]["Message"]


def test_waiters_wait(tmp_path: Path) -> None:
    memories = Memories()
    with running(tmp_path, [memories]) as server:
        waiter = server.client("bedrock-agentcore-control").get_waiter("memory_created")
        waiter.config.delay = 0.05
        waiter.wait(memoryId="memory-abcdefghij")
    assert memories.looks == 3


def test_one_token_makes_one_job(wire: Running, control: Control) -> None:
    client, before = wire.client("bedrock", wire.key("twice")), len(control.jobs)
    request = {"jobName": "once", "clientRequestToken": "token-of-mine", **JOB}
    first = client.create_model_customization_job(**request)["jobArn"]
    assert client.create_model_customization_job(**request)["jobArn"] == first
    assert len(control.jobs) == before + 1
    refused = error_of(client.create_model_customization_job, **{**request, "jobName": "other"})
    assert refused["Error"]["Code"] == "ConflictException" and "token-of-mine" in refused["Error"]["Message"]
    other = wire.client("bedrock", wire.key("somebody else"))
    assert other.create_model_customization_job(**request)["jobArn"] != first


def test_a_token_is_free_again_after_a_failure_and_held_while_it_is_worked_on(wire: Running, control: Control) -> None:
    client = wire.client("bedrock", wire.key("retry"))
    request = {"jobName": "refuse-me", "clientRequestToken": "again", **JOB}
    refused = error_of(client.create_model_customization_job, **request)
    assert "train.jsonl:7" in refused["Error"]["Message"]
    assert client.create_model_customization_job(**{**request, "jobName": "fine"})["jobArn"]
    control.slow_s, answers = 1.0, []
    control.entered.clear()
    try:
        slow = {**request, "jobName": "slow", "clientRequestToken": "slow"}
        thread = threading.Thread(target=lambda: answers.append(client.create_model_customization_job(**slow)))
        thread.start()
        assert control.entered.wait(10)
        waiting = error_of(client.create_model_customization_job, **slow)
        assert waiting["ResponseMetadata"]["HTTPStatusCode"] == 429
        patient = wire.client("bedrock", wire.key("retry"), attempts=5)
        again = patient.create_model_customization_job(**slow)
        thread.join()
    finally:
        control.slow_s = 0.0
    assert again["jobArn"] == answers[0]["jobArn"]


def test_what_belongs_to_another_is_not_there(wire: Running) -> None:
    mine = wire.client("bedrock", wire.key("owner one"))
    job = mine.create_model_customization_job(jobName="private", hyperParameters={"epochs": "2"}, **JOB)["jobArn"]
    assert mine.get_model_customization_job(jobIdentifier=job)["hyperParameters"] == {"epochs": "2"}
    other = wire.client("bedrock", wire.key("owner two"))
    hidden = error_of(other.get_model_customization_job, jobIdentifier=job)
    absent = error_of(other.get_model_customization_job, jobIdentifier=job[:-1] + "9")
    assert hidden["Error"]["Code"] == absent["Error"]["Code"] == "ResourceNotFoundException"
    assert "private" not in hidden["Error"]["Message"]
    admin = wire.client("bedrock", wire.key("boss", scopes=("*", "admin:*")))
    assert admin.get_model_customization_job(jobIdentifier=job)["jobName"] == "private"


def test_all_problems_of_a_request_are_in_one_message(wire: Running) -> None:
    client = wire.client("bedrock", wire.key())
    wrong = {**JOB, "jobName": "-no-", "customModelName": "x" * 64, "customizationType": "MAGIC"}
    wrong["trainingDataConfig"] = {"s3Uri": "s" * 1025}
    refused = error_of(client.create_model_customization_job, **wrong)["Error"]
    assert refused["Code"] == "ValidationException" and refused["Message"].startswith("4 validation errors detected")
    for part in (
        "jobName must match the pattern",
        "customModelName must have at most 63 characters; it has 64",
        "customizationType must be one of CONTINUED_PRE_TRAINING",
        "trainingDataConfig.s3Uri must have at most 1024 characters; it has 1025",
    ):
        assert part in refused["Message"]


def test_errors_keep_the_code_and_status_that_the_service_models(
    wire: Running, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, endpoint = wire.client("bedrock-runtime"), wire.client("sagemaker-runtime")
    for text, code, status in (
        ("denied", "AccessDeniedException", 403),
        ("defect", "InternalServerException", 500),
        ("corrupt", "InternalServerException", 500),
    ):
        failed = error_of(runtime.converse, modelId="m", messages=said(text))
        assert (failed["Error"]["Code"], failed["ResponseMetadata"]["HTTPStatusCode"]) == (code, status)
        assert isinstance(runtime.exceptions.from_code(code), type) and "secret" not in failed["Error"]["Message"]
    request_id = failed["ResponseMetadata"]["RequestId"]
    assert request_id in failed["Error"]["Message"] and "the secret folder" in caplog.text
    with pytest.raises(endpoint.exceptions.ValidationError, match="absent"):
        endpoint.invoke_endpoint(EndpointName="absent", Body=b"")
    with pytest.raises(wire.client("bedrock").exceptions.ResourceNotFoundException, match="missing"):
        wire.client("bedrock").delete_custom_model(modelIdentifier="missing")


def test_operations_without_a_handler_and_unknown_paths(wire: Running) -> None:
    failed = error_of(wire.client("bedrock").list_guardrails)
    assert failed["Error"]["Code"] == "UnknownOperationException" and "docs/api.md" in failed["Error"]["Message"]
    status, headers, body = raw(wire, "GET", "/nothing/here")
    assert status == 404 and headers["x-amzn-errortype"] == "UnknownOperationException"
    assert headers["x-amzn-requestid"] and "/nothing/here" in json.loads(body)["message"]


def test_a_body_over_the_limit_is_refused_before_it_is_read(tmp_path: Path, runtime: Runtime) -> None:
    with running(tmp_path, [runtime], limits=Limits(body_bytes=1000)) as server:
        client = server.client("bedrock-runtime")
        assert client.invoke_model(modelId="m", body=b"x" * 1000)
        for size in (1001, 5_000_000):
            failed = error_of(client.invoke_model, modelId="m", body=b"x" * size)
            assert failed["ResponseMetadata"]["HTTPStatusCode"] == 413
            assert failed["Error"]["Code"] == "ValidationException" and "1000 bytes" in failed["Error"]["Message"]
        promised = {"Authorization": f"Bearer {server.key().bearer}", "Content-Length": "1001"}
        assert raw(server, "POST", "/model/m/invoke", None, promised)[0] == 413  # and not a byte of it was sent
        chunks = (b"x" * 600 for _ in range(3))  # no Content-Length: counted as it comes
        signed = {"Authorization": f"Bearer {server.key().bearer}", "Transfer-Encoding": "chunked"}
        status, _, body = raw(server, "POST", "/model/m/invoke", chunks, signed)
        assert status == 413 and b"1000 bytes" in body


def test_every_request_is_reported_once(wire: Running) -> None:
    wire.seen.clear()
    wire.client("bedrock-runtime").converse(modelId="m", messages=said("one"))
    list(wire.client("bedrock-runtime").converse_stream(modelId="m", messages=said("slow"))["stream"])
    error_of(wire.client("bedrock").list_guardrails)
    until = time.monotonic() + 5
    while len(wire.seen) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert [(action, status) for action, status, _ in wire.seen] == [
        ("bedrock-runtime:Converse", 200),
        ("bedrock-runtime:ConverseStream", 200),
        ("bedrock:ListGuardrails", 404),
    ]
    assert 0.3 < wire.seen[1][2] < 5


def test_a_service_with_a_method_that_is_no_operation_is_refused() -> None:
    class Misspelt:
        service = "bedrock-runtime"

        def convers(self, request: dict[str, Any], caller: Any) -> dict[str, Any]:
            return {}

    with pytest.raises(BadInput, match=r"Misspelt\.convers is no operation of bedrock-runtime; did you mean 'converse"):
        handlers_of(Misspelt())


def test_served_operations_have_a_sentence_each() -> None:
    rows = served_operations([BedrockRuntime, Bedrock, SageMakerRuntime])
    assert ("bedrock-runtime", "Converse", "Answer a conversation.") in rows and rows == sorted(rows)
    assert all(summary.endswith(".") for _, _, summary in rows)


def test_logs_carry_the_request_id(wire: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="ascent.serve.wire.app"):
        failed = error_of(wire.client("bedrock-runtime").converse, modelId="m", messages=said("defect"))
    assert failed["ResponseMetadata"]["RequestId"] in failed["Error"]["Message"]
    assert any("bedrock-runtime:Converse failed" in record.getMessage() for record in caplog.records)


def raw(
    server: Running, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send a request as it is and return status, headers in lower case, and body."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body, headers or {}, encode_chunked=True)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()
