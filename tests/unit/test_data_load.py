"""Loading: every mistake is named with its line, and nothing is half-used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from ascent.customize.data import (
    check_lengths,
    describe,
    load_demonstrations,
    load_preferences,
    load_tasks,
    messages_for,
)
from ascent.evaluate.program import Program
from ascent.records import Message
from ascent.records.errors import BadData, BadInput

GOOD = '{"id": "g", "input": {"sig": "x"}}'


def jsonl(folder: Path, *lines: str | bytes | dict[str, Any], name: str = "d.jsonl") -> Path:
    path = folder / name
    raw = [
        line if isinstance(line, bytes) else (json.dumps(line) if isinstance(line, dict) else line).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def fails(load: Any, path: Path, **settings: Any) -> BadData:
    with pytest.raises(BadData) as caught:
        load(path, **settings)
    assert str(caught.value).startswith(str(path))
    return caught.value


# What a good file gives


def test_tasks_keep_order_labels_groups_lines_and_the_hash_of_the_bytes(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"id": "a", "input": {"prompt": "one?"}, "expected": {"answer": 1}, "group": "drug-1"},
        "",
        "   \r",
        {"id": 7, "input": {"sig": "zwölf"}, "notes": "ignored", "expected": None},
    )
    loaded = load_tasks(path, system="Be brief.")
    assert [task.id for task in loaded] == ["a", "7"]
    assert loaded.lines == {"a": 1, "7": 4}
    assert loaded.rows[0].expected == {"answer": 1} and loaded.rows[0].group == "drug-1"
    assert loaded.rows[1].expected is None and loaded.rows[1].group is None
    assert loaded.rows[0].messages == (
        Message(role="system", content="Be brief."),
        Message(role="user", content="one?"),
    )
    assert loaded.rows[1].messages[-1].content == '{"sig": "zwölf"}'
    assert loaded.source == describe(path)
    assert loaded.source.rows == 2
    assert loaded.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_derived_id_follows_the_content_not_the_place(tmp_path: Path) -> None:
    rows = [{"input": {"prompt": str(n)}, "target": "t"} for n in (1, 2, 2)]
    forward = load_demonstrations(jsonl(tmp_path, *rows, name="a.jsonl"))
    backward = load_demonstrations(jsonl(tmp_path, *reversed(rows), name="b.jsonl"))
    ids = [row.id for row in forward]
    assert len(set(ids)) == 3 and ids[2] == f"{ids[1]}-2"
    assert sorted(ids) == sorted(row.id for row in backward)
    same = {row.id: row.messages for row in backward}
    assert all(same[row.id] == row.messages for row in forward)


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path, b"\xef\xbb\xbf" + GOOD.encode(), b'{"id": "h", "input": \xff}')
    error = fails(load_tasks, path)
    offset = path.read_bytes().index(b"\xff")
    assert error.line == 2 and f"byte offset {offset} " in str(error)


def test_demonstrations_from_targets_and_from_conversations(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "own"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "u2"},
        {"role": "assistant", "content": "a2"},
    ]
    path = jsonl(
        tmp_path,
        {"id": "t", "input": {"prompt": "p"}, "target": "yes"},
        {"id": "m", "messages": turns},
        {"id": "mt", "messages": turns[1:2], "target": "a"},
    )
    first, second, third = load_demonstrations(path, system="shared")
    assert [(m.role, m.content) for m in first.messages] == [
        ("system", "shared"),
        ("user", "p"),
        ("assistant", "yes"),
    ]
    assert [(m.role, m.content) for m in second.messages] == [(t["role"], t["content"]) for t in turns]
    assert second.input == {"messages": turns[:-1]} and second.line == 2
    assert [m.content for m in third.messages] == ["shared", "u1", "a"]


def test_preferences(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"id": "p", "input": {"prompt": "q"}, "chosen": "good", "rejected": "bad", "group": "g"})
    (pair,) = load_preferences(path).rows
    assert (pair.chosen, pair.rejected, pair.group, pair.input) == ("good", "bad", "g", {"prompt": "q"})
    assert [m.content for m in pair.messages] == ["q"]


def test_prompt_assembly_system_instructions_shots_then_the_prepared_turn(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("def prepare(input):\n    return 'Sig: ' + input['sig']\n")
    program = Program.load(file)
    shots = load_demonstrations(
        jsonl(tmp_path, {"id": "s", "input": {"sig": "1 po qd"}, "target": "{}"}),
        program=program,
        system="unused",
    ).rows
    messages = messages_for({"sig": "2 po bid"}, program, "System.", "Long text.", shots)
    assert [(m.role, m.content) for m in messages] == [
        ("system", "System.\n\nLong text."),
        ("user", "Sig: 1 po qd"),
        ("assistant", "{}"),
        ("user", "Sig: 2 po bid"),
    ]
    path = jsonl(
        tmp_path,
        {"id": "a", "input": {"sig": "2 po bid"}},
        {"id": "b", "input": {"text": "?"}},
        name="t.jsonl",
    )
    error = fails(load_tasks, path, program=program)
    assert (error.line, error.field) == (2, "input") and "KeyError" in str(error)
    jsonl(tmp_path, {"id": "a", "input": {"sig": "2 po bid"}}, name="t.jsonl")
    task = load_tasks(path, program=program, system="System.", instructions="Long text.", examples=shots).rows[0]
    assert task.messages == messages


json_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
json_values = st.recursive(
    json_scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["sig", "drug", "x"]), json_values, min_size=1),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_any_json_input_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[Any], ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "d.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"id": str(n), "input": value}, ensure_ascii=ascii_only) for n, value in enumerate(inputs)
        ),
        newline="",
    )
    assert [task.input for task in load_tasks(path)] == inputs


# What a bad file gives


@pytest.mark.parametrize(
    ("bad", "field", "words"),
    [
        ('{"id": "a", "input": {"x": 1}', None, "malformed JSON at column 30"),
        ("[1, 2]", None, "a JSON array, not an object"),
        ('"text"', None, "a JSON string, not an object"),
        ('{"id": "a", "id": "b", "input": {"x": 1}}', None, "'id' occurs twice"),
        ('{"input": {"x": NaN}}', None, "NaN is not JSON"),
        ('{"input": {"x": "\\ud800"}}', None, "surrogate"),
        ('{"input": ' + '{"x":' * 100_000, None, "nested too deeply"),
        ('{"id": "a"}', "input", "is missing, and so is 'messages'"),
        ('{"id": "a", "prompt": "hi"}', "input", '{"input": {"prompt": "..."}}'),
        ('{"id": "a", "input": "hi"}', "input", "must be an object, is string"),
        ('{"id": "a", "input": {}}', "input", "empty object"),
        ('{"id": "a", "input": {"prompt": "  "}}', "input", "empty user turn"),
        ('{"id": "a", "inputs": {"x": 1}, "expected": {}}', "inputs", "did you mean 'input'?"),
        ('{"id": true, "input": {"x": 1}}', "id", "must be text or a whole number, is boolean"),
        ('{"id": " ", "input": {"x": 1}}', "id", "is empty"),
        ('{"id": "a", "input": {"x": 1}, "group": 1.5}', "group", "is number"),
        ('{"id": "a", "input": {"x": 1}, "expected": [1]}', "expected", "must be an object, is array"),
        ('{"id": "a", "input": {"x": 1}, "expcted": {"y": 2}}', "expcted", "did you mean 'expected'?"),
        ('{"id": "a", "input": {"x": 1}, "messages": []}', "messages", "both 'input' and 'messages'"),
        ('{"id": "a", "messages": []}', "messages", "at least one turn"),
        ('{"id": "a", "messages": ["hi"]}', "messages[0]", "must be an object"),
        ('{"id": "a", "messages": [{"role": "human", "content": "x"}]}', "messages[0].role", "is 'human'"),
        (
            '{"id": "a", "messages": [{"role": "user", "content": ["x"]}]}',
            "messages[0].content",
            "must be text",
        ),
        ('{"id": "a", "messages": [{"role": "assistant", "content": "x"}]}', "messages", "must follow a user"),
        ('{"id": "a", "messages": [{"role": "system", "content": "x"}]}', "messages", "must end with"),
    ],
)
def test_one_bad_task_row_is_named_by_line_and_field(tmp_path: Path, bad: str, field: str | None, words: str) -> None:
    path = jsonl(tmp_path, GOOD, "", bad, '{"id": "h", "input": {"sig": "y"}}')
    error = fails(load_tasks, path)
    assert (error.file, error.line, error.field) == (path, 3, field)
    assert words in str(error)


@pytest.mark.parametrize(
    ("load", "row", "field", "words"),
    [
        (load_demonstrations, {"input": {"x": 1}}, "target", "is missing"),
        (load_demonstrations, {"input": {"x": 1}, "target": " \n"}, "target", "is empty"),
        (load_demonstrations, {"input": {"x": 1}, "target": {"a": 1}}, "target", "JSON text"),
        (
            load_demonstrations,
            {
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "target": "b",
            },
            "target",
            "already end",
        ),
        (
            load_demonstrations,
            {"messages": [{"role": "assistant", "content": "a"}]},
            "messages",
            "must follow",
        ),
        (load_preferences, {"input": {"x": 1}, "chosen": "a"}, "rejected", "is missing"),
        (
            load_preferences,
            {"input": {"x": 1}, "chosen": "a", "rejected": " a\n"},
            "rejected",
            "same text as 'chosen'",
        ),
        (
            load_preferences,
            {"input": {"x": 1}, "chosen": [], "rejected": "b"},
            "chosen",
            "must be text, is array",
        ),
    ],
)
def test_bad_demonstrations_and_preferences(
    tmp_path: Path, load: Any, row: dict[str, Any], field: str, words: str
) -> None:
    error = fails(load, jsonl(tmp_path, "", row))
    assert (error.line, error.field) == (2, field) and words in str(error)


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    error = fails(load_tasks, jsonl(tmp_path, GOOD, '{"id": "b", "input": {"x": 1}}', GOOD))
    assert (error.line, error.field) == (3, "id") and "'g' is already used on line 1" in str(error)


def test_required_labels(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, '{"id": "e", "input": {"x": 1}, "expected": {}}')
    assert len(load_tasks(path)) == 2
    error = fails(load_tasks, path, require_expected=True)
    assert error.line == 1 and "line 2 [expected]: is an empty object" in str(error)


def test_all_problems_of_a_file_come_at_once_and_in_order(tmp_path: Path) -> None:
    lines = [b'{"id": "%d", "input": 5}' % n if n % 2 else b"{oops" for n in range(30)]
    lines[4] = b"caf\xe9"
    error = fails(load_tasks, jsonl(tmp_path, *lines))
    text = str(error)
    assert error.line == 1 and "30 problems in all; nothing was loaded" in text and "and 10 more" in text
    named = [int(part.split()[0].rstrip(":")) for part in text.split("  line ")[1:]]
    assert named == list(range(2, 21))
    assert f"byte 0xe9 at byte offset {len(b''.join(lines[:4])) + 4 + 3} " in text


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
def test_an_empty_file(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert "the file is empty" in str(fails(load_tasks, path))


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    assert "no such file" in str(fails(load_tasks, tmp_path / "none.jsonl"))
    assert "one JSON object per line" in str(fails(load_tasks, tmp_path / "d.json"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "this is a folder" in str(fails(load_tasks, tmp_path / "folder.jsonl"))
    (tmp_path / "wide.jsonl").write_text(GOOD, encoding="utf-16")
    assert "UTF-16" in str(fails(load_tasks, tmp_path / "wide.jsonl"))
    assert "no such file" in str(fails(describe, tmp_path / "none.csv"))


class Direction(BaseModel):
    dose: float | None = None
    route: Literal["oral", "topical"]
    times: int = Field(ge=0)
    needs_review: bool


def test_labels_are_checked_one_by_one_so_that_partly_labelled_rows_load(tmp_path: Path) -> None:
    def row(name: str, **labels: Any) -> dict[str, Any]:
        return {"id": name, "input": {"x": 1}, "expected": labels}

    fine = jsonl(tmp_path, row("a", dose=2, route="oral"), row("b", dose=None), row("c", needs_review=True))
    assert [task.expected for task in load_tasks(fine, schema=Direction)] == [
        {"dose": 2, "route": "oral"},
        {"dose": None},
        {"needs_review": True},
    ]
    bad = jsonl(
        tmp_path,
        row("a", rout="oral"),
        row("b", route="by mouth"),
        row("c", dose="2"),
        row("d", times=-1, needs_review="yes"),
    )
    error = fails(load_tasks, bad, schema=Direction)
    text = str(error)
    assert (error.line, error.field) == (1, "expected.rout") and "did you mean 'route'?" in text
    for place in (
        "line 2 [expected.route]",
        "line 3 [expected.dose]",
        "line 4 [expected.times]",
        "line 4 [expected.needs_review]",
    ):
        assert place in text


def test_the_program_may_declare_the_schema(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("from pydantic import BaseModel\nclass Dose(BaseModel):\n    dose: int\nEXPECTED = Dose\n")
    rows = ({"id": name, "input": {"x": 1}, "expected": {label: 1}} for name, label in (("a", "dose"), ("b", "does")))
    path = jsonl(tmp_path, *rows)
    error = fails(load_tasks, path, program=Program.load(file))
    assert (error.line, error.field) == (2, "expected.does") and "did you mean 'dose'?" in str(error)
    (tmp_path / "other.py").write_text("EXPECTED = {'dose': int}\n")
    with pytest.raises(BadInput, match="must be a pydantic model class"):
        load_tasks(path, program=Program.load(tmp_path / "other.py"))


def test_a_training_file_serves_as_tasks_without_its_answers(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path, {"id": "m", "messages": turns}, {"id": "t", "input": {"prompt": "p"}, "target": "a"})
    assert [[m.content for m in task.messages] for task in load_tasks(path)] == [["q"], ["p"]]
    assert [task.input for task in load_tasks(path)] == [row.input for row in load_demonstrations(path)]


# Lengths


def test_a_row_longer_than_the_context(tmp_path: Path) -> None:
    loaded = load_demonstrations(
        jsonl(tmp_path, *({"id": str(n), "input": {"prompt": "w " * n}, "target": "t"} for n in (3, 8, 4, 9)))
    )
    words = lambda row: sum(len(turn.content.split()) for turn in row.messages)  # noqa: E731
    assert check_lengths(loaded, words, 10) == [4, 9, 5, 10]
    with pytest.raises(BadData) as caught:
        check_lengths(loaded, words, 8)
    assert caught.value.line == 2
    assert "row '8' has 9 tokens, but the limit is 8; shorten it by 1 tokens" in str(caught.value)
    assert "line 4: row '9' has 10 tokens" in str(caught.value)
