"""Every row learns on the tiny model: the amounts below are what a broken loss, sign or mask would not reach."""

from __future__ import annotations

from pathlib import Path

import pytest
from laws.helpers import metrics, run_recipe

from ascent.customize.objectives.rows import ROWS, OnlineRow, PreferenceRow

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


PAIRED = [name for name, row in ROWS.items() if isinstance(row, PreferenceRow) and row.pairing != "unpaired"]
UNPAIRED = [name for name, row in ROWS.items() if isinstance(row, PreferenceRow) and row.pairing == "unpaired"]
ONLINE = [name for name, row in ROWS.items() if isinstance(row, OnlineRow) and not row.teacher]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PAIRED)
def test_every_paired_row_learns_which_answer_is_better(use_case: Path, tmp_path: Path, name: str, seed: int) -> None:
    """From chance to all pairs right; the margin of rpo_reward goes to the mean difference of its rewards, 0.85."""
    run_recipe(use_case, name, tmp_path, extra=f"{{epochs: 6, seed: {seed}}}")
    before, after = ends(tmp_path, "margin")
    assert ends(tmp_path, "accuracy")[1] == 1
    if name == "rpo_reward":
        assert abs(after - 0.85) < 0.1
        return
    assert after > before + (0.2 if name in ("orpo", "ipo") else 0.8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", UNPAIRED)
def test_every_unpaired_row_parts_good_from_bad(use_case: Path, tmp_path: Path, name: str, seed: int) -> None:
    run_recipe(use_case, name, tmp_path, extra=f"{{epochs: 8, seed: {seed}}}")
    rows = metrics(tmp_path)
    assert rows[0]["desirable_reward"] == 0, "before the first update policy and reference are the same bits"
    good, bad = (mean(rows[-5:], f"{kind}desirable_reward") for kind in ("", "un"))
    assert good > bad + 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "metric", "falls_to"),
    [("cpt", "nll", 0.6), ("distill_sequence", "nll", 0.9), ("distill_forward", "divergence", 0.7),
     ("distill_reverse", "divergence", 0.75), ("distill_jsd", "divergence", 0.8)],
)  # fmt: skip
def test_every_supervised_row_comes_nearer(
    use_case: Path, tmp_path: Path, name: str, metric: str, falls_to: float, seed: int
) -> None:
    """The loss over the text, or the distance to the teacher, falls to that share of what it was at first."""
    run_recipe(use_case, name, tmp_path, extra=f"{{epochs: 8, seed: {seed}}}")
    before, after = ends(tmp_path, metric)
    assert after < falls_to * before


@pytest.fixture(scope="module", params=SEEDS)
def started(
    request: pytest.FixtureRequest, use_case: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A model after a little sft, and its seed: what online rows start from."""
    out = tmp_path_factory.mktemp(f"start{request.param}")
    run_recipe(use_case, "sft", out, extra=f"{{epochs: 8, seed: {request.param}}}")
    return out / "model", request.param


RISES = {"rloo": 0.04, "ppo": 0.03}
"""Both pay 0.05 a nat for leaving the start model, and ppo's critic begins knowing nothing: 0.04 to 0.1 in 30 steps."""


@pytest.mark.parametrize("name", ONLINE)
def test_rewards_rise(use_case: Path, tmp_path: Path, started: tuple[Path, int], name: str) -> None:
    """The share of vowels in an answer rises; DAPO also learns to stop before its punishment."""
    model, seed = started
    settings = "steps: 30, minibatches: 1, max_tokens: 10, group_size: 8, prompts_per_step: 4"
    lr = 2e-2 if name == "dapo" else 1e-2
    task = f"model: {model}, reward: vowels, {settings}"
    run_recipe(use_case, name, tmp_path / name, extra=f"{{{task}, optim: {{lr: {lr}}}, seed: {seed}}}")
    before, after = ends(tmp_path / name, "reward")
    assert after > before + RISES.get(name, 0.1)
    if name == "dapo":
        assert ends(tmp_path / name, "completion_tokens")[1] < 5
    if name == "ppo":
        early, late = ends(tmp_path / name, "value_missed")
        assert late < 0.8 * early < 0.8, "the critic learns too: of the second moment of the returns it misses less"


def test_on_policy_distillation_closes_on_its_teacher(use_case: Path, tmp_path: Path) -> None:
    """The mean of ℓ_teacher − ℓ over the student's own samples, minus the reverse KL, rises towards zero."""
    run_recipe(use_case, "opd", tmp_path, extra="{steps: 40, minibatches: 1, prompts_per_step: 8, optim: {lr: 1e-2}}")
    before, after = ends(tmp_path, "advantage")
    assert before < -0.5
    assert after > 0.9 * before


def test_full_training_raises_rewards(use_case: Path, tmp_path: Path) -> None:
    sizes = "lora: null, steps: 30, minibatches: 1, prompts_per_step: 4, group_size: 8"
    run_recipe(use_case, "grpo", tmp_path, extra=f"{{{sizes}, optim: {{lr: 2e-3}}, axes: {{kl: 0.01}}}}")
    before, after = ends(tmp_path, "reward")
    assert after > before + 0.06
    assert ends(tmp_path, "kl")[1] > 0.3, "the reference stays where training began"
