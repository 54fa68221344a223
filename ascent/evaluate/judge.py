"""Judges: graders that ask a model (RLAIF). They run in this process, over many episodes at once, on any engine.

A judge is worth what its agreement with people is worth: `ascent.evaluate.agreement` measures that, before training.
What a judge cannot say in the asked form stays unscored; a judge that mostly cannot is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Literal, Protocol, Self

from pydantic import Field, model_validator

from ascent.evaluate.asking import (
    BLANK,
    RETRIES,
    Unusable,
    ask,
    check_usable,
    grade_answered,
    identity,
    json_object,
    question,
    reference_text,
)
from ascent.evaluate.graders import failed
from ascent.evaluate.statistics import wilson
from ascent.inference.engine import Completion, Engine, Prompt, Sampling
from ascent.records import Episode, FinishReason, Record, Score, Task, Unscored
from ascent.records.errors import BadInput

Pick = Literal["first", "second", "tie"]

UNSEEN = 0.05
"""Probability that may stay unseen when only one of yes and no was."""

_YES_NO = re.compile(r"\W*(yes|no|y|n)\b", re.IGNORECASE)


class BatchGrader(Protocol):
    """A grader that sees many episodes at once; its scores come back in the order of the pairs, one each."""

    name: str

    def grade(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Score]:
        """Return one score of this grader's name per pair."""
        ...


def grade_with(graders: Sequence[BatchGrader], pairs: Sequence[tuple[Task, Episode]]) -> list[Episode]:
    """Return the episodes with the graders' scores added; a score of the same name from before is replaced."""
    episodes = [episode for _, episode in pairs]
    for grader in graders:
        scores = grader.grade(pairs)
        for at, (episode, score) in enumerate(zip(episodes, scores, strict=True)):
            kept = tuple(old for old in episode.scores if old.name != score.name)
            episodes[at] = episode.model_copy(update={"scores": (*kept, score)})
    return episodes


class Judges:
    """Judges in the place of a `GraderPool`: every answer is graded by each of them."""

    def __init__(self, judges: Sequence[BatchGrader]) -> None:
        self._judges = judges
        self.graders = tuple(judge.name for judge in judges)

    def grade(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Episode]:
        """Return the episodes with the judges' scores. Raises as they do."""
        return grade_with(self._judges, pairs)


class Criterion(Record):
    """One thing to judge: a short name, what it means, and its weight in the value."""

    name: str = Field(min_length=1)
    description: str
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class Rubric(Record):
    """What to judge by. Each criterion is graded in whole numbers from `low` (not met) to `high` (fully met).

    With `reference`, the judge also sees `expected["answer"]` of the task.
    """

    criteria: tuple[Criterion, ...] = Field(min_length=1)
    low: int = 1
    high: int = 5
    reference: bool = False

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.high <= self.low:
            raise ValueError(f"a scale rises, got {self.low} to {self.high}")
        if len({criterion.name for criterion in self.criteria}) < len(self.criteria):
            raise ValueError("two criteria have the same name")
        return self


class Judgement(Record):
    """A rubric judge's answer: the weighted mean in 0..1, and each criterion's score on the scale with its reason."""

    value: float
    scores: dict[str, int]
    reasons: dict[str, str]


class RubricJudge:
    """Grades an answer on every criterion of a rubric, in one question per episode.

    The value is Σ w (score - low) / (high - low) / Σ w over the criteria. The judge gives its reason before each score,
    and samples greedily. `digest` changes with the model, the rubric and the wording of the question.
    """

    def __init__(
        self, engine: Engine, rubric: Rubric, *, name: str = "judge", max_tokens: int = 512, retries: int = RETRIES
    ) -> None:
        self.engine, self.rubric, self.name, self.max_tokens, self.retries = engine, rubric, name, max_tokens, retries

    @property
    def digest(self) -> str:
        """What identifies this judge in records."""
        return identity(self, self.rubric, self._prompt(BLANK, ""))

    def grade(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Score]:
        """Return a score per pair; its reason has every criterion's score and reason.

        Raises:
            BadInput: too many answers are unusable, see `MAX_UNUSABLE`.
        """
        return grade_answered(self.name, pairs, lambda asked: [self._score(found) for found in self.judge(asked)])

    def judge(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Judgement | Unusable]:
        """Return the full judgement of each pair. Raises as `grade` does."""
        prompts = [self._prompt(task, episode.text) for task, episode in pairs]
        return ask(self, prompts, self._parse)

    def _prompt(self, task: Task, text: str) -> Prompt:
        rubric = self.rubric
        form = {part.name: {"reason": "<one sentence>", "score": "<number>"} for part in rubric.criteria}
        criteria = "\n".join(f"- {part.name}: {part.description}" for part in rubric.criteria)
        return question(
            task,
            {"answer": text},
            f"Judge the answer by each criterion, in whole numbers from {rubric.low} (not met at all) to {rubric.high} "
            f"(fully met):\n{criteria}\n\nReply with one JSON object and nothing else, each reason before its score:\n"
            + json.dumps(form, ensure_ascii=False).replace('"<number>"', f"<{rubric.low} to {rubric.high}>"),
            reference=rubric.reference,
        )

    def _parse(self, text: str) -> Judgement:
        low, high = self.rubric.low, self.rubric.high
        found = json_object(text, [part.name for part in self.rubric.criteria])
        scores, reasons, total = {}, {}, 0.0
        for part in self.rubric.criteria:
            entry = found[part.name]
            score = entry.get("score") if isinstance(entry, dict) else entry
            if isinstance(score, bool) or not isinstance(score, int | float) or score not in range(low, high + 1):
                raise ValueError(f"the score of {part.name!r} must be a whole number from {low} to {high}")
            scores[part.name] = int(score)
            reasons[part.name] = str(entry.get("reason", "")) if isinstance(entry, dict) else ""
            total += part.weight * (score - low) / (high - low)
        value = total / sum(part.weight for part in self.rubric.criteria)
        return Judgement(value=value, scores=scores, reasons=reasons)

    def _score(self, found: Judgement | Unusable) -> Score:
        if isinstance(found, Unusable):
            return failed(self.name, found.reason)
        parts = (f"{name} {score}/{self.rubric.high}: {found.reasons[name]}" for name, score in found.scores.items())
        return Score(name=self.name, value=found.value, reason="; ".join(parts)[:1000])


class Comparison(Record):
    """A pairwise judge's two answers about two texts: its pick when the first text is shown first, and when second.

    `winner` is their common pick, or a tie when they differ: a judge that changes its mind with the order prefers
    neither (Zheng et al. 2023, arXiv 2306.05685, section 3.4). `problem` is set where an answer is unusable, and then
    there is no winner.
    """

    straight: Pick | None = None
    swapped: Pick | None = None
    reason: str = ""
    problem: str = ""

    @property
    def winner(self) -> Pick | None:
        """The text preferred in both orders, `tie`, or None where the judge gave no answer."""
        if self.straight is None or self.swapped is None:
            return None
        return self.straight if self.straight == self.swapped else "tie"

    @property
    def flipped(self) -> bool:
        """Whether the judge picked whatever stood in one of the two places."""
        return {self.straight, self.swapped} == {"first", "second"}


class PositionBias(Record):
    """How the order of the texts moved a pairwise judge.

    `flips` of the `n` answered comparisons went to one place whichever text stood there; `flip_rate` has the Wilson
    interval `low` to `high`. `first_share` is the share of these flips that went to the text shown first (None without
    flips); 0.5 means confusion, 0 or 1 a fixed preference for a place.
    """

    n: int
    flips: int
    flip_rate: float
    low: float
    high: float
    first_share: float | None


def position_bias(comparisons: Sequence[Comparison]) -> PositionBias:
    """Count how often a judge changed its pick with the order. Raises `BadInput` when no comparison was answered."""
    answered = [one for one in comparisons if one.winner is not None]
    if not answered:
        raise BadInput("the judge answered no comparison, so nothing can be said about its position bias")
    flips = [one for one in answered if one.flipped]
    low, high = wilson(len(flips), len(answered))
    return PositionBias(
        n=len(answered),
        flips=len(flips),
        flip_rate=len(flips) / len(answered),
        low=low,
        high=high,
        first_share=sum(one.straight == "first" for one in flips) / len(flips) if flips else None,
    )


class PairwiseJudge:
    """Says which of two answers is better, asked in both orders; as a grader, against `expected["answer"]`."""

    def __init__(
        self,
        engine: Engine,
        standard: str = "the answer that solves the task better: correct first, then complete, then clear",
        *,
        name: str = "pairwise",
        max_tokens: int = 256,
        retries: int = RETRIES,
    ) -> None:
        """Take the engine and the standard, which completes the sentence "Choose ..."."""
        self.engine, self.standard, self.name = engine, standard, name
        self.max_tokens, self.retries = max_tokens, retries

    @property
    def digest(self) -> str:
        """What identifies this judge in records."""
        return identity(self, self.standard, self._prompt(BLANK, "", ""))

    def compare(self, items: Sequence[tuple[Task, str, str]]) -> list[Comparison]:
        """Return a comparison for each (task, first text, second text).

        Raises:
            BadInput: too many answers are unusable, see `MAX_UNUSABLE`.
        """
        straight = [self._prompt(task, first, second) for task, first, second in items]
        swapped = [self._prompt(task, second, first) for task, first, second in items]
        found = ask(self, [*straight, *swapped], self._parse)
        return [_comparison(*both) for both in zip(found[: len(items)], found[len(items) :], strict=True)]

    def grade(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Score]:
        """Return 1 where the answer beats the reference in both orders, 0 where it loses in both, else 0.5.

        The label is `win`, `loss`, `tie`, or `flip` for a tie that the order made. Tasks without `expected["answer"]`
        are not applicable. Raises as `compare` does.
        """
        return grade_answered(self.name, pairs, self._against_reference)

    def _against_reference(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Score]:
        known = [at for at, (task, _) in enumerate(pairs) if task.expected and "answer" in task.expected]
        items = [(pairs[at][0], pairs[at][1].text, reference_text(pairs[at][0])) for at in known]
        scores = [Score(name=self.name, unscored=Unscored.not_applicable) for _ in pairs]
        for at, one in zip(known, self.compare(items), strict=True):
            if one.winner is None:
                scores[at] = failed(self.name, one.problem)
                continue
            value, label = {"first": (1.0, "win"), "second": (0.0, "loss"), "tie": (0.5, "tie")}[one.winner]
            label = "flip" if one.flipped else label
            scores[at] = Score(name=self.name, value=value, label=label, reason=one.reason[:1000])
        return scores

    def _prompt(self, task: Task, first: str, second: str) -> Prompt:
        return question(
            task,
            {"answer A": first, "answer B": second},
            f"Choose {self.standard}. The order and the length of the answers mean nothing.\n\nReply with one JSON "
            'object and nothing else, the reason first:\n{"reason": "<one sentence>", "better": "<A, B or tie>"}',
        )

    def _parse(self, text: str) -> tuple[str, str]:
        found = json_object(text, ["better"])
        better = str(found["better"]).strip().lower()
        if better not in ("a", "b", "tie"):
            raise ValueError('"better" must be "A", "B" or "tie"')
        return better, str(found.get("reason", ""))


class YesNoJudge:
    """A two-level grade: the value is P(yes), read from the log-probs of the first token, so it is continuous.

    The first token is sampled `samples` times at temperature 1, so the probability p of each distinct one seen is
    known. With Y and N the sums over those that say yes or no, and U = 1 - Σ p what is unseen, the value is
    Y / (Y + N); if only one word was seen, the unseen counts as the other: Y / (Y + U), or 1 - N / (N + U). Then, and
    while U is above 5 %, or if no word was seen, the question is asked again, at most `retries` times. An engine
    without log-probs gives the share of yes among the yes and no instead. There is no room for a reason.
    """

    def __init__(
        self,
        engine: Engine,
        question: str,
        *,
        name: str = "p_yes",
        samples: int = 8,
        retries: int = RETRIES,
        reference: bool = False,
    ) -> None:
        """Take the engine and the question about the answer, such as "Is the answer correct?".

        With `reference`, the judge also sees `expected["answer"]` of the task.
        """
        if samples < 1:
            raise BadInput(f"at least 1 sample per question is needed, got {samples}")
        self.engine, self.question, self.name = engine, question, name
        self.max_tokens, self.samples, self.retries, self.reference = 1, samples, retries, reference

    @property
    def digest(self) -> str:
        """What identifies this judge in records."""
        return identity(self, (self.samples, self.reference), self._prompt(BLANK, ""))

    def grade(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Score]:
        """Return a score per pair, its value P(yes).

        Raises:
            BadInput: too many questions got neither a yes nor a no, see `MAX_UNUSABLE`.
        """
        return grade_answered(self.name, pairs, self._p_yes)

    def _prompt(self, task: Task, text: str) -> Prompt:
        request = f"{self.question}\n\nReply with one word: Yes or No."
        return question(task, {"answer": text}, request, reference=self.reference)

    def _p_yes(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Score]:
        prompts = [self._prompt(task, episode.text) for task, episode in pairs]
        groups: list[list[Completion]] = [[] for _ in prompts]
        for attempt in range(1 + self.retries):
            left = [at for at, group in enumerate(groups) if not _is_settled(group)]
            if not left:
                break
            sampling = Sampling(n=self.samples, max_tokens=1, temperature=1.0, seed=attempt)
            for at, group in zip(left, self.engine.generate([prompts[at] for at in left], sampling), strict=True):
                groups[at] += group
        found = [probability_of_yes(group) for group in groups]
        check_usable(self, found)
        return [
            failed(self.name, value.reason) if isinstance(value, Unusable) else Score(name=self.name, value=value)
            for value in found
        ]


def probability_of_yes(group: Sequence[Completion]) -> float | Unusable:
    """Return P(yes) of samples of one question's first word, as `YesNoJudge` says."""
    said = [_says(one) for one in group]
    if True not in said and False not in said:
        one = group[0]
        broken = one.finish is FinishReason.error
        return Unusable(one.error or f"neither yes nor no, but {one.text[:80]!r}", malformed=not broken)
    yes, no, unseen = _masses(group)
    if yes + no == 0:
        return said.count(True) / (said.count(True) + said.count(False))
    return yes / (yes + (no or unseen)) if yes else unseen / (no + unseen)


def _says(one: Completion) -> bool | None:
    match = _YES_NO.match(one.text)
    return match[1].lower() in ("yes", "y") if match else None


def _masses(group: Sequence[Completion]) -> tuple[float, float, float]:
    """Return the probabilities of yes, of no, and of all that was not seen; (0, 0, 1) without log-probs."""
    seen = {one.token_ids[0]: (_says(one), math.exp(one.logps[0])) for one in group if one.logps}
    yes = sum((p for word, p in seen.values() if word is True), 0.0)
    no = sum((p for word, p in seen.values() if word is False), 0.0)
    return yes, no, max(0.0, 1 - sum(p for _, p in seen.values()))


def _is_settled(group: Sequence[Completion]) -> bool:
    said = {_says(one) for one in group} - {None}
    yes, no, unseen = _masses(group)
    return len(said) == 2 or (len(said) == 1 and (yes + no == 0 or unseen <= UNSEEN))


def _comparison(straight: tuple[str, str] | Unusable, swapped: tuple[str, str] | Unusable) -> Comparison:
    """Translate the letters of both orders into the texts they stood for."""
    for answer in (straight, swapped):
        if isinstance(answer, Unusable):
            return Comparison(problem=answer.reason)
    assert not isinstance(straight, Unusable)
    assert not isinstance(swapped, Unusable)
    picks: tuple[dict[str, Pick], dict[str, Pick]] = (
        {"a": "first", "b": "second", "tie": "tie"},
        {"a": "second", "b": "first", "tie": "tie"},
    )
    reason = " | in the other order: ".join(reason for _, reason in (straight, swapped) if reason)
    return Comparison(straight=picks[0][straight[0]], swapped=picks[1][swapped[0]], reason=reason)
