"""Serving equals sampling: whatever runs beside a request, it gets the tokens that the batch sampler gives it alone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascent.inference import lora
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Prompt, Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.sampler import Ending, sample_rows
from ascent.inference.serving.engine import ServingEngine, _uniforms
from ascent.inference.serving.request import Finish, Generation, Running
from ascent.inference.tree import Tree
from ascent.records import FinishReason

NEAR = 1e-5  # of a cumulative distribution in fp32
ADAPTERS = {
    "all": lora.LoraConfig(3, 6.0),
    "some": lora.LoraConfig(5, 5.0, ("q_proj", "v_proj", "down_proj")),
    "other": lora.LoraConfig(3, 6.0),
}


def write_adapter(model: Path, config: lora.LoraConfig, folder: Path, seed: int, base: str | None = None) -> Path:
    decoder = load_decoder(model)
    parameters = lora.attach(decoder, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    lora.save_adapter(decoder, config, folder, base or str(model))
    return folder


@dataclass(frozen=True)
class Served:
    """An engine, and what sampling alone gives."""

    engine: ServingEngine
    model: Path
    adapters: Path

    def alone(self, generation: Generation) -> tuple[list[int], list[float], FinishReason]:
        return _alone(self, generation)

    def check(self, g: Generation, found: list[int]) -> None:
        """Hold each token against the model's distribution after those before it, computed for the whole sequence."""
        decoder = _decoder(self, g.adapter)
        ids = [*g.prompt_ids, *found]
        hidden = decoder.hidden_packed(torch.tensor(ids), Tree((len(ids),), (-1,)))[len(g.prompt_ids) - 1 : -1]
        logits = (hidden @ decoder.head_weight.T).detach().double()
        assert g.temperature > 0, "greedy tokens have no border worth the name"
        p = (logits / g.temperature).softmax(-1)
        ordered = p.sort(-1, descending=True).values
        least = ordered.masked_fill(ordered.cumsum(-1) - ordered >= g.top_p, 2.0).amin(-1, keepdim=True)
        at = torch.arange(len(found)), torch.tensor(found)
        assert (p[at] >= least.squeeze(1) * (1 - NEAR)).all()
        kept = torch.where(p >= least, p, 0.0)
        above = kept.cumsum(-1) / kept.sum(-1, keepdim=True)
        uniform = torch.tensor(_uniforms(g)[: len(found)]).double()
        share = kept[at] / kept.sum(-1)
        assert (above[at] - share - NEAR <= uniform).all()
        assert (uniform <= above[at] + NEAR).all()


@cache
def _decoder(served: Served, adapter: str | None):
    decoder = load_decoder(served.model)
    if adapter is not None:
        lora.load_adapter(decoder, served.adapters / adapter)
    return decoder


@cache
def _alone(served: Served, generation: Generation) -> tuple[list[int], list[float], FinishReason]:
    decoder, g = _decoder(served, generation.adapter), generation
    sampling = Sampling(max_tokens=g.max_tokens, temperature=g.temperature, top_p=g.top_p)
    if g.temperature == 0:
        engine = TorchEngine(decoder, served.engine.renderer, "alone")
        done = engine.generate([Prompt(token_ids=g.prompt_ids)], sampling)[0][0]
        return list(done.token_ids), list(done.logps), done.finish
    ending = Ending(served.engine.renderer.end_ids)
    row = sample_rows(decoder, [g.prompt_ids], sampling, ending, seeds=[g.seed], rows_in_flight=1)[0][0]
    stopped = row.tokens[-1] in ending.ids
    return row.tokens, row.logps, FinishReason.stop if stopped else FinishReason.length


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Few rows and a small cache, so that rows wait, pages are given up, and rows are preempted."""
    folder = tmp_path_factory.mktemp("adapters")
    engine = ServingEngine(tiny_model, "tiny", rows=4, cache_tokens=26 * 16, dtype=torch.float32)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        engine.load_adapter(name, write_adapter(tiny_model, config, folder / name, seed))
    yield Served(engine, tiny_model, folder)
    engine.close()


def random_generation(dice: random.Random, stems: list[list[int]]) -> Generation:
    """Prompts that share beginnings or not, at all kinds of settings."""
    stem = dice.choice(stems)
    tail = [dice.randrange(300) for _ in range(dice.choice([1, 2, 15, 16, 17, 40]))]
    temperature = dice.choice([0.0, 0.0, 0.7, 1.0, 1.3])
    return Generation(
        prompt_ids=tuple([*stem[: dice.choice([0, 16, 20, len(stem)])], *tail]),
        max_tokens=dice.choice([1, 5, 20, 60]),
        temperature=temperature,
        top_p=dice.choice([1.0, 0.8]) if temperature else 1.0,
        seed=dice.randrange(1000),
        adapter=dice.choice([None, *ADAPTERS]),
    )


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_any_mix_of_requests_gets_what_each_gets_alone(served: Served, seed: int) -> None:
    """Arrivals at any time, adapters, prefixes found in the cache, preemptions, and cancellations in the midst."""
    dice = random.Random(seed)
    stems = [[dice.randrange(300) for _ in range(dice.choice([16, 33, 90]))] for _ in range(2)]
    runs: list[tuple[Running, bool]] = []
    for _ in range(dice.randint(1, 12)):
        run = served.engine.submit(random_generation(dice, stems))
        runs.append((run, dice.random() < 0.25))
        while dice.random() < 0.5 and not run._over.is_set():  # let steps go by before the next one arrives
            steps = served.engine.stats().steps
            while served.engine.stats().steps == steps and not run._over.is_set():
                time.sleep(0.0002)
        for one, dropped in runs:
            if dropped and dice.random() < 0.5:
                one.cancel()
    for run, dropped in runs:
        if dropped:
            run.cancel()
    for run, dropped in runs:
        tokens = run.collect(60)
        wanted, logps, finish = served.alone(run.generation)
        found = [token.id for token in tokens]
        if run.ended.finish == Finish.cancelled:
            assert dropped
            if found != wanted[: len(found)]:
                served.check(run.generation, found)
            continue
        if found != wanted:  # a number that falls on the border of two tokens, up to rounding, may pick either
            served.check(run.generation, found)
            continue
        assert run.ended.finish == finish
        if run.generation.temperature in (0.0, 1.0):  # both then speak of temperature 1
            assert [token.logp for token in tokens] == pytest.approx(logps, abs=1e-4)
    stats = served.engine.stats()
    assert (stats.running, stats.waiting, stats.cache_used) == (0, 0, 0)


def test_the_mixes_meet_all_that_they_are_meant_to(served: Served) -> None:
    """Otherwise the law above would hold of less than it says."""
    dice = random.Random(5)
    stem = [dice.randrange(300) for _ in range(90)]
    runs = [
        served.engine.submit(Generation((*stem, at), 100, temperature=1.0, seed=at, adapter=dice.choice([None, "all"])))
        for at in range(300, 312)
    ]
    before = served.engine.stats()
    for run in runs:
        assert [token.id for token in run.collect(60)] == served.alone(run.generation)[0]
    stats = served.engine.stats()
    assert before.waiting > 0
    assert stats.preempted > 0
    assert stats.cached_tokens > 0
