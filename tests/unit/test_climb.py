"""A whole climb on a tiny model: stages, gates, resume, champion, report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ascent.inference.store import Store
from ascent.ladder.climb import climb
from ascent.ladder.measure import find_candidate, latest_run, measure
from ascent.ladder.runs import read_climb
from ascent.observe.progress import Progress
from ascent.records import Decision, ModelCard
from ascent.records.errors import BadData, BadRecipe

LABELS = {"red": "stop", "green": "go", "blue": "wait"}
PROGRAM = """
def prepare(input):
    return input["word"]

def finish(text, input):
    return text.strip()

def right(task, episode):
    return float(episode.output == task.expected["answer"])

def silent(task, episode):
    return float(not episode.output)

def reward(task, episode):
    return 1.0 if episode.output == task.expected["answer"] else 0.1 * bool(episode.output)
"""
USECASE = """
name: lamps
task: say what a lamp asks for
risk: low
model: tiny
program: program.py
data: {train: train.jsonl, test: test.jsonl, prompts: prompts.jsonl}
prompt: {system: lamp, instructions: "Answer with stop, go or wait."}
sampling: {max_tokens: 8}
metrics:
  primary: {name: right, target: 0.99}
  guards: [{name: silent, direction: lower, margin: 0.05}]
reward: reward
stages:
  - prompt
  - row: sft
    recipe: {epochs: EPOCHS, batch_size: 16, precision: fp32, lora: null, checkpoint_every: 5, optim: {lr: 0.005}}
  - row: dpo
    recipe: {epochs: 1, precision: fp32}
  - row: dapo
    recipe: {steps: 2, prompts_per_step: 4, group_size: 4, precision: fp32}
priors: {sft: {labels: [50, 100]}, dpo: {pairs: [400, 500]}, rl: {prompts: [20, 50]}}
gates: {continue_past_target: true, min_informative: 0.0, min_headroom: 0.0}
"""


def write_rows(path: Path, count: int, start: int, seed: int) -> None:
    dice = random.Random(seed)
    rows = []
    for index in range(count):
        word = dice.choice(sorted(LABELS))
        row = {
            "id": f"{path.stem}-{index}",
            "input": {"word": f"{start + index} {word}"},
            "target": LABELS[word],
            "expected": {"answer": LABELS[word]},
        }
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture
def lamps(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "home"))
    card = ModelCard(id="tiny", family="llama", source="random", licence="Apache-2.0", sha256="", parameters=20_000)
    Store().add(tiny_model, card)
    folder = tmp_path / "lamps"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "usecase.yaml").write_text(USECASE.replace("EPOCHS", "6"))
    write_rows(folder / "train.jsonl", 240, 0, 1)
    write_rows(folder / "test.jsonl", 120, 1000, 2)
    write_rows(folder / "prompts.jsonl", 24, 3000, 3)
    return folder


def quiet(task: str, total: int | None = None) -> Progress:
    return Progress.quiet(task, total)


def test_a_climb_promotes_what_helps_and_says_why_it_refuses(lamps: Path) -> None:
    said: list[str] = []
    result = climb(lamps, seed=1, progress=quiet, say=said.append)
    record = read_climb(result.run_folder)
    stages = {stage.name: stage for stage in record.stages}
    assert stages["prompt"].status == "champion" and stages["sft"].status == "champion"
    change = stages["sft"].verdict_after.changes[0]
    assert change.challenger - change.champion > 0.5 and change.p_value < 1e-6
    before = stages["dpo"].verdict_before
    assert before.decision is Decision.COLLECT and before.collect == 400 - before.evidence["pairs"]
    after = stages["dapo"].verdict_after
    assert (after.decision is Decision.GO) == (record.champion == "dapo")
    assert result.stopped and record.finished
    page = result.report_html.read_text()
    assert "lamps" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (result.champion_folder / "model.safetensors").is_file()
    assert any("dpo, gate before: COLLECT" in line for line in said)

    again = measure(lamps, "champion", lamps / "test.jsonl")
    told = json.loads((result.run_folder / "report.json").read_text())
    assert told["champion"] == record.champion
    assert again.metrics["right"].value == pytest.approx(
        measure(lamps, str(result.champion_folder), lamps / "test.jsonl").metrics["right"].value
    )
    assert find_candidate(lamps, "prompt").tuned is False and find_candidate(lamps, "sft").tuned is True


def test_an_interrupted_climb_goes_on_and_runs_no_stage_twice(lamps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ascent.customize import run as run_module

    whole = climb(lamps, seed=2, progress=quiet)
    original = run_module.TrainingRun.log

    def stop_at_seven(self, step, total, tokens, metrics):
        original(self, step, total, tokens, metrics)
        if step == 7 and "sft" in str(self.folder):
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.TrainingRun, "log", stop_at_seven)
    (lamps / "runs" / "seed2").rename(lamps / "runs" / "done")
    with pytest.raises(KeyboardInterrupt):
        climb(lamps, seed=2, progress=quiet)
    monkeypatch.setattr(run_module.TrainingRun, "log", original)
    torn = latest_run(lamps)
    prompt_report = next((torn / "reports").glob("prompt-*.json")).stat().st_mtime_ns
    resumed = climb(lamps, seed=2, resume=True, progress=quiet)
    assert resumed.run_folder == torn
    assert next((torn / "reports").glob("prompt-*.json")).stat().st_mtime_ns == prompt_report
    steps = [json.loads(line)["step"] for line in (torn / "stages/sft/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    first = (lamps / "runs/done/stages/sft/model/model.safetensors").read_bytes()
    assert (torn / "stages/sft/model/model.safetensors").read_bytes() == first
    assert resumed.champion == whole.champion


def test_test_rows_in_train_stop_the_climb_before_it_starts(lamps: Path) -> None:
    row = (lamps / "test.jsonl").read_text().splitlines()[0]
    with (lamps / "train.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(BadData, match=r"train.jsonl:241"):
        climb(lamps, progress=quiet)
    assert not (lamps / "runs").exists()


def test_a_bad_override_is_found_before_anything_runs(lamps: Path) -> None:
    text = (lamps / "usecase.yaml").read_text()
    (lamps / "usecase.yaml").write_text(text.replace("batch_size", "batchsize"))
    with pytest.raises(BadRecipe, match="did you mean 'batch_size'"):
        climb(lamps, progress=quiet)
    assert not (lamps / "runs").exists()


ABSTAINING = PROGRAM.replace('def finish(text, input):\n    return text.strip()', (
    'def finish(text, input, doubtful):\n    return "" if doubtful else text.strip()'
)) + """

def wrong(task, episode):
    return None if not episode.output else float(episode.output != task.expected["answer"])
"""  # fmt: skip


def test_a_tuned_stage_learns_when_to_hand_over_and_takes_it_along(lamps: Path) -> None:
    """Half-trained, the model is unsure often enough: what passes is right more often than what it would have said."""
    (lamps / "program.py").write_text(ABSTAINING)
    write_rows(lamps / "validation.jsonl", 150, 2000, 4)
    head, rest = USECASE.replace("EPOCHS", "0.8").split("  - row: dpo")
    text = head + rest[rest.index("priors:") :]
    text = text.replace("test: test.jsonl,", "test: test.jsonl, validation: validation.jsonl,")
    text = text.replace("margin: 0.05", "margin: 0.9") + "abstain: {metric: wrong, risk: 0.01}\n"
    (lamps / "usecase.yaml").write_text(text)
    result = climb(lamps, seed=1, progress=quiet)
    (stage,) = (s for s in read_climb(result.run_folder).stages if s.name == "sft")
    assert stage.verdict_after is not None, stage.verdict_before
    assert any("handed over" in reason or "threshold" in reason for reason in stage.verdict_after.reasons)
    candidate = find_candidate(lamps, "sft")
    assert candidate.abstain_below > 0, stage.verdict_after.reasons
    assert find_candidate(lamps, "prompt").abstain_below == 0
    report = measure(lamps, "sft", lamps / "test.jsonl")
    for item in report.items:
        assert item.doubtful is (item.confidence < candidate.abstain_below)
        assert (item.output == "") is (item.doubtful or not item.text.strip())
    assert any(item.doubtful for item in report.items)
    passing = [
        item.text.strip() == LABELS[item.messages[-1].content.split()[1]] for item in report.items if item.output
    ]
    every = [item.text.strip() == LABELS[item.messages[-1].content.split()[1]] for item in report.items]
    assert sum(passing) / len(passing) > sum(every) / len(every)
    if result.champion != "lamps-prompt":
        copied = find_candidate(lamps, str(result.champion_folder))
        assert copied.abstain_below == candidate.abstain_below, "the stored model takes its threshold along"


def test_abstaining_needs_a_known_metric_and_validation_items(lamps: Path) -> None:
    for change, words in (
        ("abstain: {metric: wrogn, risk: 0.1}", "no grader is called 'wrogn'"),
        ("abstain: {metric: right, risk: 0.1}", r"data\.validation"),
        ("abstain: {metric: right, risk: 2}", "less than 1"),
    ):
        (lamps / "usecase.yaml").write_text(USECASE.replace("EPOCHS", "2") + change + "\n")
        with pytest.raises(BadRecipe, match=words):
            climb(lamps, progress=quiet)
    assert not (lamps / "runs").exists()
