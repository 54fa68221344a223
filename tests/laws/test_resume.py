"""Laws of a training run on disk: it resumes bit for bit, survives any kill, and never leaves half a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from laws.helpers import LONG, RECIPES, Stopped, metrics, run_recipe, tiny_policy

from ascent.customize.objectives.rows import ROWS
from ascent.customize.policy import Policy
from ascent.customize.trainer import Optim, Trainer
from ascent.inference.lora import ALL_LINEAR, LoraConfig
from ascent.records.errors import BadInput, Corrupt, Interrupted

FULL = "{lora: null, precision: bf16}"


def stored(out: Path) -> tuple[bytes, dict]:
    """The tensors of a run's checkpoint (weights, moments, generator) and its state without the clock."""
    state = json.loads((out / "checkpoint" / "state.json").read_text())["state"]
    del state["extra"]["seconds"]
    return (out / "checkpoint" / "state.safetensors").read_bytes(), state


def model_files(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted((out / "model").rglob("*")) if f.is_file()}


def test_every_row_has_a_recipe_here() -> None:
    assert RECIPES.keys() == ROWS.keys()


@pytest.mark.parametrize(("name", "extra"), [*((name, "") for name in ROWS), ("sft", FULL), ("dpo", FULL)])
def test_stopping_and_resuming_equals_not_stopping(name: str, extra: str, use_case: Path, tmp_path: Path) -> None:
    """Weights, moments, generator, loop state and learning curve are the same bits after 8 and after all 12 steps."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    with pytest.raises(Stopped):
        run_recipe(use_case, name, straight, stop_at=9, extra=extra)
    for step in (6, 9):
        with pytest.raises(Stopped):
            run_recipe(use_case, name, broken, stop_at=step, extra=extra)
    assert stored(straight) == stored(broken)
    cards = [run_recipe(use_case, name, out, extra=extra) for out in (straight, broken)]
    assert metrics(straight) == metrics(broken)
    assert [row["step"] for row in metrics(broken)] == list(range(1, 13))
    assert model_files(straight) == model_files(broken)
    timeless = {"seconds", "peak_rss_mb", "created"}
    assert cards[0].model_dump(exclude=timeless) == cards[1].model_dump(exclude=timeless)
    assert cards[0].steps == 12
    assert cards[0].final


def child_environment(tests: Path) -> dict[str, str]:
    """The environment in which a child process finds what this one imports."""
    paths = os.pathsep.join([str(tests), *filter(None, sys.path)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def hunt(use_case: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `hunted.py` found, with the folder of its runs."""
    tests, out = Path(__file__).parents[1], tmp_path_factory.mktemp("hunt")
    environment = child_environment(tests)
    command = [sys.executable, str(tests / "laws" / "hunted.py"), str(use_case), str(tiny_model), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"out": out}


def test_a_run_killed_at_any_moment_ends_as_if_it_never_was(hunt: dict, use_case: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments; every checkpoint found is whole, and the end has the bits of an undisturbed run."""
    killed, straight, found = hunt["out"] / "kill", tmp_path / "straight", hunt["kill"]
    assert found["exit"] == 0
    assert len(found["steps"]) >= 6
    reached = [step or 0 for step in found["steps"]]
    assert reached == sorted(reached), "no kill may lose a checkpoint that was there"
    assert len(set(reached)) > 3, reached
    run_recipe(use_case, "sft", straight, extra=LONG)
    assert model_files(killed) == model_files(straight)
    assert metrics(killed) == metrics(straight)
    assert [row["step"] for row in metrics(killed)] == list(range(1, 61))
    assert sorted(os.listdir(killed)) == sorted(os.listdir(straight)), "kills may leave nothing behind"


def test_ctrl_c_finishes_the_rollout_and_writes_a_checkpoint(hunt: dict, use_case: Path, tmp_path: Path) -> None:
    out, found = hunt["out"] / "interrupt", hunt["interrupt"]
    assert found["exit"] == 130
    assert found["step"] == found["logged"]
    assert 4 <= found["step"] < 12
    assert found["step"] % 2 == 0, "a checkpoint between two updates of one rollout could not be resumed"
    assert run_recipe(use_case, "grpo", out, extra="{checkpoint_every: 100}").steps == 12
    straight = tmp_path / "straight"
    run_recipe(use_case, "grpo", straight, extra="{checkpoint_every: 100}")
    assert metrics(out) == metrics(straight)
    assert model_files(out) == model_files(straight)


@pytest.mark.parametrize(("pressed", "saved"), [(3, 4), (4, 4)])
def test_ctrl_c_between_two_updates_of_a_rollout_waits_for_the_second(
    use_case: Path, tmp_path: Path, pressed: int, saved: int
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped after step {saved} of 12.*--resume"):
        run_recipe(use_case, "grpo", tmp_path, interrupt_at=pressed, extra="{checkpoint_every: 100}")
    assert signal.getsignal(signal.SIGINT) is before
    assert stored(tmp_path)[1]["step"] == len(metrics(tmp_path)) == saved


@pytest.fixture
def halted(use_case: Path, tmp_path: Path) -> Path:
    """A run that broke off after its checkpoint at step 4."""
    with pytest.raises(Stopped):
        run_recipe(use_case, "sft", tmp_path / "run", stop_at=6)
    return tmp_path / "run"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def edit(file: Path) -> None:
    file.write_text(file.read_text().replace('"step": 4', '"step": 5'))


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (cut, "state.safetensors"),
        (flip, "state.safetensors"),
        (Path.unlink, "state.safetensors"),
        (cut, "state.json"),
        (edit, "state.json"),
        (Path.unlink, "state.json"),
        (lambda file: file.write_text("[]"), "state.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused(halted: Path, use_case: Path, damage, name: str) -> None:
    damage(halted / "checkpoint" / name)
    with pytest.raises(Corrupt, match="start again"):
        run_recipe(use_case, "sft", halted)
    shutil.rmtree(halted / "checkpoint")
    assert run_recipe(use_case, "sft", halted).steps == 12
    assert [row["step"] for row in metrics(halted)] == list(range(1, 13))


def test_a_checkpoint_of_another_recipe_is_refused(halted: Path, use_case: Path) -> None:
    with pytest.raises(BadInput, match="another recipe"):
        run_recipe(use_case, "sft", halted, extra="{seed: 4}")
    first = run_recipe(use_case, "sft", halted)
    with pytest.raises(BadInput, match="holds the finished run"):
        run_recipe(use_case, "sft", halted, extra="{seed: 4}")
    stamp = (halted / "model" / "model.safetensors").stat().st_mtime_ns
    assert run_recipe(use_case, "sft", halted) == first
    assert (halted / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_checkpoint_of_another_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_policy(tiny_model), Optim(lr=0.1), 3)
    trainer.save(tmp_path / "checkpoint", {})
    for targets in (("q_proj",), ALL_LINEAR):
        policy = Policy.load(tiny_model, "fp32", LoraConfig(4 if targets != ALL_LINEAR else 5, 8.0, targets))
        with pytest.raises(Corrupt, match="another model or recipe"):
            Trainer(policy, Optim(lr=0.1), 3).load(tmp_path / "checkpoint")


FILL = """
import json, sys
from pathlib import Path
from laws.helpers import Stopped, run_recipe
from ascent.records.errors import NoSpace

use_case, out = Path(sys.argv[1]), Path(sys.argv[2])
try:
    run_recipe(use_case, "sft", out, stop_at=6)
except Stopped:
    pass
before = {f.name: f.read_bytes() for f in (out / "checkpoint").iterdir()}
ballast = out.parent / "ballast"
with ballast.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
with ballast.open("rb+") as file:
    file.truncate(ballast.stat().st_size - int(sys.argv[3]))
raised = ""
try:
    run_recipe(use_case, "sft", out)
except NoSpace as error:
    raised = str(error)
after = {f.name: f.read_bytes() for f in (out / "checkpoint").iterdir()}
left = sorted(f.name for f in out.iterdir())
ballast.unlink()
card = run_recipe(use_case, "sft", out)
print(json.dumps({"raised": raised, "same": before == after, "left": left, "steps": card.steps}))
"""


def test_a_full_disk_leaves_the_old_checkpoint(use_case: Path, tmp_path: Path) -> None:
    """A real file system of 2 MB, filled up but for ten pages, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=2m tmpfs {disk}"
    if not shutil.which("unshare") or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces, so no small disk can be made")
    environment = child_environment(Path(__file__).parents[1])
    run = '"$0" -c "$1" "$2" "$3" "$4"'
    command = [*unshare, f"{mount} && {run}", sys.executable, FILL, str(use_case), str(disk / "run"), "40960"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "no space left" in found["raised"]
    assert found["same"]
    assert found["left"] == ["checkpoint", "metrics.jsonl"], "no half-written file may stay"
    assert found["steps"] == 12
