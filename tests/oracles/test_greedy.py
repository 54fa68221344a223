"""Greedy decoding of the real SmolLM2 against transformers `generate`, token for token in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Prompt, Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.records import Message

NAME = "smollm2-135m-instruct"
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours.",
    "Translate to French: good morning",
    "Give a short recipe for tea, and say why you would drink it on a cold day in winter.",
    "2 + 2 =",
]


@pytest.fixture(scope="module")
def theirs(smollm2: Path):
    return AutoModelForCausalLM.from_pretrained(str(smollm2), dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> TorchEngine:
    return TorchEngine(load_decoder(smollm2), Renderer(smollm2), NAME)


def generated(theirs, engine: TorchEngine, prompt: Prompt, tokens: int) -> list[int]:
    ids = torch.tensor([engine.renderer.prompt_ids(prompt.messages)])
    ends = sorted(engine.renderer.end_ids)
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=engine.renderer.pad_id,
    )
    return out[0, ids.shape[1] :].tolist()


def compare(theirs, engine: TorchEngine, questions: list[str], tokens: int, in_flight: tuple[int, ...]) -> None:
    prompts = [Prompt((Message(role="user", content=question),)) for question in questions]
    wanted = [generated(theirs, engine, prompt, tokens) for prompt in prompts]
    for rows in in_flight:
        engine.rows_in_flight = rows
        found = engine.generate(prompts, Sampling(max_tokens=tokens, temperature=0))
        assert [list(done.token_ids) for (done,) in found] == wanted, f"{rows} rows in flight"
        for (done,) in found:
            ids = torch.tensor([done.prompt_ids + done.token_ids])
            with torch.no_grad():
                logp = theirs(ids).logits[0, len(done.prompt_ids) - 1 : -1].log_softmax(-1)
            scored = logp.gather(1, torch.tensor(done.token_ids)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(done.logps), scored, atol=2e-4, rtol=1e-4)


def test_two_short_answers_equal_generate(theirs, engine: TorchEngine) -> None:
    compare(theirs, engine, QUESTIONS[:2], 8, (64,))


@pytest.mark.slow
def test_six_answers_equal_generate_at_any_batch_size(theirs, engine: TorchEngine) -> None:
    compare(theirs, engine, QUESTIONS, 24, (1, 3, 64))
