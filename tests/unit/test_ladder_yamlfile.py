"""YAML with line numbers: every mistake is named by file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ascent.customize.yamlfile import load_yaml, read_yaml
from ascent.records.errors import BadRecipe


class Base(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sft(Base):
    row: Literal["sft"] = "sft"
    epochs: float = 1


class Dpo(Base):
    row: Literal["dpo"] = "dpo"
    beta: float = 0.1


class Optim(Base):
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)

    @field_validator("lr")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("the learning rate must be above 0; try 0.0001")
        return value


class Stage(Base):
    row: str
    name: str = ""


class Recipe(Base):
    model: str
    algorithm: Annotated[Sft | Dpo, Field(discriminator="row")] = Sft()
    optim: Optim = Optim()
    lora: Optim | None = None
    stages: list[str | Stage] = []
    parts: dict[str, Optim] = {}
    risk: Literal["low", "high"] = "low"
    note: str | None = None
    flag: bool = False
    at: str | int = ""


def load(tmp_path: Path, text: str | bytes) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_yaml(file, Recipe)


def mistake(tmp_path: Path, text: str | bytes) -> BadRecipe:
    with pytest.raises(BadRecipe) as caught:
        load(tmp_path, text)
    return caught.value


def test_a_whole_file(tmp_path: Path) -> None:
    text = """\
    model: base
    algorithm: {row: dpo, beta: 0.2}
    optim:
      lr: 2e-5
      betas: [0.9, 0.99]
    stages:
      - prompt
      - {row: sft, name: first}
    parts: {a: {lr: 1}}
    """
    recipe = load(tmp_path, text)
    assert recipe.algorithm == Dpo(beta=0.2)
    assert recipe.optim == Optim(lr=2e-5, betas=(0.9, 0.99))
    assert recipe.stages == ["prompt", Stage(row="sft", name="first")]
    assert recipe.parts == {"a": Optim(lr=1)}


@pytest.mark.parametrize(
    ("scalar", "value"),
    [("no", "no"), ("on", "on"), ("12:30", "12:30"), ("2026-01-16", "2026-01-16"), ("010", 10), ("1_000", "1_000")],
)
def test_scalars_are_yaml_1_2(tmp_path: Path, scalar: str, value: str | int) -> None:
    """YAML 1.1 would read these as false, true, 750, a date, eight and one thousand."""
    assert load(tmp_path, f"model: m\nat: {scalar}\n").at == value


def test_numbers_and_truth_values(tmp_path: Path) -> None:
    recipe = load(tmp_path, "model: m\nflag: true\nnote: ~\noptim: {lr: 1e-5, betas: [.5, 1.]}\n")
    assert (recipe.flag, recipe.note, recipe.optim.lr, recipe.optim.betas) == (True, None, 1e-5, (0.5, 1.0))


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = "model: m\noptim: &base {lr: 0.5}\nlora:\n  <<: *base\n  betas: [0, 0]\n"
    assert load(tmp_path, text).lora == Optim(lr=0.5, betas=(0, 0))


@pytest.mark.parametrize(
    ("text", "line", "field", "words"),
    [
        ("model: m\nrsik: low\n", 2, "rsik", ["did you mean 'risk'", "algorithm, at, flag"]),
        (
            "model: m\noptim:\n  lr: 1\n  bettas: [1, 1]\n",
            4,
            "optim.bettas",
            ["did you mean 'betas'", "here: betas, lr"],
        ),
        ("model: m\nlora: {lrr: 1}\n", 2, "lora.lrr", ["did you mean 'lr'"]),
        ("model: m\nparts:\n  a:\n    l: 1\n", 4, "parts.a.l", ["did you mean 'lr'"]),
        ("model: m\nalgorithm:\n  row: dpo\n  epochs: 2\n", 4, "algorithm.epochs", ["valid keys here: beta, row"]),
        ("model: m\nalgorithm: {row: dbo}\n", 2, "algorithm", ["'dbo'", "did you mean 'dpo'", "'sft'"]),
        ("model: m\nalgorithm: {beta: 1}\n", 2, "algorithm", ["'row'", "required"]),
        ("model: m\nstages:\n  - prompt\n  - row: sft\n    nme: x\n", 5, "stages[1].nme", ["did you mean 'name'"]),
        ("model: m\nrisk: hihg\n", 2, "risk", ["'hihg'", "did you mean 'high'"]),
        ("model: 3\n", 1, "model", ["string", "not 3 (a whole number)"]),
        ("model: m\noptim: 3\n", 2, "optim", ["a mapping with the keys betas, lr"]),
        ("model: m\noptim:\n  lr: fast\n", 3, "optim.lr", ["number", "'fast'"]),
        ("model: m\noptim:\n  betas: [1]\n", 3, "optim.betas[1]", ["required"]),
        ("model: m\noptim:\n  lr: -1\n", 3, "optim.lr", ["must be above 0; try 0.0001"]),
        ("risk: low\n", 1, "model", ["'model' is required and missing"]),
        ("model: m\nrisk: low\nmodel: n\n", 3, "model", ["line 1", "keep one"]),
        ("model: m\noptim:\n  lr: 1\n  lr: 2\n", 4, "lr", ["line 3"]),
        ("model: m\noptim:\n\tlr: 1\n", 3, None, ["a tab indents", "spaces"]),
        ("model: [1, 2\n", 2, None, ["not valid YAML"]),
        ("model: m\n---\nmodel: n\n", 2, None, ["one document per file"]),
        ("- model\n", 1, None, ["not a list", "its keys are: model"]),
        ("just text\n", 1, None, ["not text"]),
        ("", 1, None, ["empty", "model"]),
        ("# nothing\n\n", 1, None, ["empty"]),
        ("model: m\nnote: a\x07b\n", 2, None, ["U+0007"]),
        (b"model: m\nrisk: low\nnote: caf\xe9\n", 3, None, ["0xe9", "save the file as UTF-8"]),
        ("model: m\nnote: !!python/object:os.system x\n", 2, None, ["not valid YAML"]),
    ],
)
def test_mistakes(tmp_path: Path, text: str | bytes, line: int, field: str | None, words: list[str]) -> None:
    error = mistake(tmp_path, text)
    assert (error.line, error.field) == (line, field)
    assert str(error).startswith(f"{tmp_path / 'recipe.yaml'}:{line}")
    for word in words:
        assert word in str(error)


def test_several_mistakes_come_in_one_error_in_the_order_of_their_lines(tmp_path: Path) -> None:
    error = mistake(tmp_path, "modle: m\nrisk: hihg\noptim: {lr: x}\n")
    lines = [int(line.split("recipe.yaml:")[1].split(" ")[0]) for line in str(error).splitlines()]
    assert lines == [1, 1, 2, 3]


def test_a_utf_8_signature_is_no_mistake(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeffmodel: µ\n".encode()).model == "µ"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="no such file"):
        load_yaml(tmp_path / "absent.yaml", Recipe)
    with pytest.raises(BadRecipe, match="folder"):
        load_yaml(tmp_path, Recipe)


def test_an_alias_that_contains_itself_is_refused_not_followed(tmp_path: Path) -> None:
    assert mistake(tmp_path, "model: m\nparts: &a\n  b: *a\n").line is not None


def test_lines_for_later_checks(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\nstages:\n  - prompt\n  - row: sft\n    name: x\n")
    source = read_yaml(file, Recipe)
    assert source.line("stages", 1, "name") == 5
    assert source.line("stages", 0) == 3
    assert source.line("optim", "lr") == 1
    assert str(source.error("is taken", "stages", 1, "name")) == f"{file}:5 [stages[1].name]: is taken"
