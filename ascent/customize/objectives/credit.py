"""Credit: from graded groups of episodes to one advantage per episode.

Rewards may be NaN (an episode nobody could grade): it is left out of every statistic and gets advantage 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

STD_EPS = 1e-4  # as in TRL and close to verl's 1e-6; only matters where a group's spread is tiny

Group = Sequence[float]


def group_mean(rewards: Group) -> list[float]:
    """R − mean of the group (GRPO, arXiv 2402.03300 §4.1)."""
    mean = _mean(rewards)
    return [_or_zero(reward - mean) for reward in rewards]


def leave_one_out(rewards: Group) -> list[float]:
    """R_i − mean of the others (RLOO, arXiv 2402.14740 §2.2); equals G/(G−1)·(R_i − mean)."""
    known = [r for r in rewards if not math.isnan(r)]
    if len(known) < 2:
        return [0.0] * len(rewards)
    total = sum(known)
    return [_or_zero(reward - (total - reward) / (len(known) - 1)) for reward in rewards]


def no_baseline(rewards: Group) -> list[float]:
    """The reward itself (REINFORCE)."""
    return [_or_zero(reward) for reward in rewards]


def group_std(centred: Group, rewards: Group) -> list[float]:
    """Divide by the group's sample standard deviation (ddof 1, as verl and TRL; the paper does not say which)."""
    known = [r for r in rewards if not math.isnan(r)]
    if len(known) < 2:
        return list(centred)
    mean = _mean(known)
    std = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1))
    return [value / (std + STD_EPS) for value in centred]


def no_scale(centred: Group, rewards: Group) -> list[float]:
    """Leave the centred rewards as they are (Dr. GRPO, arXiv 2503.20783)."""
    return list(centred)


BASELINES: dict[str, Callable[[Group], list[float]]] = {
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "none": no_baseline,
}
SCALES: dict[str, Callable[[Group, Group], list[float]]] = {"group_std": group_std, "none": no_scale}


def advantages(rewards: Group, baseline: str, scale: str) -> list[float]:
    """Advantage per episode of one group: scale(baseline(R))."""
    return SCALES[scale](BASELINES[baseline](rewards), rewards)


def is_informative(rewards: Group, tolerance: float = 1e-6) -> bool:
    """Whether the group's rewards differ; a group without spread yields no gradient."""
    known = [r for r in rewards if not math.isnan(r)]
    return len(known) > 1 and max(known) - min(known) > tolerance


def overlong_punishment(length: int, longest: int, cache: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476 Eq. 13), added to the reward.

    0 up to `longest - cache` tokens, then linearly down to −1 at `longest`, −1 beyond.
    """
    if length <= longest - cache:
        return 0.0
    if length > longest:
        return -1.0
    return ((longest - cache) - length) / cache


def _mean(rewards: Group) -> float:
    known = [r for r in rewards if not math.isnan(r)]
    return sum(known) / len(known) if known else math.nan


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
