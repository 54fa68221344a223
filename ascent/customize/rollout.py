"""Rollout: sample groups of episodes for tasks, grade them, keep what carries a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ascent.customize.objectives.credit import is_informative
from ascent.evaluate.pool import GraderPool
from ascent.evaluate.suite import episode_of
from ascent.inference.engine import Engine, Prompt, Sampling
from ascent.records import Episode, Task


@dataclass(frozen=True)
class Group:
    """All samples of one task. `rewards[i]` is NaN where the grader gave no value."""

    task: Task
    episodes: tuple[Episode, ...]
    rewards: tuple[float, ...]

    @property
    def informative(self) -> bool:
        """Whether the rewards differ."""
        return is_informative(self.rewards)


def rollout(
    engine: Engine,
    tasks: Sequence[Task],
    pool: GraderPool,
    sampling: Sampling,
    reward: str,
    on_done: Callable[[int], None] | None = None,
) -> list[Group]:
    """Sample `sampling.n` episodes per task and grade them by `reward` (and whatever else the pool grades)."""
    completions = engine.generate([Prompt(task.messages) for task in tasks], sampling, on_done)
    pairs = [
        (task, episode_of(task, completion, engine.model, index))
        for task, group in zip(tasks, completions, strict=True)
        for index, completion in enumerate(group)
    ]
    graded = pool.grade(pairs)
    groups = []
    for index, task in enumerate(tasks):
        episodes = tuple(graded[index * sampling.n : (index + 1) * sampling.n])
        groups.append(Group(task, episodes, tuple(reward_of(episode, reward) for episode in episodes)))
    return groups


def reward_of(episode: Episode, name: str) -> float:
    """The episode's reward, NaN when it was not scored."""
    score = episode.score(name)
    return math.nan if score is None or score.value is None else score.value
