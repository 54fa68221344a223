"""Multi-turn episodes with tools: many at once, in lock step, token in and token out.

In every turn all live episodes are sampled in one call of the engine, then all their environments step. Turn k + 1
continues from the very tokens of turn k (`Prompt.token_ids`); what the environment says and what the chat template adds
is masked from the loss, what was sampled, end tokens included, is not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from ascent.customize.agentic.harness import Attempts, OnGroup
from ascent.customize.agentic.processes import Answer, Lost, Processes, Question, Seat
from ascent.evaluate.graders import as_score
from ascent.inference.engine import Completion, Engine, Prompt, Sampling
from ascent.records import Episode, FinishReason, Message, Task
from ascent.records.errors import BadInput

PARALLEL = 8  # environments that step at the same time
AT_ONCE = 256  # live episodes: each is a process and an open file
REFILLS = 2


def harness_of(
    program: Path | str, environment: str, max_turns: int = 4, step_seconds: float = 2.0, *, refills: int = REFILLS
) -> MultiTurn:
    """Return the harness that a recipe's `harness: {program, environment, max_turns, step_seconds}` names.

    Raises:
        BadInput: a number is out of range, the program does not load, or it has no such environment.
    """
    harness = MultiTurn(program, environment, max_turns=max_turns, step_seconds=step_seconds, refills=refills)
    harness.start()
    return harness


class MultiTurn:
    """Runs episodes of a program's environment, see `Environment`.

    An episode ends when its environment says so, after `max_turns` assistant turns, or when the context is full; in the
    latter two cases it finishes with `length`. One whose environment hangs, crashes, floods or fails, or whose engine
    fails, is lost: it is started again from the beginning, with new random numbers, up to `refills` times. The same
    seed gives the same episodes, whatever other tasks run beside them.

    `program` is a Python file; its `environment` is a class or function without arguments that returns an
    `Environment`. It is loaded once, in another process, and each episode gets a fork of that.
    """

    def __init__(
        self,
        program: Path | str,
        environment: str,
        *,
        max_turns: int = 4,
        step_seconds: float = 2.0,
        refills: int = REFILLS,
        parallel: int = PARALLEL,
        at_once: int = AT_ONCE,
    ) -> None:
        """Describe the harness; its processes start with the first run, or with `start`."""
        if max_turns < 1 or refills < 0 or at_once < 1:
            raise BadInput(f"max_turns and at_once are at least 1, refills 0; got {max_turns}, {at_once}, {refills}")
        self.max_turns, self.refills, self.at_once = max_turns, refills, at_once
        self._processes = Processes(Path(program), environment, step_seconds=step_seconds, parallel=parallel)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Load the program. Raises `BadInput` when that fails, or when it has no such environment."""
        self._processes.start()

    def close(self) -> None:
        """End all processes. A later run starts them again."""
        self._processes.close()

    def run(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Attempts]:
        """Return `sampling.n` episodes per task, in task order."""
        slots, seen = [], dict.fromkeys((task.id for task in tasks), 0)
        for task in tasks:
            occurrence = seen[task.id]  # a task drawn twice in one call is two groups
            seen[task.id] += 1
            slots += [_Slot(task, sample, f"{sampling.seed}:{task.id}:{occurrence}") for sample in range(sampling.n)]
        groups = [slots[begin : begin + sampling.n] for begin in range(0, len(slots), sampling.n)]
        found: dict[int, Attempts] = {}

        def settle() -> None:
            for index in range(len(groups)):
                if index not in found and all(slot.ended and not self._again(slot) for slot in groups[index]):
                    found[index] = _attempts(groups[index], engine.model)
                    if on_group is not None:
                        on_group(index, found[index])

        try:
            for begin in range(0, len(slots), self.at_once):
                self._run(engine, slots[begin : begin + self.at_once], replace(sampling, n=1), on_done, settle)
        finally:
            for slot in slots:
                if slot.seat is not None:
                    self._processes.end(slot.seat)
        return [found[index] for index in range(len(groups))]

    def _run(
        self,
        engine: Engine,
        slots: Sequence[_Slot],
        sampling: Sampling,
        on_done: Callable[[int], None] | None,
        settle: Callable[[], None],
    ) -> None:
        live = self._reset(slots)
        finished = len(slots) - len(live)
        settle()
        while live or finished:
            if on_done is not None and finished:
                on_done(finished)
            completions = engine.generate([slot.prompt() for slot in live], sampling) if live else []
            for slot, (completion,) in zip(live, completions, strict=True):
                slot.hear(completion)
            acting = [slot for slot in live if not slot.ended]
            answers = self._processes.ask([Question(slot.seat, slot.task, 0, slot.text) for slot in acting])
            for slot, answer in zip(acting, answers, strict=True):
                slot.see(answer, self.max_turns)
            ended = [slot for slot in live if slot.ended]
            self._vacate(ended)
            left = [slot for slot in live if not slot.ended] + self._reset([s for s in ended if self._again(s)])
            live, finished = left, len(live) - len(left)
            settle()

    def _again(self, slot: _Slot) -> bool:
        return slot.error is not None and slot.lost <= self.refills

    def _reset(self, slots: Sequence[_Slot]) -> list[_Slot]:
        """Begin the episodes, again where that fails and may be tried again; return those that live."""
        alive = []
        while slots:
            for slot in slots:
                slot.begin()
            answers = self._processes.ask([Question(None, slot.task, slot.seed("world")) for slot in slots])
            for slot, answer in zip(slots, answers, strict=True):
                slot.greet(answer)
            alive += [slot for slot in slots if not slot.ended]
            slots = [slot for slot in slots if self._again(slot)]
        return alive

    def _vacate(self, slots: Sequence[_Slot]) -> None:
        for slot in slots:
            if slot.seat is not None:
                self._processes.end(slot.seat)
                slot.seat = None


def _attempts(slots: Sequence[_Slot], model: str) -> Attempts:
    return Attempts(
        tuple(slot.episode(model) for slot in slots),
        lost=sum(slot.lost for slot in slots),
        refilled=sum(slot.lost > 0 and slot.error is None for slot in slots),
    )


@dataclass
class _Slot:
    """The place of one episode in a run, and the attempt that holds it now."""

    task: Task
    sample: int
    stream: str
    lost: int = 0
    seat: Seat | None = None
    messages: list[Message] = field(default_factory=list)
    said_at: int = 0  # where the last assistant turn stands in `messages`
    token_ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()
    logps: tuple[float, ...] = ()
    turn: int = 0
    confidence: float | None = None
    finish: FinishReason = FinishReason.stop
    score: float | None = None
    over: bool = False
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.over or self.error is not None

    @property
    def text(self) -> str:
        """The assistant's last turn."""
        return self.messages[self.said_at].content if self.turn else ""

    def seed(self, *purpose: object) -> int:
        """A seed of its own for each purpose; "world" is the same for all samples of a task."""
        text = ":".join(map(str, (self.stream, *purpose)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])

    def begin(self) -> None:
        """Forget the attempt before."""
        fresh = _Slot(self.task, self.sample, self.stream, self.lost)
        vars(self).update(vars(fresh))

    def greet(self, answer: Answer) -> None:
        """Take what the environment's reset answered."""
        if isinstance(answer, Lost):
            self.lose(answer.reason)
        else:
            self.seat, step = answer
            self.messages = list(step.messages)

    def prompt(self) -> Prompt:
        """The next turn's prompt, which draws from a stream of its own."""
        return Prompt(tuple(self.messages), self.token_ids, self.seed(self.sample, self.lost, self.turn))

    def hear(self, completion: Completion) -> None:
        """Take the assistant's turn: its text, and its tokens if they continue those that were there before."""
        if completion.finish is FinishReason.error:
            self.lose(completion.error or "sampling failed")
            return
        if self.turn and completion.finish is FinishReason.length and not (completion.token_ids or completion.text):
            self.over, self.finish = True, FinishReason.length  # the context is full
            return
        fed, sampled, known = completion.prompt_ids, completion.token_ids, len(self.token_ids)
        continues = fed[:known] == self.token_ids and (known > 0 or self.turn == 0)
        if continues and len(completion.logps) == len(sampled) > 0:
            glue = len(fed) - known
            self.token_ids = fed + sampled
            self.mask += (False,) * glue + (True,) * len(sampled)
            self.logps += (0.0,) * glue + completion.logps
            self.confidence = math.exp(min(completion.logps))
        else:
            self.token_ids, self.mask, self.logps, self.confidence = (), (), (), None
        self.turn += 1
        self.finish = completion.finish
        self.said_at = len(self.messages)
        self.messages.append(Message(role="assistant", content=completion.text.encode("utf-8", "replace").decode()))

    def see(self, answer: Answer, max_turns: int) -> None:
        """Take what the environment's step answered."""
        if isinstance(answer, Lost):
            self.seat = None
            self.lose(answer.reason)
            return
        step = answer[1]
        self.score = step.score if step.score is not None else self.score
        self.messages += () if step.done else step.messages
        self.over = step.done or self.turn == max_turns
        if not step.done and self.over:
            self.finish = FinishReason.length

    def lose(self, reason: str) -> None:
        """Count the attempt as lost."""
        self.lost += 1
        self.error = reason

    def episode(self, model: str) -> Episode:
        """What came of it; what the environment scored before the episode was lost does not count."""
        scores = () if self.score is None or self.error is not None else (as_score("environment", self.score),)
        return Episode(
            task_id=self.task.id,
            model=model,
            messages=tuple(self.messages[: self.said_at] if self.turn else self.messages),
            text=self.text,
            token_ids=self.token_ids,
            loss_mask=self.mask,
            logps=self.logps,
            finish=FinishReason.error if self.error is not None else self.finish,
            confidence=self.confidence,
            scores=scores,
            sample=self.sample,
            error=self.error,
        )
