"""Data files to records: tasks, demonstrations and preferences, checked whole before anything is used.

A row of a task file is `{"id", "input": {...}, "expected": {...}, "group"}`; a demonstration adds `"target"`
(the assistant's text), a preference `"chosen"` and `"rejected"` (if known, `"chosen_score"` and `"rejected_score"`),
a judged answer `"answer"` and `"good"`, a document is `{"text"}`. `"messages": [{"role", "content"}, ...]` may
stand for `input` (a demonstration's may end with the answer instead of having a target). `id` may be left
out: it is then derived from the row's content and stays the same wherever the row moves. `group` names what
the row belongs to (a drug, a patient, a document); splits and clustered statistics keep it together. Other
fields are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, Field

from ascent.customize.data.problems import Problems
from ascent.customize.data.read import FIELDS, read_rows
from ascent.customize.data.rows import Row
from ascent.evaluate.program import Program
from ascent.records import DataSource, Feedback, Message, Preference, Record, Task, digest
from ascent.records.errors import BadInput


class DataRow(Protocol):
    """What a task, a demonstration and a preference have in common."""

    @property
    def id(self) -> str:
        """The row's id, unique in its file."""

    @property
    def input(self) -> dict[str, Any]:
        """The raw input, before any prompt was built from it."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation."""

    @property
    def group(self) -> str | None:
        """What the row belongs to, if it says so."""


T = TypeVar("T", bound=DataRow)


class Demonstration(Record):
    """A conversation that ends with the assistant's turn to imitate.

    `input` is the raw input behind the prompt, for duplicate and leakage checks that must not see the
    prompt's boilerplate. `line` is where the row stands in its file.
    """

    id: str
    messages: tuple[Message, ...]
    input: dict[str, Any] = Field(default_factory=dict)
    group: str | None = None
    line: int | None = None


class Text(Record):
    """A raw document, or a demonstration among documents: one of `text` and `messages` is empty."""

    id: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    input: dict[str, Any] = Field(default_factory=dict)
    group: str | None = None


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A whole, checked data file: its rows, the line of each row id, and what the file was."""

    rows: tuple[T, ...]
    lines: Mapping[str, int]
    source: DataSource

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[T]:
        return iter(self.rows)


def load_tasks(
    path: Path,
    *,
    program: Program | None = None,
    system: str = "",
    instructions: str = "",
    examples: Sequence[Demonstration] = (),
    require_expected: bool = False,
    schema: type[BaseModel] | None = None,
) -> Loaded[Task]:
    """Load tasks and build the prompt of each.

    A demonstration is a task too: its answer (`target`, or the last of its messages) is left out.

    Args:
        path: a .jsonl, .csv, .tsv or .parquet file.
        program: the use case's program; its `prepare` writes the user turn and its `EXPECTED` is the default
            schema.
        system: the system prompt, the same in every stage.
        instructions: further text of the system prompt, for the prompted baseline.
        examples: few-shot demonstrations, shown before the task as alternating turns.
        require_expected: refuse rows without labels.
        schema: a pydantic model of the labels. Every label given must be a field of it and valid under it
            (strictly: `"2"` is not a number); labels may be left out, so that a partly labelled file loads.

    Raises:
        BadData: anything is wrong with the file; the message lists the first twenty problems with their
            lines.
        BadInput: the program's `EXPECTED` is not a pydantic model.
    """
    labels = schema if schema is not None else expected_schema(program)
    prompting = _Prompting(program, system, instructions, tuple(examples))

    def build(row: Row, name: str, group: str | None) -> Task | None:
        prompt = row.prompt(answer_inside=True)
        expected = row.expected(labels, required=require_expected)
        messages = prompting.build(row, prompt)
        if prompt is None or messages is None:
            return None
        return Task(id=name, input=prompt[0], messages=messages, expected=expected, group=group)

    return _load(path, build)


def load_demonstrations(
    path: Path,
    *,
    program: Program | None = None,
    system: str = "",
    instructions: str = "",
    examples: Sequence[Demonstration] = (),
) -> Loaded[Demonstration]:
    """Load conversations to imitate: a prompt with a `target`, or `messages` that end with the answer.

    Raises:
        BadData: anything is wrong with the file; the message lists the first twenty problems with their
            lines.
    """
    prompting = _Prompting(program, system, instructions, tuple(examples))

    def build(row: Row, name: str, group: str | None) -> Demonstration | None:
        shown = _demonstration(row, prompting)
        if shown is None:
            return None
        return Demonstration(id=name, messages=shown[0], input=shown[1], group=group, line=row.line)

    return _load(path, build)


def _demonstration(row: Row, prompting: _Prompting) -> tuple[tuple[Message, ...], dict[str, Any]] | None:
    """Return a demonstration's conversation and its raw input, or note what is wrong."""
    prompt = row.prompt(answer_inside=True)
    answer = prompt[1] if prompt is not None else None
    if answer is None:
        answer = row.text("target", "the assistant's text")
    elif row.has("target"):
        row.problem("target", "the messages already end with the assistant's answer; keep one of the two")
    messages = prompting.build(row, prompt)
    if prompt is None or messages is None or answer is None:
        return None
    return (*messages, Message(role="assistant", content=answer)), prompt[0]


def load_preferences(
    path: Path,
    *,
    program: Program | None = None,
    system: str = "",
    instructions: str = "",
    examples: Sequence[Demonstration] = (),
) -> Loaded[Preference]:
    """Load pairs: `input` or `messages` with a `chosen` and a `rejected` answer that differ.

    Raises:
        BadData: anything is wrong with the file; the message lists the first twenty problems with their
            lines.
    """
    prompting = _Prompting(program, system, instructions, tuple(examples))

    def build(row: Row, name: str, group: str | None) -> Preference | None:
        prompt = row.prompt()
        chosen = row.text("chosen", "the better answer")
        rejected = row.text("rejected", "the worse answer")
        if chosen is not None and rejected is not None and chosen.strip() == rejected.strip():
            row.problem("rejected", "is the same text as 'chosen', so the pair prefers nothing; correct or delete it")
        messages = prompting.build(row, prompt)
        scores = row.number("chosen_score"), row.number("rejected_score")
        if prompt is None or messages is None or chosen is None or rejected is None:
            return None
        return Preference(
            id=name,
            messages=messages,
            chosen=chosen,
            rejected=rejected,
            input=prompt[0],
            group=group,
            chosen_score=scores[0],
            rejected_score=scores[1],
        )

    return _load(path, build)


def load_feedback(
    path: Path,
    *,
    program: Program | None = None,
    system: str = "",
    instructions: str = "",
    examples: Sequence[Demonstration] = (),
) -> Loaded[Feedback]:
    """Load single answers: `input` or `messages` with an `answer` and whether it is `good`.

    Raises:
        BadData: anything is wrong with the file; the message lists the first twenty problems with their
            lines.
    """
    prompting = _Prompting(program, system, instructions, tuple(examples))

    def build(row: Row, name: str, group: str | None) -> Feedback | None:
        if row.has("chosen") or row.has("rejected"):
            row.problem(
                "chosen", "is half of a pair, and this algorithm learns from single answers; give 'answer' and 'good'"
            )
            return None
        prompt = row.prompt()
        answer = row.text("answer", "the answer that was judged")
        good = row.truth("good", "whether the answer is good: true or false")
        messages = prompting.build(row, prompt)
        if prompt is None or messages is None or answer is None or good is None:
            return None
        return Feedback(id=name, messages=messages, answer=answer, good=good, input=prompt[0], group=group)

    return _load(path, build)


def load_texts(
    path: Path,
    *,
    program: Program | None = None,
    system: str = "",
    instructions: str = "",
    examples: Sequence[Demonstration] = (),
) -> Loaded[Text]:
    """Load what continued pre-training reads: rows with raw `text`, or demonstrations to mix in against forgetting.

    Raises:
        BadData: anything is wrong with the file; the message lists the first twenty problems with their
            lines.
    """
    prompting = _Prompting(program, system, instructions, tuple(examples))

    def build(row: Row, name: str, group: str | None) -> Text | None:
        if row.has("text"):
            text = row.text("text", "the document")
            return None if text is None else Text(id=name, text=text, input={"text": text}, group=group)
        shown = _demonstration(row, prompting)
        return None if shown is None else Text(id=name, messages=shown[0], input=shown[1], group=group)

    return _load(path, build)


def expected_schema(program: Program | None) -> type[BaseModel] | None:
    """Return the pydantic model that a program declares for its labels as `EXPECTED`, if it does.

    Raises:
        BadInput: `EXPECTED` is something else.
    """
    declared = getattr(program.module, "EXPECTED", None) if program is not None else None
    if declared is None or (isinstance(declared, type) and issubclass(declared, BaseModel)):
        return declared
    raise BadInput(f"{program.path if program else ''}: EXPECTED must be a pydantic model class, is {declared!r}")


def messages_for(
    input: Mapping[str, Any],
    program: Program | None = None,
    system: str = "",
    instructions: str = "",
    shots: Sequence[Demonstration] = (),
) -> tuple[Message, ...]:
    """Build the conversation that a model sees for one input.

    In order: a system turn (`system`, a blank line, `instructions`; left out when both are empty), the turns
    of every shot, and the user turn `program.prepare(input)`. Without a program the user turn is
    `input["prompt"]`, or the input as JSON. An input that is itself a conversation (`{"messages": [...]}`)
    takes the place of the user turn, and if it opens with a system turn of its own, that one is used instead.
    """
    turns = _conversation(input)
    if turns is None:
        turns = (Message(role="user", content=(program or Program()).prepare(dict(input))),)
    opening: tuple[Message, ...] = ()
    if turns[0].role == "system":
        opening, turns = turns[:1], turns[1:]
    elif head := "\n\n".join(part for part in (system.strip(), instructions.strip()) if part):
        opening = (Message(role="system", content=head),)
    shown = tuple(turn for shot in shots for turn in shot.messages if turn.role != "system")
    return opening + shown + turns


def _conversation(input: Mapping[str, Any]) -> tuple[Message, ...] | None:
    turns = input.get("messages")
    if len(input) != 1 or not isinstance(turns, list) or not turns:
        return None
    if not all(isinstance(turn, dict) and turn.keys() == {"role", "content"} for turn in turns):
        return None
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in turns)


@dataclass(frozen=True)
class _Prompting:
    """The arguments of `messages_for` that all rows of a file share."""

    program: Program | None
    system: str
    instructions: str
    shots: tuple[Demonstration, ...]

    def build(self, row: Row, prompt: tuple[dict[str, Any], str | None] | None) -> tuple[Message, ...] | None:
        """Build the conversation of a row, or note why that is impossible."""
        if prompt is None:
            return None
        try:
            messages = messages_for(prompt[0], self.program, self.system, self.instructions, self.shots)
        except BadInput as error:
            row.problem("input", f"{error}; complete the row, or let prepare() cope with it")
            return None
        if not messages[-1].content.strip():
            row.problem("input", "gives an empty user turn; check the row and prepare() of the program")
            return None
        return messages


def _load(path: Path, build: Callable[[Row, str, str | None], T | None]) -> Loaded[T]:
    """Read a file, build a record of each row, and raise once with all problems or return everything."""
    problems = Problems(path)
    raw_rows, sha256 = read_rows(path, problems)
    lines: dict[str, int] = {}
    found: list[T] = []
    for raw in raw_rows:
        row = Row(raw, problems)
        row.check_names()
        name = _take_name(row, lines)
        record = build(row, name, row.label("group"))
        if record is not None and row.sound:
            found.append(record)
    problems.raise_any()
    source = DataSource(name=path.stem, path=str(path), rows=len(found), sha256=sha256)
    return Loaded(tuple(found), lines, source)


def _take_name(row: Row, lines: dict[str, int]) -> str:
    """Return the row's id and remember its line; rows without one get an id from their content."""
    given = row.label("id")
    if given is not None:
        if given in lines:
            row.problem("id", f"the id {given!r} is already used on line {lines[given]}; give every row its own")
        else:
            lines[given] = row.line
        return given
    content = digest({name: value for name, value in row.values.items() if name in FIELDS})[:16]
    name, copy = content, 1
    while name in lines:
        copy += 1
        name = f"{content}-{copy}"
    lines[name] = row.line
    return name
