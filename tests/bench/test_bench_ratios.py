"""Guards of speed that CI can hold: ratios of two ways to do the same work, alternating in one process, never seconds.

The model is random and small, but large enough that arithmetic and not Python decides. Each threshold lies well below
what was measured (in the comment beside it), so that a busy machine does not fail it and a lost optimisation does.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.helpers import write_tiny_model

from ascent.customize.batch import TrainSequence, micro_batches
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import row_named, row_with
from ascent.customize.policy import Policy
from ascent.customize.trainer import Optim, Trainer
from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Prompt, Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.lora import LoraConfig

VOCAB, ROUNDS, BUDGET = 8192, 5, 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers, width 256, in bf16, with the tiny model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = write_tiny_model(tmp_path_factory.mktemp("ratios") / "model")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(
        place,
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    return place


def ratio(slow: Callable[[], Any], quick: Callable[[], Any]) -> float:
    """Median over rounds of how much longer `slow` takes than `quick`; both run once before."""
    slow(), quick()
    found = []
    gc.collect()
    for _ in range(ROUNDS):
        times = []
        for work in (slow, quick):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        found.append(times[0] / times[1])
    print(f"ratio {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")  # noqa: T201
    return statistics.median(found)


def tokens(dice: random.Random, count: int) -> tuple[int, ...]:
    return tuple(dice.randrange(VOCAB) for _ in range(count))


def stepping(folder: Path, row: Any, units: Sequence[Sequence[TrainSequence]]) -> Callable[[], float]:
    trainer = Trainer(Policy.load(folder, "bf16", LoraConfig(8, 16.0)), Optim(lr=1e-4, schedule="constant"), 1_000)
    loss, entropy = objective(row), row.kind == "online"
    return lambda: trainer.update(micro_batches(units, BUDGET), loss, entropy=entropy)["loss"]


def test_training_against_transformers_and_peft(folder: Path) -> None:
    """The same sequences with the loss on their second half: packed by us, padded by transformers."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    dice = random.Random(0)
    rows = [tokens(dice, 20 + 14 * index) for index in range(16)]
    count = sum(len(row) - len(row) // 2 for row in rows)
    sequences = [
        TrainSequence(row, tuple(at >= len(row) // 2 for at in range(len(row))), ce_weight=1 / count) for row in rows
    ]
    ours = stepping(folder, row_named("sft"), [[sequence] for sequence in sequences])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = get_peft_model(base, PeftConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)).train()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    longest = max(map(len, rows))
    ids, labels, mask = torch.zeros(3, 16, longest, dtype=torch.long)
    labels[:] = -100
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = torch.tensor(row), 1
        labels[at, len(row) // 2 : len(row)] = torch.tensor(row[len(row) // 2 :])

    def theirs() -> float:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return float(loss.item())

    assert ours() == pytest.approx(theirs(), rel=0.01)
    assert ratio(theirs, ours) > 1.3


def test_a_shared_prompt_is_trained_once(folder: Path) -> None:
    """Eight samples of one prompt of 256 tokens against eight prompts of their own: as many rows and targets."""
    dice = random.Random(1)
    prompt, row = tokens(dice, 256), row_with("grpo", {"kl": 0.0})

    def step(own_prompts: bool) -> Callable[[], float]:
        made = []
        for index in range(8):
            head = tokens(dice, 256) if own_prompts else prompt
            seq = TrainSequence((*head, *tokens(dice, 24)), (*[False] * 256, *[True] * 24), rl_weight=1 / 192)
            seq.advantage, seq.old_logps = (-1.0) ** index, [-9.0] * 24
            made.append([seq])
        return stepping(folder, row, made)

    assert ratio(step(True), step(False)) > 2.0


def test_a_shared_prompt_is_sampled_from_once(folder: Path) -> None:
    """Sixteen samples of one prompt of 512 tokens against sixteen prompts of their own, 24 tokens each."""
    dice = random.Random(2)
    renderer = Renderer(folder)
    renderer.end_ids = frozenset()
    engine = TorchEngine(load_decoder(folder, torch.bfloat16), renderer, "ratios")
    one, many = [Prompt(token_ids=tokens(dice, 512))], [Prompt(token_ids=tokens(dice, 512)) for _ in range(16)]

    def sample(prompts: list[Prompt], n: int) -> Callable[[], int]:
        def work() -> int:
            groups = engine.generate(prompts, Sampling(n=n, max_tokens=24, seed=3))
            return sum(len(answer.token_ids) for group in groups for answer in group)

        assert work() == 16 * 24
        return work

    assert ratio(sample(many, 1), sample(one, 16)) > 2.0
