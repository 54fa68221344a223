"""The run folder of a climb: its records and where each file lies.

runs/<run id>/
  usecase.json              the use case as it was
  climb.json                a `ClimbRecord`, rewritten after every step
  reports/<stage>-<sha>.json    one `Report` per measured model
  stages/<stage>/run.json       the `RunCard` of a trained stage
  stages/<stage>/metrics.jsonl  one line per training step
  report.html, report.json
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from ascent.evaluate.log import read_report
from ascent.records import DataSource, Record, Report, RunCard, Verdict
from ascent.records.errors import BadInput, Corrupt
from ascent.records.files import read_jsonl

CLIMB, USECASE, METRICS = "climb.json", "usecase.json", "metrics.jsonl"


class StageRecord(Record):
    """What became of one stage. `report` and `run_card` are relative to the run folder."""

    model_config = ConfigDict(extra="ignore")

    name: str
    row: str
    status: str = "waiting"
    verdict_before: Verdict | None = None
    verdict_after: Verdict | None = None
    report: str | None = None
    run_card: str | None = None
    model: str | None = None
    seconds: float = 0.0
    cost: float = 0.0
    note: str = ""


class ClimbRecord(Record):
    """A climb: what was climbed, with what, and how it ended. `champion` names a stage or its model."""

    model_config = ConfigDict(extra="ignore")

    use_case: str
    model: str
    seed: int = 0
    started: str = ""
    finished: str | None = None
    champion: str | None = None
    stages: tuple[StageRecord, ...] = ()
    data: tuple[DataSource, ...] = ()
    commands: tuple[str, ...] = ()
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


def read_climb(run_folder: Path) -> ClimbRecord:
    """Read `climb.json` of a run folder.

    Raises:
        BadInput: the folder holds no climb.
        Corrupt: the file does not fit its schema.
    """
    file = run_folder / CLIMB
    if not file.is_file():
        raise BadInput(f"{run_folder} holds no {CLIMB}; give the folder of one run, such as DIR/runs/<run id>")
    return ClimbRecord.from_json(file.read_bytes())


def read_stage_report(run_folder: Path, stage: StageRecord) -> Report | None:
    """Read the measurement of a stage; None when it was never measured. Raises `Corrupt` when it was tampered with."""
    if stage.report is None:
        return None
    file = run_folder / stage.report
    if not file.is_file():
        raise Corrupt(f"{file} is named in {CLIMB} and missing; run the climb again with --resume")
    return read_report(file)


def read_run_card(run_folder: Path, stage: StageRecord) -> RunCard | None:
    """Read how a stage was trained; None when it was not trained."""
    file = run_folder / (stage.run_card or f"stages/{stage.name}/run.json")
    return RunCard.from_json(file.read_bytes()) if file.is_file() else None


def read_metrics(run_folder: Path, stage: StageRecord) -> Iterator[dict[str, Any]]:
    """Yield the training steps of a stage; nothing when there are none."""
    yield from read_jsonl(run_folder / "stages" / stage.name / METRICS)
