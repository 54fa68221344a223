"""The control plane on a store of its own, its jobs run in this process, and every answer held against botocore."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import botocore.session
from botocore.validate import ParamValidator

from ascent.inference.convert import import_model
from ascent.inference.registry import Registry
from ascent.inference.store import Store
from ascent.jobs.child import explain, load_function
from ascent.jobs.context import JobContext
from ascent.jobs.ledger import Ledger
from ascent.jobs.prices import PriceList
from ascent.jobs.queue import Queue
from ascent.observe.database import open_database
from ascent.serve.kinds import KINDS
from ascent.serve.models import Models
from ascent.serve.services.bedrock import Bedrock
from ascent.serve.wire.authenticate import Caller

MODEL = botocore.session.get_session().get_service_model("bedrock")
OPERATIONS = {botocore.xform_name(name): MODEL.operation_model(name) for name in MODEL.operation_names}
WORDS = ["oak", "elm", "ash", "fir", "yew", "bay", "box", "fig"]
QUICK = {"learningRate": "0.01", "batchSize": "4", "loraRank": "4", "precision": "fp32", "tokenBudget": "128"}


def caller(owner: str = "ann", *scopes: str) -> Caller:
    return Caller(owner, f"AKIA{owner.upper()}", f"{owner}-key", frozenset(scopes or ("*",)))


class House:
    """One server's parts. `work()` runs what is in line, as a worker's child would, in this process."""

    def __init__(self, folder: Path, tiny_model: Path) -> None:
        self.folder = folder
        self.store = Store()
        self.engine = open_database(folder / "home" / "server" / "ascent.db")
        self.queue = Queue(self.engine, folder / "home" / "server" / "jobs")
        self.registry = Registry(self.engine, self.store)
        self.ledger = Ledger(self.engine, PriceList())
        self.models = Models(self.store)
        self.bedrock = Bedrock(
            self.queue, self.registry, self.models, self.store, self.ledger, folder / "home" / "server"
        )
        self.models.route = self.bedrock.deployer.route
        import_model(tiny_model, "tiny", self.store)

    def call(self, operation: str, who: Caller | None = None, **request: Any) -> dict[str, Any]:
        """Call an operation; request and answer must be what botocore's model says."""
        model = OPERATIONS[operation]
        if model.input_shape is not None:
            report = ParamValidator().validate(request, model.input_shape)
            assert not report.has_errors(), report.generate_report()
        answer = getattr(self.bedrock, operation)(request, who or caller())
        report = ParamValidator().validate(answer, model.output_shape)
        assert not report.has_errors(), report.generate_report()
        assert not answer.keys() - model.output_shape.members.keys()
        return answer

    def work(self, *, break_in: str | None = None, stop: Callable[[JobContext], None] | None = None) -> None:
        """Run every job in line. `break_in` raises when that phase begins, as if the process were killed there."""
        while (lease := self.queue.claim("test")) is not None:
            job = lease.job
            state: dict[str, Any] = {"phase": "", "done": 0, "total": None}

            def send(event: dict[str, Any], lease: Any = lease, state: dict[str, Any] = state) -> None:
                state |= {name: event[name] for name in ("phase", "done", "total")}
                self.queue.report(lease, **state)
                if event["phase"] == break_in and event["total"] is None:
                    raise Killed

            context = JobContext(job.id, job.owner, job.name, job.payload, job.folder, lease.number, send)
            if stop is not None:
                stop(context)
            try:
                result = load_function(KINDS[job.kind])(context)
            except Killed:
                self.queue.release(lease, "killed")
                return
            except Exception as error:
                ended = explain(error)
                if ended["outcome"] == "interrupted":
                    self.queue.release(lease, ended["message"])
                    return
                self.queue.fail(lease, ended["message"], retry=ended.get("retry", False))
            else:
                self.queue.finish(lease, json.loads(json.dumps(result)))

    def put(self, name: str, rows: list[Any] | str) -> str:
        """Write a data file; returns its address."""
        file = self.folder / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(text, encoding="utf-8")
        return f"file://{file}"

    @property
    def out(self) -> str:
        """The address of a folder for results."""
        return f"file://{self.folder / 'out'}"

    def customize(self, who: Caller | None = None, **changes: Any) -> str:
        """Create a fine-tuning job on trees; returns its ARN."""
        request = {
            "jobName": "trees-job",
            "customModelName": "trees",
            "roleArn": "arn:aws:iam::000000000000:role/none",
            "baseModelIdentifier": "tiny",
            "trainingDataConfig": {"s3Uri": self.put("trees.jsonl", trees(16))},
            "validationDataConfig": {"validators": [{"s3Uri": self.put("validation.jsonl", trees(24, begin=3))}]},
            "outputDataConfig": {"s3Uri": self.out},
            "hyperParameters": {**QUICK, "epochCount": "3"},
        }
        given = {name: value for name, value in (request | changes).items() if value is not None}
        return str(self.call("create_model_customization_job", who, **given)["jobArn"])

    def job(self, arn: str) -> dict[str, Any]:
        return self.call("get_model_customization_job", jobIdentifier=arn)

    def import_folder(self, name: str) -> dict[str, Any]:
        return {"s3DataSource": {"s3Uri": f"file://{self.folder / name}"}}


class Killed(BaseException):
    """What stands for SIGKILL."""


def trees(count: int, begin: int = 0) -> list[dict[str, str]]:
    """Bedrock's own rows: tree number n has the name of its number modulo eight."""
    numbers = range(begin, begin + count)
    return [{"prompt": f"Name tree {n}.", "completion": f"{WORDS[n % 8]} tree"} for n in numbers]


def soon() -> datetime:
    return datetime.now(UTC)
