"""The customization job: check the data, train, save, measure, register. Every phase can be cut off and done again.

What a phase has finished rests in the job's folder: the data with their sha256, the run with its checkpoint, the id of
the stored model, the measurement. The registry takes one version per job, so the last phase repeats without effect.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent import __version__
from ascent.inference.store import Store
from ascent.inference.versions import Lineage
from ascent.records import DataSource, Message, ModelCard, Report, RunCard, Task, Verdict
from ascent.records.errors import Interrupted
from ascent.records.files import write_atomic
from ascent.serve.kinds import measure
from ascent.serve.kinds.home import begin, open_registry, read_state, stored_model, whole_model
from ascent.serve.kinds.hyperparameters import Settings, recipe_of, settled
from ascent.serve.kinds.places import Rules, put
from ascent.serve.kinds.rows import Rows, answers_of, check_rows, load_rows

if TYPE_CHECKING:
    from ascent.customize.recipes import Recipe
    from ascent.customize.train import TrainingData
    from ascent.inference.engine import Engine
    from ascent.inference.registry import Registry
    from ascent.jobs.context import JobContext

PHASES = ("data check", "training", "saving", "evaluating", "registering")
SAVED, MEASURED, PLANNED = "saved.json", "measured.json", "planned.json"
EVERY = 10
"""Lines about training in the log, at most, per tenth of the run."""


@dataclass(frozen=True)
class Prepared:
    """What the data check leaves: the recipe with its data, the start model, and the held-out rows."""

    recipe: Recipe
    start: Path
    data: TrainingData
    held_out: tuple[Rows, ...]


def run(job: JobContext) -> dict[str, Any]:
    """Run a customization job; see `Customization` of the bedrock service for its payload.

    Returns:
        `version` and `model` in the registry and the store, losses, the verdict, and what was planned and taken.

    Raises:
        BadData: a row is malformed; the caller's address, line and field.
        BadInput: the data or the hyperparameters do not fit the model.
        Interrupted: the job is to stop; training goes on from its checkpoint when it is started again.
    """
    payload, store = job.payload, Store()
    registry = open_registry(payload)
    begin(job, "data check")
    prepared = _prepare(job, store)
    begin(job, "training")
    card = _train(job, prepared, store)
    _stop_here(job)
    begin(job, "saving")
    model = _save(job, prepared, card, store)
    begin(job, "evaluating")
    measured = _measure(job, prepared, model)
    _stop_here(job)
    begin(job, "registering")
    version = _register(job, registry, prepared, card, model, measured)
    _write_results(job, measured)
    shutil.rmtree(job.folder / "run" / "model", ignore_errors=True)  # it is in the store
    shutil.rmtree(job.folder / "start", ignore_errors=True)
    return {
        "version": version,
        "model": model,
        "training_loss": card.final.get("loss"),
        "validation_losses": measured["losses"],
        "verdict": measured["verdict"]["decision"] if measured["verdict"] else None,
        "reasons": measured["verdict"]["reasons"] if measured["verdict"] else [],
        "steps": card.steps,
        "tokens": card.tokens,
        "seconds": card.seconds,
        "peak_mb": card.peak_rss_mb,
        "planned": read_state(job.folder, PLANNED),
    }


def _prepare(job: JobContext, store: Store) -> Prepared:
    from ascent.customize.feed import feed_of, make_training_data
    from ascent.customize.plan import plan
    from ascent.customize.recipes import SupervisedRecipe
    from ascent.evaluate.program import Program
    from ascent.inference.chat import Renderer
    from ascent.inference.decoder import DecoderConfig
    from ascent.inference.engines.torch import TorchEngine

    payload, folder = job.payload, job.folder / "data"
    rules = Rules(**payload["rules"])
    settings = Settings(**payload["settings"])
    start = whole_model(stored_model(payload["base"], store), job.folder / "start", store)
    more = _use_case_fields(payload)
    recipe = recipe_of(settings, **_data_field(settings, folder / "train.jsonl"), **more)
    feed = feed_of(recipe)
    program = Program.load(recipe.program) if recipe.program is not None else None
    shared: dict[str, Any] = {"rules": rules, "program": program, "system": recipe.system}
    train = load_rows(payload["train"], folder, "train", feed, **shared)
    after = "texts" if recipe.algorithm == "distill_sequence" else feed
    held_out = tuple(
        load_rows(uri, folder, f"validation-{number}", after, **shared)
        for number, uri in enumerate(payload["validation"], 1)
    )
    renderer, context = Renderer(start), DecoderConfig.from_folder(start).context
    for part in (train, *held_out):
        check_rows(part, renderer, recipe, _limit(settings, recipe, context))
    recipe = settled(settings, recipe, len(train.loaded))

    def teacher() -> Engine:
        place = stored_model(payload["teacher"], store)
        return TorchEngine.load(place, place.name)

    def answers(tasks: Sequence[Task]) -> list[tuple[Message, ...]]:
        assert isinstance(recipe, SupervisedRecipe)
        return answers_of(teacher, recipe, tasks, folder)

    loaded = train.loaded
    data = make_training_data(recipe, loaded.rows, (loaded.source,), answers if payload.get("teacher") else None)
    if not (job.folder / PLANNED).is_file():
        planned = plan(recipe, start, data, store=store)
        write_atomic(job.folder / PLANNED, planned.to_json())
        job.log(
            f"{len(train.loaded)} rows, {planned.steps} steps; predicted {planned.total_seconds:.0f} s and "
            f"{planned.peak_bytes / 2**20:,.0f} MiB"
        )
    return Prepared(recipe, start, data, held_out)


def _data_field(settings: Settings, file: Path) -> dict[str, Any]:
    """The recipe's field that names its data: `prompts` of an online row, `data` of the others."""
    from ascent.customize.objectives.rows import ROWS

    return {"prompts" if ROWS[settings.algorithm].kind == "online" else "data": str(file)}


def _use_case_fields(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe takes from a use case, and where its reward and its teacher come from."""
    found: dict[str, Any] = {}
    if payload.get("use_case"):
        from ascent.ladder.usecase import load_usecase

        usecase = load_usecase(Path(payload["use_case"]))
        found = {"program": str(usecase.path(usecase.program).resolve())}
        if "system" not in payload["settings"]["fields"]:
            found["system"] = usecase.prompt.system
    if payload.get("grader"):
        found["reward"] = {"grader": payload["grader"]}
    if payload.get("teacher"):
        found["teacher"] = {**payload["settings"]["fields"].get("teacher", {}), "model": payload["teacher"]}
    return found


def _limit(settings: Settings, recipe: Recipe, context: int) -> int:
    """Return how many tokens a row may have, an online row's answer included."""
    limits = [context]
    if "maxSeqLen" in settings.options:
        limits.append(int(settings.options["maxSeqLen"]))
    if "maxPromptLength" in settings.options:
        limits.append(int(settings.options["maxPromptLength"]) + int(getattr(recipe, "max_tokens", 0)))
    return min(limits)


def _train(job: JobContext, prepared: Prepared, store: Store) -> RunCard:
    from ascent.customize.plan import Plan, record_outcome
    from ascent.customize.train import train

    folder = job.folder / "run"
    card = train(prepared.recipe, prepared.start, prepared.data, folder, report=_reporter(job))
    outcome = record_outcome(Plan.from_json((job.folder / PLANNED).read_bytes()), card, folder, store=store)
    job.log(f"trained {card.steps} steps on {card.tokens:,} tokens in {card.seconds:.0f} s (errors {outcome.error})")
    job.meter("training", model=job.payload["priced_as"], training_tokens=card.tokens)
    return card


def _reporter(job: JobContext) -> Callable[[int, int, dict[str, float]], None]:
    """Return a step report that moves the progress and writes some lines about loss or reward."""

    def report(step: int, total: int, numbers: dict[str, float]) -> None:
        job.progress(step, total)
        if step in (1, total) or step % max(1, total // EVERY) == 0:
            names = [name for name in ("loss", "reward", "accuracy", "kl") if name in numbers]
            job.log(f"step {step} of {total}: " + ", ".join(f"{name} {numbers[name]:.4g}" for name in names))

    return report


def _save(job: JobContext, prepared: Prepared, card: RunCard, store: Store) -> str:
    """Put the result into the store, once: the adapter where its base is there, else the whole weights."""
    from ascent.inference.convert import inspect_folder
    from ascent.inference.registry import SOURCE

    if (saved := read_state(job.folder, SAVED)) is not None:
        return str(saved["model"])
    made = job.folder / "run" / "model"
    base = store.card(str(prepared.start)) if prepared.start.parent == store.models else None
    alone = base is not None and (made / "adapter").is_dir()
    folder = made / "adapter" if alone else made
    if not alone:
        shutil.rmtree(made / "adapter", ignore_errors=True)  # it fits no model of the store
    facts = inspect_folder(folder)
    origin = base or store.card(job.payload["base"])
    stored = store.add(
        folder,
        ModelCard(
            id=f"{job.payload['name'].lower()}-{job.id}",
            family=origin.family,
            source=f"{SOURCE}{card.id}",
            licence=origin.licence,
            sha256="",
            kind="adapter" if alone else "merged",
            parent=origin.id,
            parameters=facts.parameters,
            dtype=facts.dtype,
            context=origin.context,
            run=card.id,
        ),
    )
    write_atomic(job.folder / SAVED, json.dumps({"model": stored.name}))
    job.log(f"stored as {stored.name}")
    return stored.name


def _measure(job: JobContext, prepared: Prepared, model: str) -> dict[str, Any]:
    """Measure start and result on every held-out file; the first one's verdict counts."""
    if (known := read_state(job.folder, MEASURED)) is not None:
        return known
    found: dict[str, Any] = {"reports": [], "verdict": None, "losses": []}
    total = 2 * len(prepared.held_out)
    for number, rows in enumerate(prepared.held_out):
        pair, losses = [], []
        for step, tuned in enumerate((False, True), 1):
            report, loss = _report(job, prepared, rows, model, tuned=tuned)
            pair.append(report)
            losses.append(loss)
            job.progress(2 * number + step, total)
            job.log(f"{'after' if tuned else 'before'} training, {rows.loaded.source.path}: {_shown(report)}")
        found["losses"].append(losses[1])
        if number == 0:
            verdict = _verdict(job, rows, pair[0], pair[1])
            found["verdict"] = verdict.model_dump(mode="json")
            job.log(f"{verdict.decision.value}: {' '.join(verdict.reasons)}")
        found["reports"] += [report.model_dump(mode="json") for report in pair]
    if not prepared.held_out:
        job.log("no verdict: the job has no validation data to measure the model on")
    write_atomic(job.folder / MEASURED, json.dumps(found))
    return found


def _report(job: JobContext, prepared: Prepared, rows: Rows, model: str, *, tuned: bool) -> tuple[Report, float | None]:
    """Measure the start model or the tuned one on held-out rows; the loss is None where answers are graded."""
    from ascent.customize.feed import feed_of

    payload, recipe = job.payload, prepared.recipe
    folder, name = (job.folder / "run" / "model", model) if tuned else (prepared.start, payload["base"])
    if payload.get("use_case") and _labelled(rows):
        use_case = Path(payload["use_case"])
        return measure.usecase_report(folder, name, recipe.algorithm, rows.file, use_case, tuned=tuned), None
    if feed_of(recipe) == "tasks" and payload.get("grader"):
        graders, limit = [payload["grader"]], int(getattr(recipe, "max_tokens", 64))
        return measure.answer_report(folder, name, recipe.algorithm, rows, graders, recipe.program, limit), None
    return measure.likelihood_report(folder, name, recipe.algorithm, rows, recipe)


def _labelled(rows: Rows) -> bool:
    """Whether the rows say what is expected, so that a use case's graders can work."""
    with rows.file.open(encoding="utf-8") as file:
        return any("expected" in json.loads(line) for line in file if line.strip())


def _verdict(job: JobContext, rows: Rows, before: Report, after: Report) -> Verdict:
    """Let a use case's own gate decide, or the paired comparison of the one metric."""
    if job.payload.get("use_case") and _labelled(rows):
        from ascent.ladder.after import after_stage
        from ascent.ladder.usecase import load_usecase

        return after_stage(before, after, load_usecase(Path(job.payload["use_case"])))
    return measure.judge(before, after, next(iter(after.metrics)))


def _shown(report: Report) -> str:
    return ", ".join(f"{name} {estimate.value:.4g}" for name, estimate in report.metrics.items())


def _register(
    job: JobContext, registry: Registry, prepared: Prepared, card: RunCard, model: str, measured: Mapping[str, Any]
) -> str:
    payload = job.payload
    sources: tuple[DataSource, ...] = (*card.data, *(rows.loaded.source for rows in prepared.held_out))
    version = registry.add(
        payload["name"],
        model,
        job.owner,
        lineage=Lineage(
            method=card.row,
            recipe=card.recipe,
            data=sources,
            code=__version__,
            run=card.id,
            details={
                "versions": card.versions,
                "machine": card.machine,
                "seconds": card.seconds,
                "tokens": card.tokens,
            },
        ),
        parent=payload.get("parent"),
        base=payload["root"],
        job=job.id,
    )
    for content in measured["reports"]:
        # what was said item by item is in the job's results; the registry keeps the numbers
        registry.record(version.id, Report.model_validate(content).model_copy(update={"items": ()}), job.owner)
    if measured["verdict"]:
        registry.record(version.id, Verdict.model_validate(measured["verdict"]), job.owner)
    job.log(f"registered as {version.name}@{version.number} ({version.id})")
    return version.id


def _write_results(job: JobContext, measured: Mapping[str, Any]) -> None:
    """Write metrics as AWS lays them out, reports and verdict to the caller's output location."""
    results = job.folder / "results"
    steps = [json.loads(line) for line in (job.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [{"step_number": row["step"], "training_loss": row.get("loss"), **row} for row in steps]
    for row in rows:
        row.pop("step")
    files = {
        "training_artifacts/step_wise_training_metrics.csv": _table(rows),
        "reports.json": json.dumps(measured["reports"], ensure_ascii=False),
        "verdict.json": json.dumps(measured["verdict"], ensure_ascii=False),
    }
    losses = [{"validator": at, "validation_loss": loss} for at, loss in enumerate(measured["losses"], 1)]
    if losses:
        place = "validation_artifacts/post_fine_tuning_validation/validation/validation_metrics.csv"
        files[place] = _table(losses)
    for name, text in files.items():
        write_atomic(results / name, text)
    top = f"model-customization-job-{job.id}"
    put(job.payload["output"], {f"{top}/{name}": results / name for name in files}, Rules(**job.payload["rules"]))


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _stop_here(job: JobContext) -> None:
    """Leave between two phases when the job is to stop; what is done is kept."""
    if job.cancelled():
        raise Interrupted("stopped between two phases; what is finished is kept for the next attempt")
