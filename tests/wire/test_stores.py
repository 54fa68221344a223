"""Jobs whose data lie in an object store: an S3 server on loopback, and the real server with its worker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from laws.helpers import write_tiny_model
from moto.server import ThreadedMotoServer
from wire.served import make_key, serving

from ascent.inference.convert import import_model
from ascent.inference.store import Store
from ascent.records.errors import BadInput, Unavailable
from ascent.serve.kinds.places import Rules, fetch, fetch_all, put

BUCKET = "directions"


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A store with an empty bucket; the environment that leads to it, which is this process's too."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    s3().create_bucket(Bucket=BUCKET)
    yield found
    server.stop()


def s3() -> Any:
    """An unmodified boto3 client of the store."""
    return boto3.client("s3", region_name="us-east-1")


def test_files_come_from_a_store_and_go_there(variables: dict[str, str], tmp_path: Path) -> None:
    for name in ("a.jsonl", "deep/b.jsonl", "notes.txt"):
        s3().put_object(Bucket=BUCKET, Key=f"in/{name}", Body=name.encode() * 3)
    one = fetch(f"s3://{BUCKET}/in/a.jsonl", tmp_path / "one", Rules(), name="train")
    assert one.path.read_text() == "a.jsonl" * 3 and one.size == 21
    found = fetch_all(f"s3://{BUCKET}/in/", tmp_path / "all", Rules(), suffixes=(".jsonl",))
    assert [each.path.relative_to(tmp_path / "all").as_posix() for each in found] == ["a.jsonl", "deep/b.jsonl"]
    put(f"s3://{BUCKET}/out", {"x/a.jsonl": one.path}, Rules())
    assert s3().get_object(Bucket=BUCKET, Key="out/x/a.jsonl")["Body"].read() == one.path.read_bytes()
    with pytest.raises(BadInput, match="is a folder"):
        fetch(f"s3://{BUCKET}/in", tmp_path / "one", Rules())
    with pytest.raises(BadInput, match="nothing lies at"):
        fetch(f"s3://{BUCKET}/missing.jsonl", tmp_path / "one", Rules())
    with pytest.raises((BadInput, Unavailable), match=r"nothing lies at|cannot be reached") as caught:
        fetch("s3://no-such-bucket/a.jsonl", tmp_path / "one", Rules())
    assert "\n" not in str(caught.value)


def test_a_batch_in_a_store_is_answered_into_it(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "home"))
    import_model(write_tiny_model(tmp_path / "tiny"), "tiny", Store())
    turn = {"messages": [{"role": "user", "content": [{"text": "Name a tree."}]}], "inferenceConfig": {"maxTokens": 4}}
    rows = "".join(json.dumps({"recordId": f"R{n}", "modelInput": turn}) + "\n" for n in range(100))
    s3().put_object(Bucket=BUCKET, Key="team/in/batch.jsonl", Body=rows.encode())
    home = tmp_path / "home" / "server"
    key = make_key(home)
    settings = {
        "ASCENT_SERVER_DATA": json.dumps([f"s3://{BUCKET}/team"]),
        "ASCENT_SERVER_JOBS__ENVIRONMENT": json.dumps(sorted(variables)),
    }

    def submit(bedrock: Any, place: str) -> str:
        job = bedrock.create_model_invocation_job(
            jobName="batch",
            roleArn="arn:aws:iam::000000000000:role/none",
            modelId="tiny",
            modelInvocationType="Converse",
            inputDataConfig={"s3InputDataConfig": {"s3Uri": place}},
            outputDataConfig={"s3OutputDataConfig": {"s3Uri": f"s3://{BUCKET}/team/out/"}},
        )
        return str(job["jobArn"])

    with serving(home, ["--jobs", "1"], environment=settings) as server:
        server.wait_ready()
        bedrock = server.client("bedrock", key)
        for elsewhere in (f"s3://{BUCKET}/others/batch.jsonl", (tmp_path / "batch.jsonl").as_uri()):
            with pytest.raises(ClientError, match=f"s3://{BUCKET}/team, by `data`"):
                submit(bedrock, elsewhere)
        job = submit(bedrock, f"s3://{BUCKET}/team/in/batch.jsonl")
        until = time.monotonic() + 120
        while (found := bedrock.get_model_invocation_job(jobIdentifier=job))["status"] not in ("Completed", "Failed"):
            assert time.monotonic() < until, server.log.read_text()[-2000:]
            time.sleep(0.3)
    assert found["status"] == "Completed", found.get("message")
    written = s3().get_object(Bucket=BUCKET, Key=f"team/out/{job.rpartition('/')[2]}/batch.jsonl.out")["Body"].read()
    assert [json.loads(line)["recordId"] for line in written.splitlines()] == [f"R{n}" for n in range(100)]
