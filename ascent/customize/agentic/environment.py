"""The environment contract: what a model acts in. One object serves one episode, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ascent.customize.agentic.tools import Tools
from ascent.inference.calls import parse_calls
from ascent.records import Message, Task


@dataclass(frozen=True)
class Step:
    """What follows an assistant turn: messages for the model, whether the episode is over, and perhaps a score.

    A score becomes the episode's score named `environment`. Messages of a step that ends the episode are not shown
    to anyone.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    score: float | None = None


@runtime_checkable
class Environment(Protocol):
    """One episode's world. Whatever a method raises costs this episode and no other.

    An environment that draws from `random` draws the same numbers for all samples of a task in one rollout, so
    that a group's episodes start alike.
    """

    def reset(self, task: Task) -> Sequence[Message]:
        """Return the conversation that the model sees first, usually `task.messages`."""
        ...

    def step(self, text: str) -> Step:
        """Take the assistant's turn, without its end token."""
        ...


class ToolEnvironment:
    """An environment of tools: calls are answered, a turn without a call is the final answer.

    Subclass it, or make a function that returns one; `tools` may close over the state of the episode.
    """

    def __init__(self, tools: Tools) -> None:
        """Take the tools that a turn may call."""
        self.tools = tools

    def reset(self, task: Task) -> Sequence[Message]:
        """Return the task's own messages."""
        return task.messages

    def step(self, text: str) -> Step:
        """Run the turn's calls in order, one message each, or end the episode."""
        calls = parse_calls(text)
        return Step(
            tuple(Message(role="tool", content=self.tools.run(call)) for call in calls),
            done=not calls,
        )
