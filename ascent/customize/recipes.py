"""Recipes: what to train, on what, how. Typed and few; everything else is derived and printed.

A recipe is a YAML file whose `algorithm` names the row and thereby the fields that are allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ascent.customize.objectives.rows import ROWS, row_named
from ascent.customize.trainer import Optim, Schedule
from ascent.customize.yamlfile import load_yaml
from ascent.inference.lora import ALL_LINEAR, LoraConfig
from ascent.records.errors import BadRecipe, UnknownName


class Part(BaseModel):
    """Base of recipe sections: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LoraSpec(Part):
    """A low-rank adapter. Adapting all linear layers beats attention only at any rank ("LoRA without regret", 2025)."""

    rank: int = Field(default=16, ge=1)
    """Rank r of A and B."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Projections to adapt: `all-linear`, or a list such as [q_proj, v_proj]."""

    @property
    def config(self) -> LoraConfig:
        """The adapter as the model takes it."""
        return LoraConfig(self.rank, self.alpha, ALL_LINEAR if self.targets == "all-linear" else self.targets)


class OptimSpec(Part):
    """AdamW and its schedule."""

    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate; with LoRA about ten times that of full fine-tuning."""
    schedule: Schedule = "cosine"
    """constant, linear (to zero) or cosine (to a tenth)."""
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps in which the rate rises linearly."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""

    @property
    def optim(self) -> Optim:
        """The settings as the trainer takes them."""
        return Optim(**self.model_dump())


class DataSpec(Part):
    """One data file of a mixture."""

    path: Path
    """jsonl, csv or parquet, relative to the recipe."""
    weight: float = Field(default=1.0, gt=0)
    """Relative share of the rows drawn from this file."""


def _as_mixture(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str | Path) else value


Mixture = Annotated[tuple[DataSpec, ...], BeforeValidator(_as_mixture), Field(min_length=1)]


class RecipeBase(Part):
    """What every recipe has."""

    model: str
    """Start model: a name or id in the store, or a folder."""
    seed: int = 0
    """Seeds adapter initialisation, data order and sampling."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute type of the frozen base; trainable weights and log-probs are fp32 in both."""
    lora: LoraSpec | None = LoraSpec()
    """The adapter, or null to train all weights."""
    token_budget: int = Field(default=2048, ge=64)
    """Tokens per micro-batch: bounds memory, never changes the result."""
    checkpoint_every: int = Field(default=25, ge=1)
    """Steps between checkpoints."""
    system: str = ""
    """System message of every prompt built from `input`."""
    program: Path | None = None
    """The use case's program file, for `prepare`, `finish` and graders."""


class SftRecipe(RecipeBase):
    """Supervised fine-tuning on demonstrations."""

    algorithm: Literal["sft"] = "sft"
    """The row."""
    data: Mixture
    """Demonstrations: rows with `input` and `target`, or `messages`."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per step; LoRA learns worse from batches above 32."""
    optim: OptimSpec = OptimSpec()
    """Optimizer."""


class DpoRecipe(RecipeBase):
    """Direct preference optimization on pairs."""

    algorithm: Literal["dpo"] = "dpo"
    """The row."""
    data: Mixture
    """Preferences: rows with `input` or `messages`, `chosen` and `rejected`."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the pairs."""
    batch_size: int = Field(default=8, ge=1)
    """Pairs per step."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped pairs."""
    nll: float = Field(default=0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood per token; keeps its probability from falling."""
    optim: OptimSpec = OptimSpec(lr=5e-5)
    """Optimizer."""


class OnlineRecipe(RecipeBase):
    """Reinforcement learning from a grader."""

    algorithm: Literal["grpo", "dapo"]
    """The row."""
    prompts: Mixture
    """Tasks: rows with `input` and `expected`."""
    reward: str = "reward"
    """The grader whose value is the reward."""
    steps: int = Field(default=50, ge=1)
    """Optimizer steps."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Groups per rollout."""
    group_size: int = Field(default=8, ge=2)
    """Samples per prompt; a group baseline needs at least two."""
    minibatches: int = Field(default=1, ge=1)
    """Updates per rollout."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest answer; DAPO's soft punishment starts at three quarters of it."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature, also used when the trainer scores."""
    refills: int = Field(default=3, ge=0)
    """DAPO: how often a step's prompts may be drawn again to replace groups without spread."""
    kl: float | None = Field(default=None, ge=0)
    """Weight of the KL to the start model; null keeps the row's own (grpo 0.04, dapo 0)."""
    optim: OptimSpec = OptimSpec(lr=1e-4, schedule="constant", warmup_fraction=0.1)
    """Optimizer."""


Recipe = SftRecipe | DpoRecipe | OnlineRecipe


def recipe_class(algorithm: str) -> type[SftRecipe | DpoRecipe | OnlineRecipe]:
    """Return the recipe type of a row. Raises `UnknownName`."""
    row_named(algorithm)
    for kind in get_args(Recipe):
        if algorithm in get_args(kind.model_fields["algorithm"].annotation):
            found: type[SftRecipe | DpoRecipe | OnlineRecipe] = kind
            return found
    raise UnknownName("algorithm", algorithm, ROWS)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file; relative paths in it are relative to it.

    Raises:
        BadRecipe: a malformed file, an unknown key (with the nearest valid one) or a value out of range, with its line.
    """
    algorithm, line = _algorithm(path)
    try:
        kind = recipe_class(algorithm)
    except UnknownName as error:
        raise BadRecipe(str(error), file=path, line=line, field="algorithm") from error
    return _rooted(load_yaml(path, kind), path.parent)


def _algorithm(path: Path) -> tuple[str, int]:
    """Return the recipe's algorithm and its line. A file that is no mapping is left to `load_yaml`, which says why."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return "sft", 1
    if not isinstance(root, yaml.MappingNode):
        return "sft", 1
    for key, value in root.value:
        if key.value == "algorithm" and value.value:
            return str(value.value), key.start_mark.line + 1
    raise BadRecipe(
        f"the recipe names no algorithm; add a line such as 'algorithm: sft' ({', '.join(ROWS)})", file=path
    )


def _rooted(recipe: Recipe, folder: Path) -> Recipe:
    changes: dict[str, Any] = {}
    for name in ("data", "prompts"):
        if hasattr(recipe, name):
            parts = getattr(recipe, name)
            changes[name] = tuple(part.model_copy(update={"path": folder / part.path}) for part in parts)
    if recipe.program is not None:
        changes["program"] = folder / recipe.program
    if (folder / recipe.model).is_dir():
        changes["model"] = str(folder / recipe.model)
    return recipe.model_copy(update=changes)
