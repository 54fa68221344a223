"""What a recipe's row feeds on: which kind of rows, loaded from its files, and the training data made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ascent.customize import data
from ascent.customize.data import DataRow, Loaded
from ascent.customize.objectives.rows import PreferenceRow
from ascent.customize.recipes import OnlineRecipe, PreferenceRecipe, Recipe
from ascent.customize.train import TrainingData
from ascent.evaluate.program import Program
from ascent.records import DataSource, Message, Task

Feed = Literal["texts", "preferences", "feedback", "tasks"]
LOADERS: dict[Feed, Callable[..., Loaded[Any]]] = {
    "texts": data.load_texts,
    "preferences": data.load_preferences,
    "feedback": data.load_feedback,
    "tasks": data.load_tasks,
}
Teacher = Callable[[Sequence[Task]], Sequence[tuple[Message, ...]]]


def feed_of(recipe: Recipe) -> Feed:
    """Return what kind of rows a recipe learns from."""
    if isinstance(recipe, OnlineRecipe) or recipe.algorithm == "distill_sequence":
        return "tasks"
    if isinstance(recipe, PreferenceRecipe):
        row = recipe.row
        return "feedback" if isinstance(row, PreferenceRow) and row.pairing == "unpaired" else "preferences"
    return "texts"


def load_feed(recipe: Recipe) -> tuple[Sequence[Any], tuple[DataSource, ...]]:
    """Load a recipe's files; several are drawn by weight into one list as long as all of them together.

    Returns:
        The rows of `feed_of`, and where they are from.

    Raises:
        BadData: a row is malformed; the message has file, line and field.
        BadInput: the program does not load.
    """
    program = Program.load(recipe.program) if recipe.program is not None else None
    parts = recipe.prompts if isinstance(recipe, OnlineRecipe) else recipe.data
    loaded: dict[str, Loaded[DataRow]] = {}
    for part in parts:
        loaded[str(part.path)] = LOADERS[feed_of(recipe)](part.path, program=program, system=recipe.system)
    sources = tuple(each.source for each in loaded.values())
    if len(loaded) == 1:
        return next(iter(loaded.values())).rows, sources
    weights = {str(part.path): part.weight for part in parts}
    rows = {name: each.rows for name, each in loaded.items()}
    return data.mix(rows, weights, sum(map(len, rows.values())), recipe.seed), sources


def make_training_data(
    recipe: Recipe, rows: Sequence[Any], sources: tuple[DataSource, ...], teacher: Teacher | None = None
) -> TrainingData:
    """Return what training takes of the rows of `feed_of`.

    Args:
        recipe: what they are for.
        rows: loaded by one of `LOADERS`.
        sources: where they are from.
        teacher: answers the tasks of a row that learns from a teacher's answers; without one they stay tasks, which
            is enough to plan with.
    """
    feed = feed_of(recipe)
    if feed == "texts":
        conversations = [row.messages for row in rows if row.messages]
        documents = [row.text for row in rows if row.text]
        return TrainingData(conversations=conversations, documents=documents, sources=sources)
    if feed == "preferences":
        return TrainingData(preferences=rows, sources=sources)
    if feed == "feedback":
        return TrainingData(feedback=rows, sources=sources)
    if teacher is not None and recipe.algorithm == "distill_sequence":
        return TrainingData(conversations=teacher(rows), sources=sources)
    return TrainingData(tasks=rows, sources=sources)
