"""Who gets in and who does not: signatures by botocore and by AWS' documentation, tampered, late, repeated, revoked."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import http.client
import ipaddress
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.auth
import pytest
import sqlalchemy
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy import Engine
from wire.echo import Control, Running, Runtime, running

from ascent.serve.keys import NewKey
from ascent.serve.wire.authenticate import BRIEFLY_S, SKEW_S
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.sigv4 import EMPTY_SHA256, expected_signature, read_chunks, read_signed
from ascent.serve.wire.spent import Answered, Spent

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
SAY = {"modelId": "m", "messages": [{"role": "user", "content": [{"text": "hi"}]}]}
SERVICES = {"bedrock-runtime": "bedrock", "bedrock": "bedrock", "sagemaker-runtime": "sagemaker"}


def code_of(call: Any, **named: Any) -> tuple[str, int]:
    with pytest.raises(ClientError) as caught:
        call(**named)
    response = caught.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


def signed(
    server: Running,
    key: NewKey,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    service: str = "bedrock",
    headers: dict[str, str] | None = None,
    presign_s: int | None = None,
) -> tuple[str, dict[str, str]]:
    """Return path and headers of a request that botocore's own signer signed."""
    request = AWSRequest(method, f"{server.url}{path}", headers or {}, body)
    credentials = Credentials(key.access_key_id, key.secret)
    if presign_s is None:
        SigV4Auth(credentials, service, "us-west-2").add_auth(request)
    else:
        SigV4QueryAuth(credentials, service, "us-west-2", presign_s).add_auth(request)
    return request.url.removeprefix(server.url), {name: str(value) for name, value in request.headers.items()}


def send(
    server: Running, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> tuple[int, str, dict[str, Any]]:
    """Send it as it is; return status, error code and body."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, answer.getheader("x-amzn-errortype", ""), json.loads(data) if data else {}
    finally:
        connection.close()


def test_the_signature_of_aws_documentation() -> None:
    """ListUsers of "Create a signed AWS API request"."""
    headers = {
        "host": "iam.amazonaws.com",
        "content-type": "application/x-www-form-urlencoded; charset=utf-8",
        "x-amz-date": "20150830T123600Z",
        "authorization": "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/iam/aws4_request, "
        "SignedHeaders=content-type;host;x-amz-date, "
        "Signature=5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7",
    }
    found = read_signed(headers, "")
    query = "Action=ListUsers&Version=2010-05-08"
    assert expected_signature(SECRET, found, "GET", "/", query, headers, EMPTY_SHA256) == found.signature


def chunked_example() -> tuple[dict[str, str], bytes]:
    """The 66,560 bytes in three chunks of AWS' "transferring payload in multiple chunks"."""
    names = "content-encoding;content-length;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;"
    headers = {
        "host": "s3.amazonaws.com",
        "x-amz-date": "20130524T000000Z",
        "x-amz-storage-class": "REDUCED_REDUNDANCY",
        "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
        "content-encoding": "aws-chunked",
        "x-amz-decoded-content-length": "66560",
        "content-length": "66824",
        "authorization": "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        f"SignedHeaders={names}x-amz-storage-class,"
        "Signature=4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9",
    }
    chunks = (
        (b"a" * 65536, "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648"),
        (b"a" * 1024, "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497"),
        (b"", "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9"),
    )
    return headers, b"".join(b"%x;chunk-signature=%s\r\n%s\r\n" % (len(d), s.encode(), d) for d, s in chunks)


def test_the_chunked_upload_of_aws_documentation() -> None:
    headers, body = chunked_example()
    found = read_signed(headers, "")
    secret, payload = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", headers["x-amz-content-sha256"]
    path = "/examplebucket/chunkObject.txt"
    assert expected_signature(secret, found, "PUT", path, "", headers, payload) == found.signature
    assert read_chunks(body, secret, found, "66560") == b"a" * 66560
    for wrong in (
        body.replace(b"aaa", b"aab", 1),
        body[: body.rindex(b"0;chunk")],
        body + b"0",
        body[:-90],
        b"ffffffff" + body,
        b"",
    ):
        with pytest.raises(ServiceError) as caught:
            read_chunks(wrong, secret, found, "66560")
        assert caught.value.code == "InvalidSignatureException"
    with pytest.raises(ServiceError):
        read_chunks(body, secret, found, "66559")


def test_a_chunked_upload_over_the_wire(wire: Running) -> None:
    """Sign the seed with botocore and the chunks by hand, straight from the definition."""
    key, content = wire.key(), [b"abc" * 100, b"xyz", b""]
    headers = {
        "X-Amz-Content-SHA256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
        "x-amz-decoded-content-length": "303",
        "content-encoding": "aws-chunked",
    }
    path, headers = signed(wire, key, "POST", "/model/m/invoke", headers=headers)
    stamp, before = headers["X-Amz-Date"], headers["Authorization"].rpartition("=")[2]
    scope = f"{stamp[:8]}/us-west-2/bedrock/aws4_request"
    sign = f"AWS4{key.secret}".encode()
    for part in scope.split("/"):
        sign = hmac.new(sign, part.encode(), hashlib.sha256).digest()
    body = b""
    for data in content:
        hashed = (hashlib.sha256(b"").hexdigest(), hashlib.sha256(data).hexdigest())
        text = "\n".join(("AWS4-HMAC-SHA256-PAYLOAD", stamp, scope, before, *hashed))
        before = hmac.new(sign, text.encode(), hashlib.sha256).hexdigest()
        body += b"%x;chunk-signature=%s\r\n%s\r\n" % (len(data), before.encode(), data)
    assert send_raw(wire, path, headers, body) == (200, (b"abc" * 100 + b"xyz")[::-1])
    assert send(wire, "POST", path, headers, body.replace(b"xyz", b"xyy"))[:2] == (403, "InvalidSignatureException")


@pytest.mark.parametrize("service", ["bedrock-runtime", "sagemaker-runtime"])
def test_wrong_secrets_unknown_and_revoked_keys(wire: Running, service: str) -> None:
    def call(key: NewKey) -> tuple[str, int]:
        client = wire.client(service, key)
        if service == "bedrock-runtime":
            return code_of(client.converse, **SAY)
        return code_of(client.invoke_endpoint, EndpointName="e", Body=b"x")

    key = wire.key()
    assert call(replaced(key, secret="x" * 40)) == ("InvalidSignatureException", 403)
    assert call(replaced(key, access_key_id="AKIAABCDEFGHIJKLMNOP")) == ("UnrecognizedClientException", 403)
    assert call(wire.key(expires=time.time() - 1)) == ("ExpiredTokenException", 403)
    wire.keys.revoke(key.access_key_id)
    time.sleep(0.1)
    assert call(key) == ("UnrecognizedClientException", 403)


def replaced(key: NewKey, **changes: str) -> NewKey:
    return NewKey(**{**{name: getattr(key, name) for name in NewKey.__dataclass_fields__}, **changes})


def test_a_revoked_key_that_was_used_is_refused_soon(wire: Running) -> None:
    key = wire.key()
    client = wire.client("bedrock-runtime", key)
    assert client.converse(**SAY)
    wire.keys.revoke(key.access_key_id)
    time.sleep(0.1)
    assert code_of(client.converse, **SAY) == ("UnrecognizedClientException", 403)


def test_scopes_bound_what_a_key_may_do(wire: Running) -> None:
    key = wire.key(scopes=("bedrock-runtime:Conv*", "bedrock:List*"))
    assert wire.client("bedrock-runtime", key).converse(**SAY)
    assert wire.client("bedrock", key).list_model_customization_jobs()
    refused = code_of(wire.client("bedrock-runtime", key).invoke_model, modelId="m", body=b"{}")
    assert refused == ("AccessDeniedException", 403)
    with pytest.raises(ClientError, match=r"no scope for bedrock:DeleteCustomModel"):
        wire.client("bedrock", key).delete_custom_model(modelIdentifier="m")


@pytest.mark.parametrize("off_s", [-SKEW_S - 20, SKEW_S + 20, -SKEW_S + 20, SKEW_S - 20])
def test_clocks_may_differ_by_five_minutes(wire: Running, monkeypatch: pytest.MonkeyPatch, off_s: float) -> None:
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: now + dt.timedelta(seconds=off_s))
    client = wire.client("bedrock-runtime")
    if abs(off_s) < SKEW_S:
        assert client.converse(**SAY)
        return
    with pytest.raises(ClientError, match="clock") as caught:
        client.converse(**SAY)
    assert caught.value.response["Error"]["Code"] == "InvalidSignatureException"


def test_whatever_is_changed_breaks_the_signature(wire: Running) -> None:
    key, body = wire.key(), b'{"inputText": "hi"}'
    headers = {"X-Amzn-Bedrock-Trace": "ENABLED"}
    path, headers = signed(wire, key, "POST", "/model/m%2Fx/invoke", body, headers=headers)
    auth = headers["Authorization"]
    assert send(wire, "POST", "/model/m%2Fy/invoke", headers, body)[1] == "InvalidSignatureException"
    assert send(wire, "POST", "/model/m/x/invoke", headers, body)[0] == 404
    assert send(wire, "POST", path + "?a=b", headers, body)[1] == "InvalidSignatureException"
    assert send(wire, "POST", path, headers, body + b" ")[1] == "InvalidSignatureException"
    assert send(wire, "POST", path, headers | {"X-Amzn-Bedrock-Trace": "DISABLED"}, body)[1] == (
        "InvalidSignatureException"
    )
    for was, now, code in (
        ("us-west-2", "eu-west-2", "InvalidSignatureException"),
        ("/bedrock/", "/s3/", "InvalidSignatureException"),
        ("/20", "/19", "IncompleteSignatureException"),
        ("host;", "", "IncompleteSignatureException"),
        ("x-amz-date;", "", "IncompleteSignatureException"),
        ("AWS4-HMAC-SHA256", "AWS4-HMAC-SHA1", "IncompleteSignatureException"),
        ("Signature=", "Signature=0", "IncompleteSignatureException"),
    ):
        assert was in auth
        changed = send(wire, "POST", path, headers | {"Authorization": auth.replace(was, now)}, body)
        assert changed[:2] == (403, code), (was, now, changed)
    extra = send(wire, "POST", path, headers | {"X-Amz-Extra": "unsigned"}, body)
    assert extra[:2] == (403, "IncompleteSignatureException") and "x-amz-extra" in extra[2]["message"]
    assert send(wire, "POST", path, headers | {"X-Amz-Security-Token": "t"}, body)[0] == 403
    assert send_raw(wire, path, headers, body) == (200, body[::-1])


def test_a_claimed_hash_must_be_that_of_the_body(wire: Running) -> None:
    claimed = {"X-Amz-Content-SHA256": hashlib.sha256(b"mine").hexdigest()}
    path, headers = signed(wire, wire.key(), "POST", "/model/m/invoke", b"mine", headers=claimed)
    assert send(wire, "POST", path, headers, b"yours")[:2] == (403, "InvalidSignatureException")
    assert send_raw(wire, path, headers, b"mine") == (200, b"enim")


def test_a_signature_for_another_service_is_not_one_for_this(wire: Running) -> None:
    path, headers = signed(wire, wire.key(), "POST", "/model/m/invoke", b"x", service="sagemaker")
    status, code, body = send(wire, "POST", path, headers, b"x")
    assert (status, code) == (403, "InvalidSignatureException") and "'bedrock'" in body["message"]


def test_nobody_gets_in_without_a_key(wire: Running) -> None:
    assert send(wire, "GET", "/model-customization-jobs", {})[:2] == (403, "MissingAuthenticationTokenException")
    for auth in ("", "Basic abc", "AWS4-HMAC-SHA256", "AWS4-HMAC-SHA256 Credential=,,=", "Bearer ", "Bearer x", "é"):
        status, code, _ = send(wire, "GET", "/guardrails", {"Authorization": auth.encode().decode("latin-1")})
        assert status == 403 and code.endswith("Exception"), auth


def test_a_changing_request_cannot_be_sent_again(wire: Running, control: Control) -> None:
    path, headers = signed(wire, wire.key(), "DELETE", "/custom-models/dose-check")
    assert send(wire, "DELETE", path, headers)[0] == 200
    before = list(control.deleted)
    again = send(wire, "DELETE", path, headers)
    assert again[:2] == (403, "InvalidSignatureException") and "used before" in again[2]["message"]
    assert control.deleted == before
    path, headers = signed(wire, wire.key(), "DELETE", "/custom-models/missing")
    codes = [send(wire, "DELETE", path, headers)[1] for _ in range(2)]  # nothing came of it: boto3 may retry at once
    assert codes == ["ResourceNotFoundException"] * 2


def test_reads_may_come_again_and_answers_for_a_moment(tmp_path: Path) -> None:
    runtime, now = Runtime(), [time.time()]
    with running(tmp_path, [runtime, Control()], clock=lambda: now[0]) as server:
        key = server.key()
        read = signed(server, key, "GET", "/model-customization-jobs")
        ask = json.dumps({"messages": SAY["messages"]}).encode()
        said = signed(server, key, "POST", "/model/m/converse", ask, headers={"content-type": "application/json"})
        for later, answered in ((0, 200), (BRIEFLY_S - 1, 200), (BRIEFLY_S + 1, 403)):
            now[0] += later
            assert send(server, "GET", *read)[0] == 200
            assert send(server, "POST", said[0], said[1], ask)[0] == answered
        calls = runtime.calls
        now[0] += SKEW_S
        assert send(server, "POST", said[0], said[1], ask)[0] == 403 and runtime.calls == calls


def test_a_restart_forgets_no_signature_that_changed_something(tmp_path: Path) -> None:
    with running(tmp_path, [Control()]) as server:
        path, headers = signed(server, server.key(), "DELETE", "/custom-models/dose-check")
        headers["Host"] = urlsplit(server.url).netloc  # signed too, and the next server has another port
        assert send(server, "DELETE", path, headers)[0] == 200
    control = Control()
    with running(tmp_path, [control]) as server:
        status, _, body = send(server, "DELETE", path, headers)
    assert status == 403 and "used before" in body["message"] and control.deleted == []


def test_spent_signatures_are_kept_until_their_clock_ends_them(database: Engine) -> None:
    spent, other = Spent(database), Spent(database)
    assert spent.add(b"a" * 32, now=0.0, lasts=300.0) and not other.add(b"a" * 32, now=299.0, lasts=300.0)
    spent.forget(b"a" * 32)
    assert other.add(b"a" * 32, now=299.0, lasts=300.0)
    assert spent.add(b"b" * 32, now=400.0, lasts=700.0)
    with database.connect() as connection:
        kept = connection.execute(sqlalchemy.text("SELECT signature FROM spent_signatures")).scalars().all()
    assert [bytes(each) for each in kept] == [b"b" * 32]


def test_answered_signatures_are_kept_until_their_clock_ends_them() -> None:
    answered = Answered()
    assert answered.first(b"a", now=10.0, lasts=310.0) == 10.0 and answered.first(b"a", now=300.0, lasts=310.0) == 10.0
    assert answered.first(b"b", now=500.0, lasts=800.0) == 500.0 and len(answered) == 1


def test_two_equal_calls_in_one_second_are_both_answered(wire: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: now)
    client = wire.client("bedrock-runtime")
    assert [client.converse(**SAY)["stopReason"] for _ in range(3)] == ["end_turn"] * 3


def test_presigned_addresses(wire: Running, control: Control) -> None:
    key = wire.key()
    path, headers = signed(wire, key, "GET", "/model-customization-jobs?maxResults=3", presign_s=60)
    assert "X-Amz-Signature=" in path and "Authorization" not in headers
    assert send(wire, "GET", path, headers)[0] == 200 and send(wire, "GET", path, headers)[0] == 200
    assert send(wire, "GET", path.replace("maxResults=3", "maxResults=4"), headers)[1] == "InvalidSignatureException"
    assert send(wire, "GET", path.replace("Expires=60", "Expires=600"), headers)[1] == "InvalidSignatureException"
    path, headers = signed(wire, key, "GET", "/model-customization-jobs", presign_s=1)
    time.sleep(2.1)
    late = send(wire, "GET", path, headers)
    assert late[1] == "InvalidSignatureException" and "expired" in late[2]["message"]
    path, headers = signed(wire, key, "DELETE", "/custom-models/presigned", presign_s=60)
    assert [send(wire, "DELETE", path, headers)[0] for _ in range(2)] == [200, 403]


def test_unsigned_payloads(wire: Running) -> None:
    path, headers = signed(
        wire, wire.key(), "POST", "/model/m/invoke", b"one", headers={"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"}
    )
    assert send_raw(wire, path, headers, b"two") == (200, b"owt")


def send_raw(server: Running, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")]), dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    yield folder / "cert.pem", folder / "key.pem"


def test_bearer_keys_where_the_model_allows_them(
    tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3 sends bearer keys over TLS only, so TLS it is."""
    cert, private = certificate
    with running(tmp_path, [Runtime(), Control()], ssl_certfile=str(cert), ssl_keyfile=str(private)) as server:
        key = server.key("bea")
        signing = server.client("bedrock-runtime", key, verify=str(cert))
        assert signing.converse(**SAY)["output"]["message"]["content"][0]["text"] == "m|bea|hi"
        monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", key.bearer)
        nobody = replaced(key, access_key_id="AKIAABCDEFGHIJKLMNOP", secret="x")
        bearing = server.client("bedrock-runtime", nobody, verify=str(cert))
        assert bearing.converse(**SAY)["output"]["message"]["content"][0]["text"] == "m|bea|hi"
        assert server.client("bedrock", nobody, verify=str(cert)).list_model_customization_jobs()
        monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", key.bearer[:-1] + "?")
        wrong = server.client("bedrock", nobody, verify=str(cert))
        assert code_of(wrong.list_model_customization_jobs) == ("UnrecognizedClientException", 403)


def test_a_service_without_bearer_auth_takes_none(wire: Running) -> None:
    headers = {"Authorization": f"Bearer {wire.key().bearer}"}
    assert send(wire, "POST", "/model/m/converse", headers, b"{}")[0] == 400
    assert send(wire, "POST", "/endpoints/e/invocations", headers, b"x")[:2] == (403, "IncompleteSignatureException")


def test_a_caller_knows_the_region_it_signed_for(wire: Running) -> None:
    client = wire.client("bedrock", region_name="ap-south-1")
    made = client.create_model_customization_job(
        jobName="there",
        customModelName="m",
        roleArn="r",
        baseModelIdentifier="b",
        trainingDataConfig={"s3Uri": "file:///d"},
        outputDataConfig={"s3Uri": "file:///o"},
    )
    assert made["jobArn"].startswith("arn:aws:bedrock:ap-south-1:000000000000:model-customization-job/")
