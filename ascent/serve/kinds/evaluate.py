"""The evaluation job: one or two models on data files, by built-in graders, a use case's own, or a model as judge.

With two models the second is compared with the first on the same rows, and the verdict goes to its version in the
registry; so a model that was trained elsewhere can earn its deployment.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent.inference.engines.named import remote_address
from ascent.inference.store import Store
from ascent.records import Report, Verdict
from ascent.records.files import write_atomic
from ascent.serve.kinds import measure
from ascent.serve.kinds.home import begin, open_registry, read_state, stored_model, whole_model
from ascent.serve.kinds.places import Rules, put
from ascent.serve.kinds.rows import Rows, load_rows

if TYPE_CHECKING:
    from ascent.jobs.context import JobContext


def run(job: JobContext) -> dict[str, Any]:
    """Measure the payload's `models` on its `datasets`; write reports, and with two models a verdict, to `output`.

    Returns:
        Values by model, data set and metric, and the verdict's decision.

    Raises:
        BadData: a row is malformed.
        UnknownName: there is no such grader or model.
    """
    payload, rules = job.payload, Rules(**job.payload["rules"])
    registry = open_registry(payload)
    begin(job, "data check")
    data = [_load(part, job.folder / "data" / part["name"], rules) for part in payload["datasets"]]
    begin(job, "measuring")
    reports: list[list[Report]] = []
    for number, model in enumerate(payload["models"]):
        reports.append([])
        for part, rows in zip(payload["datasets"], data, strict=True):
            reports[-1].append(_measured(job, model, number, part, rows))
            job.progress(sum(map(len, reports)), len(data) * len(payload["models"]))
    verdict = _compared(payload, reports)
    begin(job, "registering")
    for model, found in zip(payload["models"], reports, strict=True):
        for report in found:
            if model["version"] is not None:
                registry.record(model["version"], report.model_copy(update={"items": ()}), job.owner)
    if verdict is not None and payload["models"][1]["version"] is not None:
        registry.record(payload["models"][1]["version"], verdict, job.owner)
    _write(job, reports, verdict, rules)
    values = [
        {"model": model["name"], "dataset": part["name"], "metrics": _plain(report)}
        for model, found in zip(payload["models"], reports, strict=True)
        for part, report in zip(payload["datasets"], found, strict=True)
    ]
    return {"values": values, "verdict": verdict.decision.value if verdict is not None else None}


def _load(part: Mapping[str, Any], folder: Path, rules: Rules) -> Rows:
    if not part["use_case"]:
        return load_rows(part["uri"], folder, part["name"], "tasks", rules)
    from ascent.evaluate.program import Program
    from ascent.ladder.usecase import load_usecase

    usecase = load_usecase(Path(part["use_case"]))
    program = Program.load(usecase.path(usecase.program))
    return load_rows(part["uri"], folder, part["name"], "tasks", rules, program=program, system=usecase.prompt.system)


def _measured(job: JobContext, model: Mapping[str, Any], number: int, part: Mapping[str, Any], rows: Rows) -> Report:
    kept = f"report-{number}-{part['name']}.json"
    if (known := read_state(job.folder, kept)) is not None:
        return Report.model_validate(known)
    store = Store()
    folder = whole_model(stored_model(model["model"], store), job.folder / f"whole-{number}", store)
    if judge := job.payload.get("judge"):
        judge = judge if remote_address(judge) else str(stored_model(judge, store))
        criteria, limit = part["metrics"], model["max_tokens"]
        report = measure.judged_report(folder, model["name"], model["name"], rows, criteria, judge, limit)
    elif part["use_case"] and not part["metrics"]:
        use_case = Path(part["use_case"])
        report = measure.usecase_report(
            folder, model["name"], model["name"], rows.file, use_case, tuned=model["version"] is not None
        )
    else:
        program = None
        if part["use_case"]:
            from ascent.ladder.usecase import load_usecase

            usecase = load_usecase(Path(part["use_case"]))
            program = usecase.path(usecase.program)
        report = measure.answer_report(
            folder, model["name"], model["name"], rows, part["metrics"], program, model["max_tokens"]
        )
    write_atomic(job.folder / kept, report.to_json())
    job.log(f"{model['name']} on {part['uri']}: {_plain(report)}")
    gc.collect()  # the next model needs the room
    return report


def _compared(payload: Mapping[str, Any], reports: list[list[Report]]) -> Verdict | None:
    """Compare the second model with the first on the first data set, by its first metric of which more is better."""
    from ascent.evaluate.criteria import LOWER_IS_BETTER

    if len(reports) < 2:
        return None
    part, before, after = payload["datasets"][0], reports[0][0], reports[1][0]
    if part["use_case"] and not part["metrics"]:
        from ascent.ladder.after import after_stage
        from ascent.ladder.usecase import load_usecase

        return after_stage(before, after, load_usecase(Path(part["use_case"])))
    rising = [name for name in part["metrics"] if name not in LOWER_IS_BETTER]
    return measure.judge(before, after, rising[0]) if rising else None


def _plain(report: Report) -> dict[str, Any]:
    """Return each metric with its interval; what is not finite becomes null."""
    names = ("value", "low", "high", "n")
    found = {name: {key: getattr(estimate, key) for key in names} for name, estimate in report.metrics.items()}
    return {
        name: {key: value if value == value else None for key, value in numbers.items()}
        for name, numbers in found.items()
    }


def _write(job: JobContext, reports: list[list[Report]], verdict: Verdict | None, rules: Rules) -> None:
    folder = job.folder / "output"
    files: dict[str, Path] = {}
    for number, found in enumerate(reports):
        for part, report in zip(job.payload["datasets"], found, strict=True):
            name = f"model-{number + 1}-{part['name']}.json"
            content = {"summary": _plain(report), **json.loads(report.to_json())}
            write_atomic(folder / name, json.dumps(content, ensure_ascii=False))
            files[name] = folder / name
    if verdict is not None:
        write_atomic(folder / "verdict.json", verdict.to_json(indent=1))
        files["verdict.json"] = folder / "verdict.json"
    put(job.payload["output"], {f"{job.name}/{job.id}/{name}": file for name, file in files.items()}, rules)
