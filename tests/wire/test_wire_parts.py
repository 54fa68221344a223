"""Parts of the wire by themselves: pages under change, ARNs, timestamps, relaxed members, routing, lapsing tokens."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.utils import parse_timestamp as parsed_by_botocore
from hypothesis import given, settings
from hypothesis import strategies as st
from wire.test_wire_roundtrip import OURS

from ascent.observe.database import open_database
from ascent.records.errors import BadInput
from ascent.serve.wire import ServiceError, arn, id_of, page
from ascent.serve.wire.decode import decode_request
from ascent.serve.wire.encode import Response, encode_response
from ascent.serve.wire.idempotency import KEPT_S, LEASE_S, Idempotency
from ascent.serve.wire.model import SERVICES, load_service
from ascent.serve.wire.pages import CURRENT, Listing
from ascent.serve.wire.router import Router
from ascent.serve.wire.timestamps import format_timestamp, parse_timestamp


@given(
    items=st.lists(st.tuples(st.floats(0, 1e9), st.text(max_size=4)), unique=True, max_size=12),
    size=st.integers(1, 5),
    reverse=st.booleans(),
    gone=st.sets(st.integers(0, 11)),
)
@settings(deadline=None, max_examples=80)
def test_pages_hold_everything_once_though_items_come_and_go(
    items: list[tuple[float, str]], size: int, reverse: bool, gone: set[int]
) -> None:
    kept = [item for at, item in enumerate(items) if at not in gone]
    present, seen, request = list(items), [], {"maxResults": size}
    while True:
        found, token = page(present, request, key=lambda item: item, reverse=reverse)
        assert len(found) <= size
        seen += found
        if token is None:
            break
        request["nextToken"] = token
        present = kept  # some are deleted after the first page
    assert len(seen) == len(set(seen)) and set(kept) <= set(seen) <= set(items)
    assert seen == sorted(seen, reverse=reverse)


def test_tokens_of_pages_are_bound_to_owner_operation_filters_and_server() -> None:
    def token_of(listing: Listing, request: dict[str, Any]) -> str:
        mark = CURRENT.set(listing)
        try:
            return page(range(9), request, key=lambda item: item)[1] or ""
        finally:
            CURRENT.reset(mark)

    here = Listing(b"k" * 32, "ana", "bedrock:ListX")
    token = token_of(here, {"maxResults": 2, "nameContains": "a"})
    assert token_of(here, {"maxResults": 3, "nameContains": "a", "nextToken": token})
    for listing, request in (
        (Listing(b"k" * 32, "eve", "bedrock:ListX"), {"nameContains": "a"}),
        (Listing(b"k" * 32, "ana", "bedrock:ListY"), {"nameContains": "a"}),
        (Listing(b"j" * 32, "ana", "bedrock:ListX"), {"nameContains": "a"}),
        (here, {"nameContains": "b"}),
    ):
        with pytest.raises(ServiceError, match="nextToken is not of this listing"):
            token_of(listing, {"maxResults": 2, "nextToken": token, **request})
    for wrong in ("", "x", token[:-2], "A" * 60, "ж", token + "AAAA"):
        if wrong:
            with pytest.raises(ServiceError):
                token_of(here, {"nameContains": "a", "nextToken": wrong})


@given(id=st.text(min_size=1, max_size=30).filter(lambda text: not text.startswith("arn:")))
def test_ids_come_back_from_their_arns(id: str) -> None:
    made = arn("bedrock", "custom-model", id, "eu-west-1")
    assert id_of(made) == id == id_of(id) and made.split(":")[4] == "000000000000"


@pytest.mark.parametrize("wrong", ["arn:", "arn:aws:bedrock:r:0:kind", "arn:aws:bedrock:r:0:kind/", "arn:a:b/c"])
def test_broken_arns_are_refused(wrong: str) -> None:
    with pytest.raises(ServiceError, match="no ARN"):
        id_of(wrong)


@given(when=st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)))
def test_timestamps_are_read_as_botocore_reads_them(when: datetime) -> None:
    assert parse_timestamp(when.isoformat()) == when
    assert parse_timestamp(format_timestamp(when, "iso8601")) == when
    if when.year > 999:  # an HTTP date with fewer digits is of this century or the last
        whole = when.replace(microsecond=0)
        assert parse_timestamp(format_timestamp(whole, "rfc822")) == whole
    if 1971 < when.year < 2200:
        assert abs(parse_timestamp(format_timestamp(when, "unixtimestamp")) - when) <= timedelta(microseconds=1)
        for form in ("iso8601", "unixtimestamp"):
            assert abs(parsed_by_botocore(format_timestamp(when, form)) - when) <= timedelta(microseconds=1)


def test_timestamps_of_other_zones_and_nonsense() -> None:
    zone = timezone(timedelta(hours=5, minutes=30))
    there = datetime(2026, 3, 1, 2, 3, 4, tzinfo=zone)
    assert parse_timestamp(there.isoformat()) == there and parse_timestamp(there.isoformat()).tzinfo is UTC
    assert format_timestamp(there, "iso8601") == "2026-02-28T20:33:04Z"
    assert format_timestamp(there.replace(tzinfo=None), "iso8601") == "2026-03-01T02:03:04Z"
    assert parse_timestamp(format_datetime(there)) == there and parse_timestamp("1767225600") == datetime(
        2026, 1, 1, tzinfo=UTC
    )
    for wrong in ("", "yesterday", "2026-13-01", "9999-12-31T23:59:59-10:00", 1e20, "1e400", "nan", float("inf")):
        with pytest.raises(ValueError, match=r".+"):
            parse_timestamp(wrong)


def test_what_is_relaxed_is_relaxed_and_nothing_else() -> None:
    operation = OURS["bedrock"]["CreateModelCustomizationJob"]
    request = {
        "jobName": "doses",
        "customModelName": "doses",
        "roleArn": "nobody",
        "baseModelIdentifier": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "trainingDataConfig": {"s3Uri": "az://container/train set.jsonl"},
        "outputDataConfig": {"s3Uri": "file:///data/out"},
    }

    def problems(**changes: Any) -> str:
        try:
            decode_request(operation, {}, "", {}, json.dumps(request | changes).encode())
        except ServiceError as error:
            return str(error)
        return ""

    assert problems() == ""
    assert "trainingDataConfig.s3Uri must match" in problems(trainingDataConfig={"s3Uri": "file:///a\x00b"})
    assert "outputDataConfig.s3Uri must have at most" in problems(outputDataConfig={"s3Uri": "f" * 1025})
    assert "customModelName must match" in problems(customModelName="a/b")
    assert "customModelKmsKeyId must match" in problems(customModelKmsKeyId="mine")
    assert "roleArn is required" in problems(roleArn=None)
    assert "customizationType must be one of" in problems(customizationType="LORA")
    assert "must have exactly one of" in problems(customizationConfig={})
    assert "hyperParameters['epochs'] must be a string" in problems(hyperParameters={"epochs": 3})


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("inferenceConfig.temperature", -0.01, "must be at least 0"),
        ("inferenceConfig.temperature", 1.01, "must be at most 1"),
        ("inferenceConfig.maxTokens", 0, "must be at least 1"),
        ("inferenceConfig.maxTokens", 2**31, "must be at most 2147483647"),
        ("inferenceConfig.maxTokens", 1.5, "must be a whole number, not a number"),
        ("inferenceConfig.maxTokens", True, "must be a whole number, not true"),
        ("inferenceConfig.stopSequences", ["x"] * 2501, "must have at most 2500 entries; it has 2501"),
        ("inferenceConfig.stopSequences", [None], "[0] must not be null"),
        ("inferenceConfig.stopSequences", [""], "[0] must have at least 1 characters; it has 0"),
        ("requestMetadata", {f"k{at}": "v" for at in range(17)}, "must have at most 16 entries; it has 17"),
        ("requestMetadata", {"k" * 257: "v"}, "(the key) must have at most 256 characters"),
        ("messages", [{"role": "robot", "content": []}], "[0].role must be one of assistant"),
        ("messages", [{"content": []}], "[0].role is required"),
        ("messages", [{"role": "user", "content": [{"text": "a", "image": {}}]}], "must have exactly one of"),
        ("toolConfig.tools", [], "must have at least 1 entries"),
    ],
)
def test_limits_of_the_model_are_named_with_their_member(path: str, value: Any, rule: str) -> None:
    outer, _, inner = path.partition(".")
    body = json.dumps({outer: {inner: value} if inner else value}).encode()
    with pytest.raises(ServiceError) as caught:
        decode_request(OURS["bedrock-runtime"]["Converse"], {"modelId": "m"}, "", {}, body)
    assert path in str(caught.value) and rule in str(caught.value)
    assert caught.value.members["fieldList"][0]["name"].startswith(path)


def test_two_operations_of_one_path_are_refused_and_no_two_of_the_five_services_share_one() -> None:
    every = [each for name in SERVICES for each in load_service(name).operations.values()]
    assert Router(every)
    with pytest.raises(BadInput, match="another operation has"):
        Router([*every, every[0]])


@pytest.mark.parametrize(
    "result",
    [
        {"nothing": 1},
        {"stopReason": 3},
        {"usage": {"inputTokens": 1.5, "outputTokens": 1, "totalTokens": 1}},
        {"metrics": []},
        {"output": {"message": {"role": "assistant", "content": [{"text": b"bytes"}]}}},
        {"output": {"message": {"role": "assistant", "content": "text"}}},
    ],
)
def test_a_result_that_is_not_the_model_s_is_a_defect(result: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"Converse|stopReason|usage|metrics|output"):
        encode_response(OURS["bedrock-runtime"]["Converse"], result)


def test_headers_of_a_result_cannot_be_split() -> None:
    with pytest.raises(TypeError, match="printable"):
        encode_response(OURS["bedrock-runtime"]["InvokeModel"], {"body": b"", "contentType": "a\r\nset-cookie: b"})


def test_tokens_lapse_after_a_day_and_dead_copies_after_a_lease(tmp_path: Path) -> None:
    now = [1e9]
    memory = Idempotency(open_database(tmp_path / "ascent.db"), clock=lambda: now[0])
    operation = OURS["bedrock"]["CreateModelCustomizationJob"]
    assert memory.begin("ana", operation, "t", {"jobName": "a"}) is None
    with pytest.raises(ServiceError, match="still being worked on") as caught:
        memory.begin("ana", operation, "t", {"jobName": "a"})
    assert caught.value.status == 429
    now[0] += LEASE_S + 1
    assert memory.begin("ana", operation, "t", {"jobName": "a"}) is None
    memory.finish("ana", operation, "t", Response(201, {"content-type": "x"}, b"\x00made"))
    again = memory.begin("ana", operation, "t", {"jobName": "a", "clientRequestToken": "t"})
    assert again is not None and (again.status, again.headers, again.body) == (201, {"content-type": "x"}, b"\x00made")
    now[0] += KEPT_S + 1
    assert memory.begin("ana", operation, "t", {"jobName": "b"}) is None
