"""SIGKILL of the whole server, and of its worker, in each phase of a customization job: the job ends once, whole."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from wire.bedrock_house import QUICK, trees
from wire.served import Served, make_key, serving

from ascent.inference.convert import import_model
from ascent.inference.registry import Registry
from ascent.inference.store import Store
from ascent.jobs.ledger import Ledger
from ascent.jobs.prices import PriceList
from ascent.jobs.queue import Queue
from ascent.jobs.specs import Job
from ascent.observe.database import open_database
from ascent.serve.keys import NewKey
from ascent.serve.kinds.customize import PHASES

PATIENCE_S = 120.0


class House:
    """A server's home that outlives its servers, and what an outsider can read of it."""

    def __init__(self, folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ASCENT_HOME", str(folder / "store"))
        self.folder, self.home = folder, folder / "store" / "server"
        import_model(tiny_model, "tiny", Store())
        self.key: NewKey = make_key(self.home)
        self.database = open_database(self.home / "ascent.db")
        self.queue = Queue(self.database, self.home / "jobs")

    def serving(self, *options: str) -> AbstractContextManager[Served]:
        """Start a server with one slot for jobs, or with other options."""
        return serving(self.home, options or ("--jobs", "1"))

    def customize(self, server: Served) -> str:
        """Create a fine-tuning job through boto3; returns its id."""
        rows = {"train": trees(16), "validation": trees(24, begin=3)}
        for name, found in rows.items():
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        answer = server.client("bedrock", self.key).create_model_customization_job(
            jobName="trees-job",
            customModelName="trees",
            roleArn="arn:aws:iam::000000000000:role/none",
            baseModelIdentifier="tiny",
            trainingDataConfig={"s3Uri": (self.folder / "train.jsonl").as_uri()},
            validationDataConfig={"validators": [{"s3Uri": (self.folder / "validation.jsonl").as_uri()}]},
            outputDataConfig={"s3Uri": (self.folder / "out").as_uri()},
            hyperParameters={**QUICK, "epochCount": "10", "checkpointEvery": "5"},
        )
        return str(answer["jobArn"].rpartition("/")[2])

    def wait(self, id: str, reached: Callable[[Job], bool]) -> Job:
        """Look at a job, many times a second, until it is where it should be."""
        until = time.monotonic() + PATIENCE_S
        while not reached(job := self.queue.get(id)):
            assert job.status not in ("failed", "stopped"), job.message
            assert time.monotonic() < until, job
            time.sleep(0.005)
        return job

    def whole(self, id: str) -> None:
        """The job is completed, did every step once, is charged once for each, and registered one version."""
        self.wait(id, lambda job: job.status == "completed")
        job = self.queue.get(id)
        steps = [json.loads(line)["step"] for line in (job.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) == job.result["steps"]
        versions = Registry(self.database, Store()).versions("trees", "ann")
        assert [version.id for version in versions] == [job.result["version"]]
        charged = Ledger(self.database, PriceList()).totals("ann", by="job")
        assert sum(total.training_tokens for total in charged) == job.result["tokens"]


@pytest.fixture
def house(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, tiny_model, monkeypatch)


def kill_server(server: Served) -> None:
    """What the machine's owner may do at any moment."""
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()


def kill_worker(server: Served) -> None:
    """End the job worker alone, and whatever it was just doing."""
    [worker] = [
        child for child in psutil.Process(server.process.pid).children() if "ascent.jobs.worker" in child.cmdline()
    ]
    worker.kill()


def test_a_job_in_line_outlives_its_server(house: House) -> None:
    with house.serving("--jobs", "0") as server:
        server.wait_ready()
        id = house.customize(server)
        kill_server(server)
    with house.serving() as server:
        house.whole(id)


@pytest.mark.parametrize(
    "phase", ["training", *(pytest.param(p, marks=pytest.mark.slow) for p in PHASES if p != "training")]
)
def test_a_killed_server_takes_up_its_job_again(house: House, phase: str) -> None:
    with house.serving() as server:
        server.wait_ready()
        id = house.customize(server)
        house.wait(id, lambda job: job.phase == phase or job.status == "completed")
        kill_server(server)
    with house.serving() as server:
        house.whole(id)
        server.wait_ready()
        models = server.client("bedrock", house.key).list_custom_models()["modelSummaries"]
        assert [model["modelName"] for model in models] == ["trees"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_worker_is_started_again(house: House, phase: str) -> None:
    with house.serving() as server:
        server.wait_ready()
        id = house.customize(server)
        house.wait(id, lambda job: job.phase == phase or job.status == "completed")
        kill_worker(server)
        house.whole(id)
