"""What the law and training tests share: a tiny model, global batches for any row, and losses with their gradients."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ascent.cli.train import training_data
from ascent.customize.batch import TokenBatch, TrainSequence, collate
from ascent.customize.objectives.credit import advantages
from ascent.customize.objectives.rows import OnlineRow, PreferenceRow, Row, SupervisedRow, objective
from ascent.customize.objectives.weights import WEIGHTS
from ascent.customize.policy import Policy
from ascent.customize.recipes import load_recipe
from ascent.customize.train import train
from ascent.inference.lora import LoraConfig
from ascent.records import RunCard, digest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "system user assistant You are a careful clerk who answers in one line.",
    "Take one tablet by mouth twice a day with food. Apply a thin layer to the skin at night.",
    "The quick brown fox jumps over the lazy dog; 0123456789 times, naïve café — déjà vu.",
]
Units = list[list[TrainSequence]]


def write_tiny_model(folder: Path, *, seed: int = 0, spread: float = 0.25, context: int = 256) -> Path:
    """Write a random Llama of two layers with its own tokenizer; `spread` is the deviation of its matrices."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=fast.eos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, spread)
    model.save_pretrained(folder)
    return folder


def tiny_policy(
    folder: Path, *, full: bool = False, moved: float = 0.0, seed: int = 0, precision: str = "fp32"
) -> Policy:
    """A policy; `moved` shifts every trainable number by that deviation, so that policy and reference differ."""
    policy = Policy.load(folder, precision, None if full else LoraConfig(4, 8.0), seed)
    if moved:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in policy.parameters:
                parameter += torch.randn(parameter.shape, generator=generator) * moved
    return policy


def random_sequence(dice: random.Random, vocab: int = 300) -> TrainSequence:
    """A prompt of 1 to 9 tokens, then 1 to 14 targets; sometimes a second masked stretch, as in several turns."""
    prompt, answer = dice.randint(1, 9), dice.randint(1, 14)
    mask = [False] * prompt + [True] * answer
    if dice.random() < 0.3:
        mask += [False] * 3 + [True] * 2
    return TrainSequence(tuple(dice.randrange(vocab) for _ in mask), tuple(mask))


def global_batch(row: Row, policy: Policy, *, seed: int = 0, units: int = 6) -> Units:
    """One weighted global batch that suits the row's kind, with ratios on both sides of any clip interval."""
    dice = random.Random(seed)
    if isinstance(row, SupervisedRow):
        made = [[random_sequence(dice)] for _ in range(units)]
        weights = WEIGHTS[row.weights]([unit[0].targets for unit in made])
        for unit, weight in zip(made, weights, strict=True):
            unit[0].ce_weight = weight
        return made
    if isinstance(row, PreferenceRow):
        made = [[random_sequence(dice), random_sequence(dice)] for _ in range(units)]
        for seq in flatten(made):
            seq.pair_weight = 1 / units
        policy.add_reference(made, 10_000)
        return made
    assert isinstance(row, OnlineRow)
    made = [[random_sequence(dice)] for _ in range(units)]
    rewards = [dice.random() for _ in made]
    credits = advantages(rewards, row.baseline, row.scale)
    weights = WEIGHTS[row.weights]([unit[0].targets for unit in made])
    policy.add_reference(made, 10_000)
    with torch.no_grad():
        scored = policy.score(collate(flatten(made)))[0].tolist()
    for (seq,), weight, credit in zip(made, weights, credits, strict=True):
        seq.rl_weight = seq.kl_weight = weight
        seq.advantage = credit
        seq.old_logps = [scored.pop(0) + dice.gauss(0, 0.25) for _ in range(seq.targets)]
    return made


def flatten(units: Units) -> list[TrainSequence]:
    """The sequences of all units."""
    return [seq for unit in units for seq in unit]


@dataclass
class Result:
    """A loss and the gradient of all trainable parameters as one vector."""

    loss: float
    gradient: Tensor

    def assert_close(self, other: Result, relative: float = 1e-5) -> None:
        """Compare loss and gradient; the gradient by the length of the difference.

        An online loss is a small rest of terms that cancel, so its error is measured against their size, at least 0.1.
        """
        assert abs(self.loss - other.loss) <= relative * max(abs(other.loss), 0.1), (self.loss, other.loss)
        gap = (self.gradient - other.gradient).norm() / other.gradient.norm()
        assert gap <= relative, f"gradients differ by {gap:.2e}"


def loss_and_gradient(policy: Policy, row: Row, batches: Sequence[TokenBatch], temperature: float = 1.0) -> Result:
    """Sum the row's loss over the micro-batches and collect the gradient, as the trainer does."""
    for parameter in policy.parameters:
        parameter.grad = None
    total = 0.0
    for batch in batches:
        out = objective(row)(*policy.score(batch, temperature=temperature), batch)
        out.loss.backward()
        total += out.loss.item()
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.parameters]
    return Result(total, torch.cat([g.flatten() for g in found]).double())


PROGRAM = '''"""Grades answers by the share of their characters that are plain letters."""


def letters(task, episode):
    if task.input.get("dead"):
        return 0.5
    text = episode.text
    return sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text))


def vowels(task, episode):
    return sum(c in "aeiou" for c in episode.text) / max(1, len(episode.text))
'''
COMMON = (
    "model: {model}\nprecision: fp32\ntoken_budget: 128\ncheckpoint_every: 4\nlora: {{rank: 4, alpha: 8}}\nseed: 3\n"
)
ONLINE = "prompts: prompts.jsonl\nprogram: program.py\nreward: letters\nsteps: 12\nprompts_per_step: 3\n"
RECIPES = {
    "sft": "algorithm: sft\ndata: train.jsonl\nepochs: 3\nbatch_size: 4\noptim: {lr: 1e-2}\n",
    "dpo": "algorithm: dpo\ndata: pairs.jsonl\nepochs: 3\nbatch_size: 4\noptim: {lr: 5e-3}\n",
    "grpo": f"algorithm: grpo\n{ONLINE}group_size: 4\nminibatches: 2\nmax_tokens: 8\n",
    "dapo": f"algorithm: dapo\n{ONLINE}group_size: 4\nmax_tokens: 8\nrefills: 2\n",
}
"""Complete recipes of twelve steps on the data of `write_use_case`, one per row; a new row adds one here."""
LONG = "{epochs: 15, checkpoint_every: 1}"
"""Makes the sft recipe 60 steps long, with a checkpoint after each."""


def write_use_case(folder: Path, model: Path) -> Path:
    """Write data, program and one recipe per row into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["oak", "elm", "ash", "fir", "yew", "bay", "box", "fig"]
    asked = [f"Name tree {number} of {len(words)}." for number in range(16)]
    answers = [f"{words[i % 8]} tree" for i in range(16)]
    pairs = zip(asked, answers, strict=True)
    files = {
        "train": [{"id": str(i), "input": {"prompt": q}, "target": a} for i, (q, a) in enumerate(pairs)],
        "pairs": [
            {"id": str(i), "input": {"prompt": q}, "chosen": answers[i], "rejected": "I do not know, 42!"}
            for i, q in enumerate(asked)
        ],
        "prompts": [{"id": str(i), "input": {"prompt": q, "dead": i % 4 == 0}} for i, q in enumerate(asked)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "program.py").write_text(PROGRAM)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(model=model) + text)
    return folder


def run_recipe(
    use_case: Path,
    name: str,
    out: Path,
    *,
    stop_at: int | None = None,
    interrupt_at: int | None = None,
    extra: str = "",
    announce: Callable[[dict[str, object]], None] | None = None,
) -> RunCard:
    """Train as `ascent train` does.

    When that step was logged, `stop_at` breaks off as a crash would, and `interrupt_at` presses Ctrl-C.
    """
    path = use_case / f"{name}{digest(extra)[:6]}.yaml"
    base = yaml.safe_load((use_case / f"{name}.yaml").read_text())
    path.write_text(yaml.safe_dump(base | (yaml.safe_load(extra) or {})))
    recipe = load_recipe(path)

    def report(step: int, total: int, numbers: dict[str, float]) -> None:
        if step == stop_at:
            raise Stopped
        if step == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    return train(recipe, Path(recipe.model), training_data(recipe), out, report=report, announce=announce)


class Stopped(Exception):
    """What the tests break a run off with."""


def metrics(out: Path) -> list[dict[str, object]]:
    """The rows of a run's learning curve without their clock readings."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
