"""Recipes: what to train, on what, how. Typed and few; everything else is derived and printed.

A recipe is a YAML file whose `algorithm` names the row and thereby the fields that are allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ascent.customize.objectives.rows import ROWS, Kind, OnlineRow, Row, row_named, row_with
from ascent.customize.trainer import Optim, Schedule
from ascent.customize.yamlfile import load_yaml
from ascent.inference.lora import ALL_LINEAR, LoraConfig
from ascent.records.errors import BadInput, BadRecipe, UnknownName


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

    algorithm: str
    """The row; see the algorithms."""
    axes: dict[str, Any] = Field(default_factory=dict)
    """Other choices on the row's axes, such as {beta: 0.2} or {clip: [0.8, 1.28]}."""
    model: str
    """Start model: a name or id in the store, a model folder, or, for another run's checkpoint, that run's folder."""
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

    @property
    def row(self) -> Row:
        """The row with the recipe's choices on its axes."""
        return row_with(self.algorithm, self.axes)

    @model_validator(mode="after")
    def _row_exists(self) -> Self:
        try:
            row = self.row
        except BadInput as error:
            raise ValueError(str(error)) from error
        if RECIPES[row.kind] is not type(self):
            raise ValueError(f"row {row.name} is a {row.kind} row; it needs other fields than this recipe has")
        return self


class TeacherSpec(Part):
    """A model to learn from, and for `distill_sequence` how it is asked."""

    model: str
    """A name or id in the store or a folder; for `distill_sequence` also remote:URL#MODEL."""
    samples: int = Field(default=1, ge=1)
    """Answers per prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest answer."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest answer."""
    reward: str | None = None
    """A grader of the program: only answers that reach `minimum` are learnt from, the best of each prompt."""
    minimum: float = 1.0
    """Least value of `reward`."""


class SupervisedRecipe(RecipeBase):
    """Learning from texts: demonstrations (sft), raw text (cpt), or a teacher's distribution or answers (distill_*)."""

    data: Mixture
    """Rows with `input` and `target`, or `messages`; cpt also takes `text`; for distill_sequence prompts suffice."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per step; LoRA learns worse from batches above 32."""
    reasoning: Literal["train", "mask", "drop"] = "train"
    """Text between <think> and </think> of an answer: learn it, read it without learning it, or leave it out. Earlier
    turns of a conversation never keep theirs, as at serving."""
    teacher: TeacherSpec | None = None
    """Whom to learn from, for the distill rows."""
    optim: OptimSpec = OptimSpec()
    """Optimizer."""


class PreferenceRecipe(RecipeBase):
    """Learning from judged answers: pairs (dpo and its kin, reward_model), or single good and bad ones (kto)."""

    data: Mixture
    """Pairs: `input` or `messages`, `chosen`, `rejected`; single answers: `answer` and `good` (true or false)."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the pairs."""
    batch_size: int = Field(default=8, ge=1)
    """Pairs, or single answers, per step."""
    embedder: str | None = None
    """For rpo_relative: a sentence embedder of the store, such as all-minilm-l6-v2, that tells how alike prompts are;
    null takes the start model's own hidden states."""
    optim: OptimSpec = OptimSpec(lr=5e-5)
    """Optimizer."""


class JudgeSpec(Part):
    """A language model as grader, which must have shown that it agrees with people."""

    model: str
    """The judge: a name or id in the store, a folder, or remote:URL#MODEL."""
    rubric: Path
    """YAML file of the criteria."""
    gold: Path | None = None
    """Items with people's labels; the judge is measured on them before the run."""
    threshold: float = Field(default=0.6, gt=0, le=1)
    """Least agreement with people."""
    override: str | None = None
    """Why a judge that has not shown its agreement may reward all the same; it is recorded."""


class RewardSpec(Part):
    """Where the reward comes from: exactly one of grader, model, judge and teacher."""

    grader: str | None = None
    """A grader of the program, or a built-in one."""
    model: Path | None = None
    """A folder that `reward_model` trained."""
    judge: JudgeSpec | None = None
    """A language model by a rubric."""
    teacher: str | None = None
    """For opd: whose log-probs teach, a name or id in the store or a folder."""
    gold: str | None = None
    """A grader that is measured beside the reward and never trained on: when it falls while the reward rises, the run
    stops."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("grader", "model", "judge", "teacher") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of grader, model, judge and teacher, not {' and '.join(given) or 'none'}"
            )
        return self


class HarnessSpec(Part):
    """A multi-turn environment instead of one answer per prompt."""

    program: Path
    """The Python file that defines the environment."""
    environment: str
    """The environment's name in it."""
    max_turns: int = Field(default=4, ge=1)
    """Most assistant turns."""
    step_seconds: float = Field(default=2.0, gt=0)
    """Time limit of one step of the environment; a rollout that exceeds it is lost and drawn again."""


def _as_reward(value: Any) -> Any:
    return {"grader": value} if isinstance(value, str) else value


class OnlineRecipe(RecipeBase):
    """Reinforcement learning on sampled, graded answers."""

    prompts: Mixture
    """Tasks: rows with `input` and `expected`."""
    reward: Annotated[RewardSpec, BeforeValidator(_as_reward)] = RewardSpec(grader="reward")
    """What is raised: a grader's name, or a mapping."""
    harness: HarnessSpec | None = None
    """The environment of multi-turn rollouts; null asks each prompt once."""
    steps: int = Field(default=50, ge=1)
    """Optimizer steps."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Groups per rollout."""
    group_size: int = Field(default=8, ge=1)
    """Samples per prompt; a group baseline needs at least two."""
    minibatches: int = Field(default=1, ge=1)
    """Updates per rollout."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest answer; DAPO's soft punishment starts at three quarters of it."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature, also used when the trainer scores."""
    optim: OptimSpec = OptimSpec(lr=1e-4, schedule="constant", warmup_fraction=0.1)
    """Optimizer."""

    @model_validator(mode="after")
    def _group_and_teacher(self) -> Self:
        row = self.row
        assert isinstance(row, OnlineRow)
        if row.grouped and self.group_size < 2:
            raise ValueError(
                f"row {row.name}, axis baseline: {row.baseline} compares the samples of a prompt, and one sample "
                f"has nothing "
                "to be compared with; set group_size to at least 2, or take a row such as reinforce, reinforce++ or ppo"
            )
        if row.teacher != (self.reward.teacher is not None):
            raise ValueError(
                f"row {row.name}, axis baseline: {row.baseline}; reward.teacher goes with the baseline 'teacher' "
                f"(opd), and "
                "only with it"
            )
        return self


Recipe = SupervisedRecipe | PreferenceRecipe | OnlineRecipe
RECIPES: dict[Kind, type[SupervisedRecipe | PreferenceRecipe | OnlineRecipe]] = {
    "supervised": SupervisedRecipe,
    "preference": PreferenceRecipe,
    "online": OnlineRecipe,
}


def recipe_class(algorithm: str) -> type[SupervisedRecipe | PreferenceRecipe | OnlineRecipe]:
    """Return the recipe type of a row. Raises `UnknownName`."""
    return RECIPES[row_named(algorithm).kind]


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
    """Make every path that the recipe names relative to the recipe's folder."""
    changes: dict[str, Any] = {}
    for name in ("data", "prompts"):
        if hasattr(recipe, name):
            parts = getattr(recipe, name)
            changes[name] = tuple(part.model_copy(update={"path": folder / part.path}) for part in parts)
    if recipe.program is not None:
        changes["program"] = folder / recipe.program
    changes["model"] = _model_in(recipe.model, folder)
    if isinstance(recipe, SupervisedRecipe) and recipe.teacher is not None:
        changes["teacher"] = recipe.teacher.model_copy(update={"model": _model_in(recipe.teacher.model, folder)})
    if isinstance(recipe, OnlineRecipe):
        changes["reward"] = _rooted_reward(recipe.reward, folder)
        if recipe.harness is not None:
            changes["harness"] = recipe.harness.model_copy(update={"program": folder / recipe.harness.program})
    return recipe.model_copy(update=changes)


def _rooted_reward(reward: RewardSpec, folder: Path) -> RewardSpec:
    changes: dict[str, Any] = {}
    if reward.model is not None:
        changes["model"] = folder / reward.model
    if reward.teacher is not None:
        changes["teacher"] = _model_in(reward.teacher, folder)
    if reward.judge is not None:
        files = {
            name: folder / path for name in ("rubric", "gold") if (path := getattr(reward.judge, name)) is not None
        }
        changes["judge"] = reward.judge.model_copy(update={**files, "model": _model_in(reward.judge.model, folder)})
    return reward.model_copy(update=changes)


def _model_in(name: str, folder: Path) -> str:
    """A model folder beside the recipe, or the name as it is."""
    return str(folder / name) if (folder / name).is_dir() else name
