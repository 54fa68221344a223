"""The report: the same facts in both files, whatever the run went through, and nothing hostile gets out."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ladder_runs import report_of, write_run

from ascent.evaluate.log import read_report, write_report
from ascent.ladder.charts import curve, interval_plot, ticks
from ascent.ladder.facts import read_usecase, thinned
from ascent.ladder.gates import after_stage
from ascent.ladder.report import build_report
from ascent.ladder.runs import ClimbRecord, read_climb
from ascent.records import Decision
from ascent.records.errors import BadInput, Corrupt
from ascent.records.files import write_atomic

SKILLS = {"prompt": 0.45, "sft": 0.93, "dpo": 0.93, "dapo": 0.99}
HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>" onclick="alert(3)\u2028{{ 7*7 }}'
VOID = {"meta", "br", "img", "path", "line", "rect", "circle"}


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page, and checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def built(run: Path) -> tuple[Page, dict[str, Any], str]:
    html, data = build_report(run)
    text = html.read_text(encoding="utf-8")
    return Page(text), json.loads(data.read_text(encoding="utf-8"), parse_constant=pytest.fail), text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("case"), SKILLS)


def rewritten(run: Path, **changes: Any) -> None:
    climb = read_climb(run).model_copy(update=changes)
    write_atomic(run / "climb.json", climb.to_json())


def test_the_facts_are_those_of_the_records(run: Path) -> None:
    page, facts, _ = built(run)
    climb = read_climb(run)
    for stage, shown in zip(climb.stages, facts["stages"], strict=True):
        assert stage.report is not None and stage.verdict_after is not None
        report = read_report(run / stage.report)
        estimate = report.metrics["exact_match"]
        assert shown["estimate"]["value"] == estimate.value
        assert shown["after"]["decision"] == stage.verdict_after.decision
        assert f"{100 * estimate.value:.1f} %" in page.text
        assert f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f} %" in page.text
        for reason in stage.verdict_after.reasons:
            assert reason in page.text
        for change in stage.verdict_after.changes[:1]:
            assert f"{len(change.fixed)} fixed" in page.text and f"{len(change.broken)} broken" in page.text
    assert [stage["champion"] for stage in facts["stages"]] == [False, False, False, True]
    assert facts["run"]["seconds"] == pytest.approx(sum(stage.seconds for stage in climb.stages))
    assert all(source.sha256 in page.text for source in climb.data)
    assert "ascent climb examples/pharmacy --seed 7" in page.text
    assert "claims for the technique" in page.text


def test_every_changed_item_can_be_opened(run: Path) -> None:
    page, facts, _ = built(run)
    buttons = [value for tag, name, value in page.attributes if (tag, name) == ("button", "data-item")]
    changes = [stage["after"]["changes"][0] for stage in facts["stages"] if stage["after"]["changes"]]
    assert sorted(buttons) == sorted(item for change in changes for item in change["fixed"] + change["broken"])
    embedded = json.loads(page.scripts[0])
    assert set(buttons) == set(embedded["items"])
    tests = {row["id"]: row for row in map(json.loads, (run.parents[1] / "test.jsonl").read_text().splitlines())}
    for name, item in embedded["items"].items():
        assert item["input"] == tests[name]["input"] and item["expected"] == tests[name]["expected"]
        for answer in item["answers"].values():
            if answer["output"] is not None:
                wrong = [part for part in ("dose", "route", "frequency") if not answer["grades"][part]]
                assert sorted(answer["differs"]) == sorted(wrong)


def test_ten_errors_are_drawn_with_the_seed(run: Path) -> None:
    _, facts, _ = built(run)
    champion = read_report(run / str(read_climb(run).stages[-1].report))
    wrong = sorted(item for item, value in champion.values("exact_match").items() if value == 0)
    drawn = [item["id"] for item in facts["errors"]["items"]]
    assert facts["errors"]["total"] == len(wrong)
    assert drawn == sorted(random.Random(7).sample(wrong, 10))


def test_the_page_needs_nothing_from_anywhere(run: Path) -> None:
    page, _, html = built(run)
    assert not [entry for entry in page.attributes if entry[1] in ("src", "srcset", "action", "data")]
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert not re.search(r"https?://|@import|url\(", html)
    checksum = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{checksum}'" in html


def test_the_page_is_accessible(run: Path) -> None:
    page, _, html = built(run)
    assert len(page.ids) == len(set(page.ids))
    targets = [value[1:] for _, name, value in page.attributes if name == "href"]
    named = [value for _, name, value in page.attributes if name == "aria-labelledby"]
    assert set(targets) <= set(page.ids) and set(named) <= set(page.ids)
    drawings = html.count("<svg ")
    labelled = len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]+', html))
    hidden = len(re.findall(r'aria-hidden="true"><span></span>\s*<svg ', html))
    assert drawings == labelled + hidden
    assert html.count("<th ") == len(re.findall(r'<th scope="(?:col|row)"', html))
    assert '<html lang="en">' in html and "prefers-color-scheme: dark" in html and "@media print" in html


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path, SKILLS, hostile=HOSTILE)
    rewritten(run, commands=(HOSTILE,), machine={HOSTILE: HOSTILE}, versions={"x": HOSTILE})
    page, facts, _ = built(run)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert not [entry for entry in page.attributes if entry[1].startswith("on")]
    assert HOSTILE in json.dumps(facts, ensure_ascii=False).replace('\\"', '"')
    assert "{{ 7*7 }}" in page.text and "alert(2)" in page.text
    embedded = json.loads(page.scripts[0])
    assert any(item["input"].get("sig") == HOSTILE for item in embedded["items"].values())


def test_one_stage_only(tmp_path: Path) -> None:
    page, facts, _ = built(write_run(tmp_path, {"prompt": 0.5}))
    assert "The only stage was measured" in page.text and "No stage has been compared" in page.text
    assert facts["champion"] == "prompt" and facts["items"] == {}


def test_a_stage_that_was_refused(tmp_path: Path) -> None:
    page, facts, _ = built(write_run(tmp_path, SKILLS, informative=1))
    assert facts["stages"][3]["before"]["decision"] == "STOP" and facts["stages"][3]["estimate"] is None
    assert "Dead groups: only 1 of 48 prompts" in page.text
    assert "Reinforcement learning (dapo) was not begun, STOP" in page.text


def test_a_stage_that_failed(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"prompt": 0.45, "sft": 0.93})
    stages = read_climb(run).stages
    broken = stages[1].model_copy(
        update={"status": "failed", "report": None, "verdict_after": None, "note": "the disk was full"}
    )
    rewritten(run, stages=(stages[0], broken), champion="prompt", finished=None)
    page, facts, _ = built(run)
    assert "the disk was full" in page.text and "its status is 'failed'" in page.text
    assert facts["stages"][0]["champion"] and "Finished not yet" in page.text


def test_a_stage_whose_grader_never_answered(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"prompt": 0.45, "sft": 0.93})
    stages = read_climb(run).stages
    usecase, champion = read_usecase(run), read_report(run / str(stages[0].report))
    values = {item.task_id: None for item in champion.items}
    silent = report_of({"exact_match": values, "near_miss": values}, stage="sft", sha256=champion.data.sha256)
    path = write_report(silent, run / "reports")
    verdict = after_stage(champion, silent, usecase)
    broken = stages[1].model_copy(update={"report": f"reports/{path.name}", "verdict_after": verdict})
    rewritten(run, stages=(stages[0], broken), champion="prompt")
    page, facts, _ = built(run)
    assert verdict.decision is Decision.NO_GO and facts["stages"][1]["estimate"] is None
    assert "could not be measured, NO-GO: not measured: sft has no graded item for exact_match" in page.text


def test_without_curves(tmp_path: Path) -> None:
    page, facts, _ = built(write_run(tmp_path, {"prompt": 0.45, "sft": 0.93}, curves=False))
    assert "No stage was trained, or none has logged a step." in page.text
    assert facts["stages"][1]["curves"] == {}


def test_a_climb_that_has_only_begun(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"prompt": 0.5})
    rewritten(run, stages=(), champion=None, finished=None)
    page, facts, _ = built(run)
    assert "No model has been measured yet." in page.text and facts["champion"] is None


def test_test_data_that_changed_or_vanished(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"prompt": 0.45, "sft": 0.93})
    test = tmp_path / "test.jsonl"
    test.write_text(test.read_text() + '{"id": "new", "input": {"sig": "x"}}\n')
    page, facts, _ = built(run)
    assert "changed after it was measured" in page.text
    item = next(iter(facts["items"].values()))
    assert item["expected"] is None and item["input"]["prompt"].startswith("tk ")
    test.unlink()
    assert "no longer there" in built(run)[0].text


def test_numbers_that_json_has_no_word_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"prompt": 0.45, "sft": 0.93})
    metrics = run / "stages/sft/metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 0.5}\n{"torn')
    _, facts, _ = built(run)
    assert facts["stages"][1]["curves"] == {"loss": [[1, 1.0], [3, 0.5]]}


def test_folders_that_hold_no_climb(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"climb\.json"):
        build_report(tmp_path)
    run = write_run(tmp_path, {"prompt": 0.5})
    next((run / "reports").iterdir()).unlink()
    with pytest.raises(Corrupt, match="--resume"):
        build_report(run)
    write_atomic(run / "climb.json", '{"model": 3}')
    with pytest.raises(Corrupt):
        build_report(run)


def test_the_plot_puts_values_where_they_belong() -> None:
    def stage(value: float) -> dict[str, Any]:
        return {
            "name": "sft",
            "title": "t",
            "champion": False,
            "claimed": {"band": [0.8, 0.85]},
            "estimate": {"value": value, "low": value - 0.1, "high": value + 0.1},
        }

    plot = interval_plot([stage(0.5)], 0.9)
    assert (plot["rows"][0]["low"], plot["rows"][0]["value"], plot["rows"][0]["high"]) == (40, 50, 60)
    assert plot["target"] == 90 and plot["rows"][0]["band"] == [80, 85]
    assert [x for x, _ in plot["ticks"]] == [0, 20, 40, 60, 80, 100]
    beyond = interval_plot([stage(3.0)], 4.0)
    assert beyond["rows"][0]["band"] is None and not beyond["fraction"]
    assert 0 < beyond["rows"][0]["value"] < beyond["target"] < 100


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 40), (0.2, 0.23), (1e5, 3e5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 9 and low <= found[0] and found[-1] <= high
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1


def test_curves_span_their_box_and_are_thinned_by_averaging() -> None:
    drawn = curve([[1, 5.0], [2, 1.0], [3, 3.0]])
    assert drawn["path"] == "M0.0 6.0 L120.0 90.0 L240.0 48.0" and drawn["trend"] is None
    assert curve([[1, 2.0], [2, 2.0]])["path"] == "M0.0 48.0 L240.0 48.0"
    points = thinned([[float(i), float(i % 2)] for i in range(1200)])
    assert len(points) == 300 and all(value == 0.5 for _, value in points) and points[-1][0] == 1199


def test_records_of_a_climb_survive_json(run: Path) -> None:
    climb = read_climb(run)
    assert ClimbRecord.from_json(climb.to_json()) == climb
