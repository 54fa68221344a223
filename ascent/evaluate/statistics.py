"""Intervals, paired tests, sample sizes and corrections. Pure; seeds make the resampling repeatable.

Everywhere `clusters` names what an item belongs to (a drug, a patient, a document). Items of one cluster are
not independent, so resampling draws whole clusters. None means that every item stands for itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import special

from ascent.records import Change, Report
from ascent.records.errors import BadInput, UnknownName

Floats = npt.NDArray[np.float64]

_BLOCK = 1 << 20
"""Resampling indices held in memory at once."""


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927, JASA 22:209).

    With p = successes / n and z the normal quantile, the limits are (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1
    + z²/n). It keeps its coverage at small n and never leaves [0, 1].
    """
    _check_count("successes", successes, n)
    if n == 0:
        return 0.0, 1.0
    z = _z(0.5 + confidence / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def rule_of_three(n: int) -> float:
    """Return the 95 % upper bound of a rate that n items showed no case of: 3/n.

    Hanley & Lippman-Hand 1983, JAMA 249:1743; it approximates 1 - 0.05^(1/n).
    """
    return 1.0 if n <= 3 else 3 / n


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Return the two-sided p-value of fixing as many items as breaking (McNemar 1947, Psychometrika 12:153).

    Exact: given the discordant items, `fixed` is Binomial(fixed + broken, ½), so p = min(1, 2 P(X ≤
    min(fixed, broken))).
    """
    if fixed < 0 or broken < 0:
        raise ValueError(f"counts cannot be negative, got fixed={fixed} and broken={broken}")
    n = fixed + broken
    return 1.0 if n == 0 else min(1.0, 2 * float(special.bdtr(min(fixed, broken), n, 0.5)))


def sign_flip(
    differences: Sequence[float] | Floats,
    clusters: Sequence[Hashable] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value of champion and challenger being exchangeable within each cluster.

    Fisher's (1935) sign-flip test on the clusters' total differences D_g: the share of sign patterns s with
    |Σ s_g D_g| ≥ |Σ D_g|. All patterns are tried up to 12 clusters, `draws` random ones above. On independent
    0/1 pairs it is the exact McNemar test, which it therefore extends to clustered items.
    """
    values = np.asarray(differences, dtype=float)
    totals, _ = _cluster_sums(values, clusters)
    totals = totals[totals != 0]
    if totals.size == 0:
        return 1.0
    observed = abs(totals.sum()) * (1 - 1e-12)
    if totals.size <= 12:
        patterns = (np.arange(1 << totals.size)[:, None] >> np.arange(totals.size)) & 1
        return float(np.mean(np.abs((2.0 * patterns - 1) @ totals) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for size in _blocks(draws, totals.size):
        signs = 2.0 * rng.integers(0, 2, (size, totals.size)) - 1
        extreme += int(np.count_nonzero(np.abs(signs @ totals) >= observed))
    return (1 + extreme) / (1 + draws)


def clustered_bootstrap(
    values: Sequence[float] | Floats,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the mean and its bootstrap interval over whole clusters (Field & Welsh 2007, JRSS B 69:369).

    The limits are expanded percentiles (Hesterberg 2015, Am. Stat. 69:371): with G clusters the tail is
    Φ(-√(G/(G-1)) t_{G-1}), which undoes the narrowness of the plain percentile interval at small G. One
    cluster says nothing about the spread, so its interval is unbounded; below about six the limits stop at the lowest
    and highest cluster mean, so that three cover at most 75 %.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0:
        return math.nan, math.nan, math.nan
    means, groups = _resample(array, clusters, draws, seed)
    low, high = _limits(means, groups, confidence)
    return float(array.mean()), low, high


def paired_bootstrap(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    clusters: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float, float]:
    """Return (difference, low, high, p) of the mean of b minus the mean of a, item by item.

    The interval is that of `clustered_bootstrap` on the item differences. The two-sided p-value inverts it: p
    is below 1 - confidence exactly when the interval leaves out 0 (up to the resolution of the draws).
    """
    differences = _differences(a, b)
    if differences.size == 0:
        return math.nan, math.nan, math.nan, 1.0
    means, groups = _resample(differences, clusters, draws, seed)
    low, high = _limits(means, groups, confidence)
    p = min(1.0, 2 * min(_tail(means <= 0, groups), _tail(means >= 0, groups)))
    return float(differences.mean()), low, high, p


def tango(fixed: int, broken: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of the difference of two paired proportions (Tango 1998, Stat. Med. 17:891).

    The difference is (fixed - broken) / n. Unlike a bootstrap it does not collapse when no item changed: its
    limits are then ± z²/(n + z²).
    """
    _check_count("fixed + broken", fixed + broken, n)
    if n == 0:
        return -1.0, 1.0
    z = _z(0.5 + confidence / 2)
    middle = (fixed - broken) / n
    return _solve(fixed, broken, n, z, -1.0, middle), _solve(fixed, broken, n, -z, middle, 1.0)


def tango_p(fixed: int, broken: int, n: int, null: float) -> float:
    """Return the one-sided p-value of "the difference of paired proportions is at most `null`" (Tango 1998).

    With `null` = -margin it is the score test of non-inferiority; with `null` = 0 it is McNemar's z test.
    """
    _check_count("fixed + broken", fixed + broken, n)
    return 1.0 if n == 0 else float(special.ndtr(-_tango_z(fixed, broken, n, null)))


def noninferior(low: float, high: float, margin: float, direction: str = "higher") -> bool:
    """Say whether a difference interval (challenger minus champion) excludes a loss of `margin` or more.

    With direction `higher` (more is better) the lower limit must lie above -margin; with `lower` the upper
    limit must lie below margin. A two-sided 95 % interval makes it a one-sided test at 2.5 %, as ICH E9 asks.
    """
    return low > -margin if _is_higher(direction) else high < margin


def noninferiority_p(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    margin: float,
    direction: str = "higher",
    clusters: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
    deff: float | None = None,
) -> float:
    """Return the one-sided p-value of "b is worse than a by `margin` or more", on the same items.

    For independent 0/1 items it is Tango's score test. Otherwise it is the tail of the paired bootstrap at
    the margin, and for clustered 0/1 items never less than Tango's, which keeps few or no discordant items
    from looking certain. `deff` is the design effect to assume where no item changed; see `design_effect`.
    """
    sign = 1.0 if _is_higher(direction) else -1.0
    differences = sign * _differences(a, b)
    if differences.size == 0:
        return 1.0
    score = 0.0
    if is_binary(a) and is_binary(b):
        score = tango_p(*_discordant(differences, clusters, deff), -margin)
        if not is_clustered(clusters):
            return score
    means, groups = _resample(differences, clusters, draws, seed)
    return max(score, _tail(means <= -margin, groups))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for testing them all (Holm 1979, Scand. J. Stat. 6:65), under the same names.

    In rising order, adjusted p_(i) = max over j ≤ i of min(1, (m - j + 1) p_(j)). Rejecting where it is at
    most alpha keeps the chance of any false rejection at alpha, whatever the dependence.
    """
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased chance that at least one of k samples is right, when c of n were.

    Chen et al. 2021: 1 - C(n-c, k) / C(n, k), arXiv 2107.03374, equation 1.
    """
    _check_samples(n, c, k)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_all_k(n: int, c: int, k: int) -> float:
    """Return the unbiased chance that all k samples are right, when c of n were: C(c, k) / C(n, k).

    The pass^k of Yao et al. 2024 (arXiv 2406.12045), the one to report where every answer must be safe.
    """
    _check_samples(n, c, k)
    return math.comb(c, k) / math.comb(n, k)


def compare(
    champion: Report, challenger: Report, metric: str, *, draws: int = 2000, seed: int = 0, like: str | None = None
) -> Change:
    """Compare one metric of two reports on the items that both scored.

    The difference is challenger minus champion. Where no item changed, the metric `like`, on which some did, tells how
    alike the items of a cluster are.

    | items | p-value (`test`) | interval |
    |---|---|---|
    | 0/1, independent | `mcnemar-exact` | Tango's |
    | 0/1, clustered | `cluster-sign-flip` | clustered paired bootstrap, never narrower than Tango's |
    | other values | `paired-bootstrap`, `clustered-paired-bootstrap` | the same bootstrap |

    `fixed` are the ids whose value rose, `broken` those whose value fell.

    Raises:
        BadInput: the reports measured different data, or no item was scored in both.
        UnknownName: a report lacks the metric.
    """
    ids, a, b, clusters = _paired_values(champion, challenger, metric)
    differences = b - a
    grouped = is_clustered(clusters)
    difference, low, high, p = paired_bootstrap(a, b, clusters, draws, seed)
    test = "clustered-paired-bootstrap" if grouped else "paired-bootstrap"
    fixed = tuple(item for item, change in zip(ids, differences, strict=True) if change > 0)
    broken = tuple(item for item, change in zip(ids, differences, strict=True) if change < 0)
    if is_binary(a) and is_binary(b):
        score_low, score_high = tango(*_discordant(differences, clusters, _deff(champion, challenger, like)))
        if grouped:
            test, p = "cluster-sign-flip", sign_flip(differences, clusters, seed=seed)
            low, high = min(low, score_low), max(high, score_high)
        else:
            test, p = "mcnemar-exact", mcnemar_exact(len(fixed), len(broken))
            low, high = score_low, score_high
        low, high = max(low, -1.0), min(high, 1.0)
    return Change(
        metric=metric,
        n=len(ids),
        champion=float(a.mean()),
        challenger=float(b.mean()),
        difference=difference,
        low=low,
        high=high,
        p_value=p,
        fixed=fixed,
        broken=broken,
        test=test,
    )


def compare_noninferior(
    champion: Report,
    challenger: Report,
    metric: str,
    margin: float,
    direction: str = "higher",
    *,
    draws: int = 2000,
    seed: int = 0,
    like: str | None = None,
) -> float:
    """Return `noninferiority_p` of one metric of two reports, on the items both scored; `like` as in `compare`.

    Raises as `compare` does.
    """
    _, a, b, clusters = _paired_values(champion, challenger, metric)
    deff = _deff(champion, challenger, like)
    return noninferiority_p(a, b, margin, direction, clusters, draws, seed, deff)


def design_effect(differences: Floats, clusters: Sequence[Hashable]) -> float | None:
    """Return the variance of the mean over clusters by that of independent items, at least 1 (Kish 1965, §5.4).

    None where all differences are equal: then they tell nothing about their likeness within clusters.
    """
    alone = float(np.var(differences, ddof=1)) * len(differences) if len(differences) > 1 else 0.0
    sums, sizes = _cluster_sums(differences, clusters)
    if alone == 0 or len(sums) < 2:
        return None
    between = float(np.square(sums - differences.mean() * sizes).sum()) * len(sums) / (len(sums) - 1)
    return max(1.0, between / alone)


def _deff(champion: Report, challenger: Report, like: str | None) -> float | None:
    """Return the design effect of the changes in the metric `like`; None without one or without changes."""
    if like is None:
        return None
    _, a, b, clusters = _paired_values(champion, challenger, like)
    return None if clusters is None else design_effect(b - a, clusters)


def cluster_of(task_id: str, groups: Mapping[str, str]) -> Hashable:
    """Return the cluster of a task: its group, or itself where it has none."""
    return ("group", groups[task_id]) if task_id in groups else ("task", task_id)


def is_binary(values: Sequence[float] | Floats) -> bool:
    """Say whether all values are 0 or 1."""
    array = np.asarray(values, dtype=float)
    return bool(np.all((array == 0) | (array == 1)))


def is_clustered(clusters: Sequence[Hashable] | None) -> bool:
    """Say whether some items share a cluster."""
    return clusters is not None and len(set(clusters)) < len(clusters)


def effective_n(values: Sequence[float] | Floats, clusters: Sequence[Hashable] | None) -> int:
    """Return the n for a score interval: the clusters if all values are equal, else the items.

    Equal values show no variation between clusters, so how alike the items of a cluster are is unknown; the
    safe reading is that they all say the same.
    """
    array = np.asarray(values, dtype=float)
    return len(set(clusters)) if clusters is not None and np.ptp(array) == 0 else len(array)


def _paired_values(
    champion: Report, challenger: Report, metric: str
) -> tuple[list[str], Floats, Floats, list[Hashable] | None]:
    """Return shared ids, champion's and challenger's values, and clusters (None where all differ)."""
    if champion.data.sha256 != challenger.data.sha256:
        raise BadInput(
            f"the reports of {champion.model!r} and {challenger.model!r} measured different data: "
            f"{champion.data.name} (sha256 {champion.data.sha256[:12]}) and "
            f"{challenger.data.name} (sha256 {challenger.data.sha256[:12]}). "
            "A paired comparison needs the same items; evaluate both on one file"
        )
    for report in (champion, challenger):
        if metric not in report.metrics:
            raise UnknownName("metric", metric, report.metrics)
    before, after = champion.values(metric), challenger.values(metric)
    ids = sorted(before.keys() & after.keys())  # so that seeded resampling does not depend on the order
    if not ids:
        raise BadInput(
            f"no item has a value of {metric!r} in both reports ({len(before)} and {len(after)} scored); "
            "look at the unscored items' reasons"
        )
    clusters = [cluster_of(item, champion.groups) for item in ids]
    a = np.array([before[item] for item in ids])
    b = np.array([after[item] for item in ids])
    return ids, a, b, clusters if is_clustered(clusters) else None


def _z(quantile: float) -> float:
    return float(special.ndtri(quantile))


def _is_higher(direction: str) -> bool:
    if direction not in ("higher", "lower"):
        raise ValueError(f"a direction is 'higher' or 'lower', got {direction!r}")
    return direction == "higher"


def _check_count(name: str, count: float, n: int) -> None:
    if not 0 <= count <= n:
        raise ValueError(f"{name} must lie between 0 and n, got {count} of {n}")


def _check_samples(n: int, c: int, k: int) -> None:
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"0 <= c <= n and 1 <= k <= n are needed, got n={n}, c={c}, k={k}")


def _differences(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> Floats:
    before, after = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if before.shape != after.shape:
        raise ValueError(f"pairs need equally many values, got {before.size} and {after.size}")
    difference: Floats = after - before
    return difference


def _discordant(
    differences: Floats, clusters: Sequence[Hashable] | None, deff: float | None = None
) -> tuple[int, int, int]:
    """Return (fixed, broken, n) of 0/1 pairs.

    Where all differences are equal they are counted in clusters, or, with a design effect, as that many fewer items.
    """
    n = effective_n(differences, clusters)
    if deff is not None and n < len(differences):
        n = max(n, round(len(differences) / deff))
    share_fixed, share_broken = np.mean(differences > 0), np.mean(differences < 0)
    return round(float(share_fixed) * n), round(float(share_broken) * n), n


def _cluster_sums(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Return each cluster's sum and size, in order of first appearance."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"every value needs its cluster, got {len(values)} values and {len(clusters)} clusters")
    number: dict[Hashable, int] = {}
    index = np.array([number.setdefault(cluster, len(number)) for cluster in clusters], dtype=np.intp)
    sums = np.bincount(index, values, len(number)).astype(np.float64)
    return sums, np.bincount(index, minlength=len(number)).astype(np.float64)


def _blocks(draws: int, width: int) -> list[int]:
    """Split `draws` rows of `width` indices into blocks that fit `_BLOCK`."""
    rows = max(1, _BLOCK // max(1, width))
    return [min(rows, draws - start) for start in range(0, draws, rows)]


def _resample(values: Floats, clusters: Sequence[Hashable] | None, draws: int, seed: int) -> tuple[Floats, int]:
    """Return the bootstrap means (sums over sizes of the drawn clusters) and the number of clusters."""
    sums, sizes = _cluster_sums(values, clusters)
    rng = np.random.default_rng(seed)
    means = []
    for size in _blocks(draws, len(sums)):
        drawn = rng.integers(0, len(sums), (size, len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(means), len(sums)


def _limits(means: Floats, groups: int, confidence: float) -> tuple[float, float]:
    if groups < 2:
        return -math.inf, math.inf
    t = float(special.stdtrit(groups - 1, 0.5 + confidence / 2))
    tail = float(special.ndtr(-math.sqrt(groups / (groups - 1)) * t))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _tail(beyond: npt.NDArray[np.bool_], groups: int) -> float:
    """Return the one-sided p-value whose expanded percentile limit falls where the share `beyond` says."""
    if groups < 2:
        return 1.0
    share = (1 + int(np.count_nonzero(beyond))) / (1 + len(beyond))
    if share >= 1:
        return 1.0
    return float(special.stdtr(groups - 1, _z(share) * math.sqrt((groups - 1) / groups)))


def _tango_z(fixed: int, broken: int, n: int, null: float) -> float:
    """Return the score statistic at a hypothetical difference.

    (fixed - broken - nδ) / √(n (2q + δ(1-δ))), where q is the chance of a broken item that fits the data best
    given δ: the larger root of 2n q² + ((2n - fixed + broken) δ - fixed - broken) q - broken δ (1-δ) = 0.
    """
    linear = (2 * n - fixed + broken) * null - fixed - broken
    constant = -broken * null * (1 - null)
    q = (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)
    variance = n * (2 * q + null * (1 - null))
    gap = fixed - broken - n * null
    if abs(gap) < 1e-12 * n:
        return 0.0
    return gap / math.sqrt(variance) if variance > 1e-15 * n else math.copysign(math.inf, gap)


def _solve(fixed: int, broken: int, n: int, target: float, low: float, high: float) -> float:
    """Return where the falling score statistic meets `target`, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        if _tango_z(fixed, broken, n, middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
