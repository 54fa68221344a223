"""Run folders for the tests of the ladder: answers are drawn at random, the real parts compute everything else."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascent.evaluate.log import write_report
from ascent.evaluate.suite import estimate
from ascent.ladder.gates import Evidence, Inventory, Probe, Spend, VerifierCheck, after_stage, before_stage
from ascent.ladder.runs import ClimbRecord, StageRecord
from ascent.ladder.usecase import UseCase, load_usecase
from ascent.records import DataSource, Decision, Episode, Message, Report, RunCard, Score
from ascent.records.files import append_jsonl, sha256_file, write_atomic

YAML = """\
name: pharmacy-directions
task: Turn a prescriber's free-text direction into checked components.
risk: high
model: smollm2-135m-instruct
program: program.py
data: {train: train.jsonl, test: test.jsonl, prompts: train.jsonl}
prompt: {system: You read directions., instructions: Answer in JSON.}
metrics:
  primary: {name: exact_match, target: 0.80}
  guards:
    - {name: near_miss, direction: lower, margin: 0.04}
  report: [dose, route, frequency]
reward: reward
stages: [prompt, sft, {row: dpo, recipe: {optim: {lr: 0.00002}}}, dapo]
costs: {machine_per_hour: 0.2, person_per_hour: 60, minutes_per_label: 1.5}
priors: {dpo: {pairs: [200, 2000]}}
budget: {minutes: 15}
gates: {worthwhile_gain: 0.08}
"""
PARTS = ("dose", "route", "frequency")
FORMS = ("tab po", "tabs by mouth", "gtt ou", "puffs inh", "ml po", "units subq")
ROUTES = ("oral", "oral", "ophthalmic", "inhalation", "oral", "subcutaneous")


def report_of(
    values: Mapping[str, Mapping[str, float | None]],
    *,
    stage: str = "sft",
    model: str = "m",
    sha256: str = "0" * 64,
    groups: Mapping[str, str] | None = None,
) -> Report:
    """Return a report whose items scored `values[metric][item]`; None is a time-out."""
    names = sorted({item for scored in values.values() for item in scored})
    items = tuple(
        Episode(
            task_id=item,
            model=model,
            messages=(Message(role="user", content=f"question {item}"),),
            text="answer",
            scores=tuple(score(metric, scored[item]) for metric, scored in values.items() if item in scored),
        )
        for item in names
    )
    return Report(
        id=stage,
        model=model,
        stage=stage,
        data=DataSource(name="test", path="test.jsonl", rows=len(items), sha256=sha256),
        metrics={metric: estimate(metric, items, dict(groups or {})) for metric in values},
        items=items,
        groups=dict(groups or {}),
    )


def score(name: str, value: float | None) -> Score:
    """Return a score; None is a time-out."""
    return Score(name=name, unscored="timeout") if value is None else Score(name=name, value=value)


def write_usecase(folder: Path, text: str = YAML, items: int = 400, hostile: str = "") -> UseCase:
    """Write a use case's folder: program, training and test data."""
    rng = random.Random(5)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "usecase.yaml", text)
    write_atomic(folder / "program.py", "def exact_match(task, episode):\n    return episode.output == task.expected\n")
    for name, count in (("train", 640), ("test", items)):
        rows = []
        for i in range(count):
            form, dose, times = rng.randrange(len(FORMS)), rng.choice([1, 2, 0.5, 10]), rng.randint(1, 6)
            sig = f"tk {dose} {FORMS[form]} {times}x/d prn {rng.choice(['pain', 'itching', 'sob', 'n/v'])}"
            if hostile and name == "test" and i % 7 == 0:
                sig = hostile
            expected = {"dose": dose, "route": ROUTES[form], "frequency": times}
            rows.append({"id": f"{name}-{i:04d}", "input": {"sig": sig}, "expected": expected, "group": f"drug-{i}"})
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return load_usecase(folder)


def measure(
    folder: Path, stage: str, skill: float, previous: Report | None, seed: int, stick: float = 0.93, hostile: str = ""
) -> Report:
    """Answer the test file with a model that gets each part right with probability `skill`.

    With probability `stick` an item is answered as `previous` answered it, as successive stages of one model do.
    """
    rng, path = random.Random(seed), folder / "test.jsonl"
    before = {item.task_id: item for item in previous.items} if previous else {}
    items = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        output: Any = dict(row["expected"])
        if row["id"] in before and rng.random() < stick:
            output = before[row["id"]].output
        else:
            for part in PARTS:
                if rng.random() > skill:
                    output[part] = rng.choice([None, 3, "topical"])
            if skill < 0.7 and rng.random() < 0.1:
                output = None
        fine = {part: output is not None and output[part] == row["expected"][part] for part in PARTS}
        flagged = output is None or None in output.values()
        scores = {"exact_match": all(fine.values()), "near_miss": not all(fine.values()) and not flagged, **fine}
        items.append(
            Episode(
                task_id=row["id"],
                model=f"smollm2-135m-{stage}",
                messages=(Message(role="user", content=row["input"]["sig"]),),
                text=json.dumps(output) if output else f"I cannot read this direction. {hostile}",
                output=output,
                scores=tuple(Score(name=name, value=float(value)) for name, value in scores.items()),
            )
        )
    data = DataSource(name="test", path="test.jsonl", rows=len(items), sha256=sha256_file(path))
    metrics = {name: estimate(name, items) for name in ("exact_match", "near_miss", *PARTS)}
    return Report(
        id=stage,
        model=f"smollm2-135m-{stage}",
        stage=stage,
        data=data,
        metrics=metrics,
        items=tuple(items),
        seconds=31.0,
    )


def write_metrics(file: Path, row: str, steps: int, rng: random.Random) -> None:
    """Write the steps of a training run with the metrics that its loop logs."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = step / steps
        facts = {"step": step, "tokens": 2048, "seconds": 3.1 * step, "grad_norm": 1.4 - done + 0.2 * rng.random()}
        if row == "sft":
            loss = 0.08 + 1.6 * math.exp(-5 * done) + 0.05 * rng.random()
            facts |= {"loss": loss, "nll": loss}
        elif row == "dpo":
            facts |= {"loss": 0.69 - 0.3 * done + 0.05 * rng.random(), "accuracy": 0.5 + 0.4 * done, "margin": 2 * done}
        else:
            facts |= {
                "loss": 0.02 * rng.gauss(0, 1),
                "reward": 0.7 + 0.12 * done + 0.05 * rng.gauss(0, 1),
                "mismatch_kl": 0.001 + 0.004 * done * rng.random(),
                "entropy": 0.42 - 0.12 * done + 0.02 * rng.gauss(0, 1),
                "clip_fraction": 0.004 + 0.01 * rng.random(),
                "informative_groups": 0.45 - 0.15 * done + 0.05 * rng.gauss(0, 1),
            }
        rows.append(facts)
    append_jsonl(file, rows)


def write_run(
    folder: Path,
    skills: Mapping[str, float],
    *,
    run: str = "2026-11-22T14-00-00",
    informative: int = 21,
    stick: float = 0.7,
    hostile: str = "",
    curves: bool = True,
) -> Path:
    """Write a whole run folder in which every stage of `skills` was tried, and return it."""
    usecase = write_usecase(folder, hostile=hostile)
    where, rng = folder / "runs" / run, random.Random(11)
    champion: Report | None = None
    stages: list[StageRecord] = []
    spent = Spend()
    for number, (name, skill) in enumerate(skills.items()):
        stage = usecase.stage(name)
        assert stage is not None
        forecast = Spend(40.0 + 150 * (number > 0), 0.002 + 0.008 * (number > 0))
        evidence = Evidence(
            stage=stage,
            spec=usecase,
            champion=champion,
            inventory=Inventory(labels=640, pairs=412, prompts=640, test_items=400),
            verifier=VerifierCheck(640, 633),
            probe=Probe(groups=48, informative=informative, k=8, pass_1=0.71, pass_k=0.88),
            spent=spent,
            forecast=forecast,
        )
        before = before_stage(evidence)
        record = StageRecord(name=name, row=stage.row, verdict_before=before, status="stopped")
        if before.decision is Decision.GO:
            report = measure(
                folder, name, skill, champion if number > 1 else None, number, stick=stick, hostile=hostile
            )
            after = after_stage(champion, report, usecase)
            path = write_report(report, where / "reports")
            seconds = forecast.seconds * (0.9 + 0.2 * rng.random())
            record = record.model_copy(
                update={
                    "status": "done",
                    "verdict_after": after,
                    "report": f"reports/{path.name}",
                    "model": report.model,
                    "seconds": seconds,
                    "cost": usecase.costs.machine(seconds),
                }
            )
            if stage.kind != "prompt":
                record = record.model_copy(update={"run_card": f"stages/{name}/run.json"})
                card = RunCard(
                    id=name, row=stage.row, recipe={"optim": {"lr": 1e-4}, "lora": {"rank": 16}}, base=usecase.model,
                    seed=7, steps=60, tokens=90_000, seconds=seconds, peak_rss_mb=3400.0,
                )  # fmt: skip
                write_atomic(where / "stages" / name / "run.json", card.to_json(indent=1))
                if curves:
                    write_metrics(where / "stages" / name / "metrics.jsonl", stage.row, 60, rng)
            if after.decision is Decision.GO:
                champion = report
            spent = Spend(spent.seconds + seconds, spent.cost + record.cost)
        stages.append(record)
    climb = ClimbRecord(
        use_case=usecase.name,
        model=usecase.model,
        seed=7,
        started="2026-11-22T14:00:00+00:00",
        finished="2026-11-22T14:11:20+00:00",
        champion=champion.model if champion else None,
        stages=tuple(stages),
        data=tuple(
            DataSource(name=name, path=f"{name}.jsonl", rows=rows, sha256=sha256_file(folder / f"{name}.jsonl"))
            for name, rows in (("train", 640), ("test", 400))
        ),
        commands=("ascent climb examples/pharmacy --seed 7",),
        machine={"processor": "2 cores", "memory_gb": 16},
        versions={"ascent": "0.1.0", "torch": "2.13.0"},
    )
    write_atomic(where / "climb.json", climb.to_json(indent=1))
    write_atomic(where / "usecase.json", usecase.model_dump_json(indent=1))
    return where
