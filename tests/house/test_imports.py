"""Imports: rooms downwards only, and nothing heavy where a user is waiting."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from house.source import ROOT

from ascent.cli.main import COMMANDS

BIN = Path(sys.executable).parent
HEAVY = ("torch", "transformers", "datasets", "scipy", "numpy", "pandas", "peft")
HELP_S = 0.5
LIGHT = (
    "import ascent",
    "import ascent.records",
    "import ascent.observe",
    "import ascent.ladder.gates",
    "import ascent.ladder.usecase",
    "import ascent.ladder.report",
    "import ascent.ladder.climb",
    "import ascent.inference.store",
    "import ascent.customize.agentic.environment",
    "import ascent.serve.wire",
    "import ascent.serve.keys",
    "import ascent.serve.app",
)
HELPS = (("--help",), *((name, "--help") for name in COMMANDS), ("models", "export", "--help"))


def test_rooms_import_downwards_only() -> None:
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("statement", LIGHT)
def test_light_parts_load_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement) == []


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    statement = f"from ascent.cli.main import run; assert run({list(arguments)}) == 0"
    assert loaded_by(statement, (*HEAVY, "pydantic", "rich", "yaml")) == []


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_is_quick(arguments: tuple[str, ...]) -> None:
    """Measured as computing time: what one waits on an idle machine, whatever else this one is doing."""
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([BIN / "ascent", *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < HELP_S, f"ascent {' '.join(arguments)} took {best:.2f} s; {HELP_S} s are allowed"


def loaded_by(statement: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    code = f"{statement}\nimport sys\nprint('\\n' + ' '.join(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()
