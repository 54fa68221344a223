"""What the protocols share: a conversation in, deltas out, whatever the wire looks like."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ascent.records.errors import BadInput, Unavailable

Finished = Literal["stop", "length", "tool", "stop_sequence", "timeout", "cancelled"]


class ContextOverflow(BadInput):
    """A prompt that does not fit into the model's context, alone or together with `max_tokens`.

    Its message begins as Amazon Bedrock's does, because agent frameworks look for those words and shorten the history.
    """

    def __init__(self, prompt: int, asked: int, context: int) -> None:
        self.prompt, self.asked, self.context = prompt, asked, context
        super().__init__(
            f"Input is too long for requested model: the prompt has {prompt} tokens and {asked} more were asked for, "
            f"the context holds {context}; shorten the conversation or lower the limit of new tokens"
        )


class ModelFailed(Unavailable):
    """A model behind another server answered with an error, or broke off; `status` is its HTTP status, if any."""

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class ToolSpec:
    """A tool the model may call; `schema` is the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    schema: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolUse:
    """A call the assistant made in an earlier turn."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolResult:
    """What a call was answered; `id` is the call's."""

    id: str
    text: str
    error: bool = False


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. Calls belong to the assistant, results to the user."""

    role: Literal["system", "user", "assistant"]
    text: str = ""
    reasoning: str = ""
    tool_uses: tuple[ToolUse, ...] = ()
    tool_results: tuple[ToolResult, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """A conversation and how to go on with it.

    Attributes:
        turns: the conversation; empty for `complete`, which takes text.
        tools: what may be called.
        tool_choice: `auto`, `any` (some tool must be called), `none`, or the name of the tool that must be called.
        max_tokens: the most new tokens; None is what the context leaves.
        temperature, top_p: as in `Sampling`; temperature 0 is greedy.
        stop: texts that end the answer and do not appear in it.
        seed: makes the answer repeatable.
        schema: a JSON schema that the answer must fit.
        regex: a regular expression that the whole answer must match, instead of a schema.
        logprobs: put the tokens of the text into `Text.tokens`, each with the `top_logprobs` likeliest.
        parallel: allow several tool calls in one answer.
        deadline_s: the longest this may take, waiting included.
        meter: told what the answer used when it ends, also one that is left or fails half-way.
        tenant: what was computed of a prompt is used again for the same tenant only.
    """

    turns: tuple[Turn, ...] = ()
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: str = "auto"
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: dict[str, Any] | None = None
    regex: str | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    parallel: bool = True
    deadline_s: float | None = None
    meter: Callable[[Usage], None] | None = field(default=None, compare=False)
    tenant: str = ""


@dataclass(frozen=True)
class TextToken:
    """A token of a text with its log-probability, and the likeliest at its place as (text, log-probability)."""

    text: str
    logp: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Text:
    """More of the answer; `tokens` are those read since the last `Text`, where they were asked for."""

    text: str
    tokens: tuple[TextToken, ...] = ()


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolStart:
    """A call begins; `index` counts the answer's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, of the answer, and how many of the prompt's were found computed."""

    prompt: int
    completion: int
    cached: int = 0


@dataclass(frozen=True)
class Finish:
    """The last delta: why the answer ended, what it used, and how long it took."""

    reason: Finished
    usage: Usage
    first_token_s: float | None = None
    seconds: float = 0.0
    stop_sequence: str | None = None


Delta = Text | Reasoning | ToolStart | ToolArguments | Finish


class ChatModel(Protocol):
    """Anything that answers. Closing an iterator of deltas cancels its request.

    Both raise `BadInput` for a request that cannot be served, `Busy` when too much is waiting, `Unavailable` when the
    model cannot be reached; all before the first delta, except that a server behind this one may break off later.
    """

    id: str

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together; 0 where that is not known."""
        ...

    def chat(self, request: ChatRequest) -> AsyncIterator[Delta]:
        """Answer a conversation; the last delta is a `Finish`."""
        ...

    def complete(self, prompt: str, request: ChatRequest) -> AsyncIterator[Delta]:
        """Go on with a text as it is, without a chat template."""
        ...

    def count(self, request: ChatRequest) -> int:
        """Return the number of tokens of a conversation as this model reads it."""
        ...


@dataclass(frozen=True)
class CallRecord:
    """One finished call, for metrics and the ledger. Times in seconds; `status` is `ok` or an error's type."""

    owner: str
    key_id: str
    model: str
    deployment: str
    operation: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seconds: float
    first_token_s: float | None
    status: str
