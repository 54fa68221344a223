"""`usecase.yaml`: what it accepts, and what it says about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ladder_runs import YAML, write_usecase

from ascent.ladder.priors import Priors, needs
from ascent.ladder.usecase import Gates, Thresholds, UseCase, load_usecase
from ascent.records.errors import BadRecipe


def mistake(folder: Path, text: str) -> BadRecipe:
    with pytest.raises(BadRecipe) as caught:
        write_usecase(folder, text)
    return caught.value


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_a_use_case(tmp_path: Path) -> None:
    usecase = write_usecase(tmp_path)
    assert [stage.name for stage in usecase.stages] == ["prompt", "sft", "dpo", "dapo"]
    assert [stage.kind for stage in usecase.stages] == ["prompt", "sft", "dpo", "online"]
    assert usecase.stages[2].recipe == {"optim": {"lr": 2e-5}}
    assert usecase.metrics.names == ("exact_match", "near_miss", "dose", "route", "frequency")
    assert usecase.path(usecase.data.test) == tmp_path / "test.jsonl"
    assert usecase.priors.dpo.pairs == (200, 2000) and usecase.priors.sft.labels == (500, 5000)


def test_it_survives_json(tmp_path: Path) -> None:
    usecase = write_usecase(tmp_path)
    assert UseCase.model_validate_json(usecase.model_dump_json()).model_dump() == usecase.model_dump()


@pytest.mark.parametrize(
    ("old", "new", "at", "field", "words"),
    [
        ("risk: high", "risk: hi", "risk: hi", "risk", ["did you mean 'high'"]),
        ("reward: reward", "rewrad: reward", "rewrad", "rewrad", ["did you mean 'reward'"]),
        ("  report: [dose", "  reprot: [dose", "reprot", "metrics.reprot", ["did you mean 'report'"]),
        ("prompt, sft", "promt, sft", "promt", "stages[0]", ["did you mean 'prompt'"]),
        ("[prompt, sft,", "[sft, prompt,", "stages:", "stages[0]", ["begin with 'prompt'"]),
        (", dapo]", ", dapo, sft]", "stages:", "stages[4]", ["a second stage is called 'sft'", "sft-2"]),
        (", dapo]", ", dapo, {row: sft, name: more}]", "stages:", "stages[4]", ["'sft' comes after 'dapo'"]),
        ("row: dpo, ", "row: dpo, recpe: {}, ", "row: dpo", "stages[2].recpe", ["did you mean 'recipe'"]),
        ("program: program.py", "program: absent.py", "absent.py", "program", ["no such file: absent.py"]),
        ("train: train.jsonl", "train: gone.jsonl", "gone.jsonl", "data.train", ["generator"]),
        ("test: test.jsonl, ", "", "data:", "data.test", ["required"]),
        ("margin: 0.04", "margin: 0", "margin: 0", "metrics.guards[0].margin", ["greater than 0"]),
        ("name: near_miss", "name: exact_match", "metrics:", "metrics", ["guard itself"]),
        ("pairs: [200, 2000]", "pairs: [2000, 200]", "priors:", "priors.dpo.pairs", ["2000 to 200"]),
        ("name: pharmacy-directions", "name: ../x", "name: ../x", "name", ["pattern"]),
    ],
)  # fmt: skip
def test_mistakes_name_line_and_field(
    tmp_path: Path, old: str, new: str, at: str, field: str, words: list[str]
) -> None:
    text = YAML.replace(old, new)
    assert text != YAML
    error = mistake(tmp_path, text)
    assert (error.line, error.field) == (line_of(text, at), field)
    for word in words:
        assert word in str(error)


def test_data_may_be_absent_when_a_generator_is_named(tmp_path: Path) -> None:
    text = YAML.replace("data:", "generator: {file: generate.py, seed: 7}\ndata:").replace("train.jsonl", "later.jsonl")
    error = mistake(tmp_path, text)
    assert error.field == "generator.file"
    (tmp_path / "generate.py").write_text("def generate(folder, seed): ...\n")
    assert load_usecase(tmp_path).data.train == Path("later.jsonl")


def test_metric_names_are_checked_against_the_program(tmp_path: Path) -> None:
    usecase = write_usecase(tmp_path)
    names = ["exact_match", "near_miss", "dose", "route", "frequency", "reward"]
    usecase.check_program(names)
    with pytest.raises(BadRecipe) as caught:
        usecase.check_program([name for name in names if name != "near_miss"] + ["near_mis"])
    assert caught.value.field == "metrics.guards[0].name"
    assert caught.value.line == line_of(YAML, "name: near_miss")
    assert "did you mean 'near_mis'" in str(caught.value)
    with pytest.raises(BadRecipe, match=r"\[reward\]"):
        usecase.check_program(names[:-1])


def test_risk_sets_the_thresholds_and_the_use_case_overrides_them() -> None:
    strict, lax = Thresholds.of("high"), Thresholds.of("low")
    assert strict.alpha < lax.alpha and strict.power > lax.power and strict.minimum_items > lax.minimum_items
    own = Thresholds.of("high", Gates(alpha=0.05, underpowered="warn"))
    assert (own.alpha, own.underpowered, own.minimum_items) == (0.05, "warn", strict.minimum_items)


def test_the_articles_table() -> None:
    """The four-phase table of the article, with the reinforcement row as AWS's own guidance corrects it."""
    priors = Priors()
    rows = {kind: priors.phase(kind) for kind in ("prompt", "sft", "dpo", "online")}
    assert [row.band for row in rows.values()] == [(0.60, 0.75), (0.80, 0.85), (0.85, 0.92), (0.95, 0.98)]
    assert [row.weeks for row in rows.values()] == [(6, 8), (12, 12), (16, 16), (24, 24)]
    assert sum(row.weeks[1] for row in rows.values()) == 60
    assert sum(row.investment_usd[0] for row in rows.values()) == 750_000
    assert needs(rows["sft"]) == "500 to 5,000 labelled examples"
    assert needs(rows["dpo"]) == "1,000 to 10,000 preference pairs"
    assert needs(rows["online"]) == "100 to 1,000 prompts with a verifier, or 10,000 trajectories"


def test_costs(tmp_path: Path) -> None:
    costs = write_usecase(tmp_path).costs
    assert costs.machine(1800) == pytest.approx(0.10)
    assert costs.labels(40) == pytest.approx(60.0)  # 40 labels of 1.5 minutes are one hour
