"""A process that forks training runs, kills one and interrupts another: `python hunted.py USE_CASE MODEL OUT`.

Forking after the imports makes an attempt cost tenths of a second instead of several. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from laws.helpers import LONG, metrics, run_recipe, tiny_policy

from ascent.cli.train import training_data
from ascent.customize.recipes import load_recipe
from ascent.customize.trainer import Optim, Trainer
from ascent.inference.chat import Renderer
from ascent.records.errors import Interrupted


def start(use_case: Path, name: str, out: Path, extra: str) -> int:
    """Fork a run; the child exits with 0 when it finished and with 130 when it was interrupted."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run_recipe(use_case, name, out, extra=extra)
        code = 0
    except Interrupted as stopped:
        code = stopped.exit_code
    finally:
        os._exit(code)


def wait_for_rows(out: Path, count: int) -> None:
    """Wait until a run's learning curve has that many rows."""
    log, until = out / "metrics.jsonl", time.monotonic() + 30
    while not (log.exists() and log.read_bytes().count(b"\n") >= count) and time.monotonic() < until:
        time.sleep(0.002)


def checked_step(model: Path, out: Path) -> int | None:
    """The step of the checkpoint as a resuming run would find it; raises when it is not whole."""
    trainer = Trainer(tiny_policy(model), Optim(lr=1.0), 1)
    return trainer.step if trainer.load(out / "checkpoint") is not None else None


def kill(use_case: Path, model: Path, out: Path) -> dict[str, object]:
    """Kill a run again and again at random moments until it gets through; check the checkpoint after every kill."""
    dice = random.Random(0)
    steps: list[int | None] = []
    for _ in range(60):
        child = start(use_case, "sft", out, LONG)
        if len(steps) < 8:
            if len(steps) % 2:  # every other kill hits a run that has done new steps, however slow the machine
                wait_for_rows(out, (steps[-1] or 0) + 1)
            time.sleep(dice.uniform(0, 0.06 if len(steps) % 2 else 0.3))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return {"exit": os.WEXITSTATUS(status), "steps": steps}
        steps.append(checked_step(model, out))
    return {"exit": None, "steps": steps}


def interrupt(use_case: Path, model: Path, out: Path) -> dict[str, object]:
    """Press Ctrl-C once the run has logged three steps of its twelve, in the middle of a rollout's two updates."""
    child = start(use_case, "grpo", out, "{checkpoint_every: 100}")
    wait_for_rows(out, 3)
    os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    return {"exit": os.WEXITSTATUS(status), "step": checked_step(model, out), "logged": len(metrics(out))}


if __name__ == "__main__":
    use_case, model, out = map(Path, sys.argv[1:])
    training_data(load_recipe(use_case / "sft.yaml"))  # what is imported on first use, imported once
    Renderer(model)
    found = {"kill": kill(use_case, model, out / "kill"), "interrupt": interrupt(use_case, model, out / "interrupt")}
    print(json.dumps(found))  # noqa: T201
