"""A job's data: fetched once, converted, checked against the model, and handed to training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent.records import DataSource, Message, Task
from ascent.records.errors import BadData, BadInput
from ascent.records.files import write_atomic
from ascent.serve.kinds.formats import as_callers, convert
from ascent.serve.kinds.places import Rules, fetch

if TYPE_CHECKING:
    from ascent.customize.data import Loaded
    from ascent.customize.feed import Feed
    from ascent.customize.recipes import Recipe, SupervisedRecipe
    from ascent.evaluate.program import Program
    from ascent.inference.chat import Renderer
    from ascent.inference.engine import Engine

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Rows:
    """One of the caller's files, loaded: `file` holds its rows in our form, and `loaded` speaks of the caller's own."""

    file: Path
    loaded: Loaded[Any]


def load_rows(
    uri: str, folder: Path, name: str, feed: Feed, rules: Rules, *, program: Program | None = None, system: str = ""
) -> Rows:
    """Fetch, convert and load one file of the caller's.

    Args:
        uri: its address.
        folder: the job's folder for data.
        name: what the file is to the job, such as `train`.
        feed: what its rows are to be.
        rules: what may be addressed.
        program: the use case's program, which writes the prompts.
        system: the system message of prompts without one.

    Raises:
        BadData: a row is malformed; the message has the caller's address, line and field.
        BadInput, Unavailable: the file cannot be had.
    """
    from ascent.customize.feed import LOADERS

    fetched = fetch(uri, folder / "original", rules, name=name)
    file = folder / f"{name}.jsonl"
    convert(fetched.path, file, uri, feed)
    loaded = as_callers(lambda: LOADERS[feed](file, program=program, system=system), file, uri)
    source = DataSource(name=name, path=uri, rows=len(loaded), sha256=fetched.sha256)
    return Rows(file, replace(loaded, source=source))


def check_rows(rows: Rows, renderer: Renderer, recipe: Recipe, limit: int) -> None:
    """Refuse rows that the model cannot read: longer than `limit` tokens, or with text that ends a turn.

    Raises:
        BadData: names the caller's file and the line of each such row.
    """
    from ascent.customize.data import check_lengths

    loaded, room = rows.loaded, int(getattr(recipe, "max_tokens", 0))

    def length(row: Any) -> int:
        try:
            return max((len(tokens) for tokens in _rendered(row, renderer)), default=0) + room
        except BadInput as error:
            raise BadData(str(error), file=loaded.source.path, line=loaded.lines[row.id]) from error

    check_lengths(loaded, length, limit)


def _rendered(row: Any, renderer: Renderer) -> list[tuple[int, ...]]:
    """Return the tokens of whatever a row renders to."""
    if getattr(row, "text", ""):
        return []  # documents are cut into windows
    answers = [getattr(row, name) for name in ("chosen", "rejected", "answer") if hasattr(row, name)]
    if answers:
        talks = [(*row.messages, Message(role="assistant", content=answer)) for answer in answers]
        return [renderer.render(talk).token_ids for talk in talks]
    if row.messages[-1].role == "assistant":
        return [renderer.render(row.messages).token_ids]
    return [tuple(renderer.prompt_ids(row.messages))]


def answers_of(
    teacher: Callable[[], Engine], recipe: SupervisedRecipe, tasks: Sequence[Task], folder: Path
) -> list[tuple[Message, ...]]:
    """Return what a teacher answers and is to be learnt from; it is asked once, and its answers are kept in `folder`.

    Raises:
        BadInput: no answer is good enough.
    """
    from ascent.customize.distill import teacher_answers

    kept = folder / ANSWERS
    if not kept.is_file():
        assert recipe.teacher is not None
        answers = teacher_answers(teacher(), tasks, recipe.teacher, recipe.program, recipe.seed)
        turns = [[message.model_dump(mode="json") for message in talk] for talk in answers]
        write_atomic(kept, json.dumps(turns, ensure_ascii=False))
    found: list[list[Mapping[str, Any]]] = json.loads(kept.read_text(encoding="utf-8"))
    return [tuple(Message.model_validate(turn) for turn in talk) for talk in found]
