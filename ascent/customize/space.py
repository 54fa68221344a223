"""What a search varies: a recipe's fields by dotted path, each with its values; read from YAML and checked at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ascent.customize.recipes import Recipe, load_recipe
from ascent.customize.yamlfile import YamlFile, read_yaml
from ascent.records.errors import BadInput, nearest

Direction = Literal["minimize", "maximize"]


class Part(BaseModel):
    """Base of the sections of a search file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Range(Part):
    """The values of one field: exactly one of the four kinds."""

    log: tuple[float, float] | None = None
    """Any number between two, evenly by its logarithm."""
    uniform: tuple[float, float] | None = None
    """Any number between two."""
    whole: tuple[int, int] | None = Field(default=None, alias="int")
    """A whole number from the first to the second, both included."""
    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    """One of a list of values of any kind."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        fields = Range.model_fields.items()
        given = [field.alias or name for name, field in fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of log, uniform, int and choice, such as {log: [1e-5, 1e-3]}")
        if given[0] != "choice":
            low, high = self.ends
            if not low < high or (given[0] == "log" and low <= 0):
                raise ValueError(f"{given[0]} needs two numbers, the smaller first" + ", above 0" * (given[0] == "log"))
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that must all be valid for the field: both ends, or every choice."""
        return next(value for value in (self.log, self.uniform, self.whole, self.choice) if value is not None)

    def draw(self, trial: Any, name: str) -> Any:
        """Let an Optuna trial propose a value. Choices go by their JSON text, since Optuna takes scalars only."""
        if self.choice is not None:
            return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in self.choice]))
        if self.whole is not None:
            return trial.suggest_int(name, *self.whole)
        return trial.suggest_float(name, *(self.log or self.uniform or ()), log=self.log is not None)


class Objective(Part):
    """What is to be best: a use case's metric on validation data, or a training metric."""

    metric: str
    """A grader of the use case; without `data`, a number of metrics.jsonl such as loss or reward."""
    direction: Direction = "maximize"
    """Whether more or less of it is better."""
    data: Path | None = None
    """Validation rows, relative to this file. Never the test file: what was searched on is no test any more."""
    usecase: Path | None = None
    """The use case's folder, relative to this file; needed with `data`."""

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.data is None) != (self.usecase is None):
            raise ValueError("a metric on data needs both `data` and `usecase`; a training metric needs neither")
        return self


class Pruning(Part):
    """When a trial is stopped early. A number that is not finite always stops it."""

    rule: Literal["median", "hyperband", "none"] = "median"
    """median: worse than half of the earlier trials were at this step; hyperband: successive halving."""
    metric: str = "loss"
    """The number of each step that is compared."""
    direction: Direction = "minimize"
    """Whether more or less of it is better."""
    warmup_steps: int = Field(default=5, ge=0)
    """Steps before a trial can be stopped."""


class SearchSpec(Part):
    """A search file."""

    recipe: Path
    """The recipe that is varied, relative to this file."""
    space: dict[str, Range] = Field(min_length=1)
    """Field of the recipe, by dotted path → its values."""
    objective: Objective
    """What is to be best."""
    trials: int = Field(default=20, ge=1)
    """How many trials to finish, pruned ones included; a larger number extends a finished search."""
    startup_trials: int = Field(default=8, ge=1)
    """Trials drawn at random, and never pruned, before the others learn from them."""
    pruning: Pruning = Pruning()
    """When a trial is stopped early."""
    seed: int = 0
    """Seeds the proposals; a trial's own seed is its recipe's."""


def load_search(path: Path) -> tuple[YamlFile[SearchSpec], Recipe]:
    """Read a search file and the recipe it varies.

    Raises:
        BadRecipe: a malformed file, or a field or value that the recipe does not have, with its line.
    """
    source = read_yaml(path, SearchSpec)
    recipe = load_recipe((path.parent / source.value.recipe).absolute())
    for name, values in source.value.space.items():
        if other := next((other for other in source.value.space if other.startswith(f"{name}.")), None):
            raise source.error(f"{other!r} lies inside {name!r}; search one of them", "space", name)
        for value in values.ends:
            try:
                varied(recipe, {name: value})
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                message = first["msg"].removeprefix("Value error, ")
                raise source.error(f"the value {value!r} does not fit: {message}", "space", name) from error
            except BadInput as error:
                raise source.error(str(error), "space", name) from error
    return source, recipe


def varied(recipe: Recipe, params: dict[str, Any]) -> Recipe:
    """Return the recipe with other values at dotted paths. What the recipe leaves to its defaults stays so.

    Raises:
        BadInput: there is no such field; the message has the nearest one.
        pydantic.ValidationError: the field does not take the value.
    """
    content = recipe.model_dump(exclude_unset=True)
    for path, value in params.items():
        at, model = content, recipe
        *sections, last = path.split(".")
        for part in sections:
            _check_field(model, part, path)
            at, model = _section(at, model, part)
        _check_field(model, last, path)
        at[int(last) if isinstance(at, list) else last] = value
    return type(recipe).model_validate(content)


def _check_field(model: Any, part: str, path: str) -> None:
    """Raise `BadInput` when a section has no such field or place."""
    if isinstance(model, BaseModel):
        known: list[str] = list(type(model).model_fields)
    elif isinstance(model, list | tuple):
        known = [str(index) for index in range(len(model))]
    elif isinstance(model, dict):
        return
    else:
        raise BadInput(f"{path!r} goes into a value that has no parts")
    if part not in known:
        raise BadInput(f"the recipe has no field {path!r}{nearest(part, known)}; known here: {', '.join(known)}")


def _section(at: Any, model: Any, part: str) -> tuple[Any, Any]:
    """Step into a part of the recipe; one that is at its default, or null, is written out first."""
    if isinstance(model, list | tuple):
        return at[int(part)], model[int(part)]
    inside = model.get(part) if isinstance(model, dict) else getattr(model, part)
    if inside is None and isinstance(model, BaseModel):
        default = type(model).model_fields[part].default
        inside = default if isinstance(default, BaseModel) else None
    if at.get(part) is None:
        at[part] = inside.model_dump(exclude_unset=True) if isinstance(inside, BaseModel) else inside
    if isinstance(at[part], tuple | dict):
        at[part] = list(at[part]) if isinstance(at[part], tuple) else dict(at[part])
    return at[part], inside
