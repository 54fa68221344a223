"""Hyperparameter search over any field of a recipe: Optuna proposes, `train` runs, the disk remembers.

A search is a folder: `search.json` (what is searched), `study.db` (Optuna's SQLite storage), `best.yaml`, and for each
trial `trials/NNN/` with its recipe, learning curve, run card and `trial.json`. A trial is finished when `trial.json`
is there, and is then never run again, nor are its values. Each proposal depends on the seed and the finished trials
alone, so a search that was stopped goes on to the same result.

The tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS 24 §4) proposes; the median rule (Golovin et al.
2017, Vizier §3.2.1) or Hyperband (Li et al. 2018, arXiv 1603.06560) stops trials early.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from ascent.customize.recipes import Recipe, load_recipe
from ascent.customize.space import SearchSpec, varied
from ascent.customize.yamlfile import YamlFile
from ascent.observe.metrics import MetricLog
from ascent.records import Record, digest
from ascent.records.errors import BadInput, MissingExtra, nearest
from ascent.records.files import claim_folder, sha256_file, write_atomic

if TYPE_CHECKING:
    from ascent.customize.train import TrainingData

SEARCH, STUDY, TRIAL, BEST, RECIPE = "search.json", "study.db", "trial.json", "best.yaml", "recipe.yaml"
TAIL = 0.1
"""A training metric's value is its mean over this last share of the steps, at least one: one batch is noise."""
Say = Callable[[str], None]


class TrialRecord(Record):
    """A finished trial."""

    number: int
    state: Literal["complete", "pruned"]
    value: float | None = None
    params: dict[str, Any]
    steps: int
    seconds: float
    reason: str = ""
    """Why a trial was pruned, or which earlier one it repeats."""


@dataclass(frozen=True)
class Hands:
    """What a search does through others: load a recipe's data, find its start model, and measure a trained model."""

    data: Callable[[Recipe], TrainingData]
    start: Callable[[str], Path]
    measure: Callable[[Path], float] | None = None


@dataclass(frozen=True)
class SearchResult:
    """All finished trials in their order, and the best one, if any was complete."""

    trials: tuple[TrialRecord, ...]
    best: TrialRecord | None
    folder: Path


class Pruned(Exception):
    """Raised out of the training loop to end a trial."""


def search(
    source: YamlFile[SearchSpec], recipe: Recipe, folder: Path, hands: Hands, *, resume: bool = False, say: Say = print
) -> SearchResult:
    """Finish the trials of a search in `folder`.

    Args:
        source: the search file, of `space.load_search`.
        recipe: the recipe it varies.
        folder: the search's own folder, new or empty unless `resume`.
        hands: how to load data, find models and measure.
        resume: go on with the search that `folder` holds.
        say: hears a line per trial, and Optuna's warnings.

    Raises:
        MissingExtra: Optuna is not installed.
        BadInput: the folder holds another search, or files of something else.
        Interrupted: Ctrl-C while training; `resume` goes on from the checkpoint.
    """
    spec = source.value
    hands = replace(hands, data=_remembering(hands.data))
    identity = _identity(source, recipe, hands)
    claim_folder(folder / SEARCH, identity, resume=resume, what="search", allowed=" (only `trials` may grow)")
    with _optuna(say) as optuna:
        study = optuna.create_study(
            study_name="search",
            storage=f"sqlite:///{(folder / STUDY).absolute()}",
            direction=spec.objective.direction,
            pruner=_pruner(optuna, spec),
            load_if_exists=True,
        )
        for left in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(left.number, state=optuna.trial.TrialState.FAIL)  # of a process that ended; it is asked again
        while (number := _finished(study, optuna)) < spec.trials:
            study.sampler = _sampler(optuna, spec, number)
            trial = study.ask()
            params = {name: values.draw(trial, name) for name, values in spec.space.items()}
            done = _one(spec, recipe, params, folder / "trials" / f"{number:03}", number, trial, hands)
            state = optuna.trial.TrialState.COMPLETE if done.state == "complete" else optuna.trial.TrialState.PRUNED
            study.tell(trial, done.value if done.state == "complete" else None, state=state)
            say(describe(done, spec))
            keep_best(folder, spec)
    return keep_best(folder, spec)


def describe(done: TrialRecord, spec: SearchSpec) -> str:
    """Return one line on a finished trial."""
    values = ", ".join(f"{name} {show(value)}" for name, value in done.params.items())
    ending = f"{spec.objective.metric} {show(done.value)}" if done.value is not None else f"pruned, {done.reason}"
    return f"trial {done.number}: {values}: {ending} ({done.steps} steps, {done.seconds:.0f} s)"


def show(value: Any) -> str:
    """Return a value in short: four digits of a fraction, other things as JSON."""
    return f"{value:.4g}" if isinstance(value, float) else str(value) if isinstance(value, str) else json.dumps(value)


def keep_best(folder: Path, spec: SearchSpec) -> SearchResult:
    """Read the finished trials, write the best recipe to `best.yaml`, and delete the weights of all others."""
    trials = _records(folder / "trials")
    sign = 1 if spec.objective.direction == "maximize" else -1
    complete = [trial for trial in trials if trial.value is not None]
    best = max(complete, key=lambda trial: (sign * (trial.value or 0.0), -trial.number), default=None)
    for trial in trials:
        place = folder / "trials" / f"{trial.number:03}"
        if trial is not best:
            for part in ("model", "checkpoint"):
                shutil.rmtree(place / part, ignore_errors=True)
    if best is not None:
        write_recipe(load_recipe(folder / "trials" / f"{best.number:03}" / RECIPE), folder / BEST)
    return SearchResult(tuple(trials), best, folder)


def _records(trials: Path) -> list[TrialRecord]:
    return [TrialRecord.from_json(file.read_bytes()) for file in sorted(trials.glob(f"*/{TRIAL}"))]


def write_recipe(recipe: Recipe, file: Path) -> None:
    """Write a recipe as YAML that `load_recipe` reads back: what it sets, with paths relative to the file."""
    content = {"algorithm": recipe.algorithm, **recipe.model_dump(mode="json", exclude_unset=True)}
    write_atomic(file, yaml.safe_dump(_near(recipe, content, file.parent), sort_keys=False, allow_unicode=True))


def _near(value: Any, content: Any, folder: Path) -> Any:
    """Return dumped content with every path, and every model given by its absolute path, relative to `folder`."""
    if isinstance(value, BaseModel):
        return {name: _near(getattr(value, name), part, folder) for name, part in content.items()}
    if isinstance(value, tuple) and any(isinstance(part, BaseModel) for part in value):
        return [_near(part, inside, folder) for part, inside in zip(value, content, strict=True)]
    if isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value) and Path(value).is_dir()):
        return Path(os.path.relpath(value, folder)).as_posix()
    return content


def _one(
    spec: SearchSpec, recipe: Recipe, params: dict[str, Any], place: Path, number: int, trial: Any, hands: Hands
) -> TrialRecord:
    """Run one trial, or read back what it came to."""
    from ascent.customize.train import train

    finished = place / TRIAL
    watch = _Watch(spec, trial, place, None if hands.measure else spec.objective.metric)
    if finished.is_file():
        watch.catch_up(place)
        return TrialRecord.from_json(finished.read_bytes())
    same = next((other for other in _records(place.parent) if other.params == params), None)
    if same is not None:  # training is deterministic: the same values come to the same result
        watch.catch_up(place.parent / f"{same.number:03}")
        reason = same.reason or f"same values as trial {same.number}"
        done = same.model_copy(update={"number": number, "steps": 0, "seconds": 0.0, "reason": reason})
        write_atomic(finished, done.to_json(indent=1))
        return done
    state: Literal["complete", "pruned"] = "complete"
    value, reason = None, ""
    try:
        own = varied(recipe, params)
        write_recipe(own, place / RECIPE)
        train(own, hands.start(own.model), hands.data(own), place, report=watch.report)
        watch.catch_up(place)
        value = hands.measure(place / "model") if hands.measure else tail_mean(place, spec.objective.metric)
        if not math.isfinite(value):
            state, value, reason = "pruned", None, f"{spec.objective.metric} is not a finite number"
    except Pruned as error:
        state, reason = "pruned", str(error)
    except ValidationError as error:  # each value is valid, but not beside the others
        state, reason = "pruned", error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
    gc.collect()  # a trial's tensors are gone before the next one's are made
    rows = MetricLog.read(place / "metrics.jsonl")
    done = TrialRecord(
        number=number,
        state=state,
        value=value,
        params=params,
        steps=len(rows),
        seconds=rows[-1]["seconds"] if rows else 0.0,
        reason=reason,
    )
    write_atomic(finished, done.to_json(indent=1))
    return done


def tail_mean(place: Path, metric: str) -> float:
    """Return a training metric's mean over the last tenth of a run's steps. Raises `BadInput` if no step has it."""
    rows = MetricLog.read(place / "metrics.jsonl")
    last = rows[-max(1, round(TAIL * len(rows))) :]
    return sum(_number(row, metric) for row in last) / len(last)


def _number(row: dict[str, Any], metric: str) -> float:
    if metric not in row:
        known = sorted(set(row) - {"step"})
        raise BadInput(f"no step has a number {metric!r}{nearest(metric, known)}; known: {', '.join(known)}")
    return float(row[metric])


class _Watch:
    """Hands a trial's numbers to Optuna, step by step.

    Optuna compares in the objective's direction; a number of the other direction goes with its sign turned. `needed`
    is a number that every step must have.
    """

    def __init__(self, spec: SearchSpec, trial: Any, place: Path, needed: str | None) -> None:
        self._rule, self._trial, self._place, self._needed = spec.pruning, trial, place, needed
        self._sign = 1 if spec.pruning.direction == spec.objective.direction else -1
        self._told: set[int] = set()

    def tell(self, step: int, value: float) -> bool:
        """Hand on a step's number, once, and return whether the trial lags; Hyperband keeps its rungs when asked."""
        if step in self._told or not math.isfinite(value):
            return False
        self._told.add(step)
        self._trial.report(self._sign * value, step)
        return bool(self._trial.should_prune())

    def catch_up(self, place: Path, before: float = math.inf) -> None:
        """Hand on the steps that another process did, or another trial of the same values."""
        for row in MetricLog.read(place / "metrics.jsonl"):
            if row["step"] < before:
                self.tell(row["step"], _number(row, self._rule.metric))

    def report(self, step: int, total: int, numbers: dict[str, float]) -> None:
        """Hear of a step. Raises `Pruned` when the trial is to end, `BadInput` when a number is missing."""
        value = _number(numbers, self._rule.metric)
        if self._needed is not None:
            _number(numbers, self._needed)
        if not math.isfinite(value):
            raise Pruned(f"{self._rule.metric} is {value} at step {step} of {total}")
        if not self._told:
            self.catch_up(self._place, before=step)
        if self.tell(step, value) and step < total:
            raise Pruned(f"{self._rule.metric} {show(value)} at step {step} of {total} lags behind the other trials")


def _remembering(load: Callable[[Recipe], TrainingData]) -> Callable[[Recipe], TrainingData]:
    """Load data once for all recipes that name the same: reading takes time, and asking a teacher takes more."""
    known: dict[str, TrainingData] = {}

    def data(recipe: Recipe) -> TrainingData:
        named = {"algorithm", "data", "prompts", "system", "program", "teacher", "seed"}
        key = digest(recipe.model_dump(mode="json", include=named))
        if key not in known:
            known.clear()
            known[key] = load(recipe)
        return known[key]

    return data


def _identity(source: YamlFile[SearchSpec], recipe: Recipe, hands: Hands) -> str:
    """Return what must stay the same in a resumed search, as JSON; the number of trials may grow."""
    spec, base = source.value, source.path.parent
    data = spec.objective.data
    content = {
        "spec": spec.model_dump(mode="json", exclude={"trials"}),
        "recipe": recipe.model_dump(mode="json", exclude={"data", "prompts", "program"}),
        "data": [part.sha256 for part in hands.data(recipe).sources],
        "validation": sha256_file(base / data) if data is not None else None,
    }
    return json.dumps({**content, "sha256": digest(content)}, indent=1, ensure_ascii=False)


@contextlib.contextmanager
def _optuna(say: Say) -> Iterator[Any]:
    """Import Optuna; what it logs goes to `say` for the length of the block."""
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("search", "a hyperparameter search") from error

    class Handler(logging.Handler):
        """Hands a record's text on."""

        def emit(self, record: logging.LogRecord) -> None:
            say(f"optuna: {record.getMessage()}")

    handler, logger = Handler(), logging.getLogger("optuna")
    optuna.logging.disable_default_handler()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logger.addHandler(handler)
    try:
        yield optuna
    finally:
        logger.removeHandler(handler)


def _sampler(optuna: Any, spec: SearchSpec, number: int) -> Any:
    """A sampler of its own for each trial, seeded by its number: what was drawn before a stop does not matter."""
    return optuna.samplers.TPESampler(seed=spec.seed * 1_000_003 + number, n_startup_trials=spec.startup_trials)


def _pruner(optuna: Any, spec: SearchSpec) -> Any:
    rule = spec.pruning
    if rule.rule == "median":
        return optuna.pruners.MedianPruner(spec.startup_trials, rule.warmup_steps)
    if rule.rule == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, rule.warmup_steps))
    return optuna.pruners.NopPruner()


def _finished(study: Any, optuna: Any) -> int:
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=states))
