"""Recipe files: what they may say, and what a mistake is answered with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ascent.cli.train import training_data
from ascent.customize.objectives.rows import ROWS
from ascent.customize.recipes import OnlineRecipe, PreferenceRecipe, SupervisedRecipe, load_recipe, recipe_class
from ascent.customize.train import run_id
from ascent.inference.lora import ALL_LINEAR
from ascent.records import DataSource
from ascent.records.errors import BadInput, BadRecipe


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


SFT = "algorithm: sft\nmodel: m\ndata: train.jsonl\n"


def test_every_row_has_a_recipe_and_no_other_takes_it() -> None:
    for name in ROWS:
        kind = recipe_class(name)
        for other in (SupervisedRecipe, PreferenceRecipe, OnlineRecipe):
            data = {"prompts": "p.jsonl"} if other is OnlineRecipe else {"data": "d.jsonl"}
            reward = {"reward": {"teacher": "t"}} if other is OnlineRecipe and name == "opd" else {}
            fields = {"algorithm": name, "model": "m", **data, **reward}
            if other is kind:
                assert kind.model_validate(fields).row == ROWS[name]
            else:
                with pytest.raises(ValueError, match=re.escape(f"row {name} is")):
                    other.model_validate(fields)


@pytest.mark.parametrize(
    ("text", "line", "field", "words"),
    [
        (SFT + "epoch: 2\n", 4, "epoch", ["unknown key 'epoch'", "did you mean 'epochs'"]),
        (SFT + "optim:\n  lr: 0.1\n  shedule: linear\n", 6, "optim.shedule", ["did you mean 'schedule'"]),
        (SFT + "lora: {rank: 0}\n", 4, "lora.rank", ["greater than or equal to 1"]),
        (SFT + "beta: 0.1\n", 4, "beta", ["unknown key 'beta'"]),
        (SFT + "epochs: fast\n", 4, "epochs", ["number"]),
        ("model: m\nalgorithm: dpoo\ndata: d\n", 2, "algorithm", ["did you mean 'dpo'", "grpo"]),
        ("model: m\nalgorithm: [sft]\ndata: d\n", 2, "algorithm", ["unknown algorithm"]),
        (
            "algorithm: dpo\nmodel: m\ndata: d\naxes: {label_smoothing: 0.5}\n",
            1,
            None,
            ["row dpo", "label_smoothing", "0.5"],
        ),
        ("algorithm: dpo\nmodel: m\ndata: d\naxes: {betta: 0.5}\n", 1, None, ["row dpo", "did you mean 'beta'"]),
        (
            "algorithm: grpo\nmodel: m\nprompts: d\naxes: {clip: [-0.2, 0.2]}\n",
            1,
            None,
            ["row grpo", "clip", "absolute"],
        ),
        (
            "algorithm: gspo\nmodel: m\nprompts: d\naxes: {weights: token_mean}\n",
            1,
            None,
            ["gspo", "seq_mean_token_mean"],
        ),
        ("algorithm: opd\nmodel: m\nprompts: d\n", 1, None, ["row opd", "baseline", "reward.teacher"]),
        ("algorithm: grpo\nmodel: m\ndata: d\n", 1, "prompts", ["required"]),
        (
            "algorithm: grpo\nmodel: m\nprompts: d\ngroup_size: 1\n",
            1,
            None,
            ["row grpo", "axis baseline", "at least 2"],
        ),
        ("algorithm: sft\nmodel: m\ndata: []\n", 3, "data", ["at least 1"]),
    ],
)
def test_a_mistake_names_line_field_and_remedy(tmp_path: Path, text: str, line: int, field: str | None, words) -> None:
    with pytest.raises(BadRecipe) as caught:
        load_recipe(written(tmp_path, text))
    error = caught.value
    shown = str(error)
    assert all(word in shown for word in words), shown
    place = f"recipe.yaml:{line}" if field is None else f"recipe.yaml:{line} [{field}]"
    found = [(error.line, error.field)] + [(line, field)] * (place in shown)
    assert (line, field) in found, shown


@pytest.mark.parametrize("text", ["model: m\ndata: d\n", "model: m\nalgorithm:\ndata: d\n"])
def test_a_recipe_without_algorithm_is_told_which_there_are(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRecipe, match=r"names no algorithm.*sft.*dpo.*grpo.*dapo"):
        load_recipe(written(tmp_path, text))


def test_bare_rpo_lists_its_three_meanings(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe) as caught:
        load_recipe(written(tmp_path, "algorithm: rpo\nmodel: m\ndata: d\n"))
    for meaning in ("relative preference optimization", "DPO with an NLL term", "reward-aware preference"):
        assert meaning in str(caught.value)
    assert caught.value.line == 1


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "algorithm: sft\n  model: m\n", "algorithm: sft\nalgorithm: dpo\n"])
def test_a_file_that_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRecipe, match=r"recipe\.yaml:\d"):
        load_recipe(written(tmp_path, text))
    with pytest.raises(BadRecipe, match="no such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_defaults_are_those_of_the_methods(tmp_path: Path) -> None:
    sft = load_recipe(written(tmp_path, SFT))
    assert isinstance(sft, SupervisedRecipe)
    assert sft.lora is not None
    assert sft.lora.config.targets == ALL_LINEAR
    assert sft.optim.lr == 5e-4
    dpo = load_recipe(written(tmp_path, SFT.replace("sft", "dpo") + "lora: null\noptim: {lr: 1e-5}\n"))
    assert isinstance(dpo, PreferenceRecipe)
    assert dpo.lora is None
    assert (dpo.row.beta, dpo.optim.lr, dpo.optim.schedule) == (0.1, 1e-5, "cosine")
    online = load_recipe(written(tmp_path, "algorithm: dapo\nmodel: m\nprompts: p.jsonl\nmax_tokens: 8\n"))
    assert isinstance(online, OnlineRecipe)
    assert (online.max_tokens, online.group_size) == (8, 8)


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    text = "algorithm: grpo\nmodel: start\nprompts: data/p.jsonl\nprogram: program.py\n"
    recipe = load_recipe(written(tmp_path, text))
    assert isinstance(recipe, OnlineRecipe)
    assert recipe.prompts[0].path == tmp_path / "data/p.jsonl"
    assert recipe.program == tmp_path / "program.py"
    assert recipe.model == str(tmp_path / "start")
    absolute = tmp_path / "elsewhere" / "d.jsonl"
    other = load_recipe(written(tmp_path, f"algorithm: sft\nmodel: smollm2\ndata: {absolute}\n"))
    assert isinstance(other, SupervisedRecipe)
    assert other.data[0].path == absolute
    assert other.model == "smollm2"


def test_a_mixture_is_drawn_by_weight(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 30)):
        rows = [{"id": f"{name}{i}", "input": {"prompt": f"{name} {i}"}, "target": name} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "algorithm: sft\nmodel: m\ndata:\n- {path: a.jsonl, weight: 3}\n- path: b.jsonl\n"
    recipe = load_recipe(written(tmp_path, text))
    data = training_data(recipe)
    said = [conversation[-1].content for conversation in data.conversations]
    assert len(said) == 40
    assert said.count("a") == 30
    assert all(abs(said[:n].count("a") - 0.75 * n) < 1 for n in range(1, 41)), "the shares hold in every prefix"
    assert {Path(source.path).name: source.rows for source in data.sources} == {"a.jsonl": 10, "b.jsonl": 30}
    with pytest.raises(BadInput):
        load_recipe(written(tmp_path, text.replace("weight: 3", "weight: 0")))


def test_a_run_is_named_by_what_decides_it(tmp_path: Path) -> None:
    source = DataSource(name="d", path="d.jsonl", rows=1, sha256="1")
    recipe = load_recipe(written(tmp_path, SFT))
    moved = tmp_path / "moved"
    moved.mkdir()
    same = load_recipe(written(moved, SFT))
    assert run_id(recipe, [source]) == run_id(same, [source.model_copy(update={"path": "moved/d.jsonl"})])
    names = {run_id(recipe, [source]), run_id(recipe, [source.model_copy(update={"sha256": "2"})])}
    for change in ("seed: 1\n", "epochs: 2\n", "optim: {lr: 1e-3}\n", "lora: null\n", "precision: fp32\n"):
        names.add(run_id(load_recipe(written(tmp_path, SFT + change)), [source]))
    assert len(names) == 7
