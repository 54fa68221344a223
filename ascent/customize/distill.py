"""Sequence-level distillation: a teacher answers, a grader keeps what is good enough, the student imitates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ascent.customize.recipes import TeacherSpec
from ascent.customize.rollout import reward_of
from ascent.evaluate.pool import GraderPool
from ascent.evaluate.suite import episode_of
from ascent.inference.engine import Engine, Prompt, Sampling
from ascent.records import FinishReason, Message, Task
from ascent.records.errors import BadInput


def teacher_answers(
    engine: Engine, tasks: Sequence[Task], spec: TeacherSpec, program: Path | None, seed: int
) -> list[tuple[Message, ...]]:
    """Return one conversation per kept answer of the teacher.

    Cut-off answers are never kept. With a reward the best answer of each prompt is kept if it reaches the minimum,
    without one every distinct answer (Kim and Rush 2016, arXiv 1606.07947 §3.2: the teacher's mode, greedily).

    Raises:
        BadInput: no answer is left to learn from.
    """
    sampling = Sampling(n=spec.samples, max_tokens=spec.max_tokens, temperature=spec.temperature, seed=seed)
    answers = engine.generate([Prompt(task.messages) for task in tasks], sampling)
    pairs = [
        (task, episode_of(task, completion, engine.model, index))
        for task, completions in zip(tasks, answers, strict=True)
        for index, completion in enumerate(completions)
        if completion.finish is FinishReason.stop and completion.text.strip()
    ]
    if spec.reward is not None:
        with GraderPool(program, [spec.reward]) as pool:
            graded = pool.grade(pairs)
        best: dict[str, tuple[float, int]] = {}
        for index, episode in enumerate(graded):
            value = reward_of(episode, spec.reward)
            if not math.isnan(value) and value >= spec.minimum and value > best.get(episode.task_id, (-math.inf, 0))[0]:
                best[episode.task_id] = (value, index)
        pairs = [pairs[index] for _, index in sorted(best.values(), key=lambda item: item[1])]
    kept = {(task.id, episode.text): (task, episode) for task, episode in pairs}
    if not kept:
        raise BadInput(
            f"{engine.model} gave no answer to learn from on {len(tasks)} prompts; raise teacher.max_tokens, lower "
            "teacher.minimum, or take a better teacher"
        )
    return [(*task.messages, Message(role="assistant", content=e.text)) for task, e in kept.values()]
