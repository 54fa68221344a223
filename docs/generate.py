"""Writes the generated pages of this folder: `make docs`. A test fails when a page is not what this would write.

Names, types, defaults and meanings come from the code; only the sentences around them are written here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
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
from ascent.customize.objectives.rows import ROWS, PreferenceRow, Row, SupervisedRow
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
    "stages": "The rungs, in order: prompt, sft, a preference row, an online row. Each is a row's name or a mapping.",
    "costs": "Prices for forecasts and the report.",
    "priors": "How much data each technique is taken to need.",
    "budget": "What the whole climb may use.",
    "gates": "The gates' thresholds, where the defaults of the risk do not fit.",
}


def pages() -> dict[str, str]:
    """Return file name → content of every generated page."""
    server = beside("server_pages")
    return {
        "api.md": NOTE + server.api_page(table),
        "cli.md": NOTE + cli_page(),
        "recipes.md": NOTE + recipes_page(),
        "serving.md": NOTE + server.serving_page(fields_table),
        "techniques.md": NOTE + techniques_page(),
        "usecase.md": NOTE + usecase_page(),
        **benchmark_pages(),
    }


def beside(name: str) -> types.ModuleType:
    """Load a module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark_pages() -> dict[str, str]:
    """The page and plot of the last `make bench`, from its results alone; none where there are no results."""
    folder = FOLDER.parent / "benchmarks"
    if not all((folder / name).is_file() for name in ("results.json", "serving.json")):
        return {}
    spec = importlib.util.spec_from_file_location("benchmarks_page", folder / "page.py")
    assert spec is not None and spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    results, serving = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("results.json", "serving.json")
    )
    found: dict[str, str] = page.pages(results, serving)
    return {name: NOTE + text if name.endswith(".md") else text for name, text in found.items()}


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
        "`algorithm` names the row ([techniques](techniques.md)) and thereby the fields that are allowed. An unknown",
        "key is an error that names the nearest valid one. Paths are relative to the recipe.\n",
    ]
    recipes = (SupervisedRecipe, PreferenceRecipe, OnlineRecipe)
    sections = (DataSpec, LoraSpec, OptimSpec, TeacherSpec, RewardSpec, JudgeSpec, HarnessSpec)
    for kind in (*recipes, *sections):
        parts += [f"## {kind.__name__}\n", f"{kind.__doc__}\n", fields_table(kind)]
    return "\n".join(parts)


DISAGREEMENTS = (
    (
        "KL term",
        "`grpo`, any row with `kl`",
        "TRL's k3 in the loss has, on policy, the expected gradient of KL(ref‖π), the forward one; only with "
        "`use_bias_correction_kl` is it right. Ours has the value of k3 and the gradient of KL(π‖ref), shown by full "
        "enumeration in `tests/oracles/test_objectives.py`.",
    ),
    (
        "dapo",
        "`dapo`",
        'TRL\'s `loss_type="dapo"` is the token mean alone: its upper bound stays 1.2, groups without spread stay, and '
        "length is not punished. Ours is all four parts of the paper.",
    ),
    (
        "cispo bounds",
        "`cispo`",
        "With ε_high unset TRL clamps the ratio to at most 0.2, which scales every step by a fifth or less. Ours is "
        "[0, 5].",
    ),
    (
        "NLL of rpo_nll",
        "`rpo_nll`",
        "TRL averages the NLL over the tokens of all chosen answers, the paper (Eq. 1) over answers after dividing by "
        "their length. They are equal where chosen answers are equally long.",
    ),
    (
        "apo_zero scale",
        "`apo_zero`",
        "TRL's paired form adds the two answers of a pair, ours averages over answers, as KTO does: half of theirs.",
    ),
    (
        "ORPO's likelihood",
        "`orpo`",
        "TRL takes it over prompt and answer. Ours is the answer's, per token, as their `disable_prompt_loss`: a "
        "prompt is given, not learnt.",
    ),
    (
        "label smoothing",
        "`dpo`",
        "TRL 1.16 has no cDPO loss any more; its `robust` divides by 1 − 2ε and can be negative without bound. Ours is "
        "Mitchell's (1−ε)·link(m) + ε·link(−m).",
    ),
    (
        "group deviation",
        "`grpo` and kin",
        "None: both take the sample deviation (ddof 1) plus 1e-4. The paper does not say which.",
    ),
)
"""Topic, rows, what differs from TRL 1.16 and why ours is right; `tests/oracles/test_trl.py` compares the rest."""

ADVICE = (
    "`gspo`, `gspo_token`: the interval of 3e-4 and 4e-4 suits answers of a thousand tokens. With short answers a bf16 "
    "sampler alone leaves it; widen `clip` about as 1/√length, and use `correction`, so that old log-probs are the "
    "trainer's own.",
    "`rpo_relative`: ω divides each margin by about the batch's size, so β means less in a larger batch; "
    "`batch_size: 1` is DPO.",
    "`kto`: keep desirable·n_good and undesirable·n_bad within a third of each other; a batch needs two prompts.",
    "Preference rows: the chosen answer's likelihood usually falls with the rejected one's; watch `chosen_nll`, and "
    "give `nll` a share where it must not.",
    "Online rows: `correction: truncate` costs one more forward pass a rollout and bounds what a sampler's rounding "
    "can do; `mismatch_kl` in the log says whether it is needed.",
)

PICKED = {
    "supervised": "the prompted model misses the target and there are enough demonstrations (`priors.sft.labels`)",
    "preference": "there are enough pairs, given or made from the champion's own graded samples (`priors.dpo.pairs`)",
    "online": "a verifier told right from wrong answers, some groups of samples differ in reward, and pass@k exceeds "
    "pass@1",
}


def techniques_page() -> str:
    """The rows with what they feed on, their axes, and where they differ from TRL."""
    rows = [(f"`{row.name}`", row.kind, data_words(row), row.source) for row in ROWS.values()]
    parts = [
        "# Techniques\n",
        "Every technique is a frozen row of choices; the trainer does not know which row it runs. A new one is one",
        "entry in `ascent/customize/objectives/rows.py` and one identity test. A recipe names the row as `algorithm`",
        "and may choose otherwise on its axes: `axes: {beta: 0.2}`.\n",
        table(("row", "kind", "data", "from"), rows),
        "Beside the rows: [frozen features and a calibrated classifier](../ascent/customize/features/__init__.py),",
        "[embedding tuning](cli.md#ascent-embed) and [multi-turn episodes with tools](recipes.md#harnessspec).\n",
        "## When the ladder picks a kind\n",
        table(("kind", "a stage of it starts when"), [(kind, words) for kind, words in PICKED.items()]),
        "A stage that starts is kept only if a paired test on held-out items shows it better and no guard is harmed.\n",
    ]
    for kind in dict.fromkeys(type(row) for row in ROWS.values()):
        own = [row for row in ROWS.values() if type(row) is kind]
        axes = [field.name for field in dataclasses.fields(kind) if field.name not in ("name", "source", "kind")]
        formula, _, meanings = (kind.__doc__ or "").partition("Attributes:")
        parts += [f"## {own[0].kind}\n", " ".join(formula.split()) + "\n", axes_table(meanings)]
        cells = [(f"`{row.name}`", choices(row, axes)) for row in own]
        parts.append(table(("row", "choices other than the default"), cells))
    parts += ["## Advice\n", *(f"- {words}" for words in ADVICE), ""]
    parts += [
        "## Where TRL differs\n",
        "Losses and gradients equal those of TRL 1.16 to 1e-5 in fp32 (`tests/oracles/test_trl.py`), but for:\n",
        table(("topic", "rows", "difference"), list(DISAGREEMENTS)),
    ]
    return "\n".join(parts)


def data_words(row: Row) -> str:
    """What a row feeds on."""
    if isinstance(row, SupervisedRow):
        asked = "raw text, demonstrations mixed in" if row.corpus else "demonstrations"
        if row.name == "distill_sequence":
            return "prompts and a teacher on any engine"
        return f"{asked} and a teacher of the same vocabulary" if row.teacher else asked
    if isinstance(row, PreferenceRow):
        if row.pairing == "unpaired":
            return "single answers, good or bad"
        return "pairs with given rewards" if row.scored else "pairs"
    if row.teacher:
        return "prompts and a teacher of the same vocabulary"
    return "prompts and a reward" + (" (a critic is trained beside)" if row.critic else "")


def axes_table(meanings: str) -> str:
    """The attributes of a row's docstring as a table."""
    found: list[tuple[str, str]] = []
    for line in meanings.splitlines():
        name, colon, words = line.strip().partition(": ")
        if colon and line.startswith(" " * 8) and not line.startswith(" " * 9):
            found.append((", ".join(f"`{part}`" for part in name.split(", ")), words))
        elif line.strip() and found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return table(("axis", "meaning"), found)


def choices(row: Row, axes: list[str]) -> str:
    """A row's choices where they are not the kind's default."""
    defaults = {field.name: field.default for field in dataclasses.fields(row)}
    own = [f"{axis} {axis_words(getattr(row, axis))}" for axis in axes if getattr(row, axis) != defaults[axis]]
    return ", ".join(own) or "the defaults"


def axis_words(value: Any) -> str:
    """Return a row's choice on an axis."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ", ".join(
            f"{name} {inner:.5g}" for name, inner in dataclasses.asdict(value).items() if inner is not None
        )
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


def cell_words(text: str) -> str:
    """Return a text that may stand in a table's cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", text.replace("\n", " "))


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(cell_words(cell) for cell in line)} |" for line in lines) + "\n"


def main() -> None:
    """Write every page."""
    for name, content in pages().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        sys.stdout.write(f"docs/{name}\n")


if __name__ == "__main__":
    main()
