"""A prompted model's answers to fixed questions, as features: experts' rubrics become columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ascent.customize.features.extract import BadItem, Features, Item, identity_of, texts_of
from ascent.inference.engine import Completion, Engine, Prompt, Sampling
from ascent.records import Message
from ascent.records.errors import BadInput, Unavailable

_PROMPT = "{item}\n\n{text}\nAnswer with one of these and nothing else: {answers}."


@dataclass(frozen=True)
class Question:
    """One question with its answers, such as yes and no."""

    text: str
    answers: tuple[str, ...] = ("yes", "no")


class RubricAnswers:
    """The share of each answer among a model's samples, question by question.

    Each question has one column per answer and one for "none of them", so D = Σ (answers + 1). With one sample the
    model answers greedily and the columns are one-hot; with more it is sampled at temperature 1, and the column of
    "yes" estimates P(yes) with a standard error of at most 1/(2 √samples).
    """

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[Question],
        *,
        samples: int = 1,
        max_tokens: int = 8,
        model_sha256: str = "",
        seed: int = 0,
    ) -> None:
        """Take the rubric.

        Args:
            engine: what answers.
            questions: the rubric.
            samples: answers per question.
            max_tokens: length of an answer.
            model_sha256: names the engine's weights; where it is empty, `engine.model` must do that.
            seed: of the samples.

        Raises:
            BadInput: there is no question, or one has fewer than two different answers.
        """
        if not questions:
            raise BadInput("the rubric has no question; give at least one")
        for question in questions:
            if len({answer.casefold().strip() for answer in question.answers} - {""}) < max(2, len(question.answers)):
                raise BadInput(f"the question {question.text!r} needs two or more different answers")
        self.engine, self.questions = engine, tuple(questions)
        self.sampling = Sampling(n=samples, max_tokens=max_tokens, temperature=0.0 if samples == 1 else 1.0, seed=seed)
        self.name, self.dimensions = "rubric", sum(len(question.answers) + 1 for question in questions)
        self.identity = identity_of(
            "rubric/1",
            model=model_sha256 or engine.model,
            prompt=_PROMPT,
            questions=[[question.text, *question.answers] for question in questions],
            sampling=[samples, max_tokens, seed],
        )

    @property
    def columns(self) -> list[str]:
        """What each feature is: "question = answer"."""
        return [f"{question.text} = {answer}" for question in self.questions for answer in (*question.answers, "none")]

    def extract(self, items: Sequence[Item]) -> Features:
        """Return features [N, D] in [0, 1].

        Raises:
            BadItem: an item is no text or an empty one.
            Unavailable: the engine failed to answer.
        """
        texts = texts_of(items)
        asked = [(index, question) for index in range(len(texts)) for question in self.questions]
        prompts = [self._prompt(texts[index], question) for index, question in asked]
        answers = self.engine.generate(prompts, self.sampling)
        shares: list[list[float]] = [[] for _ in texts]
        for (index, question), completions in zip(asked, answers, strict=True):
            shares[index] += self._shares(question, completions, index, texts[index])
        return np.array(shares, np.float32).reshape(len(texts), self.dimensions)

    def _prompt(self, item: str, question: Question) -> Prompt:
        text = _PROMPT.format(item=item, text=question.text, answers=", ".join(question.answers))
        return Prompt((Message(role="user", content=text),))

    def _shares(self, question: Question, completions: Sequence[Completion], index: int, text: str) -> list[float]:
        counts = [0] * (len(question.answers) + 1)
        for completion in completions:
            if completion.error is not None:  # not the answer "none": it would be cached as one
                raise Unavailable(
                    f"{self.engine.model} did not answer {question.text!r} for item {index + 1}: {completion.error}; "
                    "look at the engine and run again, what was answered is in the cache"
                )
            counts[answer_place(completion.text, question.answers)] += 1
        if not completions:
            raise BadItem(index, f"{self.engine.model} gave no answer to {question.text!r}", text)
        return [count / len(completions) for count in counts]


def answer_place(text: str, answers: Sequence[str]) -> int:
    """Return which answer a text begins with, whatever its case and quotes; `len(answers)` when it is none.

    Of two answers of which one begins with the other ("no", "no idea") the longer is tried first.
    """
    for place in sorted(range(len(answers)), key=lambda place: -len(answers[place])):
        if re.match(rf"\W*{re.escape(answers[place].strip())}(?!\w)", text, re.IGNORECASE):
            return place
    return len(answers)
