"""How commands end: exit codes, and one readable paragraph for every kind of failure."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from ascent.cli import main
from ascent.records.errors import BadData, BadInput, Interrupted


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Run a command that fails with `error` through the real command line."""

    @click.command("fails")
    def command() -> None:
        raise error

    module = ModuleType("ascent_test_command")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(main.COMMANDS, "fails", (module.__name__, "Fail."))
    return main.run(["fails"])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BadInput("the file is empty; give another"), 2, "the file is empty; give another"),
        (BadData("not a number", file="a.jsonl", line=3, field="dose"), 2, "a.jsonl:3 [dose]: not a number"),
        (Interrupted("stopped after step 3"), 130, "stopped after step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 2, "no space is left on the disk (x.bin)"),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), 2, "the system refuses access (x.bin)"),
        (MemoryError(), 2, "ran out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), 2, "token_budget"),
        (KeyError("dose"), 70, "KeyError: 'dose'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    assert ending(monkeypatch, error) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err.strip().splitlines()) == 1


def test_a_defect_shows_its_place_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASCENT_DEBUG", "1")
    assert ending(monkeypatch, KeyError("dose")) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert Path(__file__).name in shown


def test_a_typing_mistake_gets_the_nearest_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["climbb"]) == 2
    assert "did you mean 'climb'?" in capsys.readouterr().err


def test_usage_mistakes_are_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.run(["climb"]) == 2
    assert main.run(["climb", str(tmp_path / "absent")]) == 2
    assert main.run(["eval", str(tmp_path), "--model", "m"]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_folder_without_a_use_case_is_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.run(["advise", str(tmp_path)]) == 2
    assert "usecase.yaml" in capsys.readouterr().err


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out.split()[-1] == version("ascent-posttrain")


def test_the_installed_script_returns_the_code(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "ascent"
    environment = {**os.environ, "ASCENT_HOME": str(tmp_path)}
    done = subprocess.run(
        [script, "models", "show", "nothing"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ascent: unknown model 'nothing'")
