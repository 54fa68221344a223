"""`ascent eval`: one model on one data file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ascent.cli.console import note, table

if TYPE_CHECKING:
    from ascent.customize.recipes import HarnessSpec
    from ascent.records import Estimate, Report


@click.command("eval")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--model",
    required=True,
    help="`champion` or a stage of the latest run, a model of the store, a model folder, the folder of an unfinished "
    "training run, or remote:URL#MODEL.",
)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Rows with `input` and `expected`; only what `expected` lists is graded.",
)
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write the whole report here.")
@click.option("--stage", help="What to call the measurement in the report; by default, as the model.")
@click.option("--limit", type=click.IntRange(min=1), help="Measure only the first so many rows.")
@click.option(
    "--harness",
    metavar="PROGRAM:ENVIRONMENT",
    help="Run each row as an episode of several turns in this environment of this Python file.",
)
@click.option("--max-turns", default=4, show_default=True, type=click.IntRange(min=1), help="Most assistant turns.")
@click.option(
    "--step-seconds",
    default=2.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Time limit of one step of the environment.",
)
def command(
    folder: Path,
    model: str,
    data: Path,
    out: Path | None,
    stage: str | None,
    limit: int | None,
    harness: str | None,
    max_turns: int,
    step_seconds: float,
) -> None:
    """Measure a model on a data file with the graders of the use case in DIR, or of the use-case file DIR.

    Answers are sampled greedily. The interval beside each metric is at 95 %. With --harness, what the environment
    itself scores is the metric `environment`, and an episode that was lost, also when tried again, is unscored.
    """
    from ascent.cli.engines import model_folder, pinned
    from ascent.inference.store import Store
    from ascent.ladder.measure import measure
    from ascent.observe import Progress

    store = Store()
    if model in store.catalogue():
        model_folder(model, store)
    model = pinned(model, store)
    total = limit if limit is not None else _rows(data)
    spec = None if harness is None else harness_named(harness, max_turns, step_seconds)
    with Progress("measuring", total) as progress:
        report = measure(folder, model, data, stage=stage, progress=progress.advance, limit=limit, harness=spec)
    headers = ("metric", "value", "95 % interval", "items", "unscored", "not applicable")
    table(headers, [_row(estimate) for estimate in report.metrics.values()])
    if out is not None:
        _write(report, out)
        note(f"wrote {out}")


def harness_named(text: str, max_turns: int, step_seconds: float) -> HarnessSpec:
    """Read `PROGRAM:ENVIRONMENT`. Raises `BadInput` when it is not of that form."""
    from ascent.customize.recipes import HarnessSpec
    from ascent.records.errors import BadInput

    program, colon, environment = text.rpartition(":")
    if not (program and colon and environment):
        raise BadInput(f"--harness {text!r} is not PROGRAM:ENVIRONMENT, such as tools.py:Clerk")
    return HarnessSpec(program=Path(program), environment=environment, max_turns=max_turns, step_seconds=step_seconds)


def summary(report: Report) -> dict[str, Any]:
    """Return what was measured in short: the model, the data, and every metric with its interval."""
    names = ("value", "low", "high", "n", "unscored", "not_applicable")
    return {
        "model": report.model,
        "stage": report.stage,
        "data": {"path": report.data.path, "rows": report.data.rows, "sha256": report.data.sha256},
        "items": len(report.items),
        "seconds": round(report.seconds, 3),
        "metrics": {name: {key: getattr(e, key) for key in names} for name, e in report.metrics.items()},
    }


def _write(report: Report, out: Path) -> None:
    """Write the report's fields and the `summary` as one JSON object; numbers that are not finite become null."""
    from ascent.ladder.facts import plain
    from ascent.records.files import write_atomic

    content = {"summary": summary(report), **json.loads(report.to_json())}
    write_atomic(out, json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_report(path: Path) -> Report:
    """Read a report that `--json` wrote. Raises `BadInput` when the file is none."""
    from ascent.records import Report
    from ascent.records.errors import BadInput

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("summary")
        for metric in content["metrics"].values():
            metric.update({key: math.nan for key in ("value", "low", "high") if metric[key] is None})
        return Report.model_validate(content)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{path} is no report: {error}; give a file that `ascent eval --json` wrote") from error


def _row(estimate: Estimate) -> tuple[str, ...]:
    counts = (str(estimate.n), str(estimate.unscored), str(estimate.not_applicable))
    if math.isnan(estimate.value):
        return (estimate.name, "-", "-", *counts)
    return (estimate.name, f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}", *counts)


def _rows(data: Path) -> int | None:
    """Count the rows of a JSONL file for the progress line; other formats are counted when they are read."""
    if data.suffix != ".jsonl":
        return None
    with data.open("rb") as file:
        return sum(1 for line in file if line.strip())
