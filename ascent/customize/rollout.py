"""Rollout: sample groups of episodes for tasks, grade them, keep what carries a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ascent.customize.agentic.harness import Attempts, Harness, SingleTurn
from ascent.customize.objectives.credit import is_informative
from ascent.evaluate.pool import GraderPool
from ascent.inference.engine import Engine, Sampling
from ascent.records import Episode, Task


@dataclass(frozen=True)
class Group:
    """All samples of one task. `rewards[i]` is NaN where the grader gave no value, or where the episode was lost.

    `lost` and `refilled` count attempts that broke off and episodes that replaced them, see `Attempts`.
    """

    task: Task
    episodes: tuple[Episode, ...]
    rewards: tuple[float, ...]
    lost: int = 0
    refilled: int = 0

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
    *,
    harness: Harness | None = None,
) -> list[Group]:
    """Sample `sampling.n` episodes per task and grade them by `reward` (and whatever else the pool grades).

    A task's episodes are graded while others are still sampled. Without a harness an episode is one turn. An
    environment's own score can be the reward, by the name `environment`.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="grading") as grading:
        graded: dict[int, Future[list[Episode]]] = {}

        def grade(index: int, group: Attempts) -> None:
            graded[index] = grading.submit(pool.grade, [(tasks[index], episode) for episode in group.episodes])

        try:
            attempts = (harness or SingleTurn()).run(engine, tasks, sampling, on_done, grade)
        except BaseException:
            grading.shutdown(wait=False, cancel_futures=True)
            raise
    groups = []
    for index, (task, group) in enumerate(zip(tasks, attempts, strict=True)):
        episodes = tuple(graded[index].result())
        rewards = tuple(reward_of(episode, reward) for episode in episodes)
        groups.append(Group(task, episodes, rewards, group.lost, group.refilled))
    return groups


def reward_of(episode: Episode, name: str) -> float:
    """The episode's reward, NaN when it was lost or not scored."""
    score = episode.score(name) if episode.error is None else None
    return math.nan if score is None or score.value is None else score.value
