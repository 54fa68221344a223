"""From a customization request to a recipe: which hyperparameter sets which field, and what AWS' own names mean here.

A key that is not in the table is refused with the names that are; nothing is guessed and nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from ascent.records.errors import BadInput, nearest

if TYPE_CHECKING:
    from ascent.customize.recipes import Recipe

FINE_TUNING, PRE_TRAINING, DISTILLATION, REINFORCEMENT = (
    "FINE_TUNING",
    "CONTINUED_PRE_TRAINING",
    "DISTILLATION",
    "REINFORCEMENT_FINE_TUNING",
)
METHODS = {FINE_TUNING: "sft", PRE_TRAINING: "cpt", DISTILLATION: "distill_sequence", REINFORCEMENT: "grpo"}
"""What each type trains with unless `method` says otherwise."""
AXES = "axes."


@dataclass(frozen=True)
class Knob:
    """One hyperparameter: the recipe's field that it sets (empty: the job's own), how its text is read, what it is."""

    place: tuple[str, ...]
    read: Callable[[str], Any]
    text: str


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def _targets(text: str) -> str | list[str]:
    return text if text == "all-linear" else [part.strip() for part in text.split(",")]


_EVERY: dict[str, Knob] = {
    "method": Knob((), str, "the algorithm: sft, dpo, orpo, kto, simpo, cpt, grpo, ..."),
    "learningRate": Knob(("optim", "lr"), _number, "peak learning rate"),
    "learningRateWarmupSteps": Knob((), int, "steps in which the rate rises"),
    "schedule": Knob(("optim", "schedule"), str, "constant, linear or cosine"),
    "weightDecay": Knob(("optim", "weight_decay"), _number, "decoupled weight decay"),
    "clipNorm": Knob(("optim", "clip_norm"), _number, "largest gradient norm"),
    "adapter": Knob((), str, "lora, or none to train all weights"),
    "loraRank": Knob(("lora", "rank"), int, "rank of the adapter"),
    "loraAlpha": Knob(("lora", "alpha"), _number, "the update is scaled by alpha / rank"),
    "loraTargets": Knob(("lora", "targets"), _targets, "all-linear, or names with commas"),
    "seed": Knob(("seed",), int, "of initialisation, order and sampling"),
    "precision": Knob(("precision",), str, "bf16 or fp32"),
    "tokenBudget": Knob(("token_budget",), int, "tokens per micro-batch; bounds memory"),
    "checkpointEvery": Knob(("checkpoint_every",), int, "steps between checkpoints"),
    "maxSeqLen": Knob((), int, "longer rows are refused, in tokens"),
    "system": Knob(("system",), str, "system message of prompts without one"),
    "useCase": Knob((), str, "a use case of the server: its program, prompt and metrics"),
}
_PASSES: dict[str, Knob] = {
    "epochCount": Knob(("epochs",), _number, "passes over the data"),
    "batchSize": Knob(("batch_size",), int, "rows per step"),
}
_ONLINE: dict[str, Knob] = {
    "epochCount": Knob((), _number, "passes over the prompts"),
    "batchSize": Knob(("prompts_per_step",), int, "prompts per step"),
    "steps": Knob(("steps",), int, "optimizer steps, instead of epochCount"),
    "trainingSamplePerPrompt": Knob(("group_size",), int, "samples per prompt"),
    "inferenceMaxTokens": Knob(("max_tokens",), int, "longest answer"),
    "minibatches": Knob(("minibatches",), int, "updates per rollout"),
    "temperature": Knob(("temperature",), _number, "sampling temperature"),
    "maxPromptLength": Knob((), int, "longer prompts are refused, in tokens"),
}
_TEACHER: dict[str, Knob] = {
    "teacherSamples": Knob(("teacher", "samples"), int, "answers per prompt"),
    "teacherTemperature": Knob(("teacher", "temperature"), _number, "0 takes the likeliest answer"),
    "teacherMaxTokens": Knob(("teacher", "max_tokens"), int, "longest answer"),
}
OPTIONS = ("learningRateWarmupSteps", "maxSeqLen", "maxPromptLength", "epochCount")
"""What only the data can turn into the recipe's terms, or what is checked on them."""


@dataclass(frozen=True)
class Settings:
    """A request as a recipe without its data, and what is settled once the data are known.

    Attributes:
        algorithm: the recipe's row.
        fields: of the recipe.
        options: the `OPTIONS` that were given.
        use_case: the name of a use case of the server.
    """

    algorithm: str
    fields: dict[str, Any]
    options: dict[str, float] = field(default_factory=dict)
    use_case: str | None = None


def settings_of(kind: str, given: Mapping[str, str], model: str) -> Settings:
    """Read the hyperparameters of a customization request.

    Args:
        kind: the customization type.
        given: by name, camelCase as AWS writes them or snake_case.
        model: the start model's name.

    Raises:
        BadInput: the type is unknown, a name is, or a value cannot be read; the message lists what is known.
    """
    if kind not in METHODS:
        raise BadInput(f"customizationType {kind!r} is not run here; use one of {', '.join(METHODS)}")
    named = {_camel(name): value for name, value in given.items()}
    if len(named) < len(given):
        raise BadInput(f"a hyperparameter is given twice, in two spellings: {', '.join(sorted(given))}")
    algorithm = named.pop("method", METHODS[kind])
    table = knobs_of(kind, algorithm)
    fields: dict[str, Any] = {"algorithm": algorithm, "model": model}
    options: dict[str, float] = {}
    use_case, whole = None, False
    for name, text in named.items():
        value = _read(name, text, table)
        if name == "adapter":
            whole = _one_of(name, value, ("lora", "none")) == "none"
        elif name == "useCase":
            use_case = str(value)
        elif name.startswith(AXES):
            fields.setdefault("axes", {})[name.removeprefix(AXES)] = value
        elif table[name].place:
            _put(fields, table[name].place, value)
        else:
            options[name] = _positive(name, value)
    if whole:
        if "lora" in fields:
            raise BadInput("adapter=none trains all weights, so loraRank, loraAlpha and loraTargets have no meaning")
        fields["lora"] = None
    return Settings(algorithm, fields, options, use_case)


def knobs_of(kind: str, algorithm: str) -> dict[str, Knob]:
    """Return the table of a customization type and method.

    Raises:
        BadInput: the method is unknown, or of another type.
    """
    from ascent.customize.objectives.rows import ROWS

    allowed = [name for name, row in ROWS.items() if _belongs(kind, name, row)]
    if algorithm not in allowed:
        raise BadInput(
            f"method {algorithm!r} is none of {kind}{nearest(algorithm, allowed)}; it has {', '.join(allowed)}"
        )
    table = {**_EVERY, **(_ONLINE if ROWS[algorithm].kind == "online" else _PASSES)}
    if ROWS[algorithm].kind == "supervised":
        from ascent.customize.recipes import SupervisedRecipe

        text = str(SupervisedRecipe.model_fields["reasoning"].description)
        table["reasoning"] = Knob(("reasoning",), str, text)
    return {**table, **_TEACHER} if kind == DISTILLATION else table


def recipe_of(settings: Settings, **more: Any) -> Recipe:
    """Return the checked recipe with its data and whatever else the job adds.

    Raises:
        BadInput: a value is out of range; the message names the hyperparameter.
    """
    from ascent.customize.recipes import recipe_class

    kind, fields = recipe_class(settings.algorithm), {**settings.fields, **more}
    for name in ("optim", "lora"):
        if isinstance(fields.get(name), dict):  # what is not given keeps this recipe's default, not the section's
            fields[name] = {**kind.model_fields[name].get_default().model_dump(), **fields[name]}
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = tuple(part for part in first["loc"] if isinstance(part, str))
        tables = (_EVERY, _PASSES, _ONLINE, _TEACHER)
        names = [name for table in tables for name, knob in table.items() if knob.place and knob.place == place]
        shown = " or ".join(dict.fromkeys(names)) or ".".join(place) or "the recipe"
        value = f", is {first['input']!r}" if isinstance(first.get("input"), str | int | float) else ""
        raise BadInput(f"hyperparameter {shown}: {first['msg'].removeprefix('Value error, ')}{value}") from error


def settled(settings: Settings, recipe: Recipe, rows: int) -> Recipe:
    """Turn warm-up steps and passes over prompts into the recipe's own terms, now that the rows are counted.

    Raises:
        BadInput: there are more warm-up steps than steps.
    """
    from ascent.customize.recipes import OnlineRecipe

    options = settings.options
    if isinstance(recipe, OnlineRecipe):
        if "epochCount" in options:
            passes = options["epochCount"] * rows / recipe.prompts_per_step
            recipe = recipe.model_copy(update={"steps": max(1, math.ceil(passes)) * recipe.minibatches})
        steps = recipe.steps
    else:
        steps = max(1, math.ceil(recipe.epochs * rows / recipe.batch_size))
    warmup = options.get("learningRateWarmupSteps")
    if warmup is None:
        return recipe
    if warmup > steps:
        raise BadInput(f"learningRateWarmupSteps is {warmup:g}, but the run has {steps} steps; lower it")
    optim = recipe.optim.model_copy(update={"warmup_fraction": warmup / steps})
    return recipe.model_copy(update={"optim": optim})


def _belongs(kind: str, name: str, row: Any) -> bool:
    if kind == REINFORCEMENT:
        return bool(row.kind == "online" and not row.teacher)
    if kind == PRE_TRAINING:
        return bool(row.kind == "supervised" and row.corpus)
    taught = name == "distill_sequence" or bool(row.kind == "supervised" and row.teacher)
    if kind == DISTILLATION:
        return taught
    return bool(row.kind in ("supervised", "preference") and not taught and getattr(row, "score", "") != "head")


def _read(name: str, text: str, table: Mapping[str, Knob]) -> Any:
    if name.startswith(AXES):
        return yaml.safe_load(text)
    if name not in table:
        known = "; ".join(f"{known}: {knob.text}" for known, knob in sorted(table.items()))
        raise BadInput(f"unknown hyperparameter {name!r}{nearest(name, table)}. Known are method, axes.NAME, {known}")
    try:
        return table[name].read(text)
    except ValueError as error:
        raise BadInput(
            f"hyperparameter {name} is {text!r}, which cannot be read ({error}): {table[name].text}"
        ) from error


def _put(fields: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    *outer, last = place
    for part in outer:
        fields = fields.setdefault(part, {})
    fields[last] = value


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise BadInput(f"hyperparameter {name} is {value!r}; use {' or '.join(allowed)}")
    return value


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise BadInput(f"hyperparameter {name} is {value!r}; give a number above zero")
    return value


def _camel(name: str) -> str:
    if name.startswith(AXES):
        return name
    first, *rest = name.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)
