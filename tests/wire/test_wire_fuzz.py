"""Hostile input: whatever arrives, the answer is an error that the model knows, quickly, and never a 500."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from wire.echo import Running
from wire.test_wire_roundtrip import ALL, OURS

from ascent.serve.wire.decode import decode_request
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.jsonbody import DEPTH, read_json
from ascent.serve.wire.model import SERVICES, Operation, Shape, load_service
from ascent.serve.wire.router import Router

ROUTER = Router(each for name in SERVICES for each in load_service(name).operations.values())
ANYTHING = settings(max_examples=150, deadline=10_000, suppress_health_check=list(HealthCheck), database=None)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "\x00", "a" * 5000, 10**30, -(2**63) - 1, 1e300, "2026-13-01", "==", "file://\x00"])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


def attempt(operation: Operation, labels: dict[str, str], query: str, headers: dict[str, str], body: bytes) -> Any:
    """Decode; a refusal must be a ValidationException with a message. Anything else is a defect."""
    try:
        return decode_request(operation, labels, query, headers, body)
    except ServiceError as error:
        assert error.code == "ValidationException" and "validation error" in str(error)
        assert len(str(error)) < 20_000
        return None


def shaped(shape: Shape, draw: Any, depth: int = 0) -> Any:
    """Draw a value that has the members of a shape, each of them right or wrong."""
    if depth > 4 or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    if shape.kind == "structure":
        names = [name for name in shape.members if draw(st.booleans()) or name in shape.required]
        return {shape.members[name].wire: shaped(shape.members[name].shape, draw, depth + 1) for name in names[:8]}
    if shape.item is not None and shape.kind == "list":
        return [shaped(shape.item, draw, depth + 1) for _ in range(draw(st.integers(0, 2)))]
    if shape.item is not None:
        return {draw(st.text(max_size=5)): shaped(shape.item, draw, depth + 1)}
    if shape.enum:
        return draw(st.sampled_from(sorted(shape.enum)) | SCALARS)
    return draw(SCALARS)


@given(data=st.data())
@ANYTHING
def test_bodies_of_the_right_shape_with_wrong_values(data: st.DataObject) -> None:
    service, name = data.draw(st.sampled_from(ALL))
    operation = OURS[service][name]
    if operation.input is None:
        return
    value = shaped(operation.input, data.draw)
    labels = {
        m.wire: data.draw(st.text("%2Fab/.é\x00", min_size=1, max_size=9)) for m in operation.input.members.values()
    }
    body = json.dumps(value).encode()
    attempt(operation, labels, data.draw(st.text(max_size=30)), {"content-type": "x"}, body)


@given(body=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), query=st.text(max_size=50))
@example(body=b'{"messages":[{"role":"user","role":"user"}]}', query="")
@example(body=b'{"a":NaN}', query="a=%ff")
@example(body=b'{"a":1e999}', query="&" * 2000)
@example(body=b'{"a":' + b"9" * 5000 + b"}", query="=")
@example(body=b'{"a":"\\ud800"}', query="%")
@example(body=b"\xff\xfe{\x00}\x00", query="\x00")
@example(body=b"[" * 100_000, query="")
@example(body=b'{"a":' * 100_000, query="")
@example(body=b'"' + b"[" * 200, query="")
@example(body=b"[]", query="")
@settings(ANYTHING, max_examples=60)
def test_bodies_and_queries_of_no_shape(body: bytes, query: str) -> None:
    for service, name in (
        ("bedrock-runtime", "Converse"),
        ("bedrock", "CreateModelCustomizationJob"),
        ("bedrock", "ListCustomModels"),
        ("bedrock-agentcore", "CreateEvent"),
        ("sagemaker-runtime", "InvokeEndpoint"),
    ):
        operation = OURS[service][name]
        labels = {"modelId": "m", "memoryId": "m-abcdefghij", "EndpointName": "e"}
        attempt(operation, labels, query, {}, body)


@given(
    path=st.text(max_size=80)
    | st.lists(st.sampled_from(["model", "%", "%2F", "..", "", "x", "runtimes"])).map("/".join)
)
@settings(ANYTHING, max_examples=300)
def test_any_path_is_routed_or_not(path: str) -> None:
    for method in ("GET", "POST", "BREW"):
        found = ROUTER.find(method, f"/{path}", path)
        assert found is None or found[0].method == method


def test_nesting_duplicates_and_numbers() -> None:
    assert read_json(b"[" * DEPTH + b"]" * DEPTH)
    assert read_json(json.dumps(["[" * 500, "{" * 500, '"[' * 300]).encode())
    for body, part in (
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "levels deep"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        (b"[NaN]", "NaN is no JSON number"),
        (b"[-Infinity]", "no JSON number"),
        (b"[1e400]", "too large"),
        (b"[" + b"1" * 41 + b"]", "too large"),
        (b'["\\udc00"]', "surrogate"),
        ("[1]".encode("utf-16"), "UTF-8"),
        (b"", "not JSON"),
        (b"[1] [2]", "not JSON"),
    ):
        with pytest.raises(ValueError, match=part):
            read_json(body)


def test_routing_and_large_bodies_are_quick() -> None:
    paths = [op.uri.replace("{", "").replace("}", "") for op in OURS["bedrock-agentcore-control"].values()]
    begun = time.process_time()
    for path in paths * 10:
        ROUTER.find("POST", path)
    assert (time.process_time() - begun) / (10 * len(paths)) < 50e-6
    begun, converse = time.process_time(), OURS["bedrock-runtime"]["Converse"]
    attempt(converse, {"modelId": "m"}, "", {}, json.dumps({"messages": [1] * 300_000}).encode())
    attempt(converse, {"modelId": "m"}, "", {}, b'{"x":"' + b"[" * 3_000_000 + b'"}')
    attempt(converse, {"modelId": "m"}, "", {}, b'{"x":"' + b'\\"' * 2_000_000)
    assert time.process_time() - begun < 5


REQUESTS = (
    b"POST /model/m/converse HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST /model/m/converse HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /model/%ff%fe/converse HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /model/m/converse HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /model-customization-jobs?%ff=\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET " + b"/a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://elsewhere/guardrails HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS /guardrails HTTP/1.1\r\nHost: x\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"GET /guardrails?X-Amz-Signature=%00&X-Amz-Date=%F0%9F&X-Amz-Credential=//// HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /guardrails HTTP/1.1\r\nHost: x\r\nDate: Thu, 99 Jan 99999 00:00:00 GMT\r\n"
    b"Authorization: AWS4-HMAC-SHA256 Credential=A/20260101/r/s/aws4_request,SignedHeaders=host,Signature=" + b"0" * 64,
)


@pytest.mark.parametrize("request_bytes", REQUESTS, ids=range(len(REQUESTS)))
def test_raw_requests_get_an_answer_below_500(wire: Running, request_bytes: bytes) -> None:
    host, _, port = urlsplit(wire.url).netloc.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        ending = b"" if request_bytes.endswith((b"\n", b"}")) else b"\r\n\r\n"
        connection.sendall(request_bytes + ending)
        assert 400 <= int(connection.recv(4096).split(b" ")[1]) < 500


@given(
    body=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
    model=st.text(min_size=1, max_size=9),
)
@settings(ANYTHING, max_examples=40)
def test_requests_with_a_good_key_and_a_bad_body(wire: Running, body: bytes, model: str) -> None:
    key = _KEYS.setdefault(wire.url, wire.key().bearer)
    connection = http.client.HTTPConnection(urlsplit(wire.url).netloc, timeout=10)
    try:
        path = f"/model/{''.join(f'%{byte:02X}' for byte in model.encode('utf-8', 'surrogatepass'))}/converse"
        connection.request("POST", path, body, {"Authorization": f"Bearer {key}"})
        assert connection.getresponse().status < 500
    finally:
        connection.close()


_KEYS: dict[str, str] = {}
