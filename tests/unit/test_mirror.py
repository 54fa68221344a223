"""Runs on a real MLflow server, asked over its own REST interface what it was told of finished runs."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from ladder_runs import write_run

from ascent.cli.main import run
from ascent.ladder.mirror import mirror
from ascent.ladder.runs import read_climb, read_stage_report
from ascent.observe.metrics import MetricLog
from ascent.records.errors import BadInput, Unavailable

START_S = 120
SKILLS = {"prompt": 0.4, "sft": 0.9}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server of its own environment on loopback, its phone-home switched off."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        python = importlib.import_module("environments").python_of("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [str(python), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True)
        try:
            until = time.monotonic() + START_S
            while not _answers(address):
                assert process.poll() is None and time.monotonic() < until, (folder / "log.txt").read_text()[-2000:]
                time.sleep(0.3)
            yield address
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


def _answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=1).ok
    except requests.RequestException:
        return False


def ask(address: str, route: str, **query: Any) -> dict[str, Any]:
    found = requests.get(f"{address}/api/2.0/mlflow/{route}", params=query, timeout=10)
    assert found.ok, found.text
    answer: dict[str, Any] = found.json()
    return answer


def told(address: str, run_id: str) -> tuple[dict[str, str], dict[str, str], dict[str, float]]:
    """Parameters, tags and last metrics of a run."""
    data = ask(address, "runs/get", run_id=run_id)["run"]["data"]
    params, tags = ({row["key"]: row["value"] for row in data.get(name, ())} for name in ("params", "tags"))
    return params, tags, {row["key"]: row["value"] for row in data.get("metrics", ())}


@pytest.mark.slow
def test_a_training_run_arrives_whole_and_once(server: str, use_case: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    assert run(["train", str(use_case / "grpo.yaml"), "--out", str(place)]) == 0
    [run_id] = mirror(place, server, "trees")
    card = json.loads((place / "run.json").read_text())
    params, tags, last = told(server, run_id)
    assert (params["algorithm"], params["seed"]) == ("grpo", str(card["seed"]))
    assert tags["ascent.key"] == card["id"] and last["run/tokens"] == card["tokens"]
    rows = MetricLog.read(place / "metrics.jsonl")
    history = ask(server, "metrics/get-history", run_id=run_id, metric_key="loss")["metrics"]
    assert [(row["step"], row["value"]) for row in history] == [(row["step"], row["loss"]) for row in rows]
    files = {
        file["path"]: file["file_size"] for file in ask(server, "artifacts/list", run_id=run_id, path="model")["files"]
    }
    adapter = place / "model" / "adapter" / "adapter_model.safetensors"
    assert files["model/adapter_model.safetensors"] == adapter.stat().st_size
    [version] = ask(server, "model-versions/search", filter="name='trees-grpo'")["model_versions"]
    assert version["run_id"] == run_id
    assert mirror(place, server, "trees") == [run_id]
    assert len(ask(server, "model-versions/search", filter="name='trees-grpo'")["model_versions"]) == 1


@pytest.mark.slow
def test_a_climb_arrives_with_its_verdicts_and_intervals(server: str, tmp_path: Path) -> None:
    place = write_run(tmp_path, SKILLS)
    parent, *stages = mirror(place, server, "climbs")
    record = read_climb(place)
    assert told(server, parent)[0]["use_case"] == record.use_case
    measured = [stage for stage in record.stages if stage.report]
    assert len(stages) == len(measured) > 1
    for run_id, stage in zip(stages, measured, strict=True):
        report = read_stage_report(place, stage)
        assert report is not None
        _, tags, last = told(server, run_id)
        assert tags["mlflow.parentRunId"] == parent
        for name, estimate in report.metrics.items():
            assert [last[f"eval/{name}{end}"] for end in ("", "/low", "/high")] == pytest.approx(
                [estimate.value, estimate.low, estimate.high]
            )
        if stage.verdict_after is not None:
            assert tags["ascent.verdict.after"].startswith(stage.verdict_after.decision)
    assert mirror(place, server, "climbs") == [parent, *stages]


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    place = write_run(tmp_path, SKILLS)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(Unavailable, match=address):
            mirror(place, address)
    with pytest.raises(BadInput, match="neither"):
        mirror(tmp_path / "nowhere", address)
