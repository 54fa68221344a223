"""Where each step's rollout comes from: sampled when it is needed, or one step ahead while the policy trains.

One step ahead, the sampler holds the policy as it was before the update that is running, so what it samples is stale by
one rollout's updates. A row's `correction` weighs that as it weighs any mismatch between sampler and trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from ascent.customize.rollout import Group
from ascent.customize.run import TrainingRun
from ascent.records import Episode, Task

Rollout = tuple[list[Group], dict[str, float]]
PENDING = "pending"


class Rollouts:
    """Hands out rollouts in order; with `ahead` the next one is sampled in a thread of its own.

    `synchronise` brings the policy into the sampler. A checkpoint waits for the rollout under way and holds it, since
    the policy that sampled it is gone when the run is resumed.
    """

    def __init__(
        self, collect: Callable[[], Rollout], synchronise: Callable[[], None], run: TrainingRun, *, ahead: bool
    ) -> None:
        self._collect, self._synchronise, self._run, self._ahead = collect, synchronise, run, ahead
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._under_way: Future[Rollout] | None = None
        if ahead:
            run.before_checkpoint = self._settle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def next(self, *, last: bool) -> Rollout:
        """Return this step's rollout; unless it is the last, begin the one after it when sampling ahead."""
        self._settle()
        stored = self._run.state.pop(PENDING, None)
        if stored is None:
            self._synchronise()
            found = self._collect()
        else:
            found = _read(stored)
        if self._ahead and not last:
            self._synchronise()
            self._under_way = self._thread.submit(self._collect)
        return found

    def _settle(self) -> None:
        """Wait for the rollout under way and lay it into the run's state."""
        if self._under_way is not None:
            self._run.state[PENDING] = _written(self._under_way.result())
            self._under_way = None


def _written(rollout: Rollout) -> dict[str, Any]:
    groups, facts = rollout
    return {
        "facts": facts,
        "groups": [
            {
                "task": group.task.model_dump(mode="json"),
                "episodes": [episode.model_dump(mode="json") for episode in group.episodes],
                "rewards": [None if math.isnan(reward) else reward for reward in group.rewards],
                "lost": group.lost,
                "refilled": group.refilled,
            }
            for group in groups
        ],
    }


def _read(stored: dict[str, Any]) -> Rollout:
    groups = [
        Group(
            Task.model_validate(group["task"]),
            tuple(Episode.model_validate(episode) for episode in group["episodes"]),
            tuple(math.nan if reward is None else reward for reward in group["rewards"]),
            group["lost"],
            group["refilled"],
        )
        for group in stored["groups"]
    ]
    return groups, stored["facts"]
