"""Laws of intermediate checkpoints: they are the models of shorter runs, runs start from them, and keeping is free."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from laws.helpers import Stopped, metrics, write_use_case

from ascent.cli.engines import model_folder, open_engine
from ascent.cli.main import run
from ascent.cli.train import training_data
from ascent.customize import checkpoint as checkpoint_module
from ascent.customize.checkpoint import checkpoint_model, checkpoint_of
from ascent.customize.recipes import load_recipe
from ascent.customize.train import train
from ascent.inference.engine import Prompt, Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.store import Store
from ascent.inference.tensors import read_tensors
from ascent.records import Message, RunCard
from ascent.records.errors import BadInput, Corrupt

LORA, FULL = {}, {"lora": None, "precision": "bf16"}
STEADY = {"optim": {"lr": 1e-2, "schedule": "constant", "warmup_fraction": 0}}
"""The learning rate of a step does not depend on how many follow, so that a long run begins like a short one."""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of the test's own: the tests' common one shows the models of this machine."""
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "home"))
    return Store()


def recipe_file(use_case: Path, name: str, place: Path, **changes: object) -> Path:
    base = yaml.safe_load((use_case / f"{name}.yaml").read_text())
    parts = {key: str(use_case / base[key]) for key in ("data", "prompts", "program") if key in base}
    place.write_text(yaml.safe_dump(base | parts | changes))
    return place


def go(
    use_case: Path, name: str, out: Path, *, stop_at: int | None = None, keep: int | None = None, **changes: object
) -> RunCard:
    """Train as `ascent train` does; `stop_at` breaks off as a crash would when that step was logged."""
    recipe = load_recipe(recipe_file(use_case, name, out.with_suffix(".yaml"), **changes))

    def report(step: int, total: int, numbers: dict[str, float]) -> None:
        if step == stop_at:
            raise Stopped

    return train(recipe, Path(recipe.model), training_data(recipe), out, report=report, keep_every=keep)


def halted(use_case: Path, name: str, out: Path, **changes: object) -> Path:
    """A run of 12 steps that broke off in its sixth and has its checkpoint from the fourth."""
    with pytest.raises(Stopped):
        go(use_case, name, out, stop_at=6, **changes)
    return out


def files(model: Path) -> dict[str, bytes]:
    """What a model folder holds, without what the store adds."""
    found = {f.relative_to(model).as_posix(): f.read_bytes() for f in model.rglob("*") if f.is_file()}
    return {name: content for name, content in found.items() if name not in ("card.json", "files.json")}


@pytest.mark.parametrize(("name", "changes"), [("sft", LORA), ("sft", FULL), ("grpo", LORA)])
def test_keeping_models_changes_nothing(name: str, changes: dict, use_case: Path, tmp_path: Path) -> None:
    """Also of a run that was cut off and resumed; grpo's fifth step lies between two updates of one rollout."""
    go(use_case, name, tmp_path / "plain", **changes)
    with pytest.raises(Stopped):
        go(use_case, name, tmp_path / "kept", stop_at=7, keep=5, **changes)
    go(use_case, name, tmp_path / "kept", keep=5, **changes)
    assert files(tmp_path / "kept" / "model") == files(tmp_path / "plain" / "model")
    assert metrics(tmp_path / "kept") == metrics(tmp_path / "plain")
    kept = sorted(place.relative_to(tmp_path / "kept").as_posix() for place in (tmp_path / "kept").glob("steps/*/*"))
    assert kept == ["steps/000005/model", "steps/000010/model"]
    assert not (tmp_path / "plain" / "steps").exists()


@pytest.mark.parametrize("changes", [LORA, FULL])
def test_an_intermediate_model_is_that_of_a_run_trained_to_its_step(
    changes: dict, use_case: Path, tmp_path: Path, store: Store
) -> None:
    """Kept at step 4, made of the checkpoint of step 4, and saved by a run of 4 steps: the same bytes in every file."""
    short = go(use_case, "sft", tmp_path / "short", epochs=1, **STEADY, **changes)
    assert short.steps == 4
    long = halted(use_case, "sft", tmp_path / "long", keep=2, **STEADY, **changes)
    wanted = files(tmp_path / "short" / "model")
    assert files(long / "steps" / "000004" / "model") == wanted
    made = model_folder(str(long), store)
    assert files(made) == wanted
    assert ("adapter/adapter_model.safetensors" in wanted) is (changes == LORA)
    assert files(long / "steps" / "000002" / "model")["model.safetensors"] != wanted["model.safetensors"]
    card = store.verify(made.name)
    assert made.name.startswith("long-step-4@")
    identity = json.loads((long / "checkpoint" / "state.json").read_text())["state"]["extra"]["identity"]
    assert (card.kind, card.dtype, card.run) == ("merged", "float32", identity)


@pytest.mark.parametrize("name", ["ppo", "reward_model", "dpo"])
def test_other_kinds_of_runs_have_checkpoints_too(name: str, use_case: Path, tmp_path: Path, store: Store) -> None:
    """A critic trains beside the model and is no part of it, a reward head is."""
    place = halted(use_case, name, tmp_path / "run", keep=4)
    made = model_folder(str(place / "checkpoint"), store)
    assert files(made) == files(place / "steps" / "000004" / "model")
    assert (made / "head.safetensors").is_file() is (name == "reward_model")


def test_a_checkpoint_is_only_read_and_made_into_a_model_once(
    use_case: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(use_case, "sft", tmp_path / "straight")
    place = halted(use_case, "sft", tmp_path / "run")
    before, dice = files(place), torch.get_rng_state()
    made = checkpoint_model(place / "checkpoint", store)
    assert files(place) == before
    assert torch.equal(torch.get_rng_state(), dice)
    with monkeypatch.context() as patched:
        patched.delattr(checkpoint_module, "policy_of")
        assert model_folder(str(place), store) == model_folder(f"{place}/checkpoint", store) == made
    go(use_case, "sft", place)
    assert files(place / "model") == files(tmp_path / "straight" / "model")
    assert files(made)["model.safetensors"] != files(place / "model")["model.safetensors"]
    assert [path.name for path in store.root.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("changes", [LORA, FULL])
def test_a_run_starts_from_a_checkpoint(changes: dict, use_case: Path, tmp_path: Path, store: Store) -> None:
    """A dpo run that starts from an unfinished run's folder, and one from the model kept at that step, end alike."""
    place = halted(use_case, "sft", tmp_path / "first", keep=4, **changes)
    kept = place / "steps" / "000004" / "model"
    changes = {**changes, "epochs": 0.5}
    for name, start in (("a", place), ("b", place / "checkpoint"), ("c", kept)):
        file = recipe_file(use_case, "dpo", tmp_path / f"{name}.yaml", model=str(start), **changes)
        assert run(["train", str(file), "--out", str(tmp_path / name)]) == 0
    weights = [read_tensors(tmp_path / name / "model" / "model.safetensors") for name in "abc"]
    untrained = read_tensors(kept / "model.safetensors")
    for name, tensor in weights[2].items():
        assert torch.equal(weights[0][name], tensor) and torch.equal(weights[1][name], tensor)
    assert any(not torch.equal(tensor, untrained[name]) for name, tensor in weights[2].items())
    cards = [RunCard.from_json((tmp_path / name / "run.json").read_bytes()) for name in "ab"]
    stored = store.list()[0]
    assert [card.base for card in cards] == [stored.id] * 2, "the card names the model, not a checkpoint that moves on"
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["model"] == stored.id
    if changes.get("lora", "") is not None:
        adapter = json.loads((tmp_path / "a" / "model" / "adapter" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == stored.id


def test_a_checkpoint_can_be_talked_to_and_planned_with(
    use_case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = halted(use_case, "sft", tmp_path / "run", keep=4)
    prompts, sampling = (
        [Prompt((Message(role="user", content="Name tree 3."),))],
        Sampling(max_tokens=12, temperature=0),
    )
    engine = open_engine(str(place))
    kept = TorchEngine.load(place / "steps" / "000004" / "model", "kept")
    assert engine.model.startswith("run-step-4@")
    assert engine.generate(prompts, sampling) == kept.generate(prompts, sampling)
    assert run(["plan", str(recipe_file(use_case, "dpo", tmp_path / "dpo.yaml", model=str(place)))]) == 0
    assert "12" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_says_what_to_give_instead(use_case: Path, tmp_path: Path, store: Store) -> None:
    done, young = tmp_path / "done", tmp_path / "young"
    go(use_case, "sft", done, epochs=0.25)
    with pytest.raises(Stopped):
        go(use_case, "sft", young, stop_at=2)
    for name in (done, done / "checkpoint"):
        assert checkpoint_of(str(name)) is None
        with pytest.raises(BadInput, match=rf"{done} is a finished run.*give its model: {done / 'model'}"):
            model_folder(str(name), store)
    with pytest.raises(BadInput, match=rf"{young / 'checkpoint'} does not exist.*--resume.*checkpoint_every"):
        model_folder(str(young), store)


def test_a_checkpoint_that_cannot_be_used_names_file_and_remedy(
    use_case: Path, tiny_model: Path, tmp_path: Path, store: Store
) -> None:
    mine = write_use_case(tmp_path / "mine", shutil.copytree(tiny_model, tmp_path / "start"))
    place = halted(mine, "sft", tmp_path / "run")
    shutil.copytree(place, tmp_path / "cut")
    tensors = tmp_path / "cut" / "checkpoint" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-20])
    with pytest.raises(Corrupt, match=rf"{tensors} does not match its checksum; delete the folder"):
        model_folder(str(tmp_path / "cut"), store)
    (tmp_path / "start").rename(tmp_path / "moved")
    with pytest.raises(BadInput, match=rf"was trained from {tmp_path / 'start'}, which is no model folder now; put"):
        model_folder(str(place), store)
    assert store.list() == []
