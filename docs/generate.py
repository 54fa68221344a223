"""Writes the generated pages of this folder: `make docs`. A test fails when a page is not what this would write.

Names, types, defaults and meanings come from the code; only the sentences around them are written here.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ascent.cli.main import cli
from ascent.customize.objectives.rows import ROWS
from ascent.customize.recipes import (
    DataSpec,
    HarnessSpec,
    JudgeSpec,
    LoraSpec,
    OnlineRecipe,
    OptimSpec,
    PreferenceRecipe,
    RewardSpec,
    SupervisedRecipe,
    TeacherSpec,
)
from ascent.ladder import usecase
from ascent.ladder.priors import SOURCE, DpoPrior, Priors, PromptPrior, RlPrior, SftPrior
from ascent.ladder.usecase import Thresholds, UseCase

FOLDER = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py: run `make docs` instead of editing. -->\n"
WORDS: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}

USECASE_KEYS = {
    "name": "What the use case is called.",
    "task": "What it does, in a sentence.",
    "risk": "Sets the gates' thresholds; see below.",
    "model": "The model to start from: a name or id in the store or the catalogue, or a folder.",
    "program": "The Python file with `prepare`, `finish` and the graders.",
    "generator": "Writes the data files that are absent.",
    "data": "The data files.",
    "prompt": "What the model is told.",
    "sampling": "How answers are sampled.",
    "abstain": "When a tuned model hands an answer over because it is unsure.",
    "metrics": "What decides and what is shown.",
    "reward": "The grader whose value reinforcement learning raises, and by which preference pairs are made.",
    "stages": "The rungs, in order: prompt, sft, dpo, then grpo or dapo. Each is a row's name or a mapping.",
    "costs": "Prices for forecasts and the report.",
    "priors": "How much data each technique is taken to need.",
    "budget": "What the whole climb may use.",
    "gates": "The gates' thresholds, where the defaults of the risk do not fit.",
}


def pages() -> dict[str, str]:
    """Return file name → content of every generated page."""
    return {
        "cli.md": NOTE + cli_page(),
        "recipes.md": NOTE + recipes_page(),
        "algorithms.md": NOTE + algorithms_page(),
        "usecase.md": NOTE + usecase_page(),
    }


def cli_page() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Command line\n",
        "Commands print results to standard output, and progress and errors to standard error.\n",
    ]
    for name, command in commands("ascent", cli):
        context = click.Context(command, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## {name}\n", f"```text\n{name} {usage}\n```\n", paragraphs(command.help or "")]
        rows = [option(param) for param in command.params if isinstance(param, click.Option)]
        if rows:
            parts.append(table(("option", "default", "meaning"), rows))
    return "\n".join(parts)


def commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield a command and the commands under it, with the words that call each."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from commands(f"{name} {inner}", found)


def paragraphs(text: str) -> str:
    """Return a click help text as Markdown."""
    return "\n\n".join(" ".join(block.split()) for block in text.split("\n\n")) + "\n"


def option(param: click.Option) -> tuple[str, str, str]:
    """Return an option's spelling, default and meaning."""
    names = ", ".join(f"`{name}`" for name in param.opts)
    kind = "" if param.is_flag else f" {param.type.name.upper().removesuffix(' RANGE')}"
    if isinstance(param.type, click.Choice):
        kind = " " + " \\| ".join(map(str, param.type.choices))
    default = f"`{param.default}`" if param.show_default else "required" if param.required else ""
    return names + kind, default, param.help or ""


def recipes_page() -> str:
    """Every recipe and its sections."""
    parts = [
        "# Recipes\n",
        "A recipe is a YAML file for `ascent train`; a stage of a use case overrides the same fields under `recipe:`.",
        "`algorithm` names the row ([algorithms](algorithms.md)) and thereby the fields that are allowed. An unknown",
        "key is an error that names the nearest valid one. Paths are relative to the recipe.\n",
    ]
    recipes = (SupervisedRecipe, PreferenceRecipe, OnlineRecipe)
    sections = (DataSpec, LoraSpec, OptimSpec, TeacherSpec, RewardSpec, JudgeSpec, HarnessSpec)
    for kind in (*recipes, *sections):
        parts += [f"## {kind.__name__}\n", f"{kind.__doc__}\n", fields_table(kind)]
    return "\n".join(parts)


def algorithms_page() -> str:
    """The rows with their axes."""
    parts = [
        "# Algorithms\n",
        "Every algorithm is a frozen row of choices; the trainer does not know which row it runs. A new one is one",
        "entry in `ascent/customize/objectives/rows.py` and one identity test.\n",
        table(("row", "kind", "from"), [(f"`{row.name}`", row.kind, row.source) for row in ROWS.values()]),
    ]
    for kind in dict.fromkeys(type(row) for row in ROWS.values()):
        rows = [row for row in ROWS.values() if type(row) is kind]
        axes = [field.name for field in dataclasses.fields(kind) if field.name not in ("name", "source", "kind")]
        if not axes:
            continue
        cells = [(f"`{axis}`", *(axis_words(getattr(row, axis)) for row in rows)) for axis in axes]
        parts += [f"## {rows[0].kind}\n", f"{(kind.__doc__ or '').strip()}\n"]
        parts.append(table(("axis", *(f"`{row.name}`" for row in rows)), cells))
    return "\n".join(parts)


def axis_words(value: Any) -> str:
    """Return a row's choice on an axis."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{name} {inner}" for name, inner in dataclasses.asdict(value).items())
    return "yes" if value is True else "no" if value is False else f"{value}"


def usecase_page() -> str:
    """`usecase.yaml`, key by key."""
    if missing := set(UseCase.model_fields) ^ USECASE_KEYS.keys():
        raise SystemExit(f"docs/generate.py: USECASE_KEYS and UseCase differ in {sorted(missing)}")
    rows = [
        (f"`{name}`", type_words(field.annotation), default_words(field), USECASE_KEYS[name])
        for name, field in UseCase.model_fields.items()
    ]
    parts = [
        "# usecase.yaml\n",
        "A use case is a folder with this file, the user's own program and data. `ascent init DIR` writes one that",
        "climbs at once. An unknown key is an error that names the nearest valid one. Paths are relative to it.\n",
        table(("key", "type", "default", "meaning"), rows),
    ]
    sections = (
        usecase.Generator,
        usecase.Data,
        usecase.PromptSpec,
        usecase.SamplingSpec,
        usecase.Abstention,
        usecase.Metrics,
        usecase.Primary,
        usecase.Guard,
        usecase.StageSpec,
        usecase.Costs,
        usecase.Budget,
        usecase.Gates,
    )
    for kind in sections:
        parts += [f"## {kind.__name__}\n", f"{first_paragraph(kind)}\n", fields_table(kind)]
    parts += [thresholds_section(), priors_section()]
    return "\n".join(parts)


def thresholds_section() -> str:
    """What each risk means for the gates."""
    risks = [Thresholds.of(risk) for risk in ("low", "medium", "high")]
    rows = [(f"`{name}`", *(axis_words(getattr(risk, name)) for risk in risks)) for name in Thresholds.model_fields]
    explained = " ".join((Thresholds.__doc__ or "").split("\n\n", 1)[1].split())
    return f"## Thresholds by risk\n\n{explained}\n\n" + table(("threshold", "low", "medium", "high"), rows)


def priors_section() -> str:
    """The data needs that the gates assume."""
    needs = [
        ("`prompt`", "", f"{PromptPrior().band[0]:.0%} to {PromptPrior().band[1]:.0%}"),
        ("`sft`", "`labels: [{}, {}]`".format(*SftPrior().labels), "{:.0%} to {:.0%}".format(*SftPrior().band)),
        ("`dpo`", "`pairs: [{}, {}]`".format(*DpoPrior().pairs), "{:.0%} to {:.0%}".format(*DpoPrior().band)),
        (
            "`rl`",
            "`prompts: [{}, {}]` or `trajectories: {}`".format(*RlPrior().prompts, RlPrior().trajectories),
            "{:.0%} to {:.0%}".format(*RlPrior().band),
        ),
    ]
    text = (
        f"Keys of `priors:` ({', '.join(Priors.model_fields)}). The defaults are the table of: {SOURCE}. The first "
        "number of a range is the gate's minimum. The bands are the article's claims; they are shown beside the "
        "measured values and decide nothing."
    )
    return f"## Priors\n\n{text}\n\n" + table(("technique", "data", "claimed accuracy"), needs)


def fields_table(kind: type[BaseModel]) -> str:
    """Return the fields of a model as a table; the column of meanings is left out when nothing is said."""
    rows = [
        (f"`{name}`", type_words(field.annotation) + limits(field), default_words(field), field.description or "")
        for name, field in kind.model_fields.items()
    ]
    if not any(row[3] for row in rows):
        return table(("key", "type", "default"), [row[:3] for row in rows])
    return table(("key", "type", "default", "meaning"), rows)


def type_words(annotation: Any) -> str:
    """Return a type as a writer of YAML thinks of it."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_words(inner[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_words(part) for part in inner)
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return f"list of {type_words(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(type_words(part) for part in inner)}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    raise SystemExit(f"docs/generate.py: no words for the type {annotation}")


def limits(field: FieldInfo) -> str:
    """Return the range of a field, in words."""
    found = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in field.metadata
        for name, sign in LIMITS.items()
        if getattr(constraint, name, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def default_words(field: FieldInfo) -> str:
    """Return a field's default; sections and required fields say so."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else {}
        return ", ".join(f"`{name}: {inner}`" for name, inner in changed.items()) or "its defaults"
    if value in ("", (), {}):
        return "empty"
    return "`null`" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def first_paragraph(kind: type) -> str:
    """Return the first paragraphs of a class's docstring as Markdown."""
    return " ".join((kind.__doc__ or "").split())


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |" for line in lines) + "\n"


def main() -> None:
    """Write every page."""
    for name, content in pages().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        sys.stdout.write(f"docs/{name}\n")


if __name__ == "__main__":
    main()
