"""The harness signature, `(tasks, engine) -> episodes`, and the simplest harness: one turn, no tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ascent.evaluate.suite import Attempt, episode_of
from ascent.inference.engine import Completion, Engine, Prompt, Sampling
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


OnGroup = Callable[[int, Attempts], None]
"""Gets a task's place and its episodes as soon as they have all ended, while those of others go on."""


class Harness(Protocol):
    """Anything that turns tasks into episodes."""

    def run(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
        on_group: OnGroup | None = None,
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
        on_group: OnGroup | None = None,
    ) -> list[Attempts]:
        """Sample every task in one call of the engine; an answer that the engine failed to give is lost."""

        def attempts(index: int, completions: Sequence[Completion]) -> Attempts:
            group = tuple(episode_of(tasks[index], c, engine.model, sample) for sample, c in enumerate(completions))
            return Attempts(group, lost=sum(episode.error is not None for episode in group))

        def tell(index: int, completions: list[Completion]) -> None:
            if on_group is not None:
                on_group(index, attempts(index, completions))

        answers = engine.generate([Prompt(task.messages) for task in tasks], sampling, on_done, tell)
        return [attempts(index, completions) for index, completions in enumerate(answers)]


def attempt_with(harness: Harness, engine: Engine) -> Attempt:
    """Return what `evaluate` runs tasks with to measure `engine` in a harness; lost episodes are among its results."""

    def attempt(
        tasks: Sequence[Task], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[list[Episode]]:
        return [list(group.episodes) for group in harness.run(engine, tasks, sampling, on_done)]

    return attempt
