"""What the reference article claims about each technique: editable priors, never measurements.

The numbers are those of the four-phase table in "Advanced fine-tuning techniques for multi-agent
orchestration: patterns from Amazon at scale" (AWS, January 2026). A use case may override any of them under
`priors:`. Gates read the data minima; the report prints the bands beside the measured values; nothing else
depends on them. `NOTES` says what a reader must know before trusting the table.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SOURCE = "Advanced fine-tuning techniques for multi-agent orchestration, AWS Machine Learning Blog, January 2026"

NOTES: tuple[str, ...] = (
    "The accuracy bands are claims without a named task, test set or interval. They are shown beside the "
    "measured values for comparison and never decide anything.",
    "Reinforcement learning needs prompts and a verifier rather than stored trajectories. The article asks "
    "for 10,000 or more trajectories; AWS's own guidance for reinforcement fine-tuning starts with 100 to "
    "200 prompts and reports strong results with 100 to 1,000. Either amount opens the gate here, and the "
    "verifier must pass its own check.",
    "None of the article's cited results used DPO, GRPO or DAPO: they came from supervised fine-tuning with "
    "rules, a fine-tuned embedding model, PPO, and a light classifier on extracted features. A lower rung, "
    "or a step beside the ladder, may be the better investment.",
    "The article spells DAPO out as 'Direct Advantage Policy Optimization' but links and describes "
    "decoupled clip and dynamic sampling policy optimization (arXiv 2503.14476), which is what the row "
    "`dapo` implements.",
    "A test set of 100 items cannot tell the bands apart: at 85 % right its 95 % interval runs from 77 to "
    "91 %. About 300 items is a working minimum for one gate, 1,000 or more for the last phase.",
)


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= pair[0] <= pair[1]:
        raise ValueError(f"a range runs from low to high and starts at 0 or above, not {pair[0]:g} to {pair[1]:g}")
    return pair


def _fractions(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[1] > 1:
        raise ValueError(f"accuracy is a fraction between 0 and 1, not {pair[1]:g}")
    return pair


Span = Annotated[tuple[int, int], AfterValidator(_ordered)]
Money = Annotated[tuple[float, float], AfterValidator(_ordered)]
Band = Annotated[tuple[float, float], AfterValidator(_ordered), AfterValidator(_fractions)]


class Phase(BaseModel):
    """What the article says of every phase: how long, how accurate, how expensive (US dollars)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weeks: Span = (0, 0)
    band: Band = (0.0, 1.0)
    investment_usd: Money = (0.0, 0.0)


class PromptPrior(Phase):
    """Phase 1, prompt engineering."""

    weeks: Span = (6, 8)
    band: Band = (0.60, 0.75)
    investment_usd: Money = (50_000, 80_000)


class SftPrior(Phase):
    """Phase 2, supervised fine-tuning: labelled examples needed, from the minimum to plenty."""

    weeks: Span = (12, 12)
    band: Band = (0.80, 0.85)
    investment_usd: Money = (120_000, 180_000)
    labels: Span = (500, 5_000)


class DpoPrior(Phase):
    """Phase 3, direct preference optimisation: preference pairs needed, from the minimum to plenty."""

    weeks: Span = (16, 16)
    band: Band = (0.85, 0.92)
    investment_usd: Money = (180_000, 280_000)
    pairs: Span = (1_000, 10_000)


class RlPrior(Phase):
    """Phase 4, GRPO and DAPO: prompts with a verifier, or stored reasoning trajectories."""

    weeks: Span = (24, 24)
    band: Band = (0.95, 0.98)
    investment_usd: Money = (400_000, 800_000)
    prompts: Span = (100, 1_000)
    trajectories: int = Field(default=10_000, ge=0)


class Priors(BaseModel):
    """The table as data. `Priors()` is the article's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: PromptPrior = PromptPrior()
    sft: SftPrior = SftPrior()
    dpo: DpoPrior = DpoPrior()
    rl: RlPrior = RlPrior()

    def phase(self, kind: str) -> Phase:
        """Return the phase of a technique kind: `prompt`, `sft`, `dpo` or `online`."""
        phases: dict[str, Phase] = {
            "prompt": self.prompt,
            "sft": self.sft,
            "dpo": self.dpo,
            "online": self.rl,
        }
        return phases[kind]


def needs(phase: Phase) -> str:
    """Return a phase's data need in words, for tables."""
    match phase:
        case SftPrior(labels=(low, high)):
            return f"{low:,} to {high:,} labelled examples"
        case DpoPrior(pairs=(low, high)):
            return f"{low:,} to {high:,} preference pairs"
        case RlPrior(prompts=(low, high), trajectories=trajectories):
            return f"{low:,} to {high:,} prompts with a verifier, or {trajectories:,} trajectories"
    return "a prompt and a test set"
