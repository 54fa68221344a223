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
from ascent.customize.objectives.credit import episode_advantages
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import ROWS, OnlineRow, PreferenceRow, Row, SupervisedRow
from ascent.customize.objectives.weights import WEIGHTS
from ascent.customize.policy import Policy, Teacher
from ascent.customize.recipes import load_recipe
from ascent.customize.train import train
from ascent.inference.decoder import load_decoder
from ascent.inference.head import Distance
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
    folder: Path,
    *,
    full: bool = False,
    moved: float = 0.0,
    seed: int = 0,
    precision: str = "fp32",
    row: Row | None = None,
) -> Policy:
    """A policy; `moved` shifts every trainable number by that deviation, so that policy and reference differ.

    With a `row` it gets the head and the teacher that the row needs; the teacher is the start model, bent a little.
    """
    head = "value" if getattr(row, "critic", False) else "reward" if getattr(row, "score", "") == "head" else None
    teacher = None
    if isinstance(row, SupervisedRow) and row.teacher:
        bent = load_decoder(folder)
        with torch.no_grad():
            bent.norm.weight *= 1.3
        assert row.divergence != "none"
        teacher = Teacher(bent, Distance(row.divergence, row.beta))
    policy = Policy.load(folder, precision, None if full else LoraConfig(4, 8.0), seed, head=head, teacher=teacher)
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
        weights = WEIGHTS[row.weights]([unit[0].targets for unit in made], 0)
        for unit, weight in zip(made, weights, strict=True):
            unit[0].ce_weight = weight
        return made
    if isinstance(row, PreferenceRow):
        return _preference_batch(row, policy, dice, units)
    assert isinstance(row, OnlineRow)
    made = [[random_sequence(dice)] for _ in range(units)]
    credits = episode_advantages([[dice.random() for _ in made]], row)[0]
    weights = WEIGHTS[row.weights]([unit[0].targets for unit in made], LONGEST)
    policy.add_reference(made, 10_000)
    with torch.no_grad():
        scored = policy.score(collate(flatten(made)))[0].tolist()
    spread = 0.25 if row.ratio == "token" else 2 * (row.clip.high - 1)  # ratios on both sides of the row's interval
    for (seq,), weight, credit in zip(made, weights, credits, strict=True):
        seq.rl_weight = seq.kl_weight = weight
        seq.advantage = credit if row.returns == "sequence" else [credit + dice.gauss(0, 1) for _ in range(seq.targets)]
        shift = dice.gauss(0, spread) if row.ratio != "token" else 0.0
        seq.old_logps = [scored.pop(0) + shift + dice.gauss(0, spread) for _ in range(seq.targets)]
        seq.correction = [dice.uniform(0.5, 1.5) for _ in range(seq.targets)]
        seq.old_values = [dice.gauss(0, 1) for _ in range(seq.targets)]
        seq.returns = [dice.gauss(0, 1) for _ in range(seq.targets)]
    return made


LONGEST = 20
"""The sampling limit of these batches."""


def _preference_batch(row: PreferenceRow, policy: Policy, dice: random.Random, units: int) -> Units:
    """Pairs, single answers of both kinds, or, for rows that cross pairs, all pairs as one unit."""
    size = 1 if row.pairing == "unpaired" else 2
    made = [[random_sequence(dice) for _ in range(size)] for _ in range(units)]
    for index, unit in enumerate(made):
        embedding = tuple(dice.gauss(0, 1) for _ in range(5))
        for seq in unit:
            seq.pair_weight = 1 / units
            seq.embedding = embedding if row.pairing == "cross" else seq.embedding
            seq.anchor = 0.3 if row.anchor == "kl" else 0.0
            seq.reward = dice.gauss(0, 1) if size == 2 else (-1.0) ** index
    policy.add_reference(made, 10_000)
    return [flatten(made)] if row.pairing == "cross" else made


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
        out = objective(row)(policy.measure(batch, temperature=temperature, entropy=True), batch)
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
COMMON = "model: {model}\nprecision: fp32\ntoken_budget: 128\ncheckpoint_every: 4\nlora: {rank: 4, alpha: 8}\nseed: 3\n"
SFT_OPTIM, DPO_OPTIM = "optim: {lr: 1e-2}\n", "optim: {lr: 5e-3}\n"
ONLINE = "prompts: prompts.jsonl\nprogram: program.py\nsteps: 12\nprompts_per_step: 3\ngroup_size: 4\nmax_tokens: 8\n"


def recipe_text(row: Row) -> str:
    """A complete recipe of twelve steps for a row, on the data of `write_use_case`."""
    head = f"algorithm: {row.name}\n"
    if isinstance(row, SupervisedRow):
        data = "texts" if row.corpus else "train"
        teacher = "teacher: {model: {teacher}}\n" if row.teacher else ""
        if row.name == "distill_sequence":  # of a hundred tries one ends before its limit, for every prompt
            asked = "samples: 100, temperature: 1.0, max_tokens: 40, reward: letters, minimum: 0"
            teacher = f"program: program.py\nteacher: {{model: {{teacher}}, {asked}}}\n"
        return f"{head}data: {data}.jsonl\nepochs: 3\nbatch_size: 4\n{teacher}{SFT_OPTIM}"
    if isinstance(row, PreferenceRow):
        data = "feedback" if row.pairing == "unpaired" else "pairs"
        return f"{head}data: {data}.jsonl\nepochs: 3\nbatch_size: 4\n{DPO_OPTIM}"
    reward = "reward: {teacher: {teacher}}\n" if row.teacher else "reward: letters\n"
    return f"{head}{ONLINE}{reward}" + ("minibatches: 2\n" if row.keep_dead_groups else "axes: {refills: 2}\n")


RECIPES = {name: recipe_text(row) for name, row in ROWS.items()}
"""One recipe for every registered row, so that a new row joins the tests of whole runs by being registered."""
LONG = "{epochs: 15, checkpoint_every: 1}"
"""Makes the sft recipe 60 steps long, with a checkpoint after each."""


def write_use_case(folder: Path, model: Path) -> Path:
    """Write data, program and one recipe per row into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = write_tiny_model(folder / "teacher", seed=1)
    words = ["oak", "elm", "ash", "fir", "yew", "bay", "box", "fig"]
    asked = [f"Name tree {number} of {len(words)}." for number in range(16)]
    answers = [f"{words[i % 8]} tree" for i in range(16)]
    pairs = zip(asked, answers, strict=True)
    files = {
        "train": [{"id": str(i), "input": {"prompt": q}, "target": a} for i, (q, a) in enumerate(pairs)],
        "pairs": [
            {
                "id": str(i),
                "input": {"prompt": q},
                "chosen": answers[i],
                "rejected": "I do not know, 42!",
                "chosen_score": 1.0,
                "rejected_score": 0.1 * (i % 4),
            }
            for i, q in enumerate(asked)
        ],
        "feedback": [
            {
                "id": str(i),
                "input": {"prompt": q},
                "answer": answers[i] if i % 2 else "I do not know",
                "good": i % 2 == 1,
            }
            for i, q in enumerate(asked)
        ],
        "texts": [
            *(
                {"id": str(i), "text": f"The {word} is a tree. {'It grows slowly. ' * i}"}
                for i, word in enumerate(words)
            ),
            *({"id": f"d{i}", "input": {"prompt": q}, "target": answers[i]} for i, q in enumerate(asked[:8])),
        ],
        "prompts": [{"id": str(i), "input": {"prompt": q, "dead": i % 4 == 0}} for i, q in enumerate(asked)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "program.py").write_text(PROGRAM)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(
            (COMMON + text).replace("{model}", str(model)).replace("{teacher}", str(teacher))
        )
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
