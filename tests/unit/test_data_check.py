"""Duplicates and leakage, against a brute-force search written from the definition."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascent.customize.data import (
    Demonstration,
    check_leakage,
    dedupe,
    grams,
    leakage,
    load_demonstrations,
    load_tasks,
    normalise,
    numbers_in,
    question,
)
from ascent.records import Message, Preference, Task
from ascent.records.errors import BadData, BadInput

LONG = (
    "take {n} tablet by mouth every {h} hours with a full glass of water and food, and do not lie down for half an "
    "hour after taking it; call the pharmacy if the pain in the left knee is not gone"
)


def task(name: str, text: str, **more: object) -> Task:
    return Task(id=name, input={"sig": text, **more})


# Normal form


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Take 1 tablet, daily.", "take 1  TABLET daily"),
        ("ﬁve ½", "five 1/2".replace("/", "\u2044")),
        ("1\u20132 tablets", "1-2 tablets"),
        ("“Apply” (thinly)!", "apply thinly"),
        ("每日一次。", "每日一次"),
    ],
)
def test_the_same_question(left: str, right: str) -> None:
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("take 1 tablet", "take 2 tablet"),
        ("1/2 tablet", "1 2 tablet"),
        ("0.5 ml", "05 ml"),
        ("2 + 3", "2 * 3"),
        ("at 8:30", "at 830"),
        ("?", "!"),
        ("a b", "ab"),
    ],
)
def test_different_questions(left: str, right: str) -> None:
    assert normalise(left) != normalise(right)


@given(st.text())
def test_normal_form_is_stable(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_decisive_words_in_order() -> None:
    assert numbers_in(normalise("Take ONE tablet, 2.5 ml, not twice 1/2")) == ("1", "2.5", "not", "twice", "1/2")


def test_questions_come_from_raw_inputs_whatever_their_field_names_and_prompts() -> None:
    prompt = (Message(role="system", content="long boilerplate"), Message(role="user", content="Sig: x y"))
    assert question(Task(id="a", input={"b": 2, "a": ["x", None]}, messages=prompt)) == "x\n2"
    assert question(Demonstration(id="a", input={"sig": "x"}, messages=prompt)) == "x"
    turns = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    assert question(Task(id="a", input=turns)) == "u"
    assert question(Preference(id="a", messages=prompt, chosen="c", rejected="r")) == "Sig: x y"


# Leakage


def brute_force(train: list[Task], test: list[Task], threshold: float, numbers: bool) -> dict[str, tuple[str, float]]:
    """For each training row the highest similarity to a test row: every pair, straight from the definition."""
    found: dict[str, tuple[str, float]] = {}
    for row in train:
        ours = normalise(question(row))
        for other in test:
            theirs = normalise(question(other))
            if ours == theirs:
                kind, similarity = "exact", 1.0
            elif numbers and numbers_in(ours) != numbers_in(theirs):
                continue
            else:
                left = {ours[i : i + 5] for i in range(max(1, len(ours) - 4))}
                right = {theirs[i : i + 5] for i in range(max(1, len(theirs) - 4))}
                kind, similarity = "near", len(left & right) / len(left | right)
            better = row.id not in found or (kind == "exact", similarity) > (
                found[row.id][0] == "exact",
                found[row.id][1],
            )
            if (kind == "exact" or similarity >= threshold) and better:
                found[row.id] = (kind, similarity)
    return found


VOCABULARY = "take one 1 2 tablet tablets tablt by mouth daily inhale 2.5 ml not 每 日"
WORDS = st.sampled_from(VOCABULARY.split())
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([0.05, 0.3, 0.5, 2 / 3, 0.8, 0.9, 1.0]), st.booleans())
def test_the_index_finds_what_brute_force_finds(
    left: list[str], right: list[str], threshold: float, numbers: bool
) -> None:
    train = [task(f"r{n}", text) for n, text in enumerate(left)]
    test = [task(f"t{n}", text) for n, text in enumerate(right)]
    leaks = leakage(train, test, threshold, numbers=numbers)
    assert {leak.train_id: (leak.kind, leak.similarity) for leak in leaks} == brute_force(
        train, test, threshold, numbers
    )
    dirty = {leak.train_id for leak in leaks}
    assert leakage([row for row in train if row.id not in dirty], test, threshold, numbers=numbers) == []
    by_id = {row.id: normalise(question(row)) for row in train + test}
    for leak in leaks:
        ours, theirs = grams(by_id[leak.train_id]), grams(by_id[leak.test_id])
        assert leak.similarity == pytest.approx(len(ours & theirs) / len(ours | theirs))


def test_only_a_number_differs() -> None:
    test = [task("t", LONG.format(n=1, h=8))]
    typo = LONG.format(n=1, h=8).replace("pharmacy", "pharmcy")
    train = [task("dose", LONG.format(n=2, h=8)), task("typo", typo)]
    train.append(task("negation", LONG.format(n=1, h=8).replace("is not gone", "is gone")))
    assert [(leak.train_id, leak.kind) for leak in leakage(train, test)] == [("typo", "near")]
    loose = {leak.train_id: leak.similarity for leak in leakage(train, test, numbers=False)}
    assert loose.keys() == {"dose", "typo", "negation"} and min(loose.values()) >= 0.9


def test_another_drug_is_another_question() -> None:
    sig = "take 1 tablet by mouth once daily"
    assert leakage([task("a", sig, drug="metformin")], [task("b", sig, drug="lisinopril")]) == []
    assert leakage([task("a", sig, drug="Metformin")], [task("b", sig, drug="metformin")])[0].kind == "exact"


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_the_threshold_is_a_similarity(threshold: float) -> None:
    with pytest.raises(BadInput, match="at most 1"):
        leakage([], [], threshold)


def test_five_thousand_against_a_thousand_in_under_five_seconds() -> None:
    chance = random.Random(0)
    text = "take tablet capsule by mouth every hours daily as needed for pain inhale puffs apply cream with food"
    words = text.split()

    def rows(prefix: str, count: int) -> list[Task]:
        texts = (
            " ".join(
                chance.choice(words) if chance.random() < 0.85 else str(chance.randint(1, 9)) for _ in range(length)
            )
            for length in (chance.randint(5, 25) for _ in range(count))
        )
        return [task(f"{prefix}{n}", text) for n, text in enumerate(texts)]

    train, test = rows("r", 5000), rows("t", 1000)
    hidden = chance.sample(range(5000), 40)
    for place, row in zip(hidden, test, strict=False):
        train[place] = task(f"r{place}", row.input["sig"].upper() + ".")
    began = time.process_time()
    leaks = leakage(train, test)
    assert time.process_time() - began < 5
    assert {f"r{place}" for place in hidden} <= {leak.train_id for leak in leaks if leak.kind == "exact"}


def test_leakage_between_files_names_both_lines(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    long = LONG.format(n=1, h=8)
    rows = [
        {"id": "a", "input": {"sig": "1 po qd"}, "target": "x"},
        {"id": "b", "input": {"sig": "2 PO bid."}, "target": "x"},
        {"id": "c", "input": {"sig": long.replace("pharmacy", "pharmcy")}, "target": "x"},
    ]
    train.write_text("\n".join(map(json.dumps, rows)))
    test.write_text(
        "\n".join(json.dumps({"id": i, "input": {"text": t}}) for i, t in (("t1", long), ("t2", "2 po bid")))
    )
    learned, measured = load_demonstrations(train), load_tasks(test, system="the same for all " * 50)
    with pytest.raises(BadData) as caught:
        check_leakage(learned, measured)
    text = str(caught.value)
    assert caught.value.line == 2 and text.startswith(
        f"{train}:2 [input]: row 'b' repeats the test row 't2' on line 2 of {test}"
    )
    assert "line 3 [input]: row 'c' is 9" in text and "alike to the test row 't1' on line 1" in text
    check_leakage(learned, load_tasks(write(tmp_path / "other.jsonl", {"id": "o", "input": {"sig": "3 po tid"}})))


def write(path: Path, row: dict[str, object]) -> Path:
    path.write_text(json.dumps(row))
    return path


# Duplicates


def test_dedupe_keeps_the_first_and_tells_conflicts_apart() -> None:
    def row(name: str, text: str, answer: str) -> Demonstration:
        turns = (Message(role="user", content=text), Message(role="assistant", content=answer))
        return Demonstration(id=name, messages=turns)

    rows = [
        row("a", "1 po qd", "X"),
        row("b", "1 PO QD.", "X "),
        row("c", "1 po qd", "Y"),
        row("d", "2 po qd", "X"),
        row("e", "1 po qd", "Y"),
    ]
    clean = dedupe(rows)
    assert [kept.id for kept in clean.rows] == ["a", "c", "d"]
    assert clean.removed == (("a", "b"), ("c", "e"))
    assert clean.conflicts == (("a", "c"),)
    again = dedupe(clean.rows)
    assert again.rows == clean.rows and again.removed == ()


def test_labels_are_part_of_what_a_task_says() -> None:
    tasks = [
        Task(id="a", input={"x": "q"}, expected={"dose": 1, "route": "oral"}),
        Task(id="b", input={"x": "Q"}, expected={"route": "oral", "dose": 1}),
        Task(id="c", input={"x": "q"}, expected={"dose": 2}),
    ]
    clean = dedupe(tasks)
    assert clean.removed == (("a", "b"),) and clean.conflicts == (("a", "c"),)
    assert [kept.id for kept in dedupe(reversed(tasks)).rows] == ["c", "b"]
