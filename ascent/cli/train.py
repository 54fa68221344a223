"""`ascent train`: one recipe, outside a ladder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ascent.cli.console import note, say

if TYPE_CHECKING:
    from ascent.customize.recipes import Recipe
    from ascent.customize.train import TrainingData
    from ascent.records import Message, RunCard, Task

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
    """Load what a recipe's row feeds on; a teacher is asked for its answers.

    Raises:
        BadData: a row is malformed; the message has file, line and field.
        BadInput: the program does not load, a teacher is needed and not named, or none of its answers is good enough.
    """
    from ascent.customize.feed import load_feed, make_training_data

    rows, sources = load_feed(recipe)
    return make_training_data(recipe, rows, sources, lambda tasks: _answers_of_teacher(recipe, tasks))


def _answers_of_teacher(recipe: Recipe, tasks: Sequence[Task]) -> list[tuple[Message, ...]]:
    from ascent.cli.engines import open_engine
    from ascent.customize.distill import teacher_answers
    from ascent.customize.recipes import SupervisedRecipe
    from ascent.records.errors import BadInput

    if not isinstance(recipe, SupervisedRecipe) or recipe.teacher is None:
        raise BadInput("row distill_sequence needs a teacher; give teacher: {model: …}")
    return teacher_answers(open_engine(recipe.teacher.model), tasks, recipe.teacher, recipe.program, recipe.seed)


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
