"""Sampling one step ahead: it runs beside the update, is corrected for its staleness, and resumes bit for bit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from laws.helpers import Stopped, metrics, run_recipe, write_use_case
from safetensors.torch import load_file

from ascent.customize.loops import online
from ascent.customize.loops.ahead import Rollouts
from ascent.customize.objectives.rows import row_with
from ascent.customize.trainer import Trainer
from ascent.records.errors import BadInput

AHEAD = "{axes: {lookahead: 1, correction: truncate, kl: 0.0}}"
ADAPTER = "model/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def use_case(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_use_case(tmp_path_factory.mktemp("ahead"), tiny_model)


def test_the_next_rollout_is_sampled_while_the_policy_trains(
    use_case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No update but the last rollout's goes on before the rollout after it has begun in another thread."""
    begun = threading.Semaphore(0)
    main = threading.current_thread()
    collect, update = online.collect_groups, Trainer.update
    updates = []

    def watched(*arguments: Any) -> Any:
        if threading.current_thread() is not main:
            begun.release()
        return collect(*arguments)

    def waits(self: Trainer, *arguments: Any, **more: Any) -> dict[str, float]:
        updates.append(self.step)
        if self.step % 2 == 0 and self.step < 10:  # twelve steps, two updates a rollout
            assert begun.acquire(timeout=30), "the next rollout did not begin beside the update"
        return update(self, *arguments, **more)

    monkeypatch.setattr(online, "collect_groups", watched)
    monkeypatch.setattr(Trainer, "update", waits)
    run_recipe(use_case, "grpo", tmp_path, extra=AHEAD)
    assert updates == list(range(12))
    assert not begun.acquire(blocking=False), "one rollout each, none after the last"


def test_only_the_first_rollout_is_on_policy(use_case: Path, tmp_path: Path) -> None:
    """What sampler and trainer disagree about is rounding in the first rollout and an update in all others."""
    run_recipe(use_case, "grpo", tmp_path, extra=AHEAD)
    apart = [float(row["mismatch_kl"]) for row in metrics(tmp_path)[::2]]  # type: ignore[arg-type]
    assert abs(apart[0]) < 1e-8
    assert all(value > 1e3 * apart[0] for value in apart[1:]), apart


@pytest.mark.parametrize("stop_at", [5, 9])
def test_a_run_that_samples_ahead_resumes_bit_for_bit(use_case: Path, tmp_path: Path, stop_at: int) -> None:
    """The rollout under way rests in the checkpoint: the policy that sampled it is gone."""
    run_recipe(use_case, "grpo", tmp_path / "whole", extra=AHEAD)
    with pytest.raises(Stopped):
        run_recipe(use_case, "grpo", tmp_path / "cut", extra=AHEAD, stop_at=stop_at)
    assert (tmp_path / "cut" / "checkpoint").is_dir()
    run_recipe(use_case, "grpo", tmp_path / "cut", extra=AHEAD)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "cut"))
    assert all(tensor.equal(cut[name]) for name, tensor in whole.items())


def test_staleness_wants_a_correction() -> None:
    with pytest.raises(BadInput, match=r"row grpo, axis lookahead.*set correction"):
        row_with("grpo", {"lookahead": 1})


def test_an_error_while_sampling_ahead_ends_the_run(
    use_case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    collect = online.collect_groups

    def third_fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise BadInput("the grader is gone")
        return collect(*arguments)

    monkeypatch.setattr(online, "collect_groups", third_fails)
    with pytest.raises(BadInput, match="the grader is gone"):
        run_recipe(use_case, "grpo", tmp_path, extra=AHEAD)


def test_rollouts_without_lookahead_are_sampled_when_asked_for() -> None:
    class Run:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {}

    said: list[str] = []

    def collect() -> Any:
        said.append("sample")
        return [], {}

    with Rollouts(collect, lambda: said.append("synchronise"), Run(), ahead=False) as rollouts:  # type: ignore[arg-type]
        for _ in range(2):
            rollouts.next(last=False)
            said.append("train")
    assert said == ["synchronise", "sample", "train"] * 2
