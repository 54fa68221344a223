"""Finished runs copied to an MLflow server: parameters, the metrics of every step, reports and models.

The run folder stays what counts; the copy may be made again at any time, and then replaces nothing and adds nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ascent.ladder.runs import CLIMB, METRICS, ClimbRecord, StageRecord, read_climb, read_run_card, read_stage_report
from ascent.observe.metrics import MetricLog
from ascent.records import Report, RunCard
from ascent.records.errors import BadInput, MissingExtra, Unavailable

KEY = "ascent.key"
"""The tag by which a run that was copied before is found again."""
RUN, MODEL = "run.json", "model"
AT_ONCE = 500  # metrics of one request; the server takes at most 1000
MOST_PARAMS = 100  # parameters of one request
LONGEST = 6000  # characters of a parameter


def mirror(folder: Path, address: str, experiment: str = "ascent", *, models: bool = True) -> list[str]:
    """Copy a training run or a climb to the MLflow server at `address` and return the MLflow runs' ids.

    A climb becomes one run with a nested run for each stage that was trained or measured. With `models` each trained
    adapter (the whole model where all weights were trained) is uploaded and becomes a version of a registered model
    called `<experiment>-<stage or row>`.

    Raises:
        BadInput: the folder holds neither a finished training run nor a climb.
        MissingExtra: MLflow's client is not installed.
        Unavailable: the server cannot be reached or refuses; what was copied until then stays and is gone on with.
    """
    if not (folder / CLIMB).is_file() and not (folder / RUN).is_file():
        raise BadInput(
            f"{folder} holds neither {CLIMB} nor {RUN}; give the folder of a climb or of a finished training run"
        )
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise MissingExtra("mlflow", "copying runs to an MLflow server") from error
    try:
        copy = _Copy(MlflowClient(tracking_uri=address, registry_uri=address), experiment, models)
        return copy.climb(folder) if (folder / CLIMB).is_file() else [copy.training(folder)]
    except MlflowException as error:
        raise Unavailable(
            f"the MLflow server at {address} could not be written to: {error.message}; start it, or correct the "
            f"address, and run the same command again"
        ) from error


@dataclass(frozen=True)
class _Copy:
    client: Any
    experiment: str
    models: bool

    def climb(self, folder: Path) -> list[str]:
        record = read_climb(folder)
        key = f"{record.use_case}:{folder.absolute().name}:{record.started}"
        run, fresh = self._run(key, f"{record.use_case} climb", record.started, {})
        if fresh:
            self._log(run, _flat({"use_case": record.use_case, "model": record.model, "seed": record.seed}), ())
            for name in (CLIMB, "usecase.json", "report.html", "report.json"):
                if (folder / name).is_file():
                    self.client.log_artifact(run, str(folder / name))
        stages = [self._stage(folder, record, stage, key, run) for stage in record.stages]
        self.client.set_terminated(run)
        return [run, *(stage for stage in stages if stage is not None)]

    def training(self, folder: Path) -> str:
        card = RunCard.from_json((folder / RUN).read_bytes())
        run, fresh = self._run(card.id, f"{card.row} {card.id}", card.created, {"ascent.row": card.row})
        if fresh:
            self._card(run, card, MetricLog.read(folder / METRICS))
            self.client.log_artifact(run, str(folder / RUN))
            self._model(run, folder / MODEL, card.row)
        self.client.set_terminated(run)
        return run

    def _stage(self, folder: Path, record: ClimbRecord, stage: StageRecord, key: str, parent: str) -> str | None:
        card, report = read_run_card(folder, stage), read_stage_report(folder, stage)
        if card is None and report is None:
            return None
        tags = {"mlflow.parentRunId": parent, "ascent.row": stage.row, "ascent.status": stage.status}
        for verdict in (stage.verdict_before, stage.verdict_after):
            if verdict is not None:
                tags[f"ascent.verdict.{verdict.phase}"] = f"{verdict.decision}: {' '.join(verdict.reasons)}"[:LONGEST]
        run, fresh = self._run(f"{key}:{stage.name}", f"{record.use_case} {stage.name}", record.started, tags)
        if fresh:
            place = folder / "stages" / stage.name
            if card is not None:
                self._card(run, card, MetricLog.read(place / METRICS))
                self._model(run, place / MODEL, stage.name)
            if report is not None and stage.report is not None:
                self._log(run, {}, _measured(report))
                self.client.log_artifact(run, str(folder / stage.report), "reports")
        self.client.set_terminated(run)
        return run

    def _run(self, key: str, name: str, started: str, tags: Mapping[str, str]) -> tuple[str, bool]:
        """The MLflow run of a key, and whether it still has to be filled."""
        found = self.client.get_experiment_by_name(self.experiment)
        place = found.experiment_id if found is not None else self.client.create_experiment(self.experiment)
        quoted = key.replace("'", "\\'")
        for run in self.client.search_runs([place], f"tags.`{KEY}` = '{quoted}'"):
            if run.info.status == "FINISHED":
                return str(run.info.run_id), False
            self.client.delete_run(run.info.run_id)  # cut off half-way
        begun = int(datetime.fromisoformat(started).timestamp() * 1000) if started else None
        run = self.client.create_run(place, start_time=begun, tags={KEY: key, **tags}, run_name=name)
        return str(run.info.run_id), True

    def _card(self, run: str, card: RunCard, steps: Iterable[Mapping[str, Any]]) -> None:
        totals = {"steps": card.steps, "tokens": card.tokens, "seconds": card.seconds, "peak_rss_mb": card.peak_rss_mb}
        numbers = [(f"run/{name}", float(value), 0) for name, value in totals.items()]
        self._log(run, _flat(card.recipe) | {"base": card.base}, [*_stepwise(steps), *numbers])
        for name, version in card.versions.items():
            self.client.set_tag(run, f"ascent.version.{name}", version)

    def _log(self, run: str, params: Mapping[str, str], metrics: Iterable[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric, Param

        now = int(datetime.now().timestamp() * 1000)
        names = list(params)
        for begin in range(0, len(names), MOST_PARAMS):
            self.client.log_batch(run, params=[Param(n, params[n]) for n in names[begin : begin + MOST_PARAMS]])
        rows = [Metric(name, value, now, step) for name, value, step in metrics]
        for begin in range(0, len(rows), AT_ONCE):
            self.client.log_batch(run, metrics=rows[begin : begin + AT_ONCE])

    def _model(self, run: str, folder: Path, name: str) -> None:
        """Upload a model, its adapter alone where it has one, and register it."""
        if not self.models or not folder.is_dir():
            return
        from mlflow.exceptions import MlflowException

        adapter = folder / "adapter"
        self.client.log_artifacts(run, str(adapter if adapter.is_dir() else folder), MODEL)
        registered = f"{self.experiment}-{name}"
        try:
            self.client.get_registered_model(registered)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.client.create_registered_model(registered)
        source = f"{self.client.get_run(run).info.artifact_uri}/{MODEL}"
        self.client.create_model_version(registered, source, run_id=run, await_creation_for=None)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names → text, without what is empty."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)[:LONGEST]
    return found


def _stepwise(steps: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, float, int]]:
    for row in steps:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                yield name, float(value), int(row["step"])


def _measured(report: Report) -> Iterator[tuple[str, float, int]]:
    """Each metric of a report with the ends of its interval."""
    for name, estimate in report.metrics.items():
        for part, value in (("", estimate.value), ("/low", estimate.low), ("/high", estimate.high)):
            if math.isfinite(value):
                yield f"eval/{name}{part}", value, 0
