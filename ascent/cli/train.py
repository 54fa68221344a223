"""`ascent train`: one recipe, outside a ladder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ascent.cli.console import note, say

if TYPE_CHECKING:
    from ascent.customize.data import DataRow, Loaded
    from ascent.customize.recipes import Recipe, SupervisedRecipe
    from ascent.customize.train import TrainingData
    from ascent.evaluate.program import Program
    from ascent.records import RunCard

RECIPE_COPY = "recipe.json"
SHOWN = (
    "loss",
    "nll",
    "divergence",
    "accuracy",
    "margin",
    "reward",
    "kl",
    "entropy",
    "clip_fraction",
    "informative_groups",
)
"""What the progress line shows of a step's numbers; metrics.jsonl has all of them."""


@click.command("train")
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the run goes; by default runs/<recipe>-s<seed> beside the recipe.",
)
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@click.option(
    "--keep-every",
    type=click.IntRange(min=1),
    help="Also keep the model of every so many steps, as OUT/steps/STEP/model; the result stays the same.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Train data-parallel in so many processes; cores are divided among them.",
)
def command(recipe_file: Path, out: Path | None, resume: bool, keep_every: int | None, processes: int) -> None:
    """Train a model as the YAML file RECIPE says.

    OUT/model gets the merged weights and the adapter, OUT/run.json how they came about, OUT/metrics.jsonl every step.
    Ctrl-C writes a checkpoint and exits with 130. To start from the checkpoint of another run, give that run's folder
    as the recipe's `model`.
    """
    from ascent.cli.engines import pinned
    from ascent.customize.recipes import load_recipe
    from ascent.inference.store import Store
    from ascent.records.files import claim_folder

    recipe = load_recipe(recipe_file)
    recipe = recipe.model_copy(update={"model": pinned(recipe.model, Store())})
    folder = out or recipe_file.parent / "runs" / f"{recipe_file.stem}-s{recipe.seed}"
    claim_folder(folder / RECIPE_COPY, recipe.model_dump_json(indent=1), resume=resume, what="run")
    _run(recipe, folder, keep_every, processes)


def _run(recipe: Recipe, folder: Path, keep_every: int | None, processes: int) -> None:
    from ascent.cli.engines import model_folder
    from ascent.customize import parallel
    from ascent.customize.plan import plan, record_outcome
    from ascent.inference.store import Store

    data = training_data(recipe)
    start = model_folder(recipe.model, Store())
    planned = plan(recipe, start, data)
    work = (recipe, start, data, folder, keep_every)
    card = _train(*work) if processes == 1 else parallel.launch(_train, work, processes)
    outcome = record_outcome(planned, card, folder)
    size = f"at most {card.peak_rss_mb:,.0f} MB"
    note(f"planned: {outcome.predicted['seconds']:.0f} s, {outcome.predicted['peak_mb']:,.0f} MB")
    say(f"trained {card.steps} steps on {card.tokens:,} tokens in {card.seconds:.0f} s, {size}")
    say(f"model: {folder / 'model'}")
    say(f"talk to it: ascent chat {folder / 'model'}")


def _train(recipe: Recipe, start: Path, data: TrainingData, folder: Path, keep_every: int | None) -> RunCard:
    """Train in this process, alone or as one of several; the first one says how it goes."""
    from ascent.customize import parallel
    from ascent.customize.train import train

    with contextlib.ExitStack() as stack:
        if parallel.rank() != 0:
            return train(recipe, start, data, folder, keep_every=keep_every)
        report = step_report(recipe.algorithm, stack)
        return train(recipe, start, data, folder, report=report, announce=_announce, keep_every=keep_every)


def training_data(recipe: Recipe) -> TrainingData:
    """Load and mix what a recipe's row feeds on.

    Several files are drawn by weight into one list as long as all of them together.

    Raises:
        BadData: a row is malformed; the message has file, line and field.
        BadInput: the program does not load.
    """
    from ascent.customize import data
    from ascent.customize.objectives.rows import PreferenceRow
    from ascent.customize.recipes import PreferenceRecipe, SupervisedRecipe
    from ascent.customize.train import TrainingData
    from ascent.evaluate.program import Program

    program = Program.load(recipe.program) if recipe.program is not None else None
    if isinstance(recipe, SupervisedRecipe):
        if recipe.algorithm == "distill_sequence":
            return _answers_of_teacher(recipe, program)
        texts, sources = _mixed(recipe, recipe.data, data.load_texts, program)
        return TrainingData(
            conversations=[row.messages for row in texts if row.messages],
            documents=[row.text for row in texts if row.text],
            sources=sources,
        )
    if isinstance(recipe, PreferenceRecipe):
        row = recipe.row
        if isinstance(row, PreferenceRow) and row.pairing == "unpaired":
            feedback, sources = _mixed(recipe, recipe.data, data.load_feedback, program)
            return TrainingData(feedback=feedback, sources=sources)
        preferences, sources = _mixed(recipe, recipe.data, data.load_preferences, program)
        return TrainingData(preferences=preferences, sources=sources)
    tasks, sources = _mixed(recipe, recipe.prompts, data.load_tasks, program)
    return TrainingData(tasks=tasks, sources=sources)


def _answers_of_teacher(recipe: SupervisedRecipe, program: Program | None) -> TrainingData:
    """Ask the teacher every prompt and keep what is to be learnt from.

    Raises:
        BadInput: the recipe names no teacher, or no answer is good enough.
    """
    from ascent.cli.engines import open_engine
    from ascent.customize.data import load_tasks
    from ascent.customize.distill import teacher_answers
    from ascent.customize.train import TrainingData
    from ascent.records.errors import BadInput

    if recipe.teacher is None:
        raise BadInput("row distill_sequence needs a teacher; give teacher: {model: …}")
    tasks, sources = _mixed(recipe, recipe.data, load_tasks, program)
    engine = open_engine(recipe.teacher.model)
    conversations = teacher_answers(engine, tasks, recipe.teacher, recipe.program, recipe.seed)
    return TrainingData(conversations=conversations, sources=sources)


def _mixed(recipe: Recipe, parts: Any, load: Callable[..., Loaded[Any]], program: Program | None) -> Any:
    """Return (rows, sources) of a recipe's data files."""
    from ascent.customize.data import mix

    loaded: dict[str, Loaded[DataRow]] = {}
    for part in parts:
        loaded[str(part.path)] = load(part.path, program=program, system=recipe.system)
    sources = tuple(data.source for data in loaded.values())
    if len(loaded) == 1:
        return next(iter(loaded.values())).rows, sources
    weights = {str(part.path): part.weight for part in parts}
    rows = {name: data.rows for name, data in loaded.items()}
    return mix(rows, weights, sum(map(len, rows.values())), recipe.seed), sources


def _announce(facts: dict[str, object]) -> None:
    """Print what was derived from the recipe and the data before the first step."""
    for name, value in facts.items():
        note(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")


def step_report(task: str, stack: contextlib.ExitStack) -> Callable[[int, int, dict[str, float]], None]:
    """Return a step report that draws one live line, from the first step that this process does."""
    from ascent.observe import Progress

    shown: list[Progress] = []

    def report(step: int, total: int, numbers: dict[str, float]) -> None:
        if not shown:
            shown.append(stack.enter_context(Progress(task, total, start=step)))
        chosen = {name: numbers[name] for name in SHOWN if name in numbers}
        tokens = int(numbers.get("tokens", 0)) if step > shown[0].done else 0
        shown[0].update(step, total=total, tokens=tokens, **chosen)

    return report
