"""Agreement against scikit-learn and SciPy, coverage by simulation, and the alarm against lines known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from ascent.evaluate import agreement as a
from ascent.evaluate.statistics import wilson

quietly = settings(deadline=None, max_examples=60, derandomize=True)
pairs = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=3, max_size=60)


@quietly
@given(pairs, st.sampled_from([None, "linear", "quadratic"]))
def test_kappa_is_scikit_learns(items: list[tuple[int, int]], weights: str | None) -> None:
    human, judge = zip(*items, strict=True)
    if len(set(human) | set(judge)) == 1:
        assert math.isnan(a.cohen_kappa(human, judge, weights))
    else:
        assert a.cohen_kappa(human, judge, weights) == pytest.approx(cohen_kappa_score(human, judge, weights=weights))


@quietly
@given(pairs)
def test_correlations_are_scipys(items: list[tuple[int, int]]) -> None:
    human, judge = zip(*items, strict=True)
    constant = len(set(human)) == 1 or len(set(judge)) == 1
    theirs = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    for name, reference in theirs.items():
        mine = a.COEFFICIENTS[name](human, judge)
        if constant:
            assert math.isnan(mine)
        else:
            assert mine == pytest.approx(reference(human, judge).statistic, abs=1e-12)


def test_kappa_of_cohens_table() -> None:
    """Two raters on 200 proposals: 88 agreed for, 60 agreed against, 52 split 20/32.

    κ = (0.74 - e) / (1 - e), with margins 108/200 and 120/200: e = 0.54 · 0.6 + 0.46 · 0.4 = 0.508, so κ = 0.4715...
    """
    human = [1] * 88 + [1] * 20 + [0] * 32 + [0] * 60
    judge = [1] * 88 + [0] * 20 + [1] * 32 + [0] * 60
    assert a.cohen_kappa(human, judge) == pytest.approx((0.74 - 0.508) / 0.492)
    check = a.check_judge("j", "d", human, judge)
    assert check.accuracy == pytest.approx(0.74)
    assert (check.accuracy_low, check.accuracy_high) == pytest.approx(wilson(148, 200))
    assert (check.sensitivity, check.specificity) == pytest.approx((88 / 108, 60 / 92))


@pytest.mark.parametrize("coefficient", ["kappa", "quadratic-kappa", "pearson"])
def test_the_interval_covers_the_truth(coefficient: str) -> None:
    """A judge that repeats the person's label with chance 0.7 and else draws anew: all three are 0.7 by construction.

    The kappas: a = 0.7 + 0.3 e, so (a - e) / (1 - e) = 0.7. Pearson: cov = 0.7 var, with equal variances.
    """
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        human = rng.integers(0, 3, 80)
        judge = np.where(rng.random(80) < 0.7, human, rng.integers(0, 3, 80))
        low, high = a.interval(human, judge, coefficient, draws=200, seed=trial)
        covered += low <= 0.7 <= high
    assert 89 <= covered <= 100  # Binomial(100, 0.95) is under 89 with a chance of 0.5 %


def test_clusters_widen_the_interval() -> None:
    """Ten copies of an item carry no more than one: over clusters the interval is that of the single items."""
    rng = np.random.default_rng(0)
    human = rng.integers(0, 2, 40)
    judge = np.where(rng.random(40) < 0.8, human, 1 - human)
    single = a.interval(human, judge, "pearson", draws=1000)
    copies = a.interval(human.repeat(10), judge.repeat(10), "pearson", np.arange(40).repeat(10), draws=1000)
    naive = a.interval(human.repeat(10), judge.repeat(10), "pearson", draws=1000)
    assert copies == pytest.approx(single)
    assert naive[1] - naive[0] < 0.5 * (copies[1] - copies[0])


def test_perfect_agreement_is_not_certainty() -> None:
    """With n of n equal labels the Wilson limit is n / (n + z²), and balanced labels have e = 1/2, so κ ≥ 2 low - 1."""
    human = [0, 1] * 15
    low, high = a.interval(human, human, "kappa")
    assert high == 1.0
    assert low == pytest.approx(2 * 30 / (30 + stats.norm.ppf(0.975) ** 2) - 1)
    assert a.interval(human[:18], human[:18], "kappa") == (-1.0, 1.0)


@quietly
@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(3, 8), st.lists(st.floats(-1, 1), min_size=8, max_size=8))
def test_the_alarm_uses_least_squares_lines(rise: float, fall: float, window: int, noise: list[float]) -> None:
    steps = np.arange(window)
    judge, gold = rise * steps, fall * steps + np.array(noise[:window])
    slope = stats.linregress(steps, gold).slope
    expected = rise > 0 and slope * (window - 1) < -0.1
    if abs(slope * (window - 1) + 0.1) > 1e-9 and (rise == 0 or abs(rise) > 1e-9):
        earlier = np.zeros(4)
        judge, gold = np.concatenate([earlier, judge]), np.concatenate([earlier, gold])
        assert (a.diverged(judge, gold, window, tolerance=0.1) is not None) == expected
