"""Credit: from graded groups of episodes to advantages, per episode and then per token.

Rewards may be NaN (an episode nobody could grade): it is left out of every statistic and gets advantage 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ascent.customize.objectives.rows import OnlineRow

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
    return [value / (_deviation(known) + STD_EPS) for value in centred]


def mean_scale(centred: Group, rewards: Group) -> list[float]:
    """Divide by the group's mean reward (MaxRL, arXiv 2602.02710 Eq. 8); one that never succeeds teaches nothing."""
    mean = _mean(rewards)
    return [value / mean if mean > STD_EPS else 0.0 for value in centred]


def no_scale(centred: Group, rewards: Group) -> list[float]:
    """Leave the centred rewards as they are (Dr. GRPO, arXiv 2503.20783)."""
    return list(centred)


BASELINES: dict[str, Callable[[Group], list[float]]] = {
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "none": no_baseline,
}
SCALES: dict[str, Callable[[Group, Group], list[float]]] = {
    "group_std": group_std,
    "group_mean": mean_scale,
    "none": no_scale,
}


def episode_advantages(groups: Sequence[Group], row: OnlineRow) -> list[list[float]]:
    """Advantage per episode of a whole rollout, before anything that looks at single tokens.

    A critic and a teacher take the place of the baseline later, so here the reward stays as it is.
    """
    if row.baseline == "batch_mean":  # all groups of the rollout are one group
        flat = group_mean([reward for group in groups for reward in group])
        centred = [[flat.pop(0) for _ in group] for group in groups]
    else:
        baseline = BASELINES.get(row.baseline, no_baseline)
        centred = [baseline(group) for group in groups]
    if row.scale == "batch_std":
        known = [reward for group in groups for reward in group if not math.isnan(reward)]
        deviation = _deviation(known) if len(known) > 1 else 1.0
        return [[value / (deviation + STD_EPS) for value in group] for group in centred]
    scale = SCALES.get(row.scale, no_scale)
    return [scale(values, rewards) for values, rewards in zip(centred, groups, strict=True)]


def reward_to_go(rewards: Sequence[float], gamma: float = 1.0) -> list[float]:
    """Σ_{s≥t} γ^(s−t) r_s for every target token t."""
    found, after = [], 0.0
    for reward in reversed(rewards):
        after = reward + gamma * after
        found.append(after)
    return found[::-1]


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Generalised advantage estimation (arXiv 1506.02438 Eq. 16) and the returns A + V for the critic.

    δ_t = r_t + γV_{t+1} − V_t; A_t = δ_t + γλA_{t+1}; nothing follows the last token. `rewards` and `values` hold the
    policy's own tokens only, so advantages carry across tool output as if it were not there.
    """
    found: list[float] = []
    next_value = next_advantage = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_value = value
        found.append(next_advantage)
    found.reverse()
    return found, [a + v for a, v in zip(found, values, strict=True)]


def whiten(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Shift and scale to mean 0 and deviation 1 over all tokens of the rollout (ddof 1)."""
    flat = [value for row in rows for value in row]
    if len(flat) < 2:
        return [list(row) for row in rows]
    mean, deviation = sum(flat) / len(flat), _deviation(flat)
    return [[(value - mean) / (deviation + 1e-8) for value in row] for row in rows]


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


def _deviation(known: Sequence[float]) -> float:
    mean = sum(known) / len(known)
    return math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
