"""The benchmark suite: its floors against torch's own counter, its tokens against the tokenizer, its sides' work."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ascent.inference.chat import Renderer
from ascent.records import Message

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def suite() -> Iterator[SimpleNamespace]:
    """The suite's modules, which lie beside the package as scripts do."""
    names = ("bench", "curves", "environments", "floors", "page", "workloads")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


# ── floors ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trained", [False, True])
def test_floor_counts_the_products_that_torch_does(suite: SimpleNamespace, tiny_model: Path, trained: bool) -> None:
    """One sequence in transformers with peft, all its logits computed.

    Torch computes the whole square of attention and the logits of the last token too; the floor has only the pairs
    that see each other, and no target after the last token. Both differences are known products.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rank, length = 3, 24
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    model: Any = base
    if trained:
        model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.0))
        model.train()
    ids = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
        logits = model(input_ids=ids, use_cache=False).logits
        if trained:
            logits.logsumexp(-1).sum().backward()
    shape, tree = suite.floors.Shape.read(tiny_model), (suite.floors.Stretch(1, length),)
    found = shape.trained(tree, length - 1, rank) if trained else shape.scored(tree, length - 1)
    times = 3 if trained else 1  # a forward pass and two products for each of its own
    unseen = 4 * shape.layers * shape.heads * shape.head_size * (length * length - tree[0].pairs)
    last = 2 * shape.head * (2 if trained else 1)
    assert found.operations + times * unseen + last == counter.get_total_flops()


def test_sampling_computes_what_scoring_would(suite: SimpleNamespace, tiny_model: Path) -> None:
    """Token by token or all at once, the products are the same; only the weights are read once per token."""
    shape, Stretch = suite.floors.Shape.read(tiny_model), suite.floors.Stretch
    prompts, prompt, group, new = 3, 20, 4, 7
    sampled = shape.sampled(prompts, prompt, group, new)
    tree = (Stretch(prompts, prompt), Stretch(prompts * group, new - 1, prompt))
    scored = shape.scored(tree, prompts + prompts * group * (new - 1))
    assert sampled.operations == scored.operations
    weights = suite.floors.BF16 * (shape.linear + shape.head)
    keys = sum(
        shape.kv_bytes(prompts * prompt) + prompts * group * shape.kv_bytes(drawn + 1) for drawn in range(new - 1)
    )
    assert sampled.bytes == new * weights + keys


def test_shared_prompts_lower_the_floor(suite: SimpleNamespace, tiny_model: Path) -> None:
    """Eight samples of one prompt cost less than eight prompts with one sample, by seven times the prompt."""
    shape, make = suite.floors.Shape.read(tiny_model), suite.workloads.Workload
    one, eight = (
        suite.floors.floor(
            shape, make("", "", "grpo", (), prompts=p, prompt_tokens=100, group=8 // p, new_tokens=1, rank=4)
        )
        for p in (1, 8)
    )
    prompt = (suite.floors.Stretch(7, 100),)
    spared = shape.trained(prompt, 0, 4).operations + shape.scored(prompt, 7).operations
    assert eight.operations - one.operations == spared


# ── workloads ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_workloads_are_those_of_the_table(suite: SimpleNamespace) -> None:
    by_name = {work.name: work for work in suite.workloads.WORKLOADS}
    lengths = by_name["sft"].lengths
    assert (len(lengths), min(lengths), max(lengths), sum(lengths) / 16) == (16, 20, 230, 139)
    assert by_name["arithmetic"].tokens == 8192
    assert by_name["grpo-360"].tokens == 4 * 8 * (360 + 48)
    assert by_name["dpo"].tokens == 8 * 2 * (300 + 60)
    assert by_name["sampling"].tokens == 32 * 48


@pytest.mark.parametrize("name", ["grpo-70", "sft", "dpo", "sampling"])
def test_texts_have_exactly_their_tokens(suite: SimpleNamespace, tiny_model: Path, name: str) -> None:
    renderer = Renderer(tiny_model)
    work = next(work for work in suite.workloads.WORKLOADS if work.name == name)
    job = suite.workloads.job(work, renderer, 2)

    def count(text: str) -> int:
        return len(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])

    if name == "grpo-70":
        prompts = [renderer.prompt_ids([Message(role="user", content=text)]) for text in job["questions"]]
        assert [len(ids) for ids in prompts] == [70] * 8
        assert len(set(map(tuple, prompts))) == 8
    elif name == "sft":
        assert [[len(ids) for ids in step] for step in job["sequences"]] == [list(work.lengths)] * 2
        assert [count(renderer.decode(ids)) for ids in job["sequences"][1]] == list(work.lengths)
    elif name == "dpo":
        sizes = {
            (count(p["prompt"]), len(p["prompt_ids"]), count(p["chosen"]), len(p["rejected_ids"])) for p in job["pairs"]
        }
        assert sizes == {(300, 300, 60, 60)}
        assert all(pair["chosen_ids"][-1] == renderer.tokenizer.eos_token_id for pair in job["pairs"])
    else:
        assert {len(ids) for step in job["prompt_ids"] for ids in step} == {300}
    assert job == suite.workloads.job(work, renderer, 2)


# ── sides ──────────────────────────────────────────────────────────────────────────────────────────────────────


def options(model: Path) -> argparse.Namespace:
    own = Path(sys.executable)
    given = {"model": str(model), "threads": 1, "steps": 2, "warmup": 1, "logs": None, "patience": 0}
    return argparse.Namespace(**given, trl_python=own, vllm_python=None)


@pytest.fixture(scope="module")
def running(suite: SimpleNamespace, tiny_model: Path) -> Any:
    return suite.bench.Suite(options(tiny_model))


def work_named(suite: SimpleNamespace, name: str) -> Any:
    return suite.workloads.quick(next(work for work in suite.workloads.WORKLOADS if work.name == name))


def test_our_side_does_the_work_that_was_asked(suite: SimpleNamespace, running: Any) -> None:
    """GRPO through the real loop: every answer is as long as asked, and every step has the job's tokens."""
    work = work_named(suite, "grpo-70")
    found = running.run(suite.bench.OURS, work, 2)
    assert len(found["seconds"]) == 2, found
    assert all(seconds > 0 for seconds in found["seconds"])
    assert found["tokens"] == [work.tokens] * 2 == [2 * 2 * (64 + 8)] * 2
    assert found["facts"]["answer"] == 8
    assert 100 < found["peak_mb"] < 4000


def test_a_side_that_cannot_run_says_why(suite: SimpleNamespace, running: Any, tmp_path: Path) -> None:
    found = running.process(Path(sys.executable), "with_ascent.py", {"kind": "sft", "warmup": 0, "steps": 1})
    assert "failed" in found
    assert "KeyError" in found["failed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo-70"])
def test_trl_computes_the_same(suite: SimpleNamespace, running: Any, name: str) -> None:
    """The first step's loss is the same on both sides (DPO begins at ln 2), and so are the tokens of each step."""
    work = work_named(suite, name)
    ours, theirs = (running.run(side, work, 2) for side in (suite.bench.OURS, suite.bench.TRL))
    assert "failed" not in theirs, theirs
    assert theirs["tokens"] == pytest.approx(ours["tokens"])
    if name == "grpo-70":
        assert theirs["facts"]["answer"] == ours["facts"]["answer"] == 8
    else:
        expected = math.log(2) if name == "dpo" else ours["facts"]["first loss"]
        assert theirs["facts"]["first loss"] == pytest.approx(expected, rel=0.02)


# ── the page ───────────────────────────────────────────────────────────────────────────────────────────────────


def entry(mine: float, theirs: float) -> dict[str, Any]:
    sides = {
        "ascent": {"seconds": [mine, mine * 2, mine], "tokens": [100] * 3, "peak_mb": 1000},
        "trl": {"seconds": [theirs], "tokens": [100], "peak_mb": 5000},
        "trl, packing": {"seconds": [theirs, theirs / 3, theirs], "tokens": [300, 100, 300], "peak_mb": 5000},
    }
    targets = [
        {"quantity": "time", "reach": 4, "peers": ["trl", "trl, packing"]},
        {"quantity": "memory", "reach": 5, "peers": ["trl"]},
        {"quantity": "share", "reach": 0.45, "peers": []},
        {"quantity": "time", "reach": 2, "peers": ["vllm"]},
    ]
    floor = {"operations": 4e11, "bytes": 0, "seconds": 0.4}
    return {"title": "t", "tokens": 100, "sides": sides, "targets": targets, "floor": floor, "rates": {"bf16": 1e12}}


def test_marks_are_against_the_best_peer(suite: SimpleNamespace) -> None:
    """A peer that packs three times the tokens into a step is three times as fast at the same seconds."""
    rows = suite.page.marks(entry(1.0, 10.0))
    assert [row[2:] for row in rows] == [
        ("3.3×", "**not reached**"),
        ("1/5.0", "reached"),
        ("40%", "**not reached**"),
        ("not measured", ""),
    ]
    assert suite.page.marks(entry(0.8, 10.0))[0][2:] == ("4.2×", "reached")


@pytest.mark.parametrize(
    ("measured", "model", "told"),
    [(2.0, 1.0, "the model does not say so**"), (2.0, 2.0, "the model says so too**"), (1.05, 1.0, "no super-linear")],
)
def test_growth_is_called_super_linear_whatever_the_model_says(
    suite: SimpleNamespace, measured: float, model: float, told: str
) -> None:
    points = [{"x": x, "seconds": [x**measured, 9e9], "model": {"seconds": x**model}} for x in (1, 2, 4, 8, 16)]
    words = suite.page.verdict(points, 1.0)
    assert told in words
    assert f"x^{measured:.2f}" in words
