"""Processes that train together train the model that one process trains."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from laws.helpers import Stopped, metrics, run_recipe, write_use_case
from safetensors.torch import load_file

from ascent.cli.train import _train, training_data
from ascent.customize import parallel
from ascent.customize.recipes import load_recipe
from ascent.records.errors import AscentError, BadInput, UnknownName

ADAPTER = "model/adapter/adapter_model.safetensors"


def train_wide(use_case: Path, name: str, out: Path, processes: int = 2) -> None:
    recipe = load_recipe(use_case / f"{name}.yaml")
    parallel.launch(_train, (recipe, Path(recipe.model), training_data(recipe), out, None), processes)


@pytest.fixture(scope="module")
def use_case(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_use_case(tmp_path_factory.mktemp("parallel"), tiny_model)


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in metrics(out)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_two_processes_follow_the_curve_of_one(name: str, use_case: Path, tmp_path: Path) -> None:
    """Losses of all twelve steps and the adapter agree up to the order of sums, and one of two writes them."""
    run_recipe(use_case, name, tmp_path / "one")
    train_wide(use_case, name, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4, abs=1e-6)
    one, two = (load_file(tmp_path / width / ADAPTER) for width in ("one", "two"))
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-3 * max(t.abs().max() for t in one.values())


def test_samplers_share_the_prompts_and_graders_the_samples(use_case: Path, tmp_path: Path) -> None:
    """A row with a KL: three groups of four a step, each sampled by one of two processes, all known to both."""
    train_wide(use_case, "grpo", tmp_path)
    rows = metrics(tmp_path)
    assert len(rows) == 12
    assert all(row["prompts_drawn"] == 3 for row in rows)
    assert abs(float(rows[0]["mismatch_kl"])) < 1e-4  # type: ignore[arg-type]  # both samplers hold the policy


def test_a_run_goes_on_at_another_width(use_case: Path, tmp_path: Path) -> None:
    """Moments lie in shares in memory and whole in the checkpoint: twelve steps of one, or six and six of two."""
    run_recipe(use_case, "sft", tmp_path / "whole")
    with pytest.raises(Stopped):
        run_recipe(use_case, "sft", tmp_path / "cut", stop_at=7)
    state = json.loads((tmp_path / "cut" / "checkpoint" / "state.json").read_text())
    assert state["state"]["step"] == 4
    recipe = load_recipe(next(use_case.glob("sft?*.yaml")))
    parallel.launch(_train, (recipe, Path(recipe.model), training_data(recipe), tmp_path / "cut", None), 2)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4, abs=1e-6)


def _fail() -> None:
    """One of two processes gives up while the other waits for it."""
    if parallel.rank() == 1:
        raise BadInput("the second process has had enough")
    parallel.gathered(0)


def _die() -> None:
    if parallel.rank() == 1:
        signal.raise_signal(signal.SIGKILL)
    parallel.gathered(0)


def _unknown() -> None:
    """An error whose constructor asks for more than its message, which pickle alone could not build again."""
    if parallel.rank() == 1:
        raise UnknownName("grader", "letter", ["letters"])
    parallel.gathered(0)


@pytest.mark.parametrize(
    ("work", "said"), [(_fail, "has had enough"), (_die, "died"), (_unknown, "unknown grader 'letter'; did you mean")]
)
def test_an_error_of_one_process_ends_all(work: object, said: str) -> None:
    with pytest.raises(AscentError, match=said):
        parallel.launch(work, (), 2)  # type: ignore[arg-type]


def test_more_processes_than_cores_are_refused() -> None:
    with pytest.raises(BadInput, match="cores"):
        parallel.launch(_fail, (), 10_000)


def test_work_is_dealt_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every index once, and no process has more than the least loaded one by more than one piece."""
    monkeypatch.setattr(parallel, "width", lambda: 3)
    sizes = [7, 1, 5, 5, 3, 2, 8, 1]
    shares = parallel.share(sizes)
    assert sorted(index for indices in shares for index in indices) == list(range(8))
    load = [sum(sizes[index] for index in indices) for indices in shares]
    assert max(load) - min(load) <= 2
