"""Measure any model on a data file of a use case, with the prompt that fits the model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ascent.inference.engines.named import remote_address
from ascent.ladder.runs import CLIMB, read_climb
from ascent.ladder.usecase import UseCase, load_usecase
from ascent.ladder.workspace import open_tasks
from ascent.records import Report
from ascent.records.errors import UnknownName
from ascent.records.files import sha256_file, write_atomic

if TYPE_CHECKING:
    from ascent.customize.data import Loaded
    from ascent.customize.recipes import HarnessSpec
    from ascent.evaluate.selective import Abstention
    from ascent.evaluate.suite import Attempt
    from ascent.inference.engine import Engine
    from ascent.records import Task

MARK = "stage.json"
"""Lies in the folder of a tuned model and names the use case and stage that it was tuned for."""


@dataclass(frozen=True)
class Candidate:
    """A model to measure. `tuned` tells whether it was tuned for this use case and expects the short prompt.

    An answer less confident than `abstain_below` is doubtful.
    """

    name: str
    folder: Path | None
    tuned: bool
    url: str | None = None
    abstain_below: float = 0.0


def measure(
    folder: Path,
    model: str,
    data: Path,
    *,
    stage: str | None = None,
    progress: Callable[[int], None] | None = None,
    limit: int | None = None,
    harness: HarnessSpec | None = None,
) -> Report:
    """Measure a model on `data` with the use case's graders.

    Args:
        folder: the use case.
        model: `champion` (of the latest run), a stage of it, a model of the store, a folder, or `remote:URL#model`.
        data: rows with `input` and `expected`; only what `expected` lists is graded.
        stage: the name in the report; by default the candidate's.
        progress: hears how many items are done.
        limit: measure only the first so many rows.
        harness: the environment in which each row is an episode; without one each is asked once. The environment's own
            score joins the metrics, and what it was the report's `sampling`.

    Raises:
        BadInput, UnknownName: the use case, the model, the data or the environment cannot be used.
    """
    from ascent.evaluate.pool import GraderPool
    from ascent.evaluate.suite import evaluate
    from ascent.inference.engine import Sampling

    candidate = find_candidate(folder, model)
    usecase, loaded = open_tasks(folder, data, prompted=not candidate.tuned)
    tasks = loaded.rows if limit is None else loaded.rows[:limit]
    engine = engine_of(candidate)
    with contextlib.ExitStack() as stack:
        attempt, details = (None, None) if harness is None else _episodes(harness, engine, stack)
        pool = stack.enter_context(GraderPool(usecase.path(usecase.program), list(usecase.metrics.names)))
        return evaluate(
            engine,
            tasks,
            pool,
            sampling=Sampling(max_tokens=usecase.sampling.max_tokens, temperature=0),
            data=loaded.source,
            stage=stage or candidate.name,
            on_done=progress,
            abstain_below=candidate.abstain_below,
            attempt=attempt,
            details=details,
        )


def _episodes(
    harness: HarnessSpec, engine: Engine, stack: contextlib.ExitStack
) -> tuple[Attempt, dict[str, dict[str, object]]]:
    """Open the environment until `stack` ends; return what attempts tasks in it, and what the report says of it."""
    from ascent.customize.agentic.harness import attempt_with
    from ascent.customize.agentic.multiturn import harness_of

    world = stack.enter_context(
        harness_of(harness.program, harness.environment, harness.max_turns, harness.step_seconds)
    )
    named = {"program": harness.program.name, "sha256": sha256_file(harness.program)}
    return attempt_with(world, engine), {"harness": {**harness.model_dump(mode="json"), **named}}


def find_candidate(folder: Path, model: str) -> Candidate:
    """Find what `model` means for this use case. Raises `UnknownName` when it means nothing."""
    from ascent.inference.store import Store

    usecase = load_usecase(folder)
    if (address := remote_address(model)) is not None:
        return Candidate(address[1], None, False, address[0])
    if (run := latest_run(folder)) is not None and (found := _of_run(run, model, usecase)) is not None:
        return found
    store = Store()
    try:
        place = store.resolve(model)
    except UnknownName:
        if model not in store.catalogue():
            raise
        from ascent.inference.pull import pull

        place = pull(model, store)
    return tuned_candidate(place.name if Path(model).exists() else model, place, usecase)


def engine_of(candidate: Candidate) -> Engine:
    """Start the engine that runs a candidate."""
    if candidate.url is not None:
        from ascent.inference.engines.remote import RemoteEngine

        return RemoteEngine(candidate.url, candidate.name)
    from ascent.inference.engines.torch import TorchEngine

    assert candidate.folder is not None
    return TorchEngine.load(candidate.folder, candidate.name)


def tuned_candidate(name: str, folder: Path, usecase: UseCase) -> Candidate:
    """The model in `folder`, with what it was tuned for and the threshold that goes with it."""
    file = folder / MARK
    mark = json.loads(file.read_text()) if file.is_file() else {}
    if mark.get("use_case") != usecase.name:
        return Candidate(name, folder, False)
    return Candidate(name, folder, True, abstain_below=float(mark.get("abstain_below", 0.0)))


def mark_tuned(folder: Path, usecase: UseCase, stage: str, run: str, abstain_below: float = 0.0) -> None:
    """Note in a model folder what it was tuned for, and below which confidence it hands over."""
    mark = {"use_case": usecase.name, "stage": stage, "run": run, "abstain_below": abstain_below}
    write_atomic(folder / MARK, json.dumps(mark, indent=1))


def calibrate(
    engine: Engine, usecase: UseCase, validation: Loaded[Task], progress: Callable[[int], None] | None = None
) -> Abstention:
    """Choose the confidence below which a tuned model hands over, on the use case's validation items."""
    from ascent.evaluate.pool import GraderPool
    from ascent.evaluate.selective import abstention
    from ascent.evaluate.suite import evaluate
    from ascent.inference.engine import Sampling

    assert usecase.abstain is not None
    metric = usecase.abstain.metric
    with GraderPool(usecase.path(usecase.program), [metric]) as pool:
        report = evaluate(
            engine,
            validation.rows,
            pool,
            sampling=Sampling(max_tokens=usecase.sampling.max_tokens, temperature=0),
            data=validation.source,
            stage="calibration",
            on_done=progress,
        )
    passing = [(item.confidence, score.value) for item in report.items if (score := item.score(metric)) is not None]
    known = [(sure, value) for sure, value in passing if sure is not None and value is not None]
    return abstention([sure for sure, _ in known], [value > 0 for _, value in known], usecase.abstain.risk)


def latest_run(folder: Path) -> Path | None:
    """Return the most recently started run of a use case that has a record."""
    runs = [path.parent for path in (folder / "runs").glob(f"*/{CLIMB}")]
    return max(runs, key=lambda run: (read_climb(run).started, run.name), default=None)


def _of_run(run: Path, model: str, usecase: UseCase) -> Candidate | None:
    """Find a stage, or the champion, of a run."""
    climb = read_climb(run)
    name = climb.champion if model == "champion" else model
    stage = next((stage for stage in climb.stages if name in (stage.name, stage.model) and stage.model), None)
    if stage is None:
        return None
    if stage.row == "prompt":
        from ascent.inference.store import Store

        return Candidate(climb.model, Store().resolve(climb.model), False)
    place = run / "stages" / stage.name / "model"
    return tuned_candidate(str(stage.model), place, usecase) if place.is_dir() else None
