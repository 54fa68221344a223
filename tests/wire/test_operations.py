"""The whole server as a process: health, metrics, logs, signals, TLS, and where it refuses to listen."""

from __future__ import annotations

import datetime
import ipaddress
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from wire.served import Served, make_key, serving

from ascent.serve.keys import NewKey

QUESTION = [{"role": "user", "content": [{"text": "Name a tree."}]}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "server"


@pytest.fixture(scope="module")
def key(home: Path) -> NewKey:
    return make_key(home)


@pytest.fixture(scope="module")
def server(home: Path, key: NewKey, tiny_model: Path) -> Iterator[Served]:
    """A server that was started as systemd starts it, and told it when it was ready (sd_notify(3))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, tempfile.TemporaryDirectory() as folder:
        manager.bind(f"{folder}/notify")
        manager.settimeout(60)
        told = {"NOTIFY_SOCKET": f"{folder}/notify"}
        with serving(home, ["--model", f"tiny={tiny_model}", "--jobs", "0"], environment=told) as running:
            assert manager.recv(64) == b"READY=1"
            running.wait_ready()
            yield running
        assert manager.recv(64) == b"STOPPING=1"


def say(server: Served, key: NewKey, tokens: int = 8) -> dict[str, object]:
    answer: dict[str, object] = server.client("bedrock-runtime", key).converse(
        modelId="tiny", messages=QUESTION, inferenceConfig={"maxTokens": tokens, "temperature": 0}
    )
    return answer


def test_an_answer_is_counted_logged_and_charged(server: Served, key: NewKey) -> None:
    answer = say(server, key)
    request_id = answer["ResponseMetadata"]["RequestId"]  # type: ignore[index]
    page = requests.get(f"{server.address}/metrics", timeout=5).text
    assert 'ascent_requests_total{operation="bedrock-runtime:Converse",status="200"} 1.0' in page
    usage = answer["usage"]
    assert f'ascent_tokens_total{{kind="completion",model="tiny"}} {usage["outputTokens"]}.0' in page  # type: ignore[index]
    assert 'ascent_engine_running{engine="tiny"} 0.0' in page
    assert requests.get(f"{server.address}/healthz", timeout=5).text == "ok\n"
    refused = requests.post(f"{server.address}/model/tiny/converse", json={}, timeout=5)
    assert refused.status_code == 403
    mine = [line for line in server.lines() if line.get("request_id") == request_id]
    assert all(key.secret not in line and key.bearer not in line for line in server.log.read_text().splitlines())
    assert not mine or all(line["level"] != "error" for line in mine)


def test_sigterm_lets_a_running_answer_end_and_refuses_new_ones(home: Path, key: NewKey, tiny_model: Path) -> None:
    with serving(home, ["--model", f"tiny={tiny_model}", "--jobs", "0"]) as running:
        running.wait_ready()
        events = running.client("bedrock-runtime", key).converse_stream(
            modelId="tiny", messages=QUESTION, inferenceConfig={"maxTokens": 200, "temperature": 1.0}
        )["stream"]
        seen = [next(iter(events))]
        running.process.send_signal(signal.SIGTERM)
        seen += list(events)
        assert "metadata" in seen[-1]
        assert running.process.wait(20) == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{running.address}/healthz", timeout=2)


def test_a_killed_server_takes_its_worker_along(home: Path, key: NewKey, tiny_model: Path) -> None:
    with serving(home, ["--model", f"tiny={tiny_model}"], environment={"ASCENT_SERVER_JOBS__SLOTS": "1"}) as running:
        running.wait_ready()
        [started] = [line for line in running.lines() if line["message"] == "job worker started"]
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
        until = time.monotonic() + 20
        while Path(f"/proc/{started['pid']}").exists() and time.monotonic() < until:
            if "Z" in Path(f"/proc/{started['pid']}/stat").read_text().rpartition(")")[2][:3]:
                break  # ended; whoever adopted it has not asked yet
            time.sleep(0.1)
        else:
            assert not Path(f"/proc/{started['pid']}").exists(), "the worker outlives its server"


def test_tls_is_spoken_with_the_given_certificate(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    cert, secret = certificate(tmp_path)
    options = {"ASCENT_SERVER_TLS_CERT": str(cert), "ASCENT_SERVER_TLS_KEY": str(secret)}
    with serving(home, ["--jobs", "0"], environment=options) as running:
        assert running.address.startswith("https://127.0.0.1:")
        running.wait_ready(verify=str(cert))
        assert requests.get(f"{running.address}/healthz", timeout=5, verify=str(cert)).text == "ok\n"
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(f"{running.address}/healthz", timeout=5)


@pytest.mark.parametrize(
    ("options", "keys", "told"),
    [
        (["--host", "0.0.0.0", "--plain-http"], False, "there is no key yet"),
        (["--host", "0.0.0.0"], True, "neither|would cross the network in clear"),
        (["--model", "x"], False, "write NAME=MODEL"),
        (["--config", "nowhere.yaml"], False, "nowhere.yaml"),
    ],
)
def test_an_unsafe_or_mistaken_start_is_refused(tmp_path: Path, options: list[str], keys: bool, told: str) -> None:
    home = tmp_path / "server"
    if keys:
        make_key(home)
    done = subprocess.run(
        [sys.executable, "-m", "ascent", "serve", "--port", "0", "--jobs", "0", *options],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={"PATH": "/usr/bin", "ASCENT_SERVER_HOME": str(home), "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(told, done.stderr), done.stderr


def test_a_taken_port_is_named(server: Served, tmp_path: Path) -> None:
    port = server.address.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "ascent", "serve", "--port", port, "--jobs", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin", "ASCENT_SERVER_HOME": str(tmp_path / "server"), "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2 and f"127.0.0.1:{port}" in done.stderr


def test_a_model_that_is_not_there_keeps_the_server_from_being_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "server", ["--model", "x=no-such-model", "--jobs", "0"]) as running:
        until = time.monotonic() + 20
        while (found := requests.get(f"{running.address}/readyz", timeout=5)).text == "loading models\n":
            assert time.monotonic() < until
            time.sleep(0.05)
        assert found.status_code == 503 and "no-such-model" in found.text


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_clients_that_leave_take_nothing_along(server: Served, key: NewKey, count: int) -> None:
    """Streams that are cut after a few bytes; then nothing runs, nothing waits, and the next answer comes."""

    def leave(number: int) -> None:
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=10) as link:
            body = b'{"model":"tiny","stream":true,"max_tokens":200,"messages":[{"role":"user","content":"a"}]}'
            link.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                + f"authorization: Bearer {key.bearer}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                + body[: len(body) if number % 5 else number % len(body)]
            )
            if number % 3 and number % 5:
                link.recv(64)

    for begin in range(0, count, 12):
        threads = [threading.Thread(target=leave, args=(number,)) for number in range(begin + 1, begin + 13)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    until = time.monotonic() + 20
    while not all(f'ascent_engine_{what}{{engine="tiny"}} 0.0' in page(server) for what in ("running", "waiting")):
        assert time.monotonic() < until, page(server)
        time.sleep(0.05)
    assert say(server, key)["stopReason"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_the_systemd_unit_is_one(tmp_path: Path) -> None:
    unit = tmp_path / "ascent.service"
    text = (Path(__file__).parents[2] / "deploy" / "ascent.service").read_text()
    unit.write_text(text.replace("/opt/ascent/.venv/bin/ascent", str(Path(sys.executable).parent / "ascent")))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not [line for line in done.stderr.splitlines() if "ascent.service" in line], (
        done.stderr
    )


def page(server: Served) -> str:
    return requests.get(f"{server.address}/metrics", timeout=5).text


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, secret = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert, secret
