"""`ascent plan` and `ascent search` as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from laws.helpers import write_tiny_model, write_use_case

from ascent.cli.main import run
from ascent.cli.plan import duration
from ascent.ladder.scaffold import scaffold
from ascent.ladder.usecase import load_usecase
from ascent.ladder.workspace import generate_data

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def case(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "home"))
    return write_use_case(tmp_path / "case", tiny_model)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter use case with a tiny model, a recipe, and eight validation rows that are not in its test file."""
    place = tmp_path_factory.mktemp("desk")
    write_tiny_model(place / "tiny", context=2048)
    scaffold(place / "desk")
    generate_data(load_usecase(place / "desk"))
    rows = (place / "desk" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (place / "valid.jsonl").write_text("\n".join(rows[:8]) + "\n", encoding="utf-8")
    (place / "few.jsonl").write_text("\n".join(rows[8:24]) + "\n", encoding="utf-8")
    recipe = {
        "algorithm": "sft",
        "model": "tiny",
        "data": "few.jsonl",
        "precision": "fp32",
        "program": "desk/program.py",
    }
    (place / "sft.yaml").write_text(yaml.safe_dump(recipe))
    return place


def search_file(desk: Path, data: str, metric: str = "exact_match") -> Path:
    objective = {"metric": metric, "data": data, "usecase": "desk"}
    spec = {"recipe": "sft.yaml", "space": {"optim.lr": {"log": [1e-4, 1e-2]}}, "objective": objective, "trials": 2}
    (desk / "search.yaml").write_text(yaml.safe_dump(spec))
    return desk / "search.yaml"


def test_plan_prints_parts_and_assumptions(case: Path, capsys: Captured) -> None:
    assert run(["plan", str(case / "sft.yaml"), "--price", "2"]) == 0
    shown = capsys.readouterr().out
    for wanted in ("forward and backward", "optimiser moments", "1,740 (counted)", "cost", "GFLOP/s", "12"):
        assert wanted in shown
    assert run(["plan", str(case / "grpo.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "sampling" in shown and "every answer has 8 tokens, the most it may have" in shown


def test_plan_as_json_is_the_same_plan_twice(case: Path, capsys: Captured) -> None:
    """Rates are measured once and kept, so only the memory that the process holds may differ."""
    plans = []
    for _ in range(2):
        assert run(["plan", str(case / "sft.yaml"), "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["tokens"] == 1740 and plans[0]["steps"] == 12
    assert plans[0]["rates"] == plans[1]["rates"] and plans[0]["seconds"] == pytest.approx(plans[1]["seconds"])
    assert not (case / "runs").exists()


def test_plan_of_bad_input_is_exit_code_2(case: Path, capsys: Captured) -> None:
    (case / "sft.yaml").write_text((case / "sft.yaml").read_text() + "batchsize: 3\n")
    assert run(["plan", str(case / "sft.yaml")]) == 2
    assert "did you mean 'batch_size'" in capsys.readouterr().err
    assert run(["plan", str(case / "absent.yaml")]) == 2
    (case / "pairs.jsonl").write_text('{"input": {"prompt": "x"}}\n')
    assert run(["plan", str(case / "dpo.yaml")]) == 2
    assert "pairs.jsonl:1 [chosen]" in capsys.readouterr().err


def test_durations_read_well() -> None:
    assert [duration(s) for s in (0.0123, 3.21, 59.4, 245, 3720)] == [
        "0.012 s",
        "3.2 s",
        "59 s",
        "4 min 5 s",
        "1 h 2 min",
    ]


def test_search_measures_on_validation_data(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("ASCENT_HOME", str(desk / "home"))
    spec = search_file(desk, "valid.jsonl")
    assert run(["search", str(spec)]) == 0
    shown = capsys.readouterr()
    folder = desk / "runs" / "search"
    assert str(folder / "best.yaml") in shown.out and "EXACT_MATCH" in shown.out
    trial = json.loads((folder / "trials" / "000" / "trial.json").read_text())
    assert trial["value"] == 0.0  # a random model never answers in JSON
    data = str(desk / "valid.jsonl")
    assert run(["eval", str(desk / "desk"), "--model", str(folder / "trials" / "000" / "model"), "--data", data]) == 0
    assert "0.000" in capsys.readouterr().out
    assert run(["search", str(spec)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(["train", str(folder / "best.yaml"), "--out", str(desk / "again")]) == 0


def test_search_never_touches_the_test_data(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """The file itself, a copy, and a shuffled part of it: what was searched on is no test any more."""
    monkeypatch.setenv("ASCENT_HOME", str(desk / "home"))
    test = desk / "desk" / "data" / "test.jsonl"
    (desk / "copy.jsonl").write_bytes(test.read_bytes())
    rows = test.read_text(encoding="utf-8").splitlines()
    (desk / "part.jsonl").write_text("\n".join([*rows[5:9], *rows[:2]]) + "\n", encoding="utf-8")
    for data, words in (
        ("desk/data/test.jsonl", "is the use case's test data"),
        ("copy.jsonl", "is the use case's test data"),
        ("part.jsonl", "holds 6 rows of the use case's test data"),
    ):
        assert run(["search", str(search_file(desk, data)), "--out", str(desk / "never")]) == 2
        shown = capsys.readouterr().err
        assert words in shown and "search.yaml:" in shown
    assert run(["search", str(search_file(desk, "valid.jsonl", "exact")), "--out", str(desk / "never")]) == 2
    assert "did you mean 'exact_match'" in capsys.readouterr().err
    assert not (desk / "never").exists()


@pytest.mark.slow
def test_a_killed_search_goes_on(case: Path, capsys: Captured) -> None:
    """Killed in the middle of its second trial; afterwards the trials are those of a search that was not."""
    recipe = yaml.safe_load((case / "sft.yaml").read_text()) | {"epochs": 6, "checkpoint_every": 1}
    (case / "sft.yaml").write_text(yaml.safe_dump(recipe))
    space = {"optim.lr": {"log": [1e-4, 1e-2]}}
    objective = {"metric": "loss", "direction": "minimize"}
    spec = {"recipe": "sft.yaml", "space": space, "objective": objective, "trials": 2}
    (case / "search.yaml").write_text(yaml.safe_dump(spec))
    code = f"from ascent.cli.main import main; main(['search', {str(case / 'search.yaml')!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ, stdout=subprocess.DEVNULL)
    second = case / "runs" / "search" / "trials" / "001"
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (second / "checkpoint").is_dir() and len((second / "metrics.jsonl").read_text().splitlines()) > 4:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = (second.parent / "000" / "trial.json").stat().st_mtime_ns
    assert not (second / "trial.json").exists()
    assert run(["search", str(case / "search.yaml"), "--resume"]) == 0
    assert (second.parent / "000" / "trial.json").stat().st_mtime_ns == first
    assert run(["search", str(case / "search.yaml"), "--out", str(case / "whole")]) == 0
    for number in ("000", "001"):
        cut, whole = (
            json.loads((place / number / "trial.json").read_text()) | {"seconds": 0}
            for place in (second.parent, case / "whole" / "trials")
        )
        assert cut == whole
