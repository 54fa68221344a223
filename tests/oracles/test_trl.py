"""Losses and gradients against TRL 1.16 where it has the method: the same log-probs go into both, in fp32.

Known disagreements are written down in docs/techniques.md; each is asserted here as a disagreement, so that a change on
either side is noticed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ascent.customize.batch import Scored, TrainSequence, collate
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import ROWS, OnlineRow, PreferenceRow, Row
from ascent.customize.objectives.weights import WEIGHTS
from ascent.inference.head import Distance, divergence

trl = pytest.importorskip("trl")

PAIRS, WIDTH = 4, 9
TOLERANCE = 1e-5


@dataclass
class Padded:
    """Answers as TRL sees them, [N, L] with a mask, and as we do, one entry per target."""

    mask: Tensor
    logp: Tensor
    reference: Tensor

    @property
    def flat(self) -> Tensor:
        return self.logp[self.mask]

    def sequences(self, **streams: Any) -> list[TrainSequence]:
        found = []
        for i, row in enumerate(self.mask):
            n = int(row.sum())
            own = {name: values[i] for name, values in streams.items()}
            found.append(
                TrainSequence(
                    (1, *range(2, 2 + n)), (False, *[True] * n), reference_logps=self.reference[i][row].tolist(), **own
                )
            )
        return found


def answers(count: int, seed: int = 0, width: int = WIDTH) -> Padded:
    dice = random.Random(seed)
    mask = torch.zeros(count, width, dtype=torch.bool)
    for row in mask:
        row[: dice.randint(1, width)] = True
    generator = torch.Generator().manual_seed(seed)
    logp = -2 * torch.rand(count, width, generator=generator)
    reference = logp + 0.5 * torch.randn(count, width, generator=generator)
    return Padded(mask, logp, reference)


def ours(row: Row, padded: Padded, sequences: list[TrainSequence]) -> tuple[float, Tensor]:
    """Our loss and its gradient in the targets' log-probs."""
    leaf = padded.flat.clone().requires_grad_()
    out = objective(row)(Scored(leaf, torch.zeros_like(leaf)), collate(sequences))
    out.loss.backward()
    assert leaf.grad is not None
    return out.loss.item(), leaf.grad


def close(mine: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> None:
    assert mine[0] == pytest.approx(theirs[0], rel=TOLERANCE, abs=1e-7)
    assert (mine[1] - theirs[1]).norm() <= TOLERANCE * theirs[1].norm()


class Stub:
    """What TRL's loss methods read of a trainer, on one process in training mode; anything else is an error."""

    def __init__(self, **fields: Any) -> None:
        same = SimpleNamespace(
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
            num_processes=1,
            device=torch.device("cpu"),
        )
        self.accelerator = same
        self.model = SimpleNamespace(training=True)
        self._metrics = {"train": defaultdict(list)}
        self.aux_loss_enabled = False
        self._total_train_tokens, self._tp_size = 0, 1
        self.current_gradient_accumulation_steps = 1
        self.__dict__.update(fields)


def theirs(method: Any, stub: Stub, padded: Padded, inputs: dict[str, Any], *rest: Any) -> tuple[float, Tensor]:
    """TRL's loss and its gradient in the targets' log-probs."""
    leaf = padded.logp.clone().requires_grad_()
    zeros = torch.zeros_like(leaf)
    stub._get_per_token_logps_and_entropies = lambda *args, **kwargs: (leaf, zeros, None)

    def model(**kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=leaf * padded.mask, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(padded.mask)
        )

    loss = method(stub, model, inputs, *rest)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad[padded.mask]


# ------------------------------------------------------------------------------------------------------------- online

ONLINE = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon_low": 3e-4,
        "epsilon_high": 4e-4,
    },
    "gmpo": {"epsilon_low": 0.4, "epsilon_high": 0.4},
    "rloo": {},
}
"""Our row → how TRL's GRPO, GMPO or RLOO trainer is configured for the same method."""


def online_case(row: OnlineRow) -> tuple[Padded, list[float], list[list[float]], Tensor]:
    """Answers, an advantage each, and old log-probs with ratios on both sides of the row's interval."""
    padded = answers(6, seed=3)
    generator = torch.Generator().manual_seed(5)
    advantage = [1.0, -0.5, 0.7, -1.3, 0.2, -0.4]
    spread = {"gspo": 5e-4, "rloo": 0.1}.get(row.name, 0.3)
    old = padded.logp + spread * torch.randn(padded.logp.shape, generator=generator)
    listed = [old[i][row_mask].tolist() for i, row_mask in enumerate(padded.mask)]
    return padded, advantage, listed, old


@pytest.mark.parametrize("name", ONLINE)
def test_online_losses_and_gradients(name: str) -> None:
    row = ROWS[name]
    assert isinstance(row, OnlineRow)
    row = replace(row, kl=0.0)  # the KL term disagrees on purpose, see below
    padded, advantage, listed, old = online_case(row)
    weights = WEIGHTS[row.weights]([int(m.sum()) for m in padded.mask], WIDTH)
    sequences = padded.sequences(advantage=advantage, old_logps=listed, rl_weight=weights)
    mine = ours(row, padded, sequences)
    stub = Stub(
        **{
            "beta": 0.0,
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "importance_sampling_level": "token",
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "use_vllm": False,
            "_entropy_bonus_enabled": False,
            "max_completion_length": WIDTH,
            "args": SimpleNamespace(
                delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1
            ),
            **ONLINE[name],
        }
    )
    inputs = {
        "prompt_ids": torch.ones(6, 1, dtype=torch.long),
        "prompt_mask": torch.ones(6, 1),
        "completion_ids": torch.ones_like(padded.mask, dtype=torch.long),
        "completion_mask": padded.mask.float(),
        "advantages": torch.tensor(advantage),
        "old_per_token_logps": old,
        "old_logps": (old * padded.mask).sum(1),
        "num_items_in_batch": padded.mask.sum(),
    }
    if name == "gmpo":
        from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer as Trainer
    elif name == "rloo":
        from trl import RLOOTrainer as Trainer
    else:
        from trl import GRPOTrainer as Trainer
    close(mine, theirs(Trainer._compute_loss, stub, padded, inputs))


def test_their_default_of_cispo_is_another_method() -> None:
    """TRL takes ε_high = ε = 0.2 when it is not set, as a ratio: all weights above become 0.2. Ours is [0, 5]."""
    row = ROWS["cispo"]
    assert isinstance(row, OnlineRow)
    assert (row.clip.low, row.clip.high) == (0.0, 5.0)
    import inspect

    from trl import GRPOConfig

    assert inspect.signature(GRPOConfig).parameters["epsilon_high"].default is None


# --------------------------------------------------------------------------------------------------------- preference


def preference_case() -> tuple[Padded, Padded]:
    """Pairs in our order (chosen, rejected, …) and in TRL's (all chosen, then all rejected)."""
    mine = answers(2 * PAIRS, seed=7)
    order = torch.tensor([*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)])
    return mine, Padded(mine.mask[order], mine.logp[order], mine.reference[order])


def in_our_order(padded: Padded, gradient: Tensor) -> Tensor:
    """A gradient over TRL's order of answers, over ours."""
    full = torch.zeros_like(padded.logp)
    full[padded.mask] = gradient
    order = [place for pair in range(PAIRS) for place in (pair, PAIRS + pair)]
    return full[order][padded.mask[order]]


def dpo_inputs(padded: Padded) -> dict[str, Any]:
    masked = (padded.reference * padded.mask).sum(1)
    start = torch.zeros(2 * PAIRS, 1, dtype=torch.long)
    return {
        "input_ids": torch.ones(2 * PAIRS, WIDTH + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, WIDTH + 1),
        "completion_mask": torch.cat([start, padded.mask.long()], 1),
        "ref_chosen_logps": masked[:PAIRS],
        "ref_rejected_logps": masked[PAIRS:],
    }


DPO_LOSSES = {
    "dpo": (["sigmoid"], [1.0], {}),
    "ipo": (["ipo"], [1.0], {}),
    "rpo_nll": (["sigmoid", "sft"], [1.0, 1.0], {}),
    "apo_zero": (["apo_zero"], [0.5], {}),
}
"""Our row → TRL's loss types and weights. Its apo_zero adds both answers of a pair, ours averages answers: half."""


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", DPO_LOSSES)
def test_preference_losses_and_gradients(name: str, beta: float) -> None:
    from trl import DPOTrainer

    row = ROWS[name]
    assert isinstance(row, PreferenceRow)
    row = replace(row, beta=beta)
    mine, padded = preference_case()
    if name == "rpo_nll":  # TRL averages the NLL over tokens, the paper and we over answers: equal where lengths are
        mine.mask[0::2] = True
        padded.mask[:PAIRS] = True
    unpaired = row.pairing == "unpaired"
    share = 1 / (2 * PAIRS) if unpaired else 1 / PAIRS
    signs = [1.0, -1.0] * PAIRS if unpaired else [0.0] * (2 * PAIRS)
    sequences = mine.sequences(pair_weight=[share] * (2 * PAIRS), reward=signs)
    types, weights, _ = DPO_LOSSES[name]
    stub = Stub(
        beta=beta,
        loss_types=types,
        loss_weights=weights,
        label_smoothing=0.0,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    loss, gradient = theirs(DPOTrainer._compute_loss, stub, padded, dpo_inputs(padded), False)
    close(ours(row, mine, sequences), (loss, in_our_order(padded, gradient)))


def test_robust_dpo_is_label_smoothing_up_to_its_scale() -> None:
    """TRL's `robust` divides by 1 − 2ε and flips the second term's sign; at ε = 0 it is DPO. Ours is cDPO."""
    from trl import DPOTrainer

    mine, padded = preference_case()
    stub = Stub(
        beta=0.1,
        loss_types=["robust"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    loss, gradient = theirs(DPOTrainer._compute_loss, stub, padded, dpo_inputs(padded), False)
    sequences = mine.sequences(pair_weight=[1 / PAIRS] * (2 * PAIRS))
    close(ours(ROWS["dpo"], mine, sequences), (loss, in_our_order(padded, gradient)))


@pytest.mark.parametrize("anchor", [0.0, 0.4])
@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.3, 0.8)])
def test_kto_loss_and_gradient(anchor: float, desirable: float, undesirable: float) -> None:
    from trl import KTOTrainer

    row = ROWS["kto"]
    assert isinstance(row, PreferenceRow)
    row = replace(row, desirable=desirable, undesirable=undesirable)
    padded = answers(6, seed=9)
    good = [True, False, False, True, True, False]
    sequences = padded.sequences(
        pair_weight=[1 / 6] * 6, reward=[1.0 if g else -1.0 for g in good], anchor=[anchor] * 6
    )
    stub = Stub(
        beta=0.1,
        loss_type="kto",
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: torch.full((6,), anchor),
    )
    start = torch.zeros(6, 1, dtype=torch.long)
    inputs = {
        "label": torch.tensor(good),
        "input_ids": torch.ones(6, WIDTH + 1, dtype=torch.long),
        "attention_mask": torch.ones(6, WIDTH + 1),
        "completion_mask": torch.cat([start, padded.mask.long()], 1),
        "ref_logps": (padded.reference * padded.mask).sum(1),
        "ref_KL_logps": torch.zeros(6),
    }
    close(ours(row, padded, sequences), theirs(KTOTrainer._compute_loss, stub, padded, inputs, False))


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_reference_free_losses_and_gradients(name: str) -> None:
    """On mean log-probs; ORPO's likelihood term is left out, because TRL takes it over the prompt too."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    row = ROWS[name]
    assert isinstance(row, PreferenceRow)
    row = replace(row, nll=0.0)
    mine, padded = preference_case()
    sequences = mine.sequences(pair_weight=[1 / PAIRS] * (2 * PAIRS))
    leaf = padded.logp.clone().requires_grad_()
    mean = (leaf * padded.mask).sum(1) / padded.mask.sum(1)
    stub = Stub(beta=row.beta, alpha=0.0, loss_type="simpo", simpo_gamma=row.gamma, label_smoothing=0.0)
    if name == "simpo":
        loss = CPOTrainer.cpo_loss(stub, mean[:PAIRS], mean[PAIRS:])[0].mean()
    else:
        loss = -ORPOTrainer.odds_ratio_loss(stub, mean[:PAIRS], mean[PAIRS:])[0].mean()
    loss.backward()
    assert leaf.grad is not None
    close(ours(row, mine, sequences), (loss.item(), in_our_order(padded, leaf.grad[padded.mask])))


@pytest.mark.parametrize("centring", [0.0, 0.01])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_reward_model_loss_and_gradient(centring: float, eta: float) -> None:
    from trl import RewardTrainer

    row = ROWS["reward_model"]
    assert isinstance(row, PreferenceRow)
    row = replace(row, centring=centring, eta=eta)
    rewards = torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(2))
    given = [0.9, 0.1, 1.0, 0.2, 0.5, 0.4, 2.0, 0.0]
    sequences = [TrainSequence((1, 2), (False, True), pair_weight=1 / PAIRS, reward=value) for value in given]
    leaf = rewards.clone().requires_grad_()
    out = objective(row)(Scored(torch.empty(0), torch.empty(0), leaf), collate(sequences))
    out.loss.backward()
    other = torch.cat([rewards[0::2], rewards[1::2]]).requires_grad_()
    stub = Stub(args=SimpleNamespace(center_rewards_coefficient=centring or None))
    margins = torch.tensor(given)[0::2] - torch.tensor(given)[1::2]
    inputs = {"attention_mask": torch.ones(1), "margin": eta * margins}
    inner = SimpleNamespace(training=True)
    loss = RewardTrainer.compute_loss(
        stub, CallableModel(inner, lambda **kwargs: SimpleNamespace(logits=other[:, None])), inputs
    )
    loss.backward()
    assert leaf.grad is not None
    assert other.grad is not None
    assert out.loss.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    torch.testing.assert_close(leaf.grad[0::2], other.grad[:PAIRS], rtol=TOLERANCE, atol=1e-7)
    torch.testing.assert_close(leaf.grad[1::2], other.grad[PAIRS:], rtol=TOLERANCE, atol=1e-7)


class CallableModel:
    """A model in training mode that answers with a function."""

    training = True

    def __init__(self, inner: Any, answer: Any) -> None:
        self.inner, self.answer = inner, answer

    def __call__(self, **kwargs: Any) -> Any:
        return self.answer(**kwargs)


# ------------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3), ("jsd", 0.5)])
def test_divergences_are_those_of_gkd(kind: str, beta: float) -> None:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(37, 12, generator=generator) for _ in range(2))
    weight, known = (torch.randn(50, 12, generator=generator) for _ in range(2))
    hidden = student.clone().requires_grad_()
    distance = Distance(kind, beta if kind == "jsd" else 0.5)  # type: ignore[arg-type]
    mine = divergence(hidden, weight, teacher, known, distance).sum()
    mine.backward()
    other = student.clone().requires_grad_()
    # reduction "batchmean" over a batch of one sums over tokens and vocabulary
    loss = GKDTrainer.generalized_jsd_loss((other @ weight.T)[None], (teacher @ known.T)[None], beta=beta)
    loss.backward()
    assert hidden.grad is not None
    assert other.grad is not None
    assert mine.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    assert (hidden.grad - other.grad).norm() <= TOLERANCE * other.grad.norm()
