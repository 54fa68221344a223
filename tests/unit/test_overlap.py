"""Grading runs while sampling goes on: proven by an engine that does not sample on until the first group was graded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ascent.customize.rollout import rollout
from ascent.evaluate.pool import GraderPool
from ascent.inference.engine import Completion, Prompt, Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.records import FinishReason, Message, Task

PROGRAM = """
from pathlib import Path

def seen(task, episode):
    Path(__file__).with_name(f"{task.id}.graded").touch()
    return float(len(episode.text))
"""
TASKS = [Task(id=name, messages=(Message(role="user", content=f"Say {name}."),)) for name in ("oak", "elm", "fir")]


class Waiting:
    """Answers one prompt after the other, each only when the one before was graded."""

    model = "waiting"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        assert on_group is not None
        answers = []
        for index in range(len(prompts)):
            answers.append([Completion(text="x" * (index + k), finish=FinishReason.stop) for k in range(sampling.n)])
            on_group(index, answers[-1])
            deadline = time.monotonic() + 30
            while not (self.folder / f"{TASKS[index].id}.graded").exists():
                assert time.monotonic() < deadline, "no grade came while sampling went on"
                time.sleep(0.005)
        return answers


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


def test_groups_are_graded_while_others_are_sampled(program: Path) -> None:
    with GraderPool(program, ["seen"]) as pool:
        groups = rollout(Waiting(program.parent), TASKS, pool, Sampling(n=2), "seen")
    assert [group.rewards for group in groups] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    assert [group.task.id for group in groups] == ["oak", "elm", "fir"]


def test_the_embedded_engine_gives_groups_as_they_end(tiny_model: Path) -> None:
    """With room for one row at a time the groups come one by one, each whole, and are what is returned."""
    engine = TorchEngine.load(tiny_model, "tiny")
    engine.rows_in_flight = 1
    heard: list[tuple[int, list[Completion]]] = []
    prompts = [Prompt(task.messages) for task in TASKS]
    done: list[int] = []

    def on_group(index: int, group: list[Completion]) -> None:
        heard.append((index, group))
        done.append(counted[0])

    counted = [0]

    def on_done(number: int) -> None:
        counted[0] += number

    found = engine.generate(prompts, Sampling(n=2, max_tokens=5, temperature=1.0), on_done, on_group)
    assert sorted(index for index, _ in heard) == [0, 1, 2]
    assert all(group == found[index] for index, group in heard)
    assert done == [2, 4, 6]


def test_an_engine_that_fails_ends_the_grading(program: Path) -> None:
    class Failing(Waiting):
        def generate(self, *arguments: object, **more: object) -> list[list[Completion]]:
            raise RuntimeError("out of order")

    with GraderPool(program, ["seen"]) as pool, pytest.raises(RuntimeError, match="out of order"):
        rollout(Failing(program.parent), TASKS, pool, Sampling(n=2), "seen")
