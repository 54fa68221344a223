"""The engine signature: prompts and sampling settings in, completions with token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ascent.records import FinishReason, Message


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends where the assistant is to speak.

    `token_ids` continue one that was fed and sampled before: they are all its tokens up to the end of the assistant's
    last turn, and the engine adds only the tokens of the messages since then, so that nothing sampled is ever tokenised
    again. Without a message since then they are the whole prompt. Engines that take text alone send `messages`.

    With a `seed` of its own a prompt draws the same tokens in whatever call and at whatever place it stands; it then
    takes the place of the call's seed.
    """

    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    `temperature` 0 means greedy. `top_p` 1 keeps the whole distribution, which reinforcement learning needs so that
    the trainer's and the sampler's log-probs speak of the same distribution. The same `seed` gives the same tokens
    whatever the batch; sample k of prompt i draws from its own stream.
    """

    n: int = 1
    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(f"n and max_tokens must be at least 1, got {self.n} and {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}")


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    `token_ids` are the sampled ids, the end token included when one was sampled; `logps[i]` is the log-probability of
    token i under the model at the sampling temperature, before any `top_p` cut. `text` has no end token and no stop
    string. A continued prompt that leaves no room in the model's context gets an empty completion of finish `length`.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    finish: FinishReason = FinishReason.stop
    prompt_ids: tuple[int, ...] = ()
    error: str | None = None


@runtime_checkable
class Engine(Protocol):
    """Anything that answers prompts. `model` names what answers and goes into every report."""

    model: str

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Return `sampling.n` completions per prompt, in prompt order.

        `on_done` hears of each finished sample; `on_group` gets each prompt's place and completions as soon as they are
        all there, while others are still sampled.
        """
        ...
