"""Mixture of experts: how far token and sequence ratios spread when sampler and trainer route differently.

A random Qwen3-MoE (2 layers, 8 experts, top 2) and a dense Qwen3 of equal width and active parameters answer short
prompts; the reward is the share of answer tokens from the first quarter of the vocabulary. Measured: how often the
experts of a (token, layer) differ between sampler and trainer, and |log ρ| with and without that; the spread of token
ratios ρ_t and sequence ratios exp(mean log ρ) on the same samples, also with the sampler's routing replayed in the
trainer (arXiv 2507.18071 §5.3); and training with the rows `grpo` and `gspo`, four updates per bf16 rollout.

    python benchmarks/moe.py --json OUT.json [--seeds 3] [--steps 40] [--lr 1e-3]

All weights are random, 1/√fan-in in size: routers trained to large margins, and 128 experts, are not seen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ascent.customize.batch import Scored, TrainSequence, collate
from ascent.customize.loops.credit import Annotated, credit
from ascent.customize.objectives.kl import k3
from ascent.customize.objectives.losses import LossOut, objective
from ascent.customize.objectives.rows import OnlineRow, row_with
from ascent.customize.rollout import Group
from ascent.evaluate.statistics import clustered_bootstrap, paired_bootstrap
from ascent.records import Episode, Task

VOCAB, WIDTH, LAYERS, PROMPT, ANSWER = 64, 48, 2, 2, 24
PROMPTS, SAMPLES, MINIBATCHES, WARM = 8, 8, 4, 5
WIDE = (0.8, 1.2)
ROWS = {
    "grpo": row_with("grpo", {"kl": 0.0}),  # without its KL term, which gspo has not: only ratio and clip differ
    "gspo": row_with("gspo", {}),
    "gspo, clip of grpo": row_with("gspo", {"clip": [*WIDE]}),
    "gspo, recomputed": row_with("gspo", {"correction": "truncate"}),  # old log-probs are the trainer's own
}


class Samples(NamedTuple):
    """Answers [N, P+T], the sampler's log-probs of their tokens [N, T], and its experts [N, P+T−1, layers, k]."""

    tokens: Tensor
    logp: Tensor
    experts: Tensor


def build(seed: int, experts: int = 8) -> nn.Module:
    """Return a random fp32 Qwen3-MoE with top-2 routing, or for 0 experts a Qwen3 as wide as two experts."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape: dict[str, Any] = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, head_dim=12)
    shape |= dict(intermediate_size=2 * WIDTH, num_attention_heads=4, num_key_value_heads=2)
    if experts:
        routed = dict(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=WIDTH, norm_topk_prob=True)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **routed, experts_implementation="eager"))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def sampler_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy with weights of `dtype`; buffers (rotary frequencies) stay fp32, as inference engines keep them."""
    sampler = copy.deepcopy(model)
    for weight in sampler.parameters():
        weight.data = weight.data.to(dtype)
    return sampler


@contextmanager
def routing(model: nn.Module, batch: int, replay: Tensor | None = None) -> Iterator[Callable[[], Tensor]]:
    """Record every router's choices, given as [N, L, layers, k] on call; with `replay` impose those instead.

    An imposed choice keeps this model's own router logits: the softmax over the imposed experts alone is what top-k
    probabilities become when they are normalised to sum to one.
    """
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    seen: list[list[Tensor]] = [[] for _ in routers]

    def watch(layer: int, module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, scores, chosen = output
        if replay is not None:
            chosen = replay[:, :, layer].flatten(0, 1)
            scores = logits.gather(1, chosen).float().softmax(-1).to(scores.dtype)
        seen[layer].append(chosen.view(batch, -1, chosen.shape[-1]))
        return logits, scores, chosen

    handles = [router.register_forward_hook(partial(watch, layer)) for layer, router in enumerate(routers)]
    none = torch.zeros(batch, 0, 0, 0, dtype=torch.long)  # a dense model has no router
    try:
        yield lambda: torch.stack([torch.cat(layer, 1) for layer in seen], 2) if seen else none
    finally:
        for handle in handles:
            handle.remove()


def score(model: nn.Module, tokens: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs and entropies of the answers' tokens [N, T] in fp32, and the experts [N, P+T−1, layers, k]."""
    with routing(model, len(tokens), replay) as seen:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    all_logp = logits[:, PROMPT - 1 :].float().log_softmax(-1)
    logp = all_logp.gather(-1, tokens[:, PROMPT:, None])[..., 0]
    return logp, -(all_logp.exp() * all_logp).sum(-1), seen()


@torch.no_grad()
def sample(model: nn.Module, generator: torch.Generator, prompts: int = PROMPTS, size: int = SAMPLES) -> Samples:
    """Sample `size` answers in a row to each of `prompts` random prompts, with a key-value cache as engines do."""
    tokens = torch.randint(VOCAB, (prompts, PROMPT), generator=generator).repeat_interleave(size, 0)
    fed, cache, logps = tokens, None, []
    with routing(model, len(tokens)) as seen:
        for _ in range(ANSWER):
            out = model(input_ids=fed, past_key_values=cache, use_cache=True)
            logp = out.logits[:, -1].float().log_softmax(-1)
            fed, cache = torch.multinomial(logp.exp(), 1, generator=generator), out.past_key_values
            logps.append(logp.gather(1, fed))
            tokens = torch.cat([tokens, fed], 1)
    return Samples(tokens, torch.cat(logps, 1), seen())


def routing_change(ours: Tensor, theirs: Tensor) -> Tensor:
    """Whether the *set* of the last axis' experts differs; the order in which a router names them says nothing."""
    return (ours.sort(-1).values != theirs.sort(-1).values).any(-1)


def share_outside(log_ratio: Tensor, low: float, high: float) -> float:
    """Share of ratios outside [low, high]."""
    return float(((log_ratio < math.log(low)) | (log_ratio > math.log(high))).double().mean())


def spread(log_ratio_NT: Tensor) -> dict[str, float]:
    """Spread of the token ratios and of the sequence ratios exp(mean log ρ) (GSPO, arXiv 2507.18071 Eq. 7).

    `averaging` is std(sequence)·√T / std(token): 1 if tokens err independently, √T if a sequence's tokens err alike.
    """
    mean_N = log_ratio_NT.mean(1)
    token, sequence = float(log_ratio_NT.std()), float(mean_N.std())
    narrow = row_with("gspo", {}).clip
    return {
        "token_std": token,
        "token_q999": float(log_ratio_NT.abs().flatten().quantile(0.999)),
        "token_outside": share_outside(log_ratio_NT, *WIDE),
        "sequence_std": sequence,
        "sequence_outside": share_outside(mean_N, *WIDE),
        "sequence_outside_gspo": share_outside(mean_N, narrow.low, narrow.high),
        "averaging": sequence * log_ratio_NT.shape[1] ** 0.5 / token if token else math.nan,
    }


@torch.no_grad()
def mismatch(samples: Samples, trainer: nn.Module) -> dict[str, float]:
    """Compare a sampler with the trainer on its own samples: routing, and ratios by token and sequence."""
    logp, _, experts = score(trainer, samples.tokens)
    log_ratio = logp - samples.logp
    found = spread(log_ratio)
    if experts.shape[2]:
        change = routing_change(samples.experts, experts)[:, PROMPT - 1 :]  # where answer tokens are predicted
        moved = change.any(-1)
        replayed = score(trainer, samples.tokens, samples.experts)[0] - samples.logp
        found |= {
            "routing_change": float(change.float().mean()),
            "abs_log_ratio_changed": float(log_ratio[moved].abs().mean()),
            "abs_log_ratio_same": float(log_ratio[~moved].abs().mean()),
            "variance_from_changed": float(log_ratio[moved].square().sum() / log_ratio.square().sum()),
            "tokens_changed": float(moved.float().mean()),
            "replayed_token_std": float(replayed.std()),
            "replayed_sequence_std": float(replayed.mean(1).std()),
        }
    return found


def groups_of(samples: Samples, size: int = SAMPLES) -> list[Group]:
    """Grade the answers by the share of their tokens in the first quarter of the vocabulary; `size` to a group."""
    rewards = (samples.tokens[:, PROMPT:] < VOCAB // 4).float().mean(1).tolist()
    mask = (False,) * PROMPT + (True,) * ANSWER
    fixed: dict[str, Any] = dict(task_id="", model="", messages=(), text="", loss_mask=mask)
    each = zip(samples.tokens.tolist(), nn.functional.pad(samples.logp, (PROMPT, 0)).tolist(), strict=True)
    episodes = [Episode(token_ids=ids, logps=logps, **fixed) for ids, logps in each]
    starts = range(0, len(episodes), size)
    return [Group(Task(id=str(i)), tuple(episodes[i : i + size]), tuple(rewards[i : i + size])) for i in starts]


def loss_of(model: nn.Module, row: OnlineRow, sequences: Sequence[TrainSequence]) -> LossOut:
    """Return the row's loss on sequences of equal length."""
    batch = collate(sequences)
    logp, entropy, _ = score(model, torch.tensor([seq.token_ids for seq in sequences]))
    return objective(row)(Scored(logp.flatten(), entropy.flatten()), batch)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, row: OnlineRow, chunk: list[TrainSequence]) -> LossOut:
    """Take one optimizer step on one minibatch and return the loss before it."""
    optimizer.zero_grad()
    out = loss_of(model, row, chunk)
    out.loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return out


def train(row: OnlineRow, seed: int, steps: int, experts: int, lr: float) -> tuple[nn.Module, dict[str, list[float]]]:
    """Train on `steps` rollouts of a bf16 sampler, four updates each; return the model and a value per rollout."""
    model, generator = build(seed, experts), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    curve: dict[str, list[float]] = {"reward": [], "clip_fraction": [], "clip_first": [], "mismatch_k3": []}
    for _ in range(steps):
        samples = sample(sampler_of(model, torch.bfloat16), generator)
        groups = groups_of(samples)
        with torch.no_grad():
            trainer = score(model, samples.tokens)[0]
        said = Annotated(trainer=trainer.tolist() if row.correction != "none" else ())
        chunks = credit(row, groups, max_tokens=ANSWER, minibatches=MINIBATCHES, annotate=lambda _, said=said: said)
        outs = [update(model, optimizer, row, chunk).metrics for chunk in chunks]
        clipped = [float(out["clip_fraction"][0] / out["clip_fraction"][1]) for out in outs]
        curve["reward"].append(sum(sum(group.rewards) for group in groups) / (PROMPTS * SAMPLES))
        curve["clip_fraction"].append(sum(clipped) / len(clipped))
        curve["clip_first"].append(clipped[0])  # before any update: what precision alone clips
        curve["mismatch_k3"].append(float(k3(trainer, samples.logp).mean()))
    return model, curve


def ages(seed: int, experts: int, lr: float) -> dict[str, dict[str, float]]:
    """Mismatch after `WARM` rollouts of training: bf16 against fp32, and samplers old by 1, 2 and 4 updates.

    The updates see other samples than those that are measured, as every minibatch but the first does in a run.
    """
    row = ROWS["grpo"]
    model, generator = train(row, seed, WARM, experts, lr)[0], torch.Generator().manual_seed(2000 + seed)
    found = {"bf16": mismatch(sample(sampler_of(model, torch.bfloat16), generator), model)}
    measured = sample(model, generator)
    others = groups_of(sample(model, generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for age, chunk in enumerate(credit(row, others, max_tokens=ANSWER, minibatches=MINIBATCHES), 1):
        update(model, optimizer, row, chunk)
        if age in (1, 2, 4):
            found[f"{age} updates"] = mismatch(measured, model)
    return found


def summary(curve: dict[str, list[float]]) -> dict[str, float]:
    """First and last reward (means of five rollouts), its step-to-step deviation, and means over the run."""
    reward = torch.tensor(curve["reward"])
    means = {name: sum(values) / len(values) for name, values in curve.items() if name != "reward"}
    first, last = float(reward[:5].mean()), float(reward[-5:].mean())
    return {"first": first, "last": last, "mean": float(reward.mean()), "jitter": float(reward.diff().std())} | means


def intervals(found: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and bootstrap interval over seeds of every entry; with three seeds no wider than their range (75 %)."""
    return {name: [*clustered_bootstrap([one[name] for one in found])] for name in found[0]}


def main() -> None:
    """Run the three measurements for both models and print means over seeds with intervals; differences with p."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="rollouts per training run")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    found: dict[str, Any] = {"seeds": options.seeds, "steps": options.steps, "lr": options.lr}
    kinds, seeds = {"moe": 8, "dense": 0}, range(options.seeds)

    def note(name: str, value: Any) -> None:  # at once, so that a run that is cut short leaves what it has
        found[name] = value
        sys.stdout.write(f"{name}: {json.dumps(value)}\n")
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    for kind, experts in kinds.items():
        each = [ages(seed, experts, options.lr) for seed in seeds]
        for age in each[0]:
            note(f"{kind}, {age}", intervals([one[age] for one in each]))
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for name, row in ROWS.items():
        for kind, experts in kinds.items():
            curves = runs[kind, name] = [summary(train(row, s, options.steps, experts, options.lr)[1]) for s in seeds]
            note(f"{kind}, training, {name}", intervals(curves))
            for value in ("last", "mean", "jitter") if name != "grpo" else ():
                a, b = ([curve[value] for curve in group] for group in (runs[kind, "grpo"], curves))
                note(f"{kind}, {name} − grpo, {value}", paired_bootstrap(a, b))


if __name__ == "__main__":
    main()
