"""Advice: the rung that the data and the reports justify."""

from __future__ import annotations

from pathlib import Path

import pytest
from ladder_runs import measure, write_usecase

from ascent.ladder.advise import BESIDE, advice_text, advise, champion_of
from ascent.ladder.gates import Inventory
from ascent.ladder.usecase import UseCase
from ascent.records import Decision, Report

GO, COLLECT = Decision.GO, Decision.COLLECT
RICH = Inventory(labels=640, pairs=300, prompts=640, test_items=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("case")


@pytest.fixture(scope="module")
def usecase(folder: Path) -> UseCase:
    return write_usecase(folder)


@pytest.fixture(scope="module")
def ladder(folder: Path, usecase: UseCase) -> list[Report]:
    base = measure(folder, "prompt", 0.45, None, 0)
    tuned = measure(folder, "sft", 0.9, None, 1)
    return [base, tuned, measure(folder, "dpo", 0.9, tuned, 2, stick=0.98)]


def test_before_anything_was_measured(usecase: UseCase) -> None:
    verdicts = advise(usecase, RICH, [])
    assert [verdict.stage for verdict in verdicts] == ["prompt", "sft", "dpo", "dapo"]
    assert {verdict.decision for verdict in verdicts} == {GO}
    text = advice_text(usecase, verdicts, [])
    assert "Nothing has been measured yet." in text and "Justified next: prompt (prompting)." in text


def test_it_goes_on_from_the_champion(usecase: UseCase, ladder: list[Report]) -> None:
    verdicts = advise(usecase, RICH, list(reversed(ladder[:2])))
    assert [verdict.stage for verdict in verdicts] == ["dpo", "dapo"]
    assert all(verdict.champion == ladder[1].model for verdict in verdicts)
    text = advice_text(usecase, verdicts, ladder[:2])
    assert "The champion is sft" in text and "Justified next: dpo" in text and "Its weakest parts: " in text
    assert "still to be checked against known answers" in text


def test_a_stage_that_did_not_help_is_not_champion(usecase: UseCase, ladder: list[Report]) -> None:
    champion = champion_of(usecase, ladder)
    assert champion is not None and champion.stage == "sft"


def test_poor_data_asks_for_more_and_names_the_steps_beside(usecase: UseCase, ladder: list[Report]) -> None:
    poor = Inventory(labels=100, pairs=10, prompts=20, test_items=400)
    verdicts = advise(usecase, poor, ladder[:1])
    assert [(verdict.stage, verdict.decision, verdict.collect) for verdict in verdicts] == [
        ("sft", COLLECT, 400),
        ("dpo", COLLECT, 190),
        ("dapo", COLLECT, 80),
    ]
    text = advice_text(usecase, verdicts, ladder[:1])
    assert all(step in text for step in BESIDE) and "sft: COLLECT 400 more" in text


def test_pairs_can_come_from_the_models_own_samples(usecase: UseCase, ladder: list[Report]) -> None:
    without = Inventory(labels=640, pairs=0, prompts=640, test_items=400)
    dpo = advise(usecase, without, ladder[:2])[0]
    assert dpo.decision is GO and "own samples" in dpo.reasons[-1]


def test_all_measured(usecase: UseCase, ladder: list[Report], folder: Path) -> None:
    reports = [*ladder, measure(folder, "dapo", 0.99, ladder[1], 3, stick=0.5)]
    assert advise(usecase, RICH, reports) == []
    assert "Every stage of this use case has been measured." in advice_text(usecase, [], reports)
