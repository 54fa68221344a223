"""A training run on disk: steps that resume, checkpoint, log, and stop cleanly on Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ascent.customize import parallel
from ascent.customize.trainer import Trainer
from ascent.observe.metrics import MetricLog
from ascent.records.errors import BadInput, Interrupted

StepReport = Callable[[int, int, dict[str, float]], None]
Keep = Callable[[Trainer, Path], None]
"""Writes the model as it is now into a folder."""
CHECKPOINT, KEPT = "checkpoint", "steps"


class TrainingRun:
    """Drives a trainer through its steps; of processes that train together the first one writes.

    `state` is the loop's own JSON state and rests in every checkpoint.

    Checkpoints fall on multiples of `boundary` only: the updates that share one rollout are resumed together. A
    checkpoint is resumed only under the `identity` that wrote it, so that no run is half one recipe, half another.

    `origin` rests in every checkpoint and says what to load its tensors into. After every `keep_every` steps but the
    last, `keep` writes the model into `steps/<step>/model`; this changes nothing of the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        checkpoint_every: int,
        boundary: int = 1,
        identity: str = "",
        origin: dict[str, Any] | None = None,
        keep_every: int | None = None,
        keep: Keep | None = None,
        report: StepReport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.report, self._clock = folder, report, clock
        self.checkpoint_every, self.boundary, self.identity = checkpoint_every, boundary, identity
        self.origin, self.keep_every, self.keep = origin, keep_every, keep
        self.state: dict[str, Any] = {}
        self.before_checkpoint: Callable[[], None] = lambda: None
        self.seconds = 0.0
        self.tokens = 0
        self.last: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.writes = parallel.rank() == 0
        self._metrics = MetricLog(folder / "metrics.jsonl")

    @property
    def checkpoint(self) -> Path:
        """Where the latest checkpoint lies."""
        return self.folder / CHECKPOINT

    def steps(self, trainer: Trainer) -> Iterator[int]:
        """Yield the steps still to do; after each, log it, and checkpoint when due.

        Raises:
            BadInput: the checkpoint was written by another run.
            Interrupted: Ctrl-C was pressed; the finished step is in the checkpoint.
        """
        extra = trainer.load(self.checkpoint)
        if extra is not None:
            if extra["identity"] != self.identity:
                raise BadInput(
                    f"{self.checkpoint} was written under another recipe or other data; undo the change to go on with "
                    f"that run, or start this one in another folder"
                )
            self.state, self.last = extra["state"], extra["last"]
            self.seconds, self.tokens = extra["seconds"], extra["tokens"]
        if self.writes:
            self._metrics.truncate_after(trainer.step)
        since = 0
        with interrupt_flag() as interrupted:
            while trainer.step < trainer.total_steps and not self.state.get("ended"):
                started = self._clock()
                yield trainer.step
                self.seconds += self._clock() - started
                done = trainer.step >= trainer.total_steps or bool(self.state.get("ended"))
                whole = done or trainer.step % self.boundary == 0
                stop = parallel.agreed(interrupted())
                since += 1
                due = self.keep_every and not done and trainer.step % self.keep_every == 0
                if self.keep and self.writes and due:
                    # before the checkpoint, so that a run that is killed here does the step and this again
                    self.keep(trainer, self.folder / KEPT / f"{trainer.step:06}" / "model")
                if whole and (done or stop or since >= self.checkpoint_every):
                    since = 0
                    self.before_checkpoint()
                    self._metrics.close()
                    trainer.save(self.checkpoint, self._extra())
                if stop and whole and not done:
                    raise Interrupted(
                        f"stopped after step {trainer.step} of {trainer.total_steps}; the checkpoint is in "
                        f"{self.checkpoint}. Run the same command with --resume to go on"
                    )
        self._metrics.close()

    def _extra(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "origin": self.origin,
            "state": self.state,
            "last": self.last,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }

    def log(self, step: int, total: int, tokens: int, metrics: dict[str, float]) -> None:
        """Record one finished step (1-based in the log)."""
        self.tokens += tokens
        self.last = metrics
        if not self.writes:
            return
        self._metrics.append(step + 1, {"tokens": tokens, "seconds": round(self.seconds, 3), **metrics})
        if self.report:
            self.report(step + 1, total, {"tokens": float(tokens), **metrics})


@contextlib.contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads between steps; a second one interrupts at once."""
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: signals cannot be caught here
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)
