"""The harness signature, `(tasks, engine) -> episodes`, and the simplest harness: one turn, no tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ascent.evaluate.suite import Attempt, single_turn
from ascent.inference.engine import Engine, Sampling
from ascent.records import Episode, Task


@dataclass(frozen=True)
class Attempts:
    """All episodes of one task, in sample order.

    `lost` counts the attempts that broke off through no fault of the policy, `refilled` the episodes that took the
    place of such attempts. An episode that could not be refilled has its `error` set and finish `error`.
    """

    episodes: tuple[Episode, ...]
    lost: int = 0
    refilled: int = 0


class Harness(Protocol):
    """Anything that turns tasks into episodes."""

    def run(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Attempts]:
        """Return `sampling.n` episodes per task, in task order; `on_done` hears of each finished one."""
        ...


class SingleTurn:
    """A task's messages in, one answer out."""

    def run(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Attempts]:
        """Sample every task in one call of the engine; an answer that the engine failed to give is lost."""
        return [
            Attempts(tuple(group), lost=sum(episode.error is not None for episode in group))
            for group in single_turn(engine)(tasks, sampling, on_done)
        ]


def attempt_with(harness: Harness, engine: Engine) -> Attempt:
    """Return what `evaluate` runs tasks with to measure `engine` in a harness; lost episodes are among its results."""

    def attempt(
        tasks: Sequence[Task], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[list[Episode]]:
        return [list(group.episodes) for group in harness.run(engine, tasks, sampling, on_done)]

    return attempt
