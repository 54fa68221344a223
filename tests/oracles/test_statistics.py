"""Statistics against SciPy, published values, brute force and coverage simulations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from ascent.evaluate import power
from ascent.evaluate import statistics as s

quietly = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 300), (3, 7), (85, 100), (299, 300), (1200, 1200)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(k: int, n: int, confidence: float) -> None:
    theirs = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert s.wilson(k, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("n", "low", "high"), [(100, 76.7, 90.7), (300, 80.5, 88.6), (1200, 82.9, 86.9)])
def test_wilson_at_85_percent_has_the_tabulated_limits(n: int, low: float, high: float) -> None:
    found = s.wilson(0.85 * n, n)
    assert [round(100 * limit, 1) for limit in found] == [low, high]


def test_wilson_of_nothing_is_everything_and_bad_counts_are_refused() -> None:
    assert s.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        s.wilson(3, 2)


def test_rule_of_three_approximates_the_exact_bound() -> None:
    assert s.rule_of_three(300) == pytest.approx(0.01)
    assert s.rule_of_three(3000) == pytest.approx(0.001)
    for n in (30, 300, 3000):
        exact = stats.binomtest(0, n, alternative="less").proportion_ci(0.95).high
        assert s.rule_of_three(n) == pytest.approx(exact, rel=0.06)
        assert s.rule_of_three(n) > exact
    assert s.rule_of_three(2) == 1.0


@quietly
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(fixed: int, broken: int) -> None:
    if fixed + broken == 0:
        assert s.mcnemar_exact(0, 0) == 1.0
    else:
        assert s.mcnemar_exact(fixed, broken) == pytest.approx(stats.binomtest(fixed, fixed + broken).pvalue)


@quietly
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 9))
def test_sign_flip_without_clusters_is_mcnemar(fixed: int, broken: int, same: int) -> None:
    differences = [1.0] * fixed + [-1.0] * broken + [0.0] * same
    assert s.sign_flip(differences) == pytest.approx(s.mcnemar_exact(fixed, broken))


def test_sign_flip_is_scipys_permutation_test() -> None:
    rng = np.random.default_rng(1)
    for groups in (9, 40):
        sizes = rng.integers(1, 5, groups)
        clusters = np.repeat(np.arange(groups), sizes)
        differences = rng.integers(-1, 2, clusters.size) + 0.2
        totals = np.array([differences[clusters == g].sum() for g in range(groups)])
        theirs = stats.permutation_test(
            (totals,), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(2)
        )
        ours = s.sign_flip(differences, clusters.tolist(), draws=20_000)
        assert ours == pytest.approx(theirs.pvalue, abs=1e-12 if groups == 9 else 0.012)


def test_a_copied_item_adds_no_evidence() -> None:
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, 0.0, 1.0], 30, p=[0.1, 0.6, 0.3])
    clusters = list(range(30))
    once = s.sign_flip(differences, clusters, seed=5)
    assert s.sign_flip(np.repeat(differences, 7), np.repeat(clusters, 7).tolist(), seed=5) == once
    mean = s.clustered_bootstrap(differences, clusters)
    assert s.clustered_bootstrap(np.repeat(differences, 7), np.repeat(clusters, 7).tolist()) == pytest.approx(mean)
    _, low, high = s.clustered_bootstrap(np.repeat(differences, 7))
    assert high - low < 0.5 * (mean[2] - mean[1])


def test_bootstrap_agrees_with_the_t_interval_and_t_test_on_many_items() -> None:
    rng = np.random.default_rng(4)
    a = rng.normal(0.0, 1.0, 400)
    b = a + rng.normal(0.1, 1.0, 400)
    theirs = stats.ttest_rel(b, a)
    limits = theirs.confidence_interval()
    difference, low, high, p = s.paired_bootstrap(a, b, draws=20_000)
    assert difference == pytest.approx(float(np.mean(b - a)))
    assert (low, high) == pytest.approx((limits.low, limits.high), abs=0.006)
    assert p == pytest.approx(theirs.pvalue, abs=0.01)


def test_clustered_bootstrap_has_the_clustered_standard_error_of_miller() -> None:
    """Miller (arXiv 2411.00640), eq. 4: SE² = Σ_g (Σ_i (x_gi - mean))² / n²."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 8, 300)
    clusters = np.repeat(np.arange(300), sizes)
    values = rng.normal(0, 1, 300)[clusters] + rng.normal(0, 0.5, clusters.size)
    residual_sums = np.bincount(clusters, values - values.mean())
    error = math.sqrt(np.sum(residual_sums**2)) / clusters.size
    _, low, high = s.clustered_bootstrap(values, clusters.tolist(), draws=8000)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.04)


def test_bootstrap_p_value_and_interval_tell_the_same() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a = rng.random(12)
        _, low, high, p = s.paired_bootstrap(a, a + rng.normal(0.3, 0.5, 12), draws=4000)
        if abs(p - 0.05) > 0.004:
            assert (p < 0.05) == (low > 0 or high < 0)


def test_bootstrap_covers_95_percent_with_few_clusters() -> None:
    """20 clusters of 4 correlated items: Monte-Carlo error at 400 runs is ±2.1 points (2 standard errors)."""
    clusters = np.repeat(np.arange(20), 4).tolist()
    hits = naive = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.normal(0.5, 1, 20), 4) + rng.normal(0, 0.3, 80)
        _, low, high = s.clustered_bootstrap(values, clusters, draws=600, seed=seed)
        hits += low <= 0.5 <= high
        _, low, high = s.clustered_bootstrap(values, draws=200, seed=seed)
        naive += low <= 0.5 <= high
    assert 0.925 <= hits / 400 <= 0.975
    assert naive / 400 < 0.75


def test_bootstrap_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).random(500)
    whole = s.clustered_bootstrap(values)
    monkeypatch.setattr(s, "_BLOCK", 5000)
    assert s.clustered_bootstrap(values) == whole


def test_too_little_data_claims_nothing() -> None:
    assert all(math.isnan(number) for number in s.clustered_bootstrap([]))
    assert s.clustered_bootstrap([0.2, 0.4], ["a", "a"]) == pytest.approx((0.3, -math.inf, math.inf))
    assert s.paired_bootstrap([0.0, 0.0], [1.0, 1.0], ["a", "a"])[3] == 1.0
    assert s.sign_flip([]) == 1.0
    assert s.noninferiority_p([], [], 0.1) == 1.0


def _tango_z_by_optimisation(fixed: int, broken: int, n: int, null: float) -> float:
    """The score statistic from its definition; the nuisance parameter by numerical maximum likelihood."""
    same = n - fixed - broken

    def negative_log_likelihood(q: float) -> float:
        cells = [(fixed, q + null), (broken, q), (same, 1 - 2 * q - null)]
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -null), (1 - null) / 2
    q = optimize.minimize_scalar(
        negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    return float((fixed - broken - n * null) / math.sqrt(n * (2 * q + null - null**2)))


@pytest.mark.parametrize(("fixed", "broken", "n"), [(12, 5, 60), (3, 9, 40), (1, 0, 44), (20, 20, 300)])
@pytest.mark.parametrize("null", [-0.1, -0.02, 0.0, 0.05])
def test_tango_statistic_is_the_score_statistic(fixed: int, broken: int, n: int, null: float) -> None:
    z = _tango_z_by_optimisation(fixed, broken, n, null)
    assert s.tango_p(fixed, broken, n, null) == pytest.approx(stats.norm.sf(z), abs=1e-5)


def test_tango_has_its_known_special_cases() -> None:
    z = stats.norm.ppf(0.975)
    for n in (20, 300):  # nothing changed: ± z²/(n + z²)
        assert s.tango(0, 0, n) == pytest.approx((-(z**2) / (n + z**2), z**2 / (n + z**2)))
    # at a null of 0 it is McNemar's statistic (b - c)/√(b + c)
    assert s.tango_p(15, 6, 100, 0.0) == pytest.approx(stats.norm.sf(9 / math.sqrt(21)))
    # swapping the two models mirrors the interval
    low, high = s.tango(17, 4, 80)
    assert s.tango(4, 17, 80) == pytest.approx((-high, -low))
    # its limits are where its test has p = 2.5 %
    assert s.tango_p(17, 4, 80, low) == pytest.approx(0.025, abs=1e-6)
    assert s.tango(0, 0, 0) == (-1.0, 1.0)
    assert s.tango(10, 0, 10)[1] == pytest.approx(1.0)


def test_tango_covers_where_the_bootstrap_collapses() -> None:
    """200 items of which 1 % change either way. 2000 runs: ±1 point. The bootstrap is too sure of too few changes."""
    rng = np.random.default_rng(7)
    counts = rng.multinomial(200, [0.02, 0.01, 0.97], 2000)
    hits = [low <= 0.01 <= high for low, high in (s.tango(int(f), int(b), 200) for f, b, _ in counts)]
    assert 0.93 <= np.mean(hits) <= 0.985


def test_noninferior_reads_the_right_limit() -> None:
    assert s.noninferior(-0.01, 0.05, 0.02)
    assert not s.noninferior(-0.03, 0.05, 0.02)
    assert s.noninferior(-0.05, 0.01, 0.02, "lower")
    assert not s.noninferior(-0.05, 0.03, 0.02, "lower")
    with pytest.raises(ValueError, match="higher"):
        s.noninferior(0, 0, 0.1, "up")


def test_noninferiority_p_agrees_with_the_interval_and_mirrors() -> None:
    rng = np.random.default_rng(8)
    for _ in range(30):
        a = (rng.random(150) < 0.8).astype(float)
        b = np.where(rng.random(150) < 0.1, 1 - a, a)
        fixed, broken = int(np.sum(b > a)), int(np.sum(b < a))
        low, high = s.tango(fixed, broken, 150)
        p = s.noninferiority_p(a, b, 0.06)
        assert p == pytest.approx(s.tango_p(fixed, broken, 150, -0.06))
        assert (p < 0.025) == s.noninferior(low, high, 0.06)
        assert s.noninferiority_p(1 - a, 1 - b, 0.06, "lower") == pytest.approx(p)


def test_noninferiority_needs_enough_items_even_when_nothing_changed() -> None:
    """No item changed. Tango's z is √(n m/(1-m)) at margin m, so 5 points at 2.5 % need 73 items."""
    assert s.noninferiority_p(np.ones(72), np.ones(72), 0.05) > 0.025
    assert s.noninferiority_p(np.ones(73), np.ones(73), 0.05) < 0.025
    assert s.noninferiority_p(np.ones(72), np.ones(72), 0.05) == pytest.approx(
        stats.norm.sf(math.sqrt(72 * 0.05 / 0.95))
    )
    # 160 items of 8 documents are no better than 8
    clusters = np.repeat(np.arange(8), 20).tolist()
    assert s.noninferiority_p(np.ones(160), np.ones(160), 0.05, clusters=clusters) == pytest.approx(
        stats.norm.sf(math.sqrt(8 * 0.05 / 0.95))
    )
    assert s.noninferiority_p(np.zeros(160), np.ones(160), 0.05, clusters=clusters) < 0.01


def test_noninferiority_of_scores_is_the_t_test_on_many_items() -> None:
    rng = np.random.default_rng(9)
    a = rng.normal(0, 1, 500)
    b = a + rng.normal(-0.02, 0.6, 500)
    theirs = stats.ttest_rel(b + 0.07, a, alternative="greater").pvalue
    assert s.noninferiority_p(a, b, 0.07, draws=20_000) == pytest.approx(theirs, abs=0.008)


@quietly
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6))
def test_holm_is_the_closed_bonferroni_procedure(p_values: dict[str, float]) -> None:
    """Adjusted p of i = the largest min(1, |S| min_S p) over all sets S that hold i."""
    adjusted = s.holm(p_values)
    assert list(adjusted) == list(p_values)
    subsets = [c for r in range(1, len(p_values) + 1) for c in itertools.combinations(p_values, r)]
    for name in p_values:
        closed = max(min(1.0, len(c) * min(p_values[m] for m in c)) for c in subsets if name in c)
        assert adjusted[name] == pytest.approx(closed)


def test_holm_by_hand() -> None:
    assert s.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


TABLE = [
    (0.01, 0.05, 3923), (0.01, 0.10, 7847), (0.01, 0.20, 15696), (0.02, 0.05, 979), (0.02, 0.10, 1960),
    (0.02, 0.20, 3923), (0.03, 0.05, 434), (0.03, 0.10, 870), (0.03, 0.20, 1742), (0.05, 0.10, 312),
    (0.05, 0.20, 626), (0.10, 0.20, 155),
]  # fmt: skip


@pytest.mark.parametrize(("gain", "discordance", "n"), TABLE)
def test_paired_items_needed_is_the_table(gain: float, discordance: float, n: int) -> None:
    assert power.paired_items_needed(gain, discordance) == n
    assert power.paired_items_needed(-gain, discordance) == n


@pytest.mark.parametrize("discordance", [0.1, 0.2])
def test_paired_items_needed_gives_the_power_it_promises(discordance: float) -> None:
    """The z form of McNemar's test finds a simulated gain of 2 points in 80 % of 20,000 runs (±0.6 points)."""
    n = power.paired_items_needed(0.02, discordance)
    cells = [(discordance + 0.02) / 2, (discordance - 0.02) / 2, 1 - discordance]
    counts = np.random.default_rng(10).multinomial(n, cells, 20_000)
    fixed, broken = counts[:, 0], counts[:, 1]
    z = (fixed - broken) / np.sqrt(np.maximum(1, fixed + broken))
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.01)


def test_items_needed_is_the_published_pair_and_has_its_power() -> None:
    assert power.items_needed(0.85, 0.88) == 2036
    assert power.items_needed(0.95, 0.97) == 1506
    assert power.items_needed(0.88, 0.85) == 2036
    rng = np.random.default_rng(11)
    p1, p2 = rng.binomial(2036, 0.85, 20_000) / 2036, rng.binomial(2036, 0.88, 20_000) / 2036
    mean = (p1 + p2) / 2
    z = (p2 - p1) / np.sqrt(2 * mean * (1 - mean) / 2036)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.015)


def test_impossible_designs_are_refused() -> None:
    for gain, discordance in [(0.0, 0.1), (0.2, 0.1), (0.1, 1.5)]:
        with pytest.raises(ValueError, match="discordance"):
            power.paired_items_needed(gain, discordance)
    with pytest.raises(ValueError, match="rates"):
        power.items_needed(0.5, 0.5)
    with pytest.raises(ValueError, match="n=3"):
        s.pass_at_k(3, 4, 1)


@quietly
@given(st.integers(1, 8), st.data())
def test_pass_at_k_counts_the_subsets(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    samples = [1] * c + [0] * (n - c)
    subsets = list(itertools.combinations(samples, k))
    assert s.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert s.pass_all_k(n, c, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))


def test_design_effect_is_that_of_kish_for_equal_clusters() -> None:
    """With clusters of m items and intraclass correlation ρ it is 1 + (m − 1)ρ: m where all are alike, 1 where none."""
    rng = np.random.default_rng(0)
    clusters = [index // 10 for index in range(4000)]
    alike = np.repeat(rng.integers(0, 2, 400), 10).astype(float)
    assert s.design_effect(alike, clusters) == pytest.approx(10, rel=0.01)
    assert s.design_effect(rng.integers(0, 2, 4000).astype(float), clusters) == pytest.approx(1, abs=0.15)
    mixed = np.where(rng.random(4000) < 0.5, alike, rng.integers(0, 2, 4000)).astype(float)
    assert s.design_effect(mixed, clusters) == pytest.approx(
        1 + 9 * 0.25, rel=0.15
    )  # two items share a source with 1/4
    assert s.design_effect(np.zeros(4000), clusters) is None


def test_no_change_among_clustered_items_is_judged_by_the_likeness_of_another_metric() -> None:
    """Nothing changed on 400 items in 40 clusters: 40 alone could not exclude a loss of 3 points."""
    clusters = [index // 10 for index in range(400)]
    same = np.zeros(400)
    cautious = s.noninferiority_p(same, same, 0.03, clusters=clusters)
    informed = s.noninferiority_p(same, same, 0.03, clusters=clusters, deff=1.2)
    assert cautious > 0.1
    assert informed < 0.01
    assert s.noninferiority_p(same, same, 0.03, clusters=clusters, deff=10.0) == pytest.approx(cautious)
