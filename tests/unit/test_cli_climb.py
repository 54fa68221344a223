"""`climb`, `advise` and `report` on the starter use case with a tiny random model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from laws.helpers import write_tiny_model

from ascent.cli.main import run
from ascent.ladder.scaffold import scaffold


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter with two stages that a random model cannot profit from."""
    place = tmp_path_factory.mktemp("climb")
    tiny = write_tiny_model(place / "tiny", context=2048)
    scaffold(place / "desk")
    file = place / "desk" / "usecase.yaml"
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"(?m)^model: .*$", f"model: {place.name}", text)
    text = re.sub(r"(?ms)^stages:.*?\n\n", "stages: [prompt, {row: sft, recipe: {epochs: 0.1}}]\n\n", text)
    file.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCENT_HOME", str(place / "home"))
        assert run(["models", "import", str(tiny), "--name", place.name]) == 0
        assert run(["climb", str(place / "desk")]) == 0
    return place / "desk"


@pytest.fixture(autouse=True)
def home(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCENT_HOME", str(desk.parent / "home"))


def test_a_refused_gain_is_exit_code_1_when_strict(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The finished climb is read back, its second stage did not help, and nothing runs again."""
    before = {file: file.stat().st_mtime_ns for file in (desk / "runs").rglob("reports/*.json")}
    assert run(["climb", str(desk), "--resume", "--strict"]) == 1
    shown = capsys.readouterr().out
    assert "sft: finished earlier (kept out)" in shown
    table = [line.split() for line in shown.splitlines() if line.split()[:1] in (["prompt"], ["sft"])]
    assert ["prompt", "GO", "GO"] in table
    assert ["sft", "GO", "STOP"] in table
    assert before == {file: file.stat().st_mtime_ns for file in (desk / "runs").rglob("reports/*.json")}
    assert len(before) == 2


def test_advise_reads_what_was_measured(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["advise", str(desk)]) == 0
    shown = capsys.readouterr()
    assert "The champion is prompt" in shown.out
    assert str(desk / "runs" / "seed0") in shown.err


def test_report_is_written_again(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, data = desk / "runs" / "seed0" / "report.html", desk / "runs" / "seed0" / "report.json"
    before = json.loads(data.read_text(encoding="utf-8"))
    html.unlink()
    data.unlink()
    assert run(["report", str(desk / "runs" / "seed0")]) == 0
    assert capsys.readouterr().out.split() == [str(html), str(data)]
    assert json.loads(data.read_text(encoding="utf-8")) == before
    assert run(["report", str(desk)]) == 2


def test_stages_can_be_measured_by_name(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(desk / "data" / "test.jsonl")
    for model in ("champion", "sft"):
        assert run(["eval", str(desk), "--model", model, "--data", data, "--limit", "3"]) == 0
    assert run(["eval", str(desk), "--model", "dapo", "--data", data]) == 2
    assert "unknown model 'dapo'" in capsys.readouterr().err
