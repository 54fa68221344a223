"""The starter use case: it loads, its data are honest, and its graders know right from wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ascent.cli.main import run
from ascent.evaluate.program import Program
from ascent.ladder.scaffold import scaffold
from ascent.ladder.workspace import Workspace, open_workspace
from ascent.records import Episode, Task
from ascent.records.errors import BadInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("init") / "my desk"
    scaffold(place)
    return place


@pytest.fixture(scope="module")
def workspace(folder: Path) -> Workspace:
    return open_workspace(folder)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data" / name).read_text(encoding="utf-8").splitlines()]


def test_it_is_a_whole_use_case(workspace: Workspace) -> None:
    """Loading checks the keys, the metrics' names, the labels' schema, and that no test row repeats a training row."""
    assert workspace.usecase.name == "my-desk"
    have, needed = workspace.inventory(), workspace.usecase.priors
    assert have.labels >= needed.sft.labels[0]
    assert have.prompts >= needed.rl.prompts[0]
    assert have.test_items >= workspace.usecase.thresholds.minimum_items


def test_test_data_share_nothing_with_training(folder: Path) -> None:
    seen = {row["group"] for name in ("train.jsonl", "prompts.jsonl") for row in rows(folder, name)}
    assert seen.isdisjoint(row["group"] for row in rows(folder, "test.jsonl"))


def test_labels_are_balanced(folder: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        counts = Counter((row["expected"]["queue"], row["expected"]["urgency"]) for row in rows(folder, name))
        assert len(counts) == 15
        assert max(counts.values()) <= 1.5 * min(counts.values())


def test_the_generator_is_deterministic(folder: Path, tmp_path: Path) -> None:
    scaffold(tmp_path / "again", "other")
    for name in ("train.jsonl", "test.jsonl", "prompts.jsonl", "examples.jsonl"):
        assert (tmp_path / "again" / "data" / name).read_bytes() == (folder / "data" / name).read_bytes()


def test_graders_on_right_and_wrong_answers(folder: Path) -> None:
    program = Program.load(folder / "program.py")
    names = ("exact_match", "queue", "urgency", "urgent_missed", "reward")
    expected = {"queue": "billing", "urgency": "high"}

    def grades(text: str, wanted: dict[str, str] = expected) -> list[Any]:
        task = Task(id="1", input={"message": "x"}, expected=wanted)
        output = program.finish(text, task.input)
        episode = Episode(task_id="1", model="m", messages=(), text=text, output=output)
        return [program.grader(name)(task, episode) for name in names]

    assert grades('{"queue": "billing", "urgency": "high"}') == [True, True, True, False, 1.0]
    assert grades('{"queue": "billing", "urgency": "low"}') == [False, True, False, True, pytest.approx(0.55)]
    assert grades("billing, high") == [False, False, False, True, 0.0]
    assert grades('{"queue": "billing"}', {"queue": "billing"}) == [True, True, None, None, 1.0]


def test_others_may_read_it_as_far_as_the_umask_lets_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").touch()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (folder / "usecase.yaml").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run(["init", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_name_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot name a use case"):
        scaffold(tmp_path / "a", "has space")
    assert not (tmp_path / "a").exists()


def test_what_it_prints_is_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path / "desk"), "--name", "desk-1"]) == 0
    shown = capsys.readouterr().out
    for file in (tmp_path / "desk").rglob("*"):
        if file.is_file():
            assert file.relative_to(tmp_path / "desk").as_posix() in shown
    assert "name: desk-1" in (tmp_path / "desk" / "usecase.yaml").read_text()
