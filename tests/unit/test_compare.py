"""`ascent compare` on two reports as `ascent eval --json` writes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ascent.cli.eval import _write, read_report
from ascent.cli.main import run
from ascent.evaluate.suite import estimate
from ascent.records import DataSource, Episode, Report, Score, Unscored
from ascent.records.errors import BadInput

DATA = DataSource(name="test", path="test.jsonl", rows=10, sha256="a" * 64)


def report(model: str, right: list[int]) -> Report:
    """Ten items, each right or wrong; the metric `tone` was scored on none."""
    items = [
        Episode(
            task_id=str(index),
            model=model,
            messages=(),
            text="x",
            scores=(Score(name="right", value=value), Score(name="tone", unscored=Unscored.not_applicable)),
        )
        for index, value in enumerate(right)
    ]
    metrics = {name: estimate(name, items) for name in ("right", "tone")}
    return Report(id=model, model=model, stage=model, data=DATA, metrics=metrics, items=tuple(items), sampling={})


def test_two_reports_are_compared_item_by_item(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six fixed and none broken: McNemar's exact test gives 2 · 0.5⁶ = 0.0312."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    _write(report("plain", [1, 1, *[0] * 8]), before)
    _write(report("tuned", [1] * 8 + [0] * 2), after)
    assert run(["compare", str(before), str(after)]) == 0
    shown = capsys.readouterr().out
    assert "plain (plain) → tuned (tuned)" in shown
    row = next(line for line in shown.splitlines() if line.startswith("right"))
    for part in ("0.200", "0.800", "+0.600", "0.0312", "6 / 0", "mcnemar-exact"):
        assert part in row
    assert "tone" not in shown


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = report("plain", [1, 0] * 5)
    _write(written, tmp_path / "out.json")
    read = read_report(tmp_path / "out.json")
    assert math.isnan(read.metrics["tone"].value)
    assert read.items == written.items
    assert read.metrics["right"] == written.metrics["right"]


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{}", "{", '{"summary": 1, "metrics": {"a": 3}}'):
        (tmp_path / "no.json").write_text(text)
        with pytest.raises(BadInput, match=r"no\.json is no report"):
            read_report(tmp_path / "no.json")
