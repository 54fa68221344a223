"""The abstention threshold: against scipy's binomial law, and on answers whose error rate per confidence is known."""

from __future__ import annotations

import random

import pytest
from scipy import stats

from ascent.evaluate.selective import abstention, upper_bound
from ascent.records.errors import BadInput


@pytest.mark.parametrize(("wrong", "n"), [(0, 149), (1, 235), (7, 264), (3, 3)])
def test_the_bound_is_the_rate_at_which_so_few_errors_become_unlikely(wrong: int, n: int) -> None:
    """At the bound p, P(X ≤ wrong) for X ~ Binomial(n, p) is 5 %; with none wrong p = 1 − 0.05^(1/n)."""
    bound = upper_bound(wrong, n)
    if wrong == n:
        assert bound == 1.0
        return
    assert stats.binom.cdf(wrong, n, bound) == pytest.approx(0.05, abs=1e-9)
    if wrong == 0:
        assert bound == pytest.approx(1 - 0.05 ** (1 / n))


def answers(n: int, seed: int) -> tuple[list[float], list[bool]]:
    """Answers that are wrong with probability 0.3 below a confidence of 0.6, never above."""
    dice = random.Random(seed)
    sure = [dice.random() for _ in range(n)]
    return sure, [value < 0.6 and dice.random() < 0.3 for value in sure]


def test_the_lowest_threshold_that_keeps_to_the_risk_is_taken() -> None:
    sure, wrong = answers(1000, 0)
    chosen = abstention(sure, wrong, 0.02)
    assert chosen.reached
    assert 0.5 < chosen.below <= 0.6
    passing = [bad for value, bad in zip(sure, wrong, strict=True) if value >= chosen.below]
    assert (len(passing), sum(passing)) == (chosen.passed, chosen.wrong)
    assert chosen.bound == pytest.approx(upper_bound(chosen.wrong, chosen.passed))
    lower = sorted(value for value in sure if value < chosen.below)
    for threshold in (lower[-1], lower[len(lower) // 2], 0.0):  # none below keeps to it
        passing = [bad for value, bad in zip(sure, wrong, strict=True) if value >= threshold]
        assert upper_bound(sum(passing), len(passing)) > 0.02


def test_what_it_promises_holds_on_new_answers() -> None:
    """Over 40 draws the error rate of what passes rarely exceeds the risk, though the draw chose the threshold."""
    sure, wrong = answers(40_000, 99)
    exceeded = 0
    for seed in range(40):
        chosen = abstention(*answers(400, seed), 0.03)
        passing = [bad for value, bad in zip(sure, wrong, strict=True) if value >= chosen.below]
        exceeded += sum(passing) / len(passing) > 0.03
    assert exceeded <= 6, "5 % of 40, and three standard deviations"


def test_no_error_means_no_threshold_and_hopeless_data_say_so() -> None:
    free = abstention([0.2, 0.9, 0.5] * 60, [False] * 180, 0.02)
    assert (free.below, free.passed, free.reached) == (0.0, 180, True)
    few = abstention([0.9, 0.8, 0.4], [False, False, True], 0.02)
    assert not few.reached
    assert few.below == pytest.approx(0.6)
    assert "No confidence threshold" in few.sentence
    with pytest.raises(BadInput, match="validation"):
        abstention([], [], 0.1)


def test_equal_confidences_pass_or_go_together() -> None:
    chosen = abstention([0.9] * 200 + [0.5] * 10, [False] * 200 + [True] + [False] * 9, 0.02)
    assert chosen.below == pytest.approx(0.7)
    assert (chosen.passed, chosen.wrong) == (200, 0)
