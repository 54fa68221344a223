"""What flows through the learn half: messages, tasks, episodes and scores."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ascent.records.record import Record

Role = Literal["system", "user", "assistant", "tool"]


class Message(Record):
    """One chat turn."""

    role: Role
    content: str


class Task(Record):
    """One item to solve: what goes in, what should come out, and what it belongs to.

    `input` is the raw row of the use case, `messages` the conversation that a model sees (rendered from `input` by
    the use case's prompt). `group` is the cluster for splits and clustered statistics (a drug, a patient, a document).
    """

    id: str
    input: dict[str, Any] = Field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    expected: dict[str, Any] | None = None
    group: str | None = None


class Unscored(StrEnum):
    """Why a grader gave no value. Only `not_applicable` is harmless; the rest are counted and shown."""

    not_applicable = "not_applicable"
    timeout = "timeout"
    crash = "crash"
    error = "error"
    no_output = "no_output"


class Score(Record):
    """A grader's word on one episode: a value, or *unscored* with the cause. A time-out is never a wrong answer."""

    name: str
    value: float | None = None
    label: str | None = None
    reason: str = ""
    unscored: Unscored | None = None

    @model_validator(mode="after")
    def _value_or_cause(self) -> Self:
        if (self.value is None) == (self.unscored is None):
            raise ValueError("a score has either a value or a cause for being unscored")
        return self


class FinishReason(StrEnum):
    """Why sampling stopped."""

    stop = "stop"
    length = "length"
    error = "error"


class Episode(Record):
    """One attempt at a task, as tokens: what training and evaluation both read.

    `token_ids` is prompt + completion, captured once at sampling and never re-tokenised; `loss_mask[i]` is True where
    token i was produced by the policy; `logps[i]` is its log-probability under the sampler at sampling temperature
    (0.0 where the mask is False). All three have the same length. `confidence` is the probability of the least certain
    token of the answer, None where the engine gave no log-probs; `doubtful`: it lies below the model's threshold.
    """

    task_id: str
    model: str
    messages: tuple[Message, ...]
    text: str
    output: Any = None
    token_ids: tuple[int, ...] = ()
    loss_mask: tuple[bool, ...] = ()
    logps: tuple[float, ...] = ()
    finish: FinishReason = FinishReason.stop
    confidence: float | None = None
    doubtful: bool = False
    scores: tuple[Score, ...] = ()
    sample: int = 0
    error: str | None = None

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if not len(self.token_ids) == len(self.loss_mask) == len(self.logps):
            raise ValueError("token_ids, loss_mask and logps must have one entry per token")
        return self

    def score(self, name: str) -> Score | None:
        """Return the score of that name, if the episode has been graded by it."""
        return next((score for score in self.scores if score.name == name), None)

    @property
    def completion_tokens(self) -> int:
        """Number of tokens the policy produced."""
        return sum(self.loss_mask)


class Preference(Record):
    """A chosen and a rejected answer to the same prompt.

    `input` is the raw input behind `messages`, and `group` what it belongs to, as in `Task`.
    """

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    input: dict[str, Any] = Field(default_factory=dict)
    group: str | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    source: Literal["data", "samples"] = "data"


class Feedback(Record):
    """One answer that was found good or bad, without another to compare it with (a thumb up or down)."""

    id: str
    messages: tuple[Message, ...]
    answer: str
    good: bool
    input: dict[str, Any] = Field(default_factory=dict)
    group: str | None = None
