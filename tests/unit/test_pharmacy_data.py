# ruff: noqa: E402
"""The generator: determinism, disjoint splits, and gold answers that the rules read back as the frame meant them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ascent.records import Episode, Task

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "pharmacy"))

import generate
import program

Rows = dict[str, list[generate.Row]]


@pytest.fixture(scope="module")
def made() -> Rows:
    return generate.make(7)


def test_sizes_and_unique_texts(made: Rows) -> None:
    assert {name: len(rows) for name, rows in made.items()} == generate.SIZES
    texts = [row.text for rows in made.values() for row in rows]
    assert len(texts) == len(set(texts))


def test_drugs_and_phrase_families_of_the_test_set_are_its_own(made: Rows) -> None:
    drugs = {name: {row.drug for row in rows} for name, rows in made.items()}
    names = list(drugs)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert not drugs[name] & drugs[other]
    families = {name: set().union(*(row.families for row in rows)) for name, rows in made.items()}
    learnt, measured = families["train"] | families["prompts"], families["test"] | families["validation"]
    assert not measured & learnt
    assert 0.2 < len(measured) / len(measured | learnt) < 0.45


def test_gold_answers_are_read_back_as_the_frame_meant(made: Rows) -> None:
    wrong = []
    total = 0
    for rows in made.values():
        for row in rows:
            total += 1
            output = program.finish(row.target, {"sig": row.sig, **row.given})
            keys = [key for key in row.expected if key not in program._COMPONENTS]
            same = all(program._right(key, output, row.expected) for key in program._COMPONENTS)
            if not same or any(output[key] != row.expected[key] for key in keys):
                wrong.append((row.sig, row.target))
    assert len(wrong) <= 0.005 * total, wrong[:5]


def test_same_seed_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "SIZES", {"train": 60, "validation": 20, "test": 20, "prompts": 20})
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate.generate(tmp_path / folder, seed)
    for name in ("train", "validation", "test", "prompts", "examples"):
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
    assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()


def _graded(expected: dict[str, object], sig: str, answer: str) -> tuple[Task, Episode]:
    task = Task(id="t", input={"sig": sig}, expected=expected)
    return task, Episode(task_id="t", model="m", messages=(), text=answer, output=program.finish(answer, task.input))


def test_graders_look_only_at_what_is_listed() -> None:
    answer = "dose: 2 tablets; route: oral; when: every 72 hours"
    pair = _graded({"dose_unit": "Tablets", "max_times_per_day": 0.334}, "2 tabs po q72h", answer)
    assert program.exact_match(*pair) is True
    assert program.dose(*pair) is None
    assert program.needs_review(*pair) is None
    assert program.false_alarm(*pair) is None
    assert program.near_miss(*pair) is False
    assert program.reward(*pair) == 1.0


def test_a_wrong_answer_that_nobody_stops_is_a_near_miss() -> None:
    pair = _graded(
        {"dose_min": 1, "route": None, "needs_review": False},
        "2 tabs po daily",
        "dose: 2 tablets; route: oral; when: daily",
    )
    assert program.exact_match(*pair) is False
    assert program.near_miss(*pair) is True
    assert program.false_alarm(*pair) is False
    reward = program.reward(*pair)
    assert reward is not None
    assert 0 < reward < 0.4


def test_inventing_is_flagged_and_pays_less_than_leaving_out() -> None:
    expected = {"dose_min": 1, "dose_max": 1, "dose_unit": "tablet", "route": None, "duration_days": None}
    honest = _graded(expected, "1 tab daily", "dose: 1 tablet; when: daily")
    inventing = _graded(expected, "1 tab daily", "dose: 1 tablet; route: oral; when: daily; for: 10 days")
    assert program.reward(*honest) == 1.0
    assert inventing[1].output["review_reasons"] == ["not_in_text"]
    assert (program.reward(*inventing) or 0) < 1.0
    nothing_listed = _graded({}, "1 tab daily", "none")
    assert program.exact_match(*nothing_listed) is None
    assert program.reward(*nothing_listed) is None
