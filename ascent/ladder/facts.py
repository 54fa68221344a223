"""The facts of a report: what `report.json` holds and `report.html` shows, gathered from a run folder."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ascent.ladder.before import TECHNIQUES
from ascent.ladder.priors import NOTES, SOURCE, needs
from ascent.ladder.runs import (
    USECASE,
    ClimbRecord,
    StageRecord,
    read_climb,
    read_metrics,
    read_run_card,
    read_stage_report,
)
from ascent.ladder.summary import summarise
from ascent.ladder.usecase import KINDS, UseCase
from ascent.records import Episode, Record, Report, Task
from ascent.records.errors import Corrupt

SAMPLED_ERRORS = 10
CURVE_POINTS = 300
SAME = 0.01
"""Numbers closer than 1 % are not marked as different."""

Json = dict[str, Any]


def gather(run_folder: Path) -> Json:
    """Read a run folder and return its facts as plain JSON values.

    Raises:
        BadInput: the folder holds no climb.
        Corrupt: a file in it does not fit its schema or is missing.
    """
    climb, usecase = read_climb(run_folder), read_usecase(run_folder)
    reports = {stage.name: read_stage_report(run_folder, stage) for stage in climb.stages}
    measured = {name: report for name, report in reports.items() if report is not None}
    champion = champion_stage(climb)
    tasks, note = read_tasks(run_folder, measured.values())
    stages = [stage_facts(run_folder, climb, stage, reports[stage.name], usecase) for stage in climb.stages]
    champion_before: str | None = None
    for stage in stages:
        stage["against"] = champion_before
        if stage["after"] and stage["after"]["decision"] == "GO":
            champion_before = stage["name"]
    facts: Json = {
        "schema_version": 1,
        "use_case": use_case_facts(climb, usecase),
        "run": {
            "id": run_folder.resolve().name,
            "seed": climb.seed,
            "started": climb.started,
            "finished": climb.finished,
            "seconds": sum(stage.seconds for stage in climb.stages),
            "cost": sum(stage.cost for stage in climb.stages),
            "currency": usecase.costs.currency,
        },
        "champion": champion,
        "stages": stages,
        "metrics": metric_facts(measured, usecase),
        "items": item_facts(stages, measured, tasks),
        "errors": error_facts(measured.get(champion or ""), usecase, tasks, climb.seed),
        "items_note": note,
        "data": [source.model_dump(exclude={"schema_version"}) for source in climb.data],
        "claims": {"source": SOURCE, "notes": list(NOTES)},
        "commands": list(climb.commands),
        "machine": climb.machine,
        "versions": climb.versions,
    }
    facts["summary"] = summarise(facts)
    shown: Json = plain(facts)
    return shown


def read_usecase(run_folder: Path) -> UseCase:
    """Read the use case as it was when the climb began."""
    file = run_folder / USECASE
    try:
        return UseCase.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise Corrupt(f"{file} is missing; run the climb again with --resume") from None
    except ValueError as error:
        raise Corrupt(f"{file} is not a valid use case: {error}") from error


def champion_stage(climb: ClimbRecord) -> str | None:
    """Return the name of the champion's stage, whether the record names the stage or its model."""
    named = {stage.name for stage in climb.stages}
    if climb.champion in named:
        return climb.champion
    owners = [stage.name for stage in climb.stages if stage.model is not None and stage.model == climb.champion]
    return owners[0] if owners else None


def read_tasks(run_folder: Path, reports: Iterable[Report]) -> tuple[dict[str, Task], str]:
    """Return the test tasks by id, or none and the reason why inputs and labels cannot be shown."""
    source = next((report.data for report in reports), None)
    if source is None:
        return {}, "No model was measured."
    from ascent.customize.data.load import load_tasks  # loads readers that a run without reports never needs
    from ascent.records.errors import AscentError

    for base in (run_folder.resolve().parents[1], Path()):
        file = base / source.path
        if not file.is_file():
            continue
        try:
            loaded = load_tasks(file)
        except AscentError as error:
            return {}, f"The test data cannot be read any more: {error}"
        if loaded.source.sha256 == source.sha256:
            return {task.id: task for task in loaded}, ""
        return {}, f"{source.path} changed after it was measured, so inputs and labels are not shown."
    return {}, f"{source.path} is no longer there, so inputs and labels are not shown."


def use_case_facts(climb: ClimbRecord, usecase: UseCase) -> Json:
    """Return what was asked for."""
    primary = usecase.metrics.primary
    return {
        "name": usecase.name,
        "task": usecase.task,
        "risk": usecase.risk,
        "model": climb.model,
        "primary": primary.name,
        "target": primary.target,
        "guards": [guard.model_dump() for guard in usecase.metrics.guards],
        "thresholds": usecase.thresholds.model_dump(),
        "definition": json.loads(usecase.model_dump_json(exclude_defaults=True)),
    }


def stage_facts(
    run_folder: Path, climb: ClimbRecord, stage: StageRecord, report: Report | None, usecase: UseCase
) -> Json:
    """Return how one stage went."""
    kind = KINDS.get(stage.row, "online")
    phase, card = usecase.priors.phase(kind), read_run_card(run_folder, stage)
    estimate = report.metrics.get(usecase.metrics.primary.name) if report else None
    if estimate is not None and estimate.n == 0:
        estimate = None
    return {
        "name": stage.name,
        "row": stage.row,
        "title": TECHNIQUES[kind].capitalize(),
        "status": stage.status,
        "note": stage.note,
        "model": stage.model,
        "champion": stage.name == champion_stage(climb),
        "before": bare(stage.verdict_before),
        "after": bare(stage.verdict_after),
        "estimate": bare(estimate),
        "claimed": {
            "band": list(phase.band),
            "weeks": list(phase.weeks),
            "investment_usd": list(phase.investment_usd),
            "data": needs(phase),
        },
        "measured_on": bare(report.data) if report else None,
        "sampling": report.sampling if report else {},
        "evaluation_seconds": report.seconds if report else 0.0,
        "seconds": stage.seconds,
        "cost": stage.cost,
        "training": bare(card),
        "curves": curves(read_metrics(run_folder, stage)),
    }


def metric_facts(reports: Mapping[str, Report], usecase: UseCase) -> list[Json]:
    """Return one row per metric with the estimate of every measured stage, in the use case's order."""
    named = list(usecase.metrics.names)
    extra = sorted({name for report in reports.values() for name in report.metrics} - set(named))
    guards = {guard.name: guard for guard in usecase.metrics.guards}
    rows = []
    for name in [*named, *extra]:
        estimates = {stage: bare(report.metrics[name]) for stage, report in reports.items() if name in report.metrics}
        if not estimates:
            continue
        role = "primary" if name == usecase.metrics.primary.name else "guard" if name in guards else "component"
        guard = guards.get(name)
        rows.append(
            {
                "name": name,
                "role": role,
                "direction": guard.direction if guard else "higher",
                "margin": guard.margin if guard else None,
                "limit": guard.limit if guard else None,
                "estimates": estimates,
            }
        )
    return rows


def item_facts(stages: list[Json], reports: Mapping[str, Report], tasks: Mapping[str, Task]) -> Json:
    """Return the items that some stage fixed or broke, each with every stage's answer."""
    wanted: dict[str, None] = {}
    for stage in stages:
        for change in (stage["after"] or {}).get("changes", [])[:1]:
            wanted.update(dict.fromkeys([*change["fixed"], *change["broken"]]))
    answers = {name: {item.task_id: item for item in report.items} for name, report in reports.items()}
    return {
        item: {
            **question(tasks.get(item), next((a[item] for a in answers.values() if item in a), None)),
            "answers": {
                name: answer(episodes[item], tasks.get(item)) for name, episodes in answers.items() if item in episodes
            },
        }
        for item in wanted
    }


def error_facts(report: Report | None, usecase: UseCase, tasks: Mapping[str, Task], seed: int) -> Json:
    """Return a seeded sample of the items that a model got wrong, and how many there are."""
    if report is None:
        return {"total": 0, "seed": seed, "items": []}
    primary = usecase.metrics.primary.name
    wrong = sorted(item for item, value in report.values(primary).items() if value < 1)
    chosen = sorted(random.Random(seed).sample(wrong, min(SAMPLED_ERRORS, len(wrong))))
    episodes = {item.task_id: item for item in report.items}
    return {
        "total": len(wrong),
        "seed": seed,
        "items": [
            {
                "id": item,
                **question(tasks.get(item), episodes[item]),
                "answer": answer(episodes[item], tasks.get(item)),
            }
            for item in chosen
        ],
    }


def question(task: Task | None, episode: Episode | None) -> Json:
    """Return what was asked and what is right; without the task, the last turn the model saw."""
    if task is not None:
        return {"input": task.input, "expected": task.expected}
    turns = [turn for turn in episode.messages if turn.role == "user"] if episode else []
    return {"input": {"prompt": turns[-1].content} if turns else {}, "expected": None}


def answer(episode: Episode, task: Task | None) -> Json:
    """Return what a model answered, the failed grades, and the components that differ from what is right."""
    expected = task.expected if task and task.expected else {}
    output = episode.output if isinstance(episode.output, dict) else None
    differing = [key for key, value in expected.items() if output is not None and not same(output.get(key), value)]
    grades = {score.name: score.value for score in episode.scores if score.value is not None}
    unscored = {score.name: str(score.unscored) for score in episode.scores if score.unscored}
    return {
        "text": episode.text,
        "output": output,
        "differs": differing,
        "grades": grades,
        "unscored": unscored,
        "error": episode.error,
    }


def same(one: Any, other: Any) -> bool:
    """Say whether two component values are equal, numbers within 1 %."""
    numbers = (int, float)
    if isinstance(one, numbers) and isinstance(other, numbers) and not isinstance(one, bool):
        return math.isclose(one, other, rel_tol=SAME)
    return bool(one == other)


def curves(steps: Iterable[Json]) -> dict[str, list[list[float]]]:
    """Return metric → [[step, value], ...], thinned to `CURVE_POINTS` by averaging neighbours."""
    found: dict[str, list[list[float]]] = {}
    for number, row in enumerate(steps, 1):
        step = float(row.get("step", number))
        for name, value in row.items():
            usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if usable and name not in ("step", "seconds"):
                found.setdefault(name, []).append([step, float(value)])
    return {name: thinned(points) for name, points in found.items()}


def thinned(points: list[list[float]]) -> list[list[float]]:
    """Return at most `CURVE_POINTS` points, each the mean of its neighbours; the steps stay in order."""
    if len(points) <= CURVE_POINTS:
        return points
    edges = [round(i * len(points) / CURVE_POINTS) for i in range(CURVE_POINTS + 1)]
    parts = [points[start:end] for start, end in itertools.pairwise(edges)]
    return [[part[-1][0], sum(point[1] for point in part) / len(part)] for part in parts]


def bare(record: Record | None) -> Json | None:
    """Return a record as plain values without its schema version."""
    return without_version(json.loads(record.to_json())) if record is not None else None


def without_version(value: Any) -> Any:
    """Drop `schema_version` keys at every depth."""
    if isinstance(value, dict):
        return {key: without_version(inner) for key, inner in value.items() if key != "schema_version"}
    return [without_version(inner) for inner in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Return a value that strict JSON can hold: not-a-number and infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
