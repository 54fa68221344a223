"""Sampling and training speed of the embedded engine beside transformers and peft, on the same work in one run.

Both sides get the same model in bf16, the same prompts, the same answers to learn, LoRA of rank 16 on all linear
layers, and the threads that torch takes by itself. Each measurement runs in a process of its own, so that peak memory
is its own, and warms up first. Tokens are those that count: sampled tokens up to the end token, and tokens of
training sequences without padding. The loss of the first training step is given so that one can see that both
computed the same thing.

    python benchmarks/engine.py --json OUT.json [--quick]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ascent.records import Message

MODEL = "smollm2-135m-instruct"
RANK, ALPHA = 16, 32
TEXT = (
    "The clerk reads the order, checks the address, and asks the customer when a line cannot be read. "
    "Every parcel leaves with a note of what is inside, who packed it, and when it has to arrive. "
)


@dataclass(frozen=True)
class Work:
    """How much to do: sampling of `prompts` × `samples`, and steps on `sequences`."""

    prompts: int = 4
    samples: int = 8
    max_tokens: int = 48
    shared_words: int = 250
    sequences: int = 16
    words: int = 90
    steps: int = 3


QUICK = Work(prompts=2, samples=4, max_tokens=16, shared_words=60, sequences=4, words=30, steps=1)


def prompts(work: Work) -> list[tuple[Message, ...]]:
    """Prompts that share a long system text, as those of a use case do."""
    system = Message(role="system", content=words(work.shared_words, 0))
    asked = [f"Question {index}: {words(12, index)} Explain at length." for index in range(work.prompts)]
    return [(system, Message(role="user", content=text)) for text in asked]


def conversations(work: Work) -> list[tuple[Message, ...]]:
    """Demonstrations of different lengths: half a length of `words` to one and a half."""
    found = []
    for index in range(work.sequences):
        length = work.words // 2 + work.words * index // max(1, work.sequences - 1)
        question = Message(role="user", content=f"Write note {index}.")
        system = Message(role="system", content="You write notes.")
        found.append((system, question, Message(role="assistant", content=words(length, index))))
    return found


def words(count: int, start: int) -> str:
    """Return `count` words of the text, beginning somewhere else for each `start`."""
    all_words = TEXT.split()
    return " ".join(all_words[(start * 7 + at) % len(all_words)] for at in range(count))


def sample_ours(folder: Path, work: Work) -> dict[str, Any]:
    """Sample with the embedded engine."""
    from ascent.inference.engine import Prompt, Sampling
    from ascent.inference.engines.torch import TorchEngine

    engine = TorchEngine.load(folder, MODEL)
    asked = [Prompt(messages) for messages in prompts(work)]
    sampling = Sampling(n=work.samples, max_tokens=work.max_tokens, temperature=1.0, seed=1)
    engine.generate(asked[:1], Sampling(n=2, max_tokens=4, temperature=1.0))
    seconds, groups = timed(lambda: engine.generate(asked, sampling))
    answers = [answer for group in groups for answer in group]
    tokens = sum(len(answer.token_ids) for answer in answers)
    return rate(tokens, seconds) | {"prompt_tokens": len(answers[0].prompt_ids)}


def sample_theirs(folder: Path, work: Work) -> dict[str, Any]:
    """Sample with transformers' `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    from ascent.inference.chat import Renderer

    renderer = Renderer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = [renderer.prompt_ids(messages) for messages in prompts(work)]
    padded, mask = pad(ids, renderer.pad_id, left=True)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "pad_token_id": renderer.pad_id}
    torch.manual_seed(1)
    with torch.inference_mode():
        model.generate(padded[:1], attention_mask=mask[:1], max_new_tokens=4, num_return_sequences=2, **settings)
        more = {"max_new_tokens": work.max_tokens, "num_return_sequences": work.samples}
        seconds, out = timed(lambda: model.generate(padded, attention_mask=mask, **more, **settings))
    tokens = 0
    for row in out[:, padded.shape[1] :].tolist():
        ends = [at for at, token in enumerate(row) if token in renderer.end_ids]
        tokens += ends[0] + 1 if ends else len(row)
    return rate(tokens, seconds) | {"prompt_tokens": len(ids[0])}


def train_ours(folder: Path, work: Work) -> dict[str, Any]:
    """Take optimizer steps with our trainer."""
    from ascent.customize.batch import TrainSequence, micro_batches
    from ascent.customize.objectives.rows import objective, row_named
    from ascent.customize.objectives.weights import WEIGHTS
    from ascent.customize.policy import Policy
    from ascent.customize.trainer import Optim, Trainer
    from ascent.inference.chat import Renderer
    from ascent.inference.lora import LoraConfig

    renderer = Renderer(folder)
    rendered = [renderer.render(messages) for messages in conversations(work)]
    sequences = [TrainSequence(item.token_ids, item.loss_mask) for item in rendered]
    weights = WEIGHTS["token_mean"]([sequence.targets for sequence in sequences])
    for sequence, weight in zip(sequences, weights, strict=True):
        sequence.ce_weight = weight
    policy = Policy.load(folder, "bf16", LoraConfig(RANK, float(ALPHA)))
    trainer = Trainer(policy, Optim(lr=1e-4, schedule="constant", warmup_fraction=0.0), work.steps + 1)
    loss = objective(row_named("sft"))
    losses: list[float] = []

    def step() -> None:
        losses.append(trainer.update(micro_batches([[sequence] for sequence in sequences], 2048), loss)["loss"])

    step()
    seconds, _ = timed(lambda: [step() for _ in range(work.steps)])
    tokens = work.steps * sum(len(sequence.token_ids) for sequence in sequences)
    return rate(tokens, seconds) | {"first_loss": losses[0]}


def train_theirs(folder: Path, work: Work) -> dict[str, Any]:
    """Take optimizer steps with transformers and peft on one padded batch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from ascent.inference.chat import Renderer

    renderer = Renderer(folder)
    rendered = [renderer.render(messages) for messages in conversations(work)]
    padded, mask = pad([item.token_ids for item in rendered], renderer.pad_id, left=False)
    labels = torch.full_like(padded, -100)
    for row, item in enumerate(rendered):
        for at, (token, kept) in enumerate(zip(item.token_ids, item.loss_mask, strict=True)):
            labels[row, at] = token if kept else -100
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0))
    model.train()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses: list[float] = []

    def step() -> None:
        loss = model(input_ids=padded, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        losses.append(loss.item())

    step()
    seconds, _ = timed(lambda: [step() for _ in range(work.steps)])
    tokens = work.steps * sum(len(item.token_ids) for item in rendered)
    return rate(tokens, seconds) | {"first_loss": losses[0]}


MEASUREMENTS: dict[str, dict[str, Callable[[Path, Work], dict[str, Any]]]] = {
    "sampling": {"ascent": sample_ours, "transformers": sample_theirs},
    "training": {"ascent": train_ours, "transformers": train_theirs},
}


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Any, Any]:
    """Return (ids, mask) of rows as two rectangular tensors."""
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[at, place] = torch.tensor(row)
        mask[at, place] = 1
    return ids, mask


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return (seconds, result)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def rate(tokens: int, seconds: float) -> dict[str, Any]:
    """Return tokens, seconds and their quotient."""
    return {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}


def measure(kind: str, side: str, folder: Path, work: Work) -> dict[str, Any]:
    """Take one measurement in this process and add the peak memory."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = MEASUREMENTS[kind][side](folder, work)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found | {"peak_rss_mb": round(peak_mb), "threads": torch.get_num_threads()}


def main() -> None:
    """Take all measurements and write them as JSON."""
    parser = argparse.ArgumentParser(description="Sampling and training speed beside transformers and peft.")
    parser.add_argument("--json", type=Path, help="where the numbers go; they are printed in any case")
    parser.add_argument("--quick", action="store_true", help="a small piece of work, to see that everything runs")
    arguments = parser.parse_args()
    from ascent.inference.pull import pull
    from ascent.inference.store import Store

    work = QUICK if arguments.quick else Work()
    folder = pull(MODEL, Store())
    results: dict[str, Any] = {}
    for kind, sides in MEASUREMENTS.items():
        for side in sides:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(measure, kind, side, folder, work).result()
            results.setdefault(kind, {})[side] = found
            sys.stdout.write(f"{kind:<9} {side:<13} {json.dumps(found)}\n")
            sys.stdout.flush()
        speeds = {side: found["tokens_per_second"] for side, found in results[kind].items()}
        results[kind]["ratio"] = round(speeds["ascent"] / speeds["transformers"], 2)
        sys.stdout.write(f"{kind:<9} ratio {results[kind]['ratio']}\n")
    if arguments.json:
        from ascent.records.files import write_atomic

        packages = ("ascent-posttrain", "torch", "transformers", "peft")
        facts = {"work": asdict(work), "model": folder.name, "system": platform.platform(), "results": results}
        content = facts | {"versions": {name: version(name) for name in packages}}
        write_atomic(arguments.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
