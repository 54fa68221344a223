"""The gate before training on a judge, and the alarm during it."""

from __future__ import annotations

import math

import pytest

from ascent.evaluate.agreement import JudgeCheck, check_judge, diverged, require_agreement
from ascent.records.errors import BadInput, UnknownName

HUMAN = [0, 1] * 60
GOOD = [1 - label if at % 20 == 0 else label for at, label in enumerate(HUMAN)]
COIN = [label if at % 4 < 2 else 1 - label for at, label in enumerate(HUMAN)]


def test_a_good_judge_passes_and_the_record_survives_json() -> None:
    check = check_judge("rubric", "abc", HUMAN, GOOD)
    assert check.value == pytest.approx(0.9)  # 114 of 120 equal; both margins half: (0.95 - 0.5) / 0.5
    assert 0.6 <= check.low < check.value < check.high <= 1
    assert check.passed
    assert require_agreement(check) == check
    assert JudgeCheck.from_json(check.to_json()) == check


def test_a_guessing_judge_is_refused_and_only_a_reason_lets_it_through() -> None:
    check = check_judge("rubric", "abc", HUMAN, COIN)
    assert check.value == pytest.approx(0.0)
    assert not check.passed
    for nothing in (None, "", "  "):
        with pytest.raises(BadInput, match=r"'rubric' does not agree.*kappa 0\.00.*on 120 items.*reach 0\.60"):
            require_agreement(check, nothing)
    let = require_agreement(check, " pilot run ")
    assert (let.override, let.passed) == ("pilot run", False)
    assert JudgeCheck.from_json(let.to_json()).override == "pilot run"


def test_the_lower_limit_decides_so_a_small_set_cannot_pass_by_luck() -> None:
    small = check_judge("j", "d", HUMAN[:24], GOOD[:24])
    assert small.value > 0.8 > 0.75 > small.low
    assert not check_judge("j", "d", HUMAN[:24], GOOD[:24], threshold=0.75).passed
    assert check_judge("j", "d", HUMAN, GOOD, threshold=0.75).passed
    tiny = check_judge("j", "d", HUMAN[:10], HUMAN[:10])
    assert (tiny.value, tiny.low, tiny.high, tiny.passed) == (1.0, -1.0, 1.0, False)
    with pytest.raises(BadInput, match="Under 20 items nothing can be said"):
        require_agreement(tiny)


def test_unscored_items_are_counted_not_guessed() -> None:
    scores: list[float | None] = list(GOOD)
    scores[5:15] = [None] * 10
    check = check_judge("j", "d", HUMAN, scores)
    assert (check.items, check.unscored) == (110, 10)
    assert check.value == check_judge("j", "d", HUMAN[:5] + HUMAN[15:], GOOD[:5] + GOOD[15:]).value


def test_continuous_scores_need_a_correlation() -> None:
    scores = [0.3 * label + 0.001 * at for at, label in enumerate(HUMAN)]
    with pytest.raises(BadInput, match=r"kappa compares labels.*spearman"):
        check_judge("j", "d", HUMAN, scores)
    check = check_judge("j", "d", HUMAN, scores, coefficient="spearman", draws=200)
    assert check.passed
    assert (check.sensitivity, check.specificity) == (None, None)


@pytest.mark.parametrize(
    ("human", "scores", "message"),
    [
        ([1, 0], [1], "2 labels and 1 scores"),
        ([1, 0], [None, None], "scored none"),
        ([1, 1], [1, 0], "people gave all 2 items the value 1"),
        ([1, 0], [1, 1], "the judge 'j' gave all 2 items the value 1"),
        ([1, 0], [math.nan, 1], "must be finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(human: list[float], scores: list[float | None], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_judge("j", "d", human, scores)


def test_an_unknown_coefficient_is_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'kappa'"):
        check_judge("j", "d", HUMAN, GOOD, coefficient="kapa")


RISING = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]


def test_the_alarm_says_what_happened_and_where_to_go_back() -> None:
    words = diverged(RISING, [0.40, 0.44, 0.46, 0.43, 0.40, 0.37])
    assert words is not None
    # The last five gold values lie on a line of slope -0.02 (Σ xy / Σ x² = -0.2 / 10), 0.08 over four steps.
    assert "rose by 0.2 while the gold metric got worse by 0.08" in words
    assert "measurement 3 of 6 (0.46)" in words


@pytest.mark.parametrize(
    ("judge", "gold", "settings"),
    [
        (RISING, RISING, {}),
        (RISING, [0.5] * 6, {}),
        (RISING, [0.500, 0.498, 0.496, 0.494, 0.492, 0.490], {}),
        (RISING[::-1], RISING[::-1], {}),
        (RISING[:4], RISING[:4][::-1], {}),
        (RISING, [0.5, 0.5, 0.5, 0.1, 0.5, 0.5], {}),
        (RISING, RISING[::-1], {"higher_is_better": False}),
        (RISING, RISING[::-1], {"tolerance": 0.3}),
    ],
)
def test_no_alarm(judge: list[float], gold: list[float], settings: dict[str, float]) -> None:
    assert diverged(judge, gold, **settings) is None


def test_a_metric_where_less_is_better_alarms_when_it_rises() -> None:
    words = diverged(RISING, RISING, higher_is_better=False)
    assert words is not None
    assert "measurement 1 of 6" in words


@pytest.mark.parametrize(
    ("judge", "gold", "window"), [([1.0], [1.0, 2.0], 5), ([math.nan] * 5, [1.0] * 5, 5), ([1.0], [1.0], 2)]
)
def test_bad_curves_are_refused(judge: list[float], gold: list[float], window: int) -> None:
    with pytest.raises(ValueError, match=r"finite|needed"):
        diverged(judge, gold, window)
