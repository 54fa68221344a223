"""Measure one model on one data set: generate, grade, estimate, report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Protocol

from ascent.evaluate.statistics import (
    cluster_of,
    clustered_bootstrap,
    effective_n,
    is_binary,
    is_clustered,
    wilson,
)
from ascent.inference.engine import Completion, Engine, Prompt, Sampling
from ascent.records import DataSource, Episode, Estimate, Report, Score, Task, Unscored, digest
from ascent.records.errors import BadInput

CHUNK = 256
"""Tasks given to the engine at once: enough for it to batch well, few enough to hold with their tokens."""


class Grading(Protocol):
    """What grades answers, by names: a `GraderPool`, or judges."""

    @property
    def graders(self) -> tuple[str, ...]:
        """The names of the scores that it gives."""

    def grade(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Episode]:
        """Return the episodes with their scores, in the same order."""


Attempt = Callable[[Sequence[Task], Sampling, Callable[[int], None] | None], list[list[Episode]]]
"""What attempts tasks: from tasks, how to sample and what hears of finished episodes to `sampling.n` episodes per task,
in task order, ungraded but for scores that the attempt brings along. A lost episode has its `error` and finish `error`.
"""


def evaluate(
    engine: Engine,
    tasks: Sequence[Task],
    pool: Grading,
    *,
    sampling: Sampling,
    data: DataSource,
    stage: str,
    on_done: Callable[[int], None] | None = None,
    keep_tokens: bool = False,
    abstain_below: float = 0.0,
    chunk: int = CHUNK,
    attempt: Attempt | None = None,
    details: Mapping[str, Any] | None = None,
) -> Report:
    """Answer every task `sampling.n` times, grade the answers and return the report.

    An answer whose sampling failed stays in the report as an unscored item, as does an episode that was lost. The
    report's metrics are the pool's graders and the scores that the attempt brought along, such as an environment's;
    its id is the digest of what was measured, so repeating a deterministic measurement gives the same id.

    Args:
        engine: what answers; `engine.model` goes into the report.
        tasks: the items, with messages and unique ids.
        pool: the graders.
        sampling: how to sample.
        data: the data set the tasks come from, for later comparisons.
        stage: the stage being measured.
        on_done: hears how many further samples the engine has finished.
        abstain_below: the confidence under which an answer is doubtful; the program's `finish` hears of it.
        keep_tokens: keep token ids, masks and log-probs in the items. They make a report many times larger.
        chunk: tasks per call of the engine, or of `attempt`.
        attempt: what runs the tasks with the engine; by default each is asked once.
        details: what else decided the answers, such as the environment; it joins the report's `sampling`.

    Raises:
        BadInput: two tasks share an id, or a task has no messages.
    """
    _check(tasks)
    started = time.monotonic()
    attempt = attempt or single_turn(engine)
    items: list[Episode] = []
    prompt_tokens = completion_tokens = 0
    for begin in range(0, len(tasks), chunk):
        part = tasks[begin : begin + chunk]
        attempts = attempt(part, sampling, on_done)
        pairs = [
            (task, _doubted(episode, abstain_below))
            for task, episodes in zip(part, attempts, strict=True)
            for episode in episodes
        ]
        prompt_tokens += sum(map(_tokens_read, attempts))
        completion_tokens += sum(episode.completion_tokens for _, episode in pairs)
        graded = pool.grade(pairs)
        items.extend(graded if keep_tokens else map(_without_tokens, graded))
    names = dict.fromkeys([*pool.graders, *(score.name for item in items for score in item.scores)])
    groups = {task.id: task.group for task in tasks if task.group is not None}
    report = Report(
        id="",
        model=engine.model,
        stage=stage,
        data=data,
        metrics={name: estimate(name, items, groups) for name in names},
        items=tuple(items),
        groups=groups,
        sampling={**asdict(sampling), "stop": list(sampling.stop), **(details or {})},
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )
    return report.model_copy(
        update={
            "id": digest(report.model_dump(mode="json"))[:16],
            "seconds": time.monotonic() - started,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def single_turn(engine: Engine) -> Attempt:
    """Return what asks every task once: its messages in, one answer out, all tasks in one call of the engine."""

    def attempt(
        tasks: Sequence[Task], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[list[Episode]]:
        answers = engine.generate([Prompt(task.messages) for task in tasks], sampling, on_done)
        return [
            [episode_of(task, completion, engine.model, sample) for sample, completion in enumerate(completions)]
            for task, completions in zip(tasks, answers, strict=True)
        ]

    return attempt


def estimate(
    name: str, episodes: Sequence[Episode], groups: Mapping[str, str] | None = None, *, seed: int = 0
) -> Estimate:
    """Return the mean of one metric with its 95 % interval.

    | values | method | interval |
    |---|---|---|
    | 0/1, every item its own cluster | `wilson` | Wilson's |
    | 0/1, items share clusters | `clustered-bootstrap` | over clusters, never narrower than Wilson's |
    | other | `bootstrap`, `clustered-bootstrap` | bootstrap over items or clusters |
    | none scored | `none` | NaN |

    A cluster is the task's group; samples of one task share the task's cluster. Where all 0/1 values of
    clustered items are equal, Wilson's n is the number of clusters.
    """
    ordered = sorted(episodes, key=lambda episode: (episode.task_id, episode.sample))  # so that seeds repeat
    scores = [(episode.task_id, _score(name, episode)) for episode in ordered]
    values = [score.value for _, score in scores if score.value is not None]
    skipped = sum(score.unscored is Unscored.not_applicable for _, score in scores)
    missing = len(scores) - len(values) - skipped
    if not values:
        nan = math.nan
        return Estimate(
            name=name,
            value=nan,
            low=nan,
            high=nan,
            n=0,
            unscored=missing,
            not_applicable=skipped,
            method="none",
        )
    clusters = [cluster_of(task, groups or {}) for task, score in scores if score.value is not None]
    mean, low, high, method = _interval(values, clusters, seed)
    return Estimate(
        name=name,
        value=mean,
        low=low,
        high=high,
        n=len(values),
        successes=sum(values) if is_binary(values) else None,
        unscored=missing,
        not_applicable=skipped,
        method=method,
    )


def episode_of(task: Task, completion: Completion, model: str, sample: int = 0) -> Episode:
    """Return one completion of a task as an ungraded episode.

    Its tokens are the prompt's and the completion's; the mask marks the latter. Tokens are left out where the
    engine gave none or not one log-prob each, as a remote engine may.
    """
    prompt, sampled = completion.prompt_ids, completion.token_ids
    whole = len(completion.logps) == len(sampled) > 0
    return Episode(
        task_id=task.id,
        model=model,
        messages=task.messages,
        text=completion.text.encode("utf-8", "replace").decode(),
        token_ids=prompt + sampled if whole else (),
        loss_mask=(False,) * len(prompt) + (True,) * len(sampled) if whole else (),
        logps=(0.0,) * len(prompt) + completion.logps if whole else (),
        finish=completion.finish,
        confidence=math.exp(min(completion.logps)) if whole else None,
        sample=sample,
        error=completion.error,
    )


def _interval(values: Sequence[float], clusters: Sequence[Hashable], seed: int) -> tuple[float, float, float, str]:
    mean = sum(values) / len(values)
    grouped = is_clustered(clusters)
    if not is_binary(values):
        _, low, high = clustered_bootstrap(values, clusters, seed=seed)
        return mean, low, high, "clustered-bootstrap" if grouped else "bootstrap"
    n = effective_n(values, clusters)
    low, high = wilson(mean * n, n)
    if not grouped:
        return mean, low, high, "wilson"
    _, wide_low, wide_high = clustered_bootstrap(values, clusters, seed=seed)
    return mean, max(0.0, min(low, wide_low)), min(1.0, max(high, wide_high)), "clustered-bootstrap"


def _score(name: str, episode: Episode) -> Score:
    return episode.score(name) or Score(name=name, unscored=Unscored.error, reason="was not graded")


def _doubted(episode: Episode, below: float) -> Episode:
    unsure = episode.confidence is not None and episode.confidence < below
    return episode.model_copy(update={"doubtful": True}) if unsure else episode


def _tokens_read(episodes: Sequence[Episode]) -> int:
    """Count the tokens that the samples of a task read and did not write; what comes before the first answer, once."""
    masks = [episode.loss_mask for episode in episodes if any(episode.loss_mask)]
    return sum(mask.count(False) for mask in masks) - sum(mask.index(True) for mask in masks[1:])


def _without_tokens(episode: Episode) -> Episode:
    return episode.model_copy(update={"token_ids": (), "loss_mask": (), "logps": ()})


def _check(tasks: Sequence[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise BadInput(f"two tasks have the id {task.id!r}; ids must be unique, because results are paired by them")
        if not task.messages:
            raise BadInput(f"task {task.id!r} has no messages to answer; build tasks with a prompt before evaluating")
        seen.add(task.id)
