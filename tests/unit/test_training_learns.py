"""Every row learns on the tiny model: the amounts below are what a broken loss, sign or mask would not reach."""

from __future__ import annotations

from pathlib import Path

import pytest
from laws.helpers import metrics, run_recipe

SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


def mean(rows: list[dict], name: str) -> float:
    values = [row[name] for row in rows if isinstance(row.get(name), float)]
    return sum(values) / len(values)


def ends(out: Path, name: str) -> tuple[float, float]:
    """Mean of a metric over the first and over the last five steps."""
    rows = metrics(out)
    return mean(rows[:5], name), mean(rows[-5:], name)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("training", "falls_below"), [("", 2.5), ("lora: null, ", 0.8)], ids=["lora", "full"])
def test_sft_learns_its_answers(use_case: Path, tmp_path: Path, training: str, falls_below: float, seed: int) -> None:
    run_recipe(use_case, "sft", tmp_path, extra=f"{{{training}epochs: 8, seed: {seed}}}")
    before, after = ends(tmp_path, "loss")
    assert before > 4
    assert after < falls_below


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("training", ["", "lora: null, optim: {lr: 1e-3}, "], ids=["lora", "full"])
def test_dpo_opens_the_margin_from_zero(use_case: Path, tmp_path: Path, training: str, seed: int) -> None:
    run_recipe(use_case, "dpo", tmp_path, extra=f"{{{training}epochs: 6, seed: {seed}}}")
    first = metrics(tmp_path)[0]
    assert first["margin"] == 0, "before the first update policy and reference are the same bits"
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert ends(tmp_path, "margin")[1] > 3
    assert ends(tmp_path, "accuracy")[1] == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "lr", "rises"), [("grpo", 1e-2, 0.15), ("dapo", 2e-2, 0.12)])
def test_rewards_rise(use_case: Path, tmp_path: Path, name: str, lr: float, rises: float, seed: int) -> None:
    """After a little sft the share of vowels in an answer rises; DAPO also learns to stop before its punishment."""
    run_recipe(use_case, "sft", tmp_path / "sft", extra=f"{{epochs: 8, seed: {seed}}}")
    settings = "steps: 30, minibatches: 1, max_tokens: 10, group_size: 8, prompts_per_step: 4"
    extra = f"{{model: {tmp_path}/sft/model, reward: vowels, {settings}, optim: {{lr: {lr}}}, seed: {seed}}}"
    run_recipe(use_case, name, tmp_path / name, extra=extra)
    before, after = ends(tmp_path / name, "reward")
    assert after > before + rises
    if name == "dapo":
        assert ends(tmp_path / name, "completion_tokens")[1] < 5


def test_full_training_raises_rewards(use_case: Path, tmp_path: Path) -> None:
    extra = "{lora: null, steps: 30, minibatches: 1, prompts_per_step: 4, group_size: 8, optim: {lr: 2e-3}, kl: 0.01}"
    run_recipe(use_case, "grpo", tmp_path, extra=extra)
    before, after = ends(tmp_path, "reward")
    assert after > before + 0.06
    assert ends(tmp_path, "kl")[1] > 0.3, "the reference stays where training began"
