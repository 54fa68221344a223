"""`search`: on the tiny model, against runs made without it, and against itself when it is stopped on the way."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from laws.helpers import Stopped, write_use_case

from ascent.cli.train import training_data
from ascent.customize.recipes import load_recipe
from ascent.customize.search import BEST, TRIAL, Hands, SearchResult, search, tail_mean, write_recipe
from ascent.customize.space import load_search, varied
from ascent.customize.train import train
from ascent.records import RunCard
from ascent.records.errors import BadInput, BadRecipe, MissingExtra

HANDS = Hands(training_data, Path)
LOSS = {"metric": "loss", "direction": "minimize"}


@pytest.fixture
def case(tiny_model: Path, tmp_path: Path) -> Path:
    """The shared use case, with runs of six steps."""
    folder = write_use_case(tmp_path / "case", tiny_model)
    text = (folder / "sft.yaml").read_text()
    (folder / "sft.yaml").write_text(text.replace("epochs: 3\n", "epochs: 1.5\n"))
    return folder


def write_spec(case: Path, space: dict[str, Any], **more: Any) -> Path:
    path = case / "search.yaml"
    path.write_text(yaml.safe_dump({"recipe": "sft.yaml", "space": space, "objective": LOSS} | more, sort_keys=False))
    return path


def run(spec: Path, folder: Path, hands: Hands = HANDS, **more: Any) -> SearchResult:
    source, recipe = load_search(spec)
    lines: list[str] = []
    return search(source, recipe, folder, hands, say=lines.append, **more)


def told(result: SearchResult) -> list[dict[str, Any]]:
    return [trial.model_dump(exclude={"seconds"}) for trial in result.trials]


# ── what is proposed, trained and kept ─────────────────────────────────────────────────────────────────────────


def test_the_better_of_two_rates_is_found(case: Path, tmp_path: Path) -> None:
    """The values are those of the same recipes trained by hand, and the best recipe is one that `train` accepts."""
    rates = [1e-6, 1e-2]
    spec = write_spec(case, {"optim.lr": {"choice": rates}}, trials=4, pruning={"rule": "none"})
    result = run(spec, tmp_path / "out")
    by_hand = {}
    for rate in rates:
        recipe = load_recipe(case / "sft.yaml")
        recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": rate})})
        train(recipe, Path(recipe.model), training_data(recipe), tmp_path / str(rate))
        rows = [json.loads(line) for line in (tmp_path / str(rate) / "metrics.jsonl").read_text().splitlines()]
        by_hand[rate] = rows[-1]["loss"]  # of six steps the last tenth is one
    assert {trial.params["optim.lr"] for trial in result.trials} == set(rates)
    for trial in result.trials:
        assert trial.value == pytest.approx(by_hand[trial.params["optim.lr"]], rel=1e-6)
    repeats = [trial for trial in result.trials if "same values as trial" in trial.reason]
    assert len(repeats) == 2 and all(trial.steps == 0 for trial in repeats)
    assert len(list((tmp_path / "out").rglob("run.json"))) == 2  # values that were tried are not trained again
    assert result.best is not None and result.best.params == {"optim.lr": 1e-2}
    best = load_recipe(tmp_path / "out" / BEST)
    assert best.optim.lr == 1e-2
    card = train(best, Path(best.model), training_data(best), tmp_path / "again")
    stored = RunCard.from_json((tmp_path / "out" / "trials" / f"{result.best.number:03}" / "run.json").read_bytes())
    assert card.final == stored.final
    assert card.data[0].sha256 == stored.data[0].sha256


def test_only_the_best_trial_keeps_its_weights(case: Path, tmp_path: Path) -> None:
    spec = write_spec(case, {"optim.lr": {"log": [1e-5, 1e-1]}}, trials=3, pruning={"rule": "none"})
    result = run(spec, tmp_path / "out")
    assert result.best is not None
    kept = [path.parent.name for path in (tmp_path / "out" / "trials").glob("*/model")]
    assert kept == [f"{result.best.number:03}"]
    for number in range(3):
        place = tmp_path / "out" / "trials" / f"{number:03}"
        assert {"recipe.yaml", "run.json", "metrics.jsonl", TRIAL} <= {file.name for file in place.iterdir()}


@pytest.mark.parametrize("rule", ["median", "hyperband"])
def test_a_trial_that_diverges_is_pruned(case: Path, tmp_path: Path, rule: str) -> None:
    """A rate of 30 throws the model off at once; the good trials before it run to their end."""
    spec = write_spec(
        case,
        {"optim.lr": {"choice": [1e-2, 30.0]}},
        trials=4,
        startup_trials=1,
        seed=1,
        pruning={"rule": rule, "warmup_steps": 2},
    )
    result = run(spec, tmp_path / "out")
    bad = [trial for trial in result.trials if trial.params["optim.lr"] == 30.0]
    assert bad and bad[0].number > 0  # what the seed is chosen for: a good one comes first
    assert all(trial.state == "pruned" and trial.steps < 6 and "lags behind" in trial.reason for trial in bad)
    assert not (tmp_path / "out" / "trials" / f"{bad[0].number:03}" / "run.json").exists()
    assert result.best is not None and result.best.params == {"optim.lr": 1e-2}


def test_a_value_that_is_no_number_ends_the_trial_and_not_the_search(case: Path, tmp_path: Path) -> None:
    values = iter([math.nan, 0.25, 0.75])
    spec = write_spec(case, {"epochs": {"uniform": [0.3, 0.6]}}, trials=3)
    result = run(spec, tmp_path / "out", Hands(training_data, Path, lambda model: next(values)))
    assert [(trial.state, trial.value) for trial in result.trials] == [
        ("pruned", None),
        ("complete", 0.25),
        ("complete", 0.75),
    ]
    assert result.best is result.trials[1]  # the direction is minimize


def test_values_that_do_not_go_together_end_the_trial_and_not_the_search(case: Path, tmp_path: Path) -> None:
    """Label smoothing is for the logistic link only; beside the other link each of its values but 0 is refused."""
    space = {"axes.link": {"choice": ["squared"]}, "axes.label_smoothing": {"choice": [0.1]}}
    result = run(write_spec(case, space, recipe="dpo.yaml", trials=1), tmp_path / "out")
    assert (result.trials[0].state, result.trials[0].steps, result.best) == ("pruned", 0, None)
    assert "label_smoothing goes with the link 'logistic' only" in result.trials[0].reason


# ── stopping and going on ──────────────────────────────────────────────────────────────────────────────────────


def test_a_stopped_search_goes_on_to_the_same_result(case: Path, tmp_path: Path) -> None:
    """Stopped between training and measuring of a trial: those before it stay, and it comes out the same."""
    space = {"optim.lr": {"log": [1e-4, 1e-1]}, "lora.rank": {"int": [1, 4]}, "batch_size": {"choice": [4, 8]}}
    spec = write_spec(case, space, trials=3, startup_trials=1, pruning={"warmup_steps": 1})
    whole = run(spec, tmp_path / "whole")
    calls: list[Path] = []

    def stop_at_second(model: Path) -> float:
        calls.append(model)
        if len(calls) == 2:
            raise Stopped
        return tail_mean(model.parent, "loss")

    with pytest.raises(Stopped):
        run(spec, tmp_path / "cut", Hands(training_data, Path, stop_at_second))
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut" / "trials").glob(f"*/{TRIAL}")}
    assert done
    with pytest.raises(BadInput, match="--resume"):
        run(spec, tmp_path / "cut")
    again = run(spec, tmp_path / "cut", resume=True)
    assert told(again) == told(whole)
    assert all(file.stat().st_mtime_ns == time for file, time in done.items())
    calls.clear()
    finished = run(spec, tmp_path / "cut", Hands(training_data, Path, stop_at_second), resume=True)
    assert told(finished) == told(whole) and calls == []


def test_a_trial_that_was_recorded_but_not_told_is_read_back(case: Path, tmp_path: Path) -> None:
    """The process ends after `trial.json` was written and before Optuna heard of it."""
    spec = write_spec(case, {"optim.lr": {"log": [1e-4, 1e-1]}}, trials=2, pruning={"rule": "none"})
    whole = run(spec, tmp_path / "whole")
    source, recipe = load_search(spec)

    def stop(line: str) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        search(source, recipe, tmp_path / "cut", HANDS, say=stop)
    assert told(run(spec, tmp_path / "cut", resume=True)) == told(whole)


def test_more_trials_may_be_asked_for_and_nothing_else_may_change(case: Path, tmp_path: Path) -> None:
    space = {"optim.lr": {"log": [1e-4, 1e-1]}}
    short = run(write_spec(case, space, trials=1), tmp_path / "out")
    longer = run(write_spec(case, space, trials=3), tmp_path / "out", resume=True)
    assert told(longer)[:1] == told(short) and len(longer.trials) == 3
    with pytest.raises(BadInput, match=r"search.json differs"):
        run(write_spec(case, space, trials=3, seed=1), tmp_path / "out", resume=True)
    with (case / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "input": {"prompt": "x"}, "target": "y"}) + "\n")
    with pytest.raises(BadInput, match=r"search.json differs"):
        run(write_spec(case, space, trials=3), tmp_path / "out", resume=True)
    with pytest.raises(BadInput, match="holds no search"):
        run(write_spec(case, space), case)


def test_two_searches_of_one_seed_are_alike_and_of_two_seeds_are_not(case: Path, tmp_path: Path) -> None:
    space = {"optim.lr": {"log": [1e-4, 1e-1]}, "epochs": {"uniform": [0.3, 1]}}
    first = run(write_spec(case, space, trials=1), tmp_path / "a")
    assert told(run(write_spec(case, space, trials=1), tmp_path / "b")) == told(first)
    assert told(run(write_spec(case, space, trials=1, seed=1), tmp_path / "c")) != told(first)


# ── the search file ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"optim.lr": {"log": [1e-4, 1]}, "optim.learn": {"log": [1e-5, 1]}},
            r"search.yaml:7 .*no field 'optim.learn'",
        ),
        ({"lora.rnak": {"int": [1, 4]}}, "did you mean 'rank'"),
        ({"batchsize": {"int": [1, 4]}}, "did you mean 'batch_size'"),
        ({"batch_size": {"int": [0, 4]}}, "the value 0 does not fit: .*greater than or equal to 1"),
        ({"batch_size": {"uniform": [1.5, 4]}}, "the value 1.5 does not fit: .*integer"),
        ({"optim.lr": {"log": [0, 1]}}, "above 0"),
        ({"optim.lr": {"log": [1, 1]}}, "the smaller first"),
        ({"optim.lr": {"lgo": [1, 2]}}, "did you mean 'log'"),
        ({"optim.lr": {"log": [1, 2], "uniform": [1, 2]}}, "exactly one of log, uniform, int and choice"),
        ({"lora": {"choice": [None]}, "lora.rank": {"int": [1, 2]}}, "'lora.rank' lies inside 'lora'"),
        ({"seed.x": {"int": [1, 2]}}, "has no parts"),
        ({"data.3.weight": {"int": [1, 2]}}, "known here: 0"),
        ({"axes.wieghts": {"choice": ["token_mean"]}}, "weights"),
    ],
)
def test_mistakes_are_named_with_their_line(case: Path, space: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipe, match=message) as caught:
        load_search(write_spec(case, space))
    assert "search.yaml" in str(caught.value) and caught.value.line is not None


def test_data_needs_a_use_case(case: Path) -> None:
    with pytest.raises(BadRecipe, match="needs both `data` and `usecase`"):
        load_search(write_spec(case, {"seed": {"int": [1, 2]}}, objective={"metric": "m", "data": "v.jsonl"}))


def test_a_varied_recipe_keeps_all_else(case: Path) -> None:
    """Sections at the default of their kind stay so: an online recipe's schedule is constant, not cosine."""
    online = load_recipe(case / "grpo.yaml")
    changed = varied(online, {"optim.lr": 0.5, "lora.alpha": 1.0, "prompts.0.weight": 2.0})
    assert (changed.optim.lr, changed.optim.schedule, changed.optim.warmup_fraction) == (0.5, "constant", 0.1)
    assert (changed.lora.rank, changed.lora.alpha) == (4, 1.0)
    assert changed.prompts[0].weight == 2.0 and changed.prompts[0].path == online.prompts[0].path
    untouched = {"optim", "lora", "prompts"}
    assert changed.model_dump(exclude=untouched) == online.model_dump(exclude=untouched)
    bare = online.model_copy(update={"lora": None})
    assert varied(bare, {"lora.rank": 2}).lora == type(online.lora)(rank=2)
    assert online.optim.lr == 1e-4 and dict(online.axes) == {}
    assert varied(online, {"axes.kl": 0.5}).row.kl == 0.5
    assert dict(online.axes) == {}


def test_a_written_recipe_is_read_back(case: Path, tmp_path: Path) -> None:
    for name in ("sft", "dpo", "grpo"):
        recipe = load_recipe((case / f"{name}.yaml").absolute())
        write_recipe(recipe, tmp_path / "deep" / "er" / "recipe.yaml")
        text = (tmp_path / "deep" / "er" / "recipe.yaml").read_text()
        assert str(tmp_path) not in text
        again = load_recipe(tmp_path / "deep" / "er" / "recipe.yaml")
        place = {"data", "prompts", "program", "model"}
        assert again.model_dump(exclude=place) == recipe.model_dump(exclude=place)
        assert Path(again.model).resolve() == Path(recipe.model).resolve()


def test_an_unknown_metric_is_named(case: Path, tmp_path: Path) -> None:
    objective = {"metric": "lss", "direction": "minimize"}
    with pytest.raises(BadInput, match=r"no step has a number 'lss'; did you mean 'loss'"):
        run(write_spec(case, {"epochs": {"uniform": [0.3, 0.6]}}, objective=objective), tmp_path / "out")


def test_a_missing_optuna_prints_the_install_line(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"ascent-posttrain\[search\]"):
        run(write_spec(case, {"optim.lr": {"log": [1e-4, 1e-1]}}), tmp_path / "out")
