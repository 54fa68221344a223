"""`ascent doctor`: every finding, forced where the machine does not show it by itself."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from ascent.cli.main import run
from ascent.inference import doctor, machine
from ascent.inference.store import Store


def test_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "home"))
    code = run(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    levels = {line.split()[1]: line.split()[0] for line in lines if not line.startswith(" ")}
    assert set(levels) >= {
        "python",
        "torch",
        "threads",
        "memory",
        "store",
        "disk",
        "model",
        "pip",
        "accelerator",
        "speed",
    }
    assert set(levels.values()) <= {"ok", "warn", "fail"}
    assert code == ("fail" in levels.values())
    assert levels["model"] == "warn"
    assert "ascent models pull smollm2-135m-instruct" in "\n".join(lines)


def test_every_objection_has_a_remedy(tmp_path: Path) -> None:
    for check in doctor.examine(Store(tmp_path), seconds=0.02):
        assert check.level == "ok" or check.remedy, check


def test_speed_is_that_of_the_machine() -> None:
    """Twice the time gives the same rate, within a factor that a busy machine may cause."""
    import torch

    one, two = doctor._rate(torch.float32, 0.1), doctor._rate(torch.float32, 0.2)
    assert 0.2 < one / two < 5
    assert one > 1e8


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    check = doctor.check_store(Store(tmp_path / "file" / "home"))
    assert check.level == "fail"
    assert "ASCENT_HOME" in check.remedy


@pytest.mark.parametrize(("free", "level"), [(1e9, "fail"), (4e9, "warn"), (50e9, "ok")])
def test_memory_and_disk_thresholds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, level: str) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: machine.Machine(4, int(64e9), int(free)))
    assert doctor.check_memory().level == level
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("Usage", (), {"free": free})())
    assert doctor.check_disk(Store(tmp_path)).level == level


@pytest.mark.parametrize(("threads", "level"), [("1", "warn"), ("4", "ok"), ("64", "warn"), ("", "ok")])
def test_threads(monkeypatch: pytest.MonkeyPatch, threads: str, level: str) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: machine.Machine(4, 1, 1))
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert doctor.check_threads().level == level


def test_missing_extras_come_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The declared extras of the installed package, with one package of `dev` hidden, then with all of them hidden."""
    real = importlib.metadata.version
    wanted = {"ruff", "mypy", "pytest"}

    def version(name: str) -> str:
        if name in wanted:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    dev = next(check for check in doctor.check_extras() if check.name == "extra dev")
    assert dev.level == "warn"
    assert all(name in dev.found for name in wanted)
    assert dev.remedy == doctor.install_line("dev")
    assert dev.remedy.startswith(f"{sys.executable} -m pip install")
    assert dev.remedy.rstrip("'").endswith("[dev]")


def test_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rest of the examination goes on without it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {check.name: check for check in doctor.examine(Store(tmp_path), seconds=0.02)}
    assert found["torch"].level == "fail"
    assert "pip install" in found["torch"].remedy
    assert "speed" not in found
    assert "disk" in found


def test_kernels_that_only_lack_a_compiler_come_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascent.inference import native

    for problem, level in (("", "ok"), ("there is no gcc", "warn"), ("switched off by ASCENT_NATIVE=0", "ok")):
        monkeypatch.setattr(native, "problem", lambda problem=problem: problem)
        check = doctor.check_kernels()
        assert (check.level, problem in check.found) == (level, True)
        assert ("install gcc" in check.remedy) == (level == "warn")
