"""Measuring in an environment of several turns: what is in the report, what is missing from it, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from laws.helpers import write_tiny_model
from scipy import stats
from unit.test_pharmacy_dosing import load

from ascent.cli.main import run
from ascent.customize.agentic.harness import SingleTurn, attempt_with
from ascent.customize.agentic.multiturn import MultiTurn, harness_of
from ascent.customize.data import load_demonstrations
from ascent.customize.recipes import OnlineRecipe, SupervisedRecipe, load_recipe
from ascent.customize.sequences import conversation_sequences
from ascent.evaluate.pool import GraderPool
from ascent.evaluate.suite import evaluate
from ascent.inference.chat import Renderer
from ascent.inference.engine import Engine, Sampling
from ascent.inference.engines.scripted import ScriptedEngine
from ascent.inference.engines.torch import TorchEngine
from ascent.records import DataSource, Message, Report, Task, Unscored

EXAMPLE = Path(__file__).parents[2] / "examples" / "pharmacy"
DATA = DataSource(name="test", path="test.jsonl", rows=5, sha256="a" * 64)
PROGRAM = '''
import os
from ascent.customize.agentic.environment import Step
from ascent.records import Message


class Desk:
    """Ends after two turns with the score that the task names; a task without one breaks the episode."""

    def reset(self, task):
        self.score, self.turns = task.input["score"], 0
        return task.messages

    def step(self, text):
        self.turns += 1
        if self.score is None and self.turns == 2:
            os._exit(1)
        if self.turns == 2:
            return Step(done=True, score=self.score if self.score >= 0 else None)
        return Step((Message(role="tool", content=f"heard {text}"),), score=0.5 if self.score is None else None)


def turns(task, episode):
    return 1.0 + sum(message.role == "assistant" for message in episode.messages)
'''
USE_CASE = """name: desk
task: Talk twice.
risk: low
model: {model}
program: program.py
data: {{test: test.jsonl}}
sampling: {{max_tokens: 6}}
metrics: {{primary: {{name: turns, target: 2}}}}
stages: [prompt]
"""


@pytest.fixture(scope="module")
def desk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "usecase.yaml").write_text(USE_CASE.format(model=tiny_model))
    rows = [{"id": task.id, "input": task.input} for task in tasks(1, 0, None, 1)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def world(desk: Path) -> Iterator[MultiTurn]:
    with harness_of(desk / "program.py", "Desk", 4, 20, refills=1) as harness:
        yield harness


@pytest.fixture(scope="module")
def pool(desk: Path) -> Iterator[GraderPool]:
    with GraderPool(desk / "program.py", ["turns"]) as pool:
        yield pool


def tasks(*scores: float | None) -> list[Task]:
    asked = [{"score": score, "prompt": f"q{number}"} for number, score in enumerate(scores)]
    return [Task(id=q["prompt"], input=q, messages=(Message(role="user", content=q["prompt"]),)) for q in asked]


def measured(engine: Engine, world: MultiTurn, pool: GraderPool, todo: list[Task], **changes) -> Report:
    sampling = changes.pop("sampling", Sampling(temperature=0))
    attempt = attempt_with(world, engine)
    return evaluate(engine, todo, pool, sampling=sampling, data=DATA, stage="s", attempt=attempt, **changes)


def test_scores_of_the_environment_are_a_metric_and_lost_episodes_are_unscored(
    world: MultiTurn, pool: GraderPool
) -> None:
    """Of 1, 1, 0, one episode lost in its second turn and one left unscored: two right of three, by Wilson."""
    done: list[int] = []
    engine = ScriptedEngine(lambda prompt: "so")
    report = measured(engine, world, pool, tasks(1, 0, None, 1, -1), on_done=done.append, chunk=2)
    found = report.metrics["environment"]
    assert (found.n, found.successes, found.unscored, found.method) == (3, 2.0, 2, "wilson")
    theirs = stats.binomtest(2, 3).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    turns = report.metrics["turns"]
    assert (turns.value, turns.n, turns.unscored) == (2.0, 4, 1)
    assert [item.task_id for item in report.items] == ["q0", "q1", "q2", "q3", "q4"]
    lost = report.items[2]
    assert "exit status 1" in str(lost.error)
    assert lost.score("environment") is None, "what it was given before it broke is no score"
    assert lost.scores[0].unscored is Unscored.no_output
    assert report.values("environment") == {"q0": 1.0, "q1": 0.0, "q3": 1.0}
    assert [m.role for m in report.items[0].messages] == ["user", "assistant", "tool"]
    assert sum(done) == 5
    assert list(report.metrics) == ["turns", "environment"]


def test_without_a_harness_nothing_changed(tiny_model: Path, pool: GraderPool) -> None:
    """The default is the single-turn harness: the same items, numbers and id; and the details are part of the id."""
    engine = TorchEngine.load(tiny_model, "tiny")
    sampling, todo = Sampling(n=2, max_tokens=5, seed=4), tasks(1, 1, 1)
    plain = evaluate(engine, todo, pool, sampling=sampling, data=DATA, stage="s")
    same = evaluate(
        engine, todo, pool, sampling=sampling, data=DATA, stage="s", attempt=attempt_with(SingleTurn(), engine)
    )
    other = evaluate(engine, todo, pool, sampling=sampling, data=DATA, stage="s", details={"harness": "x"})
    assert same.id == plain.id != other.id
    assert same.items == plain.items
    assert plain.metrics.keys() == {"turns"}
    assert plain.prompt_tokens == sum(len(engine.renderer.prompt_ids(task.messages)) for task in todo)


def test_tokens_that_are_read_are_counted_once_for_the_samples_of_a_task(
    tiny_model: Path, world: MultiTurn, pool: GraderPool
) -> None:
    """All tokens, less what was written, less the first prompt for every sample of a task but one."""
    renderer = Renderer(tiny_model)
    engine = ScriptedEngine(lambda prompt: f"answer {len(prompt.messages)}", renderer)
    todo = tasks(1, 1)
    report = measured(
        engine, world, pool, todo, sampling=Sampling(n=3, temperature=0), keep_tokens=True, abstain_below=1.1
    )
    everything = sum(len(item.token_ids) for item in report.items)
    written = sum(len(renderer.answer_ids(text)) for text in ("answer 1", "answer 3")) * 6
    prompts = sum(len(renderer.prompt_ids(task.messages)) for task in todo)
    assert report.completion_tokens == written
    assert report.prompt_tokens == everything - written - 2 * prompts
    assert report.prompt_tokens > prompts, "what the tools said was read too"
    assert all(item.doubtful for item in report.items), "scripted answers are certain, so all lie below 1.1"


def test_the_command_measures_in_an_environment(
    desk: Path, tiny_model: Path, world: MultiTurn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    command = ["eval", str(desk), "--model", str(tiny_model), "--data", str(desk / "test.jsonl")]
    harness = ["--harness", f"{desk / 'program.py'}:Desk", "--step-seconds", "20"]
    assert run([*command, *harness, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "environment  0.667" in shown
    report = json.loads(out.read_text())
    named = report["sampling"]["harness"]
    assert (named["program"], named["environment"], named["max_turns"]) == ("program.py", "Desk", 4)
    assert [item["error"] is None for item in report["items"]] == [True, True, False, True]
    engine = TorchEngine.load(tiny_model, "tiny")
    todo = [task.model_copy(update={"id": f"q{at}"}) for at, task in enumerate(tasks(1, 0, None, 1))]
    alone = world.run(engine, todo, Sampling(max_tokens=6, temperature=0))
    assert [item["text"] for item in report["items"]][:2] == [group.episodes[0].text for group in alone][:2]
    assert run([*command, *harness, "--max-turns", "1", "--limit", "2"]) == 0
    assert "turns   1.000" in capsys.readouterr().out
    assert run([*command, "--harness", "program.py"]) == 2
    assert "PROGRAM:ENVIRONMENT" in capsys.readouterr().err
    assert run([*command, "--harness", f"{desk / 'program.py'}:Desc"]) == 2
    assert "did you mean 'Desk'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pharmacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its data, and a tiny model of a context that holds an order."""
    folder = tmp_path_factory.mktemp("pharmacy")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "data", "dosing"))
    load("dosing_tasks").generate(folder / "dosing", 7)
    model = write_tiny_model(folder / "tiny", context=4096)
    for name, start in (("dosing_sft", "smollm2-135m-instruct"), ("dosing_grpo", "runs/dosing_sft-s0/model")):
        text = (folder / f"{name}.yaml").read_text()
        assert f"model: {start}\n" in text
        (folder / f"{name}.yaml").write_text(text.replace(start, str(model)))
    return folder


def test_the_recipes_of_the_example_can_be_planned(pharmacy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("dosing_sft", SupervisedRecipe), ("dosing_grpo", OnlineRecipe)):
        recipe = load_recipe(pharmacy / f"{name}.yaml")
        assert isinstance(recipe, kind)
        assert run(["plan", str(pharmacy / f"{name}.yaml"), "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert planned["algorithm"] == recipe.algorithm
        assert planned["tokens"] > 10_000
        assert planned["steps"] == (recipe.steps if isinstance(recipe, OnlineRecipe) else 12 * recipe.epochs)


def test_demonstrations_are_token_for_token_what_an_expert_would_be_rewarded_for(pharmacy: Path) -> None:
    """SFT's tokens and mask of each row are those of the scripted expert's episode in the harness, which is solved."""
    renderer, expert = Renderer(pharmacy / "tiny"), load("dosing_tasks").expert
    rows = load_demonstrations(pharmacy / "dosing" / "demonstrations.jsonl").rows[:6]
    taught = conversation_sequences([row.messages for row in rows], renderer)
    orders = [json.loads(line) for line in (pharmacy / "dosing" / "train.jsonl").read_text().splitlines()[:6]]
    assert [row.id for row in rows] == [order["id"] for order in orders]
    todo = [Task(**order, messages=rows[at].messages[:2]) for at, order in enumerate(orders)]
    engine = ScriptedEngine(lambda prompt: expert(prompt.messages), renderer)
    with (
        harness_of(pharmacy / "dosing.py", "Dosing", 4, 20) as world,
        GraderPool(pharmacy / "dosing.py", ["solved"], time_limit_s=20) as pool,
    ):
        report = measured(engine, world, pool, todo, keep_tokens=True)
    assert report.metrics["solved"].value == 1
    for item, sequence in zip(report.items, taught, strict=True):
        assert item.token_ids == sequence.token_ids
        assert item.loss_mask == sequence.loss_mask
