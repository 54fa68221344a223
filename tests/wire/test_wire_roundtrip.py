"""What botocore writes we read, and what we write botocore reads: every operation, with random valid values."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.awsrequest import create_request_object, prepare_request_dict
from botocore.eventstream import EventStream
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.parsers import EventStreamJSONParser, create_parser
from botocore.serialize import create_serializer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict
from wire.shapes import NoValueError, Values

from ascent.serve.wire.decode import decode_request
from ascent.serve.wire.encode import encode_error, encode_response
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.events import error_frame, event_frame
from ascent.serve.wire.model import REWRITTEN, SERVICES, Operation, compiled, load_service
from ascent.serve.wire.router import Router

# services of the same protocol with what the five lack: greedy labels, query literals, header maps, lists and JSON
OTHERS = ("mediastore-data", "lex-runtime", "dataexchange", "polly", "apigateway", "iot-data", "entityresolution")
MODELS = {name: ServiceModel(Loader().load_service_model(name, "service-2"), name) for name in (*SERVICES, *OTHERS)}
OURS = {name: {op.name: op for op in load_service(name).operations.values()} for name in MODELS}
ROUTERS = {name: Router(OURS[name].values()) for name in OTHERS}
ROUTERS |= dict.fromkeys(SERVICES, Router(op for name in SERVICES for op in OURS[name].values()))
ALL = [(service, name) for service in SERVICES for name in OURS[service]]
FEW = settings(
    deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate], derandomize=False
)
SEEDS = st.integers(0, 2**32)


def check_input(service: str, name: str, seed: int) -> None:
    model, ours = MODELS[service].operation_model(name), OURS[service][name]
    if model.has_event_stream_input:
        return
    given = {} if model.input_shape is None else Values(seed).structure(model.input_shape, 0)
    request = sent(model, given)
    found = ROUTERS[service].find(request["method"], request["path"], request["query"])
    assert found is not None and found[0] is ours, f"{service}:{name} was routed to {found and found[0].action}"
    got = decode_request(ours, found[1], request["query"], request["headers"], request["body"])
    assert got == expected(model, given), f"{service}:{name}, seed {seed}"


def sent(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return what botocore would put on the wire."""
    serialized = create_serializer("rest-json", include_validation=True).serialize_to_request(given, model)
    serialized["headers"] = {name: str(value) for name, value in serialized["headers"].items()}
    prepare_request_dict(serialized, "http://127.0.0.1:1", context={})
    ready = create_request_object(serialized).prepare()
    _, _, path, query, _ = urlsplit(ready.url)
    body = ready.body.encode() if isinstance(ready.body, str) else ready.body or b""
    headers = {name.lower(): as_text(value) for name, value in ready.headers.items()}
    return {"method": ready.method, "path": path, "query": query, "headers": headers, "body": body}


def expected(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Take out what looks on the wire as if it were not there, and add what looks as if it were."""
    if model.input_shape is None:
        return {}
    for name, member in model.input_shape.members.items():
        if member.serialization.get("location") == "headers" and name in given:
            given = given | {name: {key.lower(): value for key, value in given[name].items()}}  # names have no case
    payload = model.input_shape.serialization.get("payload")
    if payload and model.input_shape.members[payload].type_name == "structure":
        typed = [n for n, m in model.input_shape.members.items() if m.serialization.get("name") == "Content-Type"]
        given = dict.fromkeys(typed, "application/json") | given
    if payload is None or payload in model.input_shape.required_members:
        return given
    shape = model.input_shape.members[payload]
    if shape.type_name in ("blob", "string"):
        return {name: value for name, value in given.items() if name != payload or value}
    return {payload: {}, **given}  # botocore sends {} for a structure that is absent


def check_output(service: str, name: str, seed: int) -> None:
    model, ours, values = MODELS[service].operation_model(name), OURS[service][name], Values(seed)
    shape = model.output_shape
    if shape is None:
        assert encode_response(ours, {}).body in (b"", b"{}")
        return
    payload = shape.serialization.get("payload")
    result = values.structure(shape, 0, skip=frozenset({payload} if ours.stream is not None else ()))
    for member, inner in shape.members.items():
        if inner.serialization.get("location") == "statusCode":
            result[member] = 200
    response = encode_response(ours, result)
    parsed = parse(model, response.status, response.headers, response.body)
    parsed.pop(payload if ours.stream is not None else "", None)
    always = {payload} if ours.stream is None else {"ContentType", "contentType"}  # a body has a type, or is an object
    parsed = {member: value for member, value in parsed.items() if member in result or member not in always}
    assert parsed == result, f"{service}:{name}, seed {seed}"
    if ours.stream is not None:
        check_stream(model, ours, payload, values)


def check_stream(model: Any, ours: Operation, payload: str, values: Values) -> None:
    shape = model.output_shape.members[payload]
    if not shape.serialization.get("eventstream"):
        data = values.random.randbytes(100)
        assert encode_response(ours, {payload: data}).body == data
        return
    names = [name for name, event in shape.members.items() if not event.metadata.get("exception")]
    events = [(name, values.value(shape.members[name])) for name in names for _ in range(2)]
    bare = {
        name: part
        for name in names
        for part, inner in shape.members[name].members.items()
        if inner.serialization.get("eventpayload")
    }
    raw = b"".join(event_frame(ours.stream.shape, name, value) for name, value in events)
    read = EventStream(Pieces(raw, values.random), shape, EventStreamJSONParser(), model.name)
    assert [(name, value) for event in read for name, value in event.items()] == [
        (name, {bare[name]: b""} | value if name in bare else value) for name, value in events
    ]
    assert events, f"{model.name} has no events"


class Pieces:
    """A body that arrives in random pieces."""

    def __init__(self, raw: bytes, chance: random.Random) -> None:
        self._raw, self._chance = raw, chance

    def stream(self) -> Iterator[bytes]:
        at = 0
        while at < len(self._raw):
            size = self._chance.randint(1, 300)
            yield self._raw[at : at + size]
            at += size


def parse(model: Any, status: int, headers: dict[str, str], body: Any, shape: Any = None) -> dict[str, Any]:
    answer = {"status_code": status, "headers": CaseInsensitiveDict(headers), "body": body, "context": {}}
    parsed = create_parser("rest-json").parse(answer, shape or (model and model.output_shape))
    parsed.pop("ResponseMetadata", None)
    return parsed


def as_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def test_the_models_are_the_five_services_whole() -> None:
    assert {name: len(OURS[name]) for name in SERVICES} == {
        name: len(MODELS[name].operation_names) for name in SERVICES
    }
    assert len(ALL) > 390


@given(seed=SEEDS)
@settings(FEW, max_examples=6)
def test_requests_of_botocore_are_decoded_to_what_they_were(seed: int) -> None:
    for at, (service, name) in enumerate(ALL):
        check_input(service, name, seed + at)


@given(seed=SEEDS)
@settings(FEW, max_examples=6)
def test_responses_are_parsed_by_botocore_to_what_they_were(seed: int) -> None:
    for at, (service, name) in enumerate(ALL):
        check_output(service, name, seed + at)


@given(seed=SEEDS)
@settings(FEW, max_examples=8)
def test_locations_that_other_services_use_are_right_too(seed: int) -> None:
    for service in OTHERS:
        for name in OURS[service]:
            if service == "polly" and name == "StartSpeechSynthesisStream":
                continue
            check_input(service, name, seed)


@pytest.mark.slow
@given(seed=SEEDS)
@settings(FEW, max_examples=100)
def test_everything_round_trips_many_times(seed: int) -> None:
    for at, (service, name) in enumerate(ALL):
        check_input(service, name, seed + at)
        check_output(service, name, seed + at)


def test_modelled_errors_are_parsed_with_code_status_and_message() -> None:
    checked = 0
    for service in SERVICES:
        for shape in MODELS[service].error_shapes:
            operation = next((each for each in OURS[service].values() if shape.name in each.error_codes), None)
            if operation is None:  # one that only a stream sends
                continue
            checked += 1
            response = encode_error(ServiceError(shape.name, "what, why and what to do"), operation)
            parsed = parse(None, response.status, response.headers, response.body, None)
            assert parsed["Error"] == {"Code": shape.name, "Message": "what, why and what to do"}
            modelled = shape.metadata.get("error", {}).get("httpStatusCode")
            assert modelled is None or response.status == modelled
            members = parse(None, response.status, response.headers, response.body, shape)
            spelled = next(name for name in shape.members if name.lower() == "message")
            assert members[spelled] == "what, why and what to do"
    assert checked > 45


def test_a_stream_that_fails_ends_with_the_exception_that_the_model_has() -> None:
    model, ours = MODELS["bedrock-runtime"].operation_model("ConverseStream"), OURS["bedrock-runtime"]["ConverseStream"]
    for code, modelled in (("ThrottlingException", True), ("AccessDeniedException", False)):
        raw = error_frame(ours.stream.shape, ServiceError(code, "too much"), ours, "r1")
        shape = model.output_shape.members["stream"]
        with pytest.raises(Exception) as caught:
            list(EventStream(Pieces(raw, random.Random(1)), shape, EventStreamJSONParser(), "ConverseStream"))
        assert type(caught.value).__name__ == "EventStreamError"
        expected_code = "throttlingException" if modelled else code
        assert caught.value.response["Error"]["Code"] == expected_code
        assert caught.value.response["Error"]["Message"].startswith("too much")


def patterns() -> dict[str, Any]:
    found = {}
    for service in SERVICES:
        for shape in Loader().load_service_model(service, "service-2")["shapes"].values():
            if "pattern" in shape:
                found[shape["pattern"]] = shape
    return found


def test_patterns_that_only_java_reads_are_these() -> None:
    skipped = {pattern for pattern in patterns() if compiled(pattern) is None}
    assert skipped == {
        r"\p{L}[\p{L}\p{M}0-9_]*( [\p{L}\p{M}0-9_]+)*",
        r"\p{ASCII}*",
        r"\A\S[\p{Print}]*\z",
        r"https://[^\p{C}]*",
        r"[^\p{C}]*",
    }


def test_rewritten_patterns_read_what_the_model_s_read() -> None:
    used = set()
    for pattern, shape in patterns().items():
        for part in REWRITTEN:
            if part in pattern:
                used.add(part)
                values = Values(5)
                for _ in range(50):
                    text = values.matching(
                        re.compile(pattern), shape.get("min", 0), min(shape.get("max", 300), 300), False
                    )
                    assert compiled(pattern).fullmatch(text), (pattern, text)
    assert used == set(REWRITTEN)


def test_no_pattern_takes_long_whatever_is_matched() -> None:
    """Repeat a piece of a text up to the longest length, then spoil the end: the worst for backtracking."""
    slow = {}
    for pattern, shape in patterns().items():
        if (read := compiled(pattern)) is None:
            continue
        for text in hostile(pattern, int(min(shape.get("max", 2048), 2048))):
            begun = time.process_time()
            read.fullmatch(text)
            if (taken := time.process_time() - begun) > 0.25:
                slow[pattern] = (taken, text[:60])
    assert not slow


def hostile(pattern: str, longest: int) -> Iterator[str]:
    values = Values(3)
    bases = ["a", "-", "a-", "0", "_", "a.", "A ", "/a", "a:", " "]
    with contextlib.suppress(NoValueError):
        bases.append(values.matching(re.compile(pattern), 0, 80, False) or "a")
    for base in bases:
        for prefix in ("", bases[-1]):
            yield (prefix + base * longest)[: longest - 1] + "\x00"
