"""A use case: one folder with `usecase.yaml`, the user's own program, and data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from ascent.customize.objectives.rows import ROWS, OnlineRow, PreferenceRow
from ascent.customize.yamlfile import YamlFile, read_yaml
from ascent.ladder.priors import Priors
from ascent.records.errors import nearest

FILE = "usecase.yaml"
Risk = Literal["low", "medium", "high"]
Kind = Literal["prompt", "sft", "dpo", "online"]


def _kinds() -> dict[str, Kind]:
    """The rows that can be a stage: those that feed on demonstrations, pairs, or prompts with a reward."""
    kinds: dict[str, Kind] = {"prompt": "prompt", "sft": "sft"}
    for name, row in ROWS.items():
        if isinstance(row, PreferenceRow) and row.pairing != "unpaired" and row.score != "head":
            kinds[name] = "dpo"
        elif isinstance(row, OnlineRow) and not row.teacher:
            kinds[name] = "online"
    return kinds


KINDS = _kinds()
"""Row → technique kind. The order of the kinds is the order of the ladder."""

_RUNGS: tuple[Kind, ...] = ("prompt", "sft", "dpo", "online")


class Part(BaseModel):
    """Base of the sections of `usecase.yaml`: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Generator(Part):
    """A Python file whose `generate(folder, seed)` writes the data files that are absent."""

    file: Path
    seed: int = 0


class Data(Part):
    """Data files, relative to the use case's folder. Only `test` is always needed; gates name the rest."""

    test: Path
    train: Path | None = None
    validation: Path | None = None
    prompts: Path | None = None
    preferences: Path | None = None


class PromptSpec(Part):
    """What the model is told. Tuned stages see only `system`; the prompted baseline sees all of it."""

    system: str = ""
    instructions: str = ""
    examples: Path | None = None


class Abstention(Part):
    """When a tuned model must hand an answer over: the share of wrong ones among what passes is bounded.

    After training, the confidence threshold is chosen on the validation data so that `metric`, an error rate that does
    not apply to answers handed over, stays below `risk` with 95 % confidence. The program's `finish` hears the result.
    """

    metric: str
    risk: float = Field(gt=0, lt=1)


class SamplingSpec(Part):
    """How answers are sampled when they are measured (greedy) and how long they may get."""

    max_tokens: int = Field(default=128, ge=1)


class Primary(Part):
    """The one metric that decides, higher being better, and the value the use case needs."""

    name: str
    target: float


class Guard(Part):
    """A metric that must not get worse by `margin` or more while the primary improves.

    `limit` is what it must keep to, with its whole 95 % interval, before the target counts as met.
    """

    name: str
    direction: Literal["lower", "higher"]
    margin: float = Field(gt=0)
    limit: float | None = None


class Metrics(Part):
    """One primary metric, the guards, and metrics that are shown but never decide."""

    primary: Primary
    guards: tuple[Guard, ...] = ()
    report: tuple[str, ...] = ()

    @property
    def gating(self) -> tuple[str, ...]:
        """The metrics that decide: the primary and the guards."""
        return (self.primary.name, *(guard.name for guard in self.guards))

    @property
    def names(self) -> tuple[str, ...]:
        """Every metric to compute, the primary first, without repeats."""
        return tuple(dict.fromkeys([*self.gating, *self.report]))

    @model_validator(mode="after")
    def _guards_differ(self) -> Self:
        names = [guard.name for guard in self.guards]
        if len(set(names)) < len(names) or self.primary.name in names:
            raise ValueError("a metric may guard only once, and the primary metric cannot guard itself")
        return self


class StageSpec(Part):
    """One rung to climb: its algorithm row, a name that is unique in the use case, and recipe overrides."""

    row: str
    name: str = Field(default="", pattern=r"^[a-z0-9]?[a-z0-9_-]*$")
    recipe: dict[str, Any] = Field(default_factory=dict)

    @field_validator("row")
    @classmethod
    def _row_can_be_a_stage(cls, row: str) -> str:
        if row not in KINDS:
            raise ValueError(f"no stage has the row {row!r}{nearest(row, KINDS)}; known: {', '.join(KINDS)}")
        return row

    @property
    def kind(self) -> Kind:
        """The technique this row belongs to."""
        return KINDS[self.row]


class Costs(Part):
    """Prices for the forecast and the cost table."""

    machine_per_hour: float = Field(default=0.0, ge=0)
    currency: str = "USD"
    person_per_hour: float = Field(default=0.0, ge=0)
    minutes_per_label: float = Field(default=0.0, ge=0)

    def machine(self, seconds: float) -> float:
        """Return the price of machine time."""
        return self.machine_per_hour * seconds / 3600

    def labels(self, count: int) -> float:
        """Return the price of having people label `count` items."""
        return self.person_per_hour * self.minutes_per_label * count / 60


class Budget(Part):
    """What the whole climb may use. A limit that is absent does not bind."""

    minutes: float | None = Field(default=None, gt=0)
    cost: float | None = Field(default=None, gt=0)


class Gates(Part):
    """The gates' thresholds. An absent one takes the default of the use case's risk (see `Thresholds.of`)."""

    alpha: float | None = Field(default=None, gt=0, lt=0.5)
    power: float | None = Field(default=None, gt=0.5, lt=1)
    minimum_items: int | None = Field(default=None, ge=1)
    worthwhile_gain: float | None = Field(default=None, gt=0, lt=1)
    underpowered: Literal["warn", "collect"] | None = None
    max_unscored: float | None = Field(default=None, ge=0, le=1)
    min_informative: float | None = Field(default=None, ge=0, le=1)
    min_headroom: float | None = Field(default=None, ge=0, le=1)
    verifier_agreement: float | None = Field(default=None, ge=0, le=1)
    continue_past_target: bool = False


class Thresholds(Part):
    """What the gates apply, complete.

    `alpha` bounds the chance of promoting a model that is no better; `power` is the chance of noticing a gain
    of `worthwhile_gain`; `minimum_items` is the fewest paired test items a promotion may rest on.
    `max_unscored` is the largest fraction of items without a grade. `min_informative` and `min_headroom` are
    the smallest fraction of sampled groups with mixed rewards, and the smallest pass@k - pass@1, that make
    online learning worth its cost. `verifier_agreement` is how often the reward must side with the reference
    answers.
    """

    alpha: float
    power: float
    minimum_items: int
    worthwhile_gain: float = 0.05
    underpowered: Literal["warn", "collect"] = "warn"
    max_unscored: float = 0.05
    min_informative: float = 0.10
    min_headroom: float = 0.02
    verifier_agreement: float = 0.95
    continue_past_target: bool = False

    @classmethod
    def of(cls, risk: Risk, gates: Gates | None = None) -> Thresholds:
        """Return the defaults of a risk with a use case's own values on top.

        100 items leave a 95 % interval of about ±7 points around 85 %, 300 items about ±4 (Wilson 1927);
        hence the minima. High risk also refuses to start a stage that the test set is too small to judge.
        """
        defaults: dict[Risk, dict[str, Any]] = {
            "low": {"alpha": 0.10, "power": 0.80, "minimum_items": 100},
            "medium": {"alpha": 0.05, "power": 0.80, "minimum_items": 200},
            "high": {"alpha": 0.01, "power": 0.90, "minimum_items": 300, "underpowered": "collect"},
        }
        own = gates.model_dump(exclude_none=True) if gates else {}
        return cls(**{**defaults[risk], **own})


class UseCase(Part):
    """`usecase.yaml`, checked. `folder` is where it lies; `path` resolves a file it names."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    task: str = Field(min_length=1)
    risk: Risk = "medium"
    model: str = Field(min_length=1)
    program: Path
    generator: Generator | None = None
    data: Data
    prompt: PromptSpec = PromptSpec()
    sampling: SamplingSpec = SamplingSpec()
    abstain: Abstention | None = None
    metrics: Metrics
    reward: str | None = None
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    costs: Costs = Costs()
    priors: Priors = Priors()
    budget: Budget = Budget()
    gates: Gates = Gates()

    _source: YamlFile[UseCase] | None = PrivateAttr(default=None)
    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="before")
    @classmethod
    def _short_stages(cls, value: Any) -> Any:
        """Let a stage be written as its row alone: `stages: [prompt, sft]`."""
        if isinstance(value, dict) and isinstance(value.get("stages"), list):
            stages = [{"row": stage} if isinstance(stage, str) else stage for stage in value["stages"]]
            return {**value, "stages": stages}
        return value

    @model_validator(mode="after")
    def _name_stages(self) -> Self:
        named = tuple(
            stage if stage.name else stage.model_copy(update={"name": stage.row.replace("+", "p")})
            for stage in self.stages
        )
        object.__setattr__(self, "stages", named)
        return self

    @property
    def folder(self) -> Path:
        """The folder that `usecase.yaml` was loaded from."""
        return self._folder

    @property
    def thresholds(self) -> Thresholds:
        """The gates' thresholds: the risk's defaults with this use case's own values on top."""
        return Thresholds.of(self.risk, self.gates)

    def path(self, file: Path) -> Path:
        """Return where a file that the use case names lies."""
        return self._folder / file

    def stage(self, name: str) -> StageSpec | None:
        """Return the stage of that name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def check_program(self, names: Iterable[str]) -> None:
        """Check every metric and the reward against the graders that exist.

        Raises:
            BadRecipe: a name no grader has, with its line and the nearest name that exists.
        """
        known = sorted(set(names))
        metrics = self.metrics
        asked: list[tuple[str, tuple[int | str, ...]]] = [
            (metrics.primary.name, ("metrics", "primary", "name")),
            *((guard.name, ("metrics", "guards", i, "name")) for i, guard in enumerate(metrics.guards)),
            *((name, ("metrics", "report", i)) for i, name in enumerate(metrics.report)),
        ]
        if self.reward is not None:
            asked.append((self.reward, ("reward",)))
        if self.abstain is not None:
            asked.append((self.abstain.metric, ("abstain", "metric")))
        for name, loc in asked:
            if name not in known:
                raise self._error(
                    f"no grader is called {name!r}{nearest(name, known)}; define a function of that name in "
                    f"{self.program}, or use one of: {', '.join(known) or 'none'}",
                    *loc,
                )
        if self.abstain is not None and self.data.validation is None:
            raise self._error(
                "abstain needs labelled items to choose its threshold on; name them as data.validation", "abstain"
            )

    def _error(self, message: str, *loc: int | str) -> Exception:
        return self._source.error(message, *loc) if self._source else ValueError(message)

    def _check_order(self) -> None:
        first, names = self.stages[0], set[str]()
        if first.row != "prompt":
            raise self._error(
                f"the first stage is {first.row!r}; every later stage is compared with the prompted model, "
                "so begin with 'prompt'",
                "stages",
                0,
            )
        for i, stage in enumerate(self.stages):
            if stage.name in names:
                raise self._error(
                    f"a second stage is called {stage.name!r}; give it a name of its own: "
                    f"{{row: {stage.row}, name: {stage.name}-2}}",
                    "stages",
                    i,
                )
            names.add(stage.name)
            before = self.stages[i - 1] if i else stage
            if _RUNGS.index(stage.kind) < _RUNGS.index(before.kind) or (i and stage.kind == "prompt"):
                raise self._error(
                    f"{stage.row!r} comes after {before.row!r}; stages climb in the order "
                    "prompt, sft, dpo, then grpo or dapo",
                    "stages",
                    i,
                )

    def _check_files(self) -> None:
        if not self.path(self.program).is_file():
            raise self._error(f"no such file: {self.program}, looked for in {self._folder}", "program")
        if self.generator and not self.path(self.generator.file).is_file():
            raise self._error(f"no such file: {self.generator.file}, looked for in {self._folder}", "generator", "file")
        named = [(file, ("data", key)) for key, file in self.data if file is not None]
        if self.prompt.examples is not None:
            named.append((self.prompt.examples, ("prompt", "examples")))
        for file, loc in named:
            if self.generator is None and not self.path(file).is_file():
                raise self._error(
                    f"no such file: {file}, looked for in {self._folder}; write it, or name a generator that "
                    "does: generator: {file: generate.py, seed: 7}",
                    *loc,
                )


def load_usecase(folder: Path) -> UseCase:
    """Load `usecase.yaml` from a folder (or the file itself) and check all that needs no Python.

    Raises:
        BadRecipe: with file, line and key: a malformed file, an unknown key or value, a stage out of
            order, a file that does not exist. `UseCase.check_program` checks the names of metrics.
    """
    file = folder if folder.is_file() else folder / FILE
    source = read_yaml(file, UseCase)
    usecase = source.value
    usecase._source, usecase._folder = source, file.parent
    usecase._check_order()
    usecase._check_files()
    return usecase
