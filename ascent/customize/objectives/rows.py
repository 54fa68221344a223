"""The rows: every algorithm is a frozen choice on a few axes. Adding one is one entry here and one identity test.

A row holds no code: `losses.py` reads its axes on the training side, `credit.py` on the sampling side. Choices that
do not go together are refused where the row is made, so that an override in a recipe fails before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from ascent.records.errors import BadInput, UnknownName, nearest

Kind = Literal["supervised", "preference", "online"]


@dataclass(frozen=True)
class Clip:
    """The interval in which the ratio ρ = π/π_old moves freely, for example [0.8, 1.28]: bounds are absolute.

    With `dual` an answer with A < 0 costs at most dual·|A|, however far ρ has grown (arXiv 1912.09729 Eq. 5).
    """

    low: float
    high: float
    dual: float | None = None

    def __post_init__(self) -> None:
        if self.dual is not None and self.dual <= 1:
            raise ValueError("a dual clip bounds ρ for negative advantages and must be above 1")
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(f"a clip interval is absolute and contains 1, got [{self.low}, {self.high}]")


@dataclass(frozen=True)
class SupervisedRow:
    """Σ w·(ce·(−ℓ) + D): cross-entropy on the target tokens, and a divergence D to a teacher's distribution.

    Attributes:
        weights: how tokens are averaged over the global batch.
        ce: weight of the cross-entropy.
        divergence: forward KL(T‖S), reverse KL(S‖T) or the generalised JSD of GKD, arXiv 2306.13649 Eq. 1; per token.
        beta: the mixture β of the JSD; M = β·T + (1−β)·S.
        corpus: whether rows are raw text, of which every token but the first is a target.
    """

    name: str
    source: str
    weights: str = "token_mean"
    ce: float = 1.0
    divergence: Literal["none", "forward", "reverse", "jsd"] = "none"
    beta: float = 0.5
    corpus: bool = False
    kind: ClassVar[Kind] = "supervised"

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError("beta is a share between 0 and 1; its limits are the divergences 'forward' and 'reverse'")
        if self.ce == 0 and self.divergence == "none":
            raise ValueError("with ce 0 and no divergence there is nothing to learn; set one of them")

    @property
    def teacher(self) -> bool:
        """Whether a teacher model is needed."""
        return self.divergence != "none"


@dataclass(frozen=True)
class PreferenceRow:
    """s(y) = norm_t(ℓ_t − ref·ℓ_ref,t); m = β(s_w − s_l) − γ; loss = (1−ε)·link(m) + ε·link(−m) + α·NLL(y_w)/|y_w|.

    Attributes:
        beta: strength of the tie to the reference (τ of IPO, λ of ORPO).
        score: sum or mean of the tokens' log-ratios, the mean log-prob's log-odds (ORPO), or a reward head's output.
        reference: whether the start model's log-probs are subtracted.
        pairing: chosen with its own rejected; every chosen with every rejected of the batch; or each answer for itself.
        link: what a margin costs.
        label_smoothing: assumed share ε of flipped pairs (cDPO).
        nll: weight α of the chosen answer's negative log-likelihood per token.
        gamma: margin that the chosen answer must win by, inside the link.
        eta: scale of given rewards (rpo_reward), or of a given margin (reward model).
        temperature: T of the prompt similarities that weigh cross pairs (rpo_relative).
        anchor: z0 of unpaired rows: the clamped KL over mismatched answers, or 0.
        desirable, undesirable: weights of good and bad answers of unpaired rows.
        centring: weight of (r_w + r_l)², which fixes a reward model's free constant.
    """

    name: str
    source: str
    beta: float = 0.1
    score: Literal["sum", "mean", "log_odds", "head"] = "sum"
    reference: bool = True
    pairing: Literal["pair", "cross", "unpaired"] = "pair"
    link: Literal["logistic", "odds_ratio", "squared", "reward_squared", "reward_kl", "sigmoid"] = "logistic"
    label_smoothing: float = 0.0
    nll: float = 0.0
    gamma: float = 0.0
    eta: float = 1.0
    temperature: float = 0.5
    anchor: Literal["zero", "kl"] = "zero"
    desirable: float = 1.0
    undesirable: float = 1.0
    centring: float = 0.0
    kind: ClassVar[Kind] = "preference"

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.temperature <= 0:
            raise ValueError("beta and temperature must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError("label_smoothing is a share below 0.5 of flipped pairs")
        if min(self.nll, self.gamma, self.eta, self.desirable, self.undesirable, self.centring) < 0:
            raise ValueError("weights and margins cannot be negative")
        if (self.pairing == "unpaired") != (self.link == "sigmoid"):
            raise ValueError("the link 'sigmoid' goes with the pairing 'unpaired', and only with it")
        if self.label_smoothing and self.link != "logistic":
            raise ValueError("label_smoothing goes with the link 'logistic' only; set it to 0")
        if self.score in ("head", "log_odds") and self.reference:
            raise ValueError(f"the score {self.score!r} has no reference; set reference to false")
        if self.score == "head" and (self.nll or self.pairing != "pair"):
            raise ValueError("a reward head scores pairs and has no likelihood; set nll to 0 and pairing to 'pair'")

    @property
    def scored(self) -> bool:
        """Whether pairs need given rewards."""
        return self.link in ("reward_squared", "reward_kl")


@dataclass(frozen=True)
class OnlineRow:
    """−Σ w·c·ψ(r, A) + kl·Σ w·KL − entropy·Σ w·H over sampled, graded groups.

    r pools the log-ratios over a sequence, c corrects a mismatch between sampler and trainer.

    Attributes:
        baseline: what is subtracted from the reward; a critic or a teacher gives every token its own advantage.
        scale: what the centred reward is divided by.
        returns: the whole sequence's reward for every token, or the reward from a token on.
        ratio: per token, or pooled over the sequence: mean (value and gradient), mean with the gradient of the token,
            sum, or mean of clipped log-ratios.
        surrogate: ψ.
        clip: the absolute ratio interval of ψ.
        gate: temperatures τ+, τ− of the soft gate.
        weights: how tokens are averaged over the global batch.
        refills: how often new prompts are drawn in a step for groups without spread, which go; null keeps them.
        overlong: whether DAPO's soft overlong punishment is added to the reward.
        reward_kl: weight of k1 = ℓ − ℓ_ref taken off the reward.
        kl: weight of the KL in the loss (value of k3, gradient of the reverse KL).
        entropy: weight of the entropy bonus.
        correction: how the rollout's mismatch to the trainer is corrected; see `ratio.corrections`.
        correction_bounds: the interval of the correction; null for its usual one.
        gae: discount γ and trace λ of the critic's advantages.
        value: clip range c and weight of the critic's loss.
        lookahead: rollouts that are sampled ahead while the policy trains; 1 is one step off the policy.
    """

    name: str
    source: str
    baseline: Literal["none", "batch_mean", "group_mean", "leave_one_out", "critic", "teacher"] = "group_mean"
    scale: Literal["none", "group_std", "group_mean", "batch_std", "whiten_tokens"] = "group_std"
    returns: Literal["sequence", "to_go"] = "sequence"
    ratio: Literal["token", "sequence", "sequence_token", "sequence_sum", "geometric"] = "token"
    surrogate: Literal["policy_gradient", "min_clip", "sg_clip", "soft_gate", "plain"] = "min_clip"
    clip: Clip = field(default=Clip(0.8, 1.2))
    gate: tuple[float, float] = (1.0, 1.05)
    weights: str = "seq_mean_token_mean"
    refills: int | None = None
    overlong: bool = False
    reward_kl: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    correction: Literal["none", "truncate", "token_mask", "sequence_mask"] = "none"
    correction_bounds: tuple[float, float] | None = None
    gae: tuple[float, float] = (1.0, 0.95)
    value: tuple[float, float] = (0.2, 0.1)
    lookahead: Literal[0, 1] = 0
    kind: ClassVar[Kind] = "online"

    def __post_init__(self) -> None:
        if self.critic and self.returns != "to_go":
            raise ValueError("a critic predicts the reward from a token on; set returns to 'to_go'")
        if self.returns == "to_go" and self.scale not in ("none", "whiten_tokens"):
            raise ValueError("returns 'to_go' differ within a sequence; set scale to 'none' or 'whiten_tokens'")
        if self.ratio != "token" and self.weights == "token_mean":
            raise ValueError(f"a ratio per {self.ratio} weighs sequences; set weights to 'seq_mean_token_mean'")
        if self.ratio != "token" and self.returns == "to_go" and self.ratio != "sequence_token":
            raise ValueError(
                "a pooled ratio has one advantage a sequence; set returns to 'sequence' or ratio to 'token'"
            )
        if (self.ratio == "geometric") != (self.surrogate == "plain"):
            raise ValueError("the ratio 'geometric' is clipped already; it goes with the surrogate 'plain'")
        if self.scale == "group_mean" and self.baseline != "group_mean":
            raise ValueError("scale 'group_mean' divides what baseline 'group_mean' has centred")
        if self.lookahead and self.correction == "none":
            raise ValueError("rollouts sampled ahead are stale; set correction to 'truncate' or a mask")
        if min(self.kl, self.reward_kl, self.entropy) < 0:
            raise ValueError("kl, reward_kl and entropy cannot be negative")

    @property
    def keep_dead_groups(self) -> bool:
        """Whether groups without spread stay in the batch."""
        return self.refills is None

    @property
    def critic(self) -> bool:
        """Whether a value head is trained beside the policy."""
        return self.baseline == "critic"

    @property
    def teacher(self) -> bool:
        """Whether a teacher scores the samples."""
        return self.baseline == "teacher"

    @property
    def grouped(self) -> bool:
        """Whether an advantage compares the samples of one prompt, so that one sample says nothing."""
        return self.baseline in ("group_mean", "leave_one_out") or self.scale in ("group_std", "group_mean")


Row = SupervisedRow | PreferenceRow | OnlineRow

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        SupervisedRow("sft", "maximum likelihood on demonstrations; per-token mean over the global batch"),
        SupervisedRow(
            "distill_sequence",
            "sequence-level distillation: maximum likelihood on a teacher's answers (Kim and Rush 2016, arXiv "
            "1606.07947 §3.2)",
        ),
        SupervisedRow(
            "cpt",
            "continued pre-training: maximum likelihood on raw text, documents packed side by side (Gururangan et al. "
            "2020, arXiv 2004.10964)",
            corpus=True,
        ),
        SupervisedRow(
            "distill_forward",
            "logit distillation, forward KL(T‖S) over the vocabulary (Hinton et al. 2015, arXiv 1503.02531)",
            ce=0.0,
            divergence="forward",
        ),
        SupervisedRow(
            "distill_reverse",
            "logit distillation, reverse KL(S‖T) (MiniLLM, Gu et al. 2023, arXiv 2306.08543 Eq. 1)",
            ce=0.0,
            divergence="reverse",
        ),
        SupervisedRow(
            "distill_jsd",
            "logit distillation, generalised JSD(β) (GKD, Agarwal et al. 2023, arXiv 2306.13649 Eq. 1)",
            ce=0.0,
            divergence="jsd",
        ),
        PreferenceRow("dpo", "Rafailov et al. 2023, arXiv 2305.18290 Eq. 7; label smoothing: Mitchell 2023, Eq. 3"),
        PreferenceRow(
            "ipo",
            "Azar et al. 2023, arXiv 2310.12036 Eq. 17, on mean log-ratios as the authors confirmed; β is τ",
            score="mean",
            link="squared",
        ),
        PreferenceRow(
            "rpo_relative",
            "relative preference optimization, Yin et al. 2024, arXiv 2402.10958: every chosen against every "
            "rejected of "
            "the batch, weighed by prompt similarity",
            pairing="cross",
        ),
        PreferenceRow(
            "rpo_nll",
            "DPO with the chosen answer's NLL per token, Pang et al. 2024, arXiv 2404.19733 Eq. 1",
            nll=1.0,
        ),
        PreferenceRow(
            "rpo_reward",
            "reward-aware preference optimization, Nemotron-4 340B, arXiv 2406.11704 §3.3.2; squared distance",
            link="reward_squared",
        ),
        PreferenceRow(
            "simpo",
            "Meng et al. 2024, arXiv 2405.14734 Eq. 6; β 2.0, γ 1.0",
            score="mean",
            reference=False,
            beta=2.0,
            gamma=1.0,
        ),
        PreferenceRow(
            "orpo",
            "Hong et al. 2024, arXiv 2403.07691 Eq. 6-7; β is λ, the NLL is the answer's",
            score="log_odds",
            link="odds_ratio",
            reference=False,
            nll=1.0,
        ),
        PreferenceRow(
            "kto",
            "Ethayarajh et al. 2024, arXiv 2402.01306 Eq. 7-8; good and bad answers need not be pairs",
            pairing="unpaired",
            link="sigmoid",
            anchor="kl",
        ),
        PreferenceRow(
            "apo_zero",
            "D'Oosterlinck et al. 2024, arXiv 2408.06266 Eq. 7: KTO with z0 = 0",
            pairing="unpaired",
            link="sigmoid",
        ),
        PreferenceRow(
            "reward_model",
            "Bradley and Terry 1952 on a scalar head; margin: Touvron et al. 2023, arXiv 2307.09288 Eq. 2; centring: "
            "arXiv 2312.09244 Eq. 2",
            beta=1.0,
            score="head",
            reference=False,
            eta=0.0,
            centring=0.01,
        ),
        OnlineRow(
            "reinforce",
            "Williams 1992, with the mean reward of the batch as baseline",
            baseline="batch_mean",
            scale="none",
            surrogate="policy_gradient",
            weights="token_mean",
        ),
        OnlineRow(
            "ppo",
            "Schulman et al. 2017, arXiv 1707.06347 Eq. 7 and 9, GAE: arXiv 1506.02438 Eq. 16; k1 in the reward",
            baseline="critic",
            scale="whiten_tokens",
            returns="to_go",
            weights="token_mean",
            reward_kl=0.05,
        ),
        OnlineRow(
            "rloo",
            "Ahmadian et al. 2024, arXiv 2402.14740 §2.2: leave-one-out baseline, the answer as one action; k1 "
            "in the reward",
            baseline="leave_one_out",
            scale="none",
            ratio="sequence_sum",
            reward_kl=0.05,
        ),
        OnlineRow(
            "reinforce++",
            "Hu 2025, arXiv 2501.03262 Eq. 8-9: reward to go with k1, whitened over the batch's tokens",
            baseline="none",
            scale="whiten_tokens",
            returns="to_go",
            weights="token_mean",
            reward_kl=0.01,
        ),
        OnlineRow(
            "reinforce++_baseline",
            "Hu 2025, arXiv 2501.03262 §3.3: the group's mean off the reward, whitened over the batch's tokens, "
            "KL in the loss",
            scale="whiten_tokens",
            weights="token_mean",
            kl=0.01,
        ),
        OnlineRow("grpo", "Shao et al. 2024, arXiv 2402.03300 Eq. 3-4, β 0.04", kl=0.04),
        OnlineRow(
            "dr_grpo",
            "Liu et al. 2025, arXiv 2503.20783 §3.2: no division by the group's deviation, a constant instead of |y|",
            scale="none",
            weights="seq_mean_token_sum",
        ),
        OnlineRow(
            "dapo",
            "Yu et al. 2025 (ByteDance), arXiv 2503.14476: clip-higher, dynamic sampling, token mean, soft overlong "
            "punishment, no KL",
            clip=Clip(0.8, 1.28),
            weights="token_mean",
            refills=3,
            overlong=True,
        ),
        OnlineRow(
            "gspo",
            "Zheng et al. 2025, arXiv 2507.18071 Eq. 5-7: the ratio of the whole answer, length-normalised; clip "
            "3e-4, 4e-4",
            ratio="sequence",
            clip=Clip(1 - 3e-4, 1 + 4e-4),
        ),
        OnlineRow(
            "gspo_token",
            "Zheng et al. 2025, arXiv 2507.18071 Eq. 13-14: the sequence's ratio with the token's gradient",
            ratio="sequence_token",
            clip=Clip(1 - 3e-4, 1 + 4e-4),
        ),
        OnlineRow(
            "cispo",
            "MiniMax 2025, arXiv 2506.13585 Eq. 4-5: clipped ratio as a constant weight; upper bound 5 of arXiv "
            "2510.13786",
            surrogate="sg_clip",
            clip=Clip(0.0, 5.0),
            weights="token_mean",
            refills=0,
        ),
        OnlineRow(
            "sapo",
            "Gao et al. 2025, arXiv 2511.20347: a soft gate instead of a clip, τ+ 1.0, τ− 1.05",
            surrogate="soft_gate",
        ),
        OnlineRow(
            "gmpo",
            "Zhao et al. 2025, arXiv 2507.20673 Eq. 4: geometric mean of ratios clipped to e^±0.4",
            ratio="geometric",
            surrogate="plain",
            clip=Clip(math.exp(-0.4), math.exp(0.4)),
        ),
        OnlineRow(
            "maxrl",
            "maximum-likelihood RL, arXiv 2602.02710: the group's mean reward instead of its deviation",
            scale="group_mean",
            weights="token_mean",
            refills=0,
        ),
        OnlineRow(
            "opd",
            "on-policy distillation: ℓ_teacher − ℓ as each sampled token's advantage (reverse KL; Gu et al. "
            "2023, arXiv "
            "2306.08543 §2.2; Lu 2025, Thinking Machines)",
            baseline="teacher",
            scale="none",
            returns="to_go",
            surrogate="sg_clip",
            clip=Clip(0.0, 5.0),
            weights="token_mean",
        ),
    )
}


AMBIGUOUS = {
    "rpo": ". 'rpo' is ambiguous: rpo_relative is relative preference optimization (Yin 2024, the article's), "
    "rpo_nll is DPO with an NLL term (Pang 2024), and rpo_reward is reward-aware preference optimization (Nemotron-4)"
}


def row_named(name: str) -> Row:
    """Return the row. Raises `UnknownName`; a bare `rpo` is refused because three methods carry that name."""
    if name not in ROWS:
        raise UnknownName("algorithm", name, ROWS, hint=AMBIGUOUS.get(name, ""))
    return ROWS[name]


def row_with(name: str, axes: Mapping[str, Any]) -> Row:
    """Return the row of that name with other choices on some axes.

    Raises:
        UnknownName: there is no such row.
        BadInput: the row has no such axis, or the choice does not go; the message names row, axis and remedy.
    """
    row = row_named(name)
    known = [f.name for f in fields(row) if f.name not in ("name", "source", "kind")]
    for axis in axes:
        if axis not in known:
            raise BadInput(f"row {name}: no axis {axis!r}{nearest(axis, known)}; its axes: {', '.join(known)}")
    values = {axis: _interval(value) if axis == "clip" else value for axis, value in axes.items()}
    try:
        made: Row = TypeAdapter(type(row)).validate_python({**asdict(row), **values})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or ", ".join(axes)
        raise BadInput(f"row {name}, axis {place}: {first['msg'].removeprefix('Value error, ')}") from error
    return made


def _interval(value: Any) -> Any:
    """A clip interval written as [low, high] or [low, high, dual]."""
    if not isinstance(value, list | tuple) or len(value) not in (2, 3):
        return value
    return dict(zip(("low", "high", "dual"), value, strict=False))
