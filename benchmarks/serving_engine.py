"""What the serving engine delivers, beside the batch sampler on the same load and machine, in one run.

    python benchmarks/serving_engine.py [--model smollm2-135m-instruct] [--json FILE] [--only load adapters prefix ...]

Distinct random prompts of 100 tokens, answers of 64 at temperature 1, bf16. Each number is the median of `ROUNDS`, and
the sides take turns, so that a slow spell of the machine meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from ascent.inference import lora
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.sampler import Ending, sample_rows
from ascent.inference.serving.engine import ServingEngine
from ascent.inference.serving.kernels import release_threads
from ascent.inference.serving.request import Generation, Running
from ascent.inference.store import Store

PROMPT, ANSWER, ROUNDS, SYSTEM = 100, 64, 3, 300
DICE = random.Random(0)


def tokens(count: int) -> tuple[int, ...]:
    """Random ids of ordinary words."""
    return tuple(DICE.randrange(1000, 40000) for _ in range(count))


def serve(
    engine: ServingEngine, count: int, adapters: Sequence[str | None] = (None,), *, answer: int = ANSWER
) -> float:
    """Tokens a second of `count` requests at once, dealt out to the adapters."""
    requests = [
        Generation(tokens(PROMPT), answer, seed=at, adapter=adapters[at % len(adapters)]) for at in range(count)
    ]
    began = time.perf_counter()
    runs = [engine.submit(request) for request in requests]
    delivered = sum(len(run.collect()) for run in runs)
    return delivered / (time.perf_counter() - began)


def batch(engine: TorchEngine, count: int) -> float:
    """The same load by the batch sampler, which knows it all beforehand."""
    prompts = [tokens(PROMPT) for _ in range(count)]
    sampling = Sampling(max_tokens=ANSWER)
    began = time.perf_counter()
    rows = sample_rows(
        engine.decoder,
        prompts,
        sampling,
        Ending(),
        seeds=range(count),
        rows_in_flight=engine.rows_in_flight,
        packed=engine._packed,
    )
    seconds = time.perf_counter() - began
    release_threads()  # as the sampler's threads would slow the engine down
    return sum(len(row[0].tokens) for row in rows) / seconds


def medians(sides: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The sides in turns; the first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, side in sides.items():
            value = side()
            if turn:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def load(engine: ServingEngine, folder: Path) -> dict[str, float]:
    """Tokens a second at 1, 8 and 32 requests."""
    sampler = TorchEngine.load(folder, engine.name)
    sides: dict[str, Callable[[], float]] = {}
    for count in (1, 8, 32):
        sides[f"engine, {count} at once, tokens/s"] = lambda count=count: serve(engine, count)
        sides[f"batch sampler, {count} at once, tokens/s"] = lambda count=count: batch(sampler, count)
    return medians(sides)


def adapters(engine: ServingEngine, folder: Path) -> dict[str, float]:
    """Tokens a second at 32 requests through no adapter, one, and four."""
    decoder, config = load_decoder(folder), lora.LoraConfig(16, 32.0)
    parameters = lora.attach(decoder, config)
    names = [f"adapter-{at}" for at in range(4)]
    with tempfile.TemporaryDirectory() as scratch:
        for at, name in enumerate(names):
            generator = torch.Generator().manual_seed(at)
            with torch.no_grad():
                for parameter in parameters:
                    parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
            lora.save_adapter(decoder, config, Path(scratch) / name, engine.name)
            engine.load_adapter(name, Path(scratch) / name)
    return medians(
        {
            "no adapter, tokens/s": lambda: serve(engine, 32),
            "one adapter, tokens/s": lambda: serve(engine, 32, names[:1]),
            "four adapters, tokens/s": lambda: serve(engine, 32, names),
        }
    )


def prefix(engine: ServingEngine, folder: Path) -> dict[str, float]:
    """Milliseconds to the first token after a system prompt that is new, and one that was seen."""

    def first(system: tuple[int, ...]) -> float:
        run = engine.submit(Generation((*system, *tokens(20)), 1))
        run.collect()
        return 1e3 * run.ended.first_token_s

    seen = tokens(SYSTEM)
    first(seen)
    return medians({"new system prompt, ms": lambda: first(tokens(SYSTEM)), "seen, ms": lambda: first(seen)})


def settings(engine: ServingEngine, folder: Path) -> dict[str, float]:
    """Tokens a second at 32 requests that sample at `top_p` 0.9, and that want 5 likeliest tokens."""

    def asked(**fields: float) -> float:
        requests = [Generation(tokens(PROMPT), ANSWER, seed=at, **fields) for at in range(32)]  # type: ignore[arg-type]
        began = time.perf_counter()
        runs = [engine.submit(request) for request in requests]
        return sum(len(run.collect()) for run in runs) / (time.perf_counter() - began)

    return medians(
        {
            "plain, tokens/s": lambda: asked(),
            "top_p 0.9, tokens/s": lambda: asked(top_p=0.9),
            "top_logprobs 5, tokens/s": lambda: asked(top_logprobs=5),
        }
    )


def stall(engine: ServingEngine, folder: Path) -> dict[str, float]:
    """The longest and the usual gap, in ms, between tokens of 8 answers while a prompt of 2,000 tokens comes in."""

    def gaps() -> list[float]:
        runs = [engine.submit(Generation(tokens(PROMPT), 200)) for _ in range(8)]
        while any(run._end is None and not run._arrived for run in runs):
            time.sleep(0.001)
        long, counts, times = engine.submit(Generation(tokens(2000), 1)), len(runs[0]._arrived), [time.perf_counter()]
        while not long._over.is_set():
            if len(runs[0]._arrived) > counts:
                counts = len(runs[0]._arrived)
                times.append(time.perf_counter())
            time.sleep(0.0005)
        for run in runs:
            run.cancel()
            run.collect()
        return [1e3 * (after - before) for before, after in itertools.pairwise(times)]

    gaps()
    rounds = [gaps() for _ in range(ROUNDS)]
    return {
        "longest gap, ms": statistics.median(map(max, rounds)),
        "median gap, ms": statistics.median(map(statistics.median, rounds)),
    }


def readers(engine: ServingEngine, folder: Path) -> dict[str, float]:
    """Tokens a second at 32 requests read by an event loop that decodes and encodes each token as a server would."""

    async def read(run: Running) -> int:
        count = 0
        async for token in run:
            text = engine.renderer.decode([token.id])
            chunk = {"id": run.number, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
            count += bool(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        return count

    async def all_read() -> float:
        began = time.perf_counter()
        runs = [engine.submit(Generation(tokens(PROMPT), ANSWER, seed=at)) for at in range(32)]
        return sum(await asyncio.gather(*map(read, runs))) / (time.perf_counter() - began)

    return medians(
        {"waited for, tokens/s": lambda: serve(engine, 32), "streamed, tokens/s": lambda: asyncio.run(all_read())}
    )


def contention(engine: ServingEngine, folder: Path) -> dict[str, float]:
    """Tokens a second at 8 short answers while another thread of the process runs Python without a pause."""
    usual, over = sys.getswitchinterval(), threading.Event()

    def beside(interval_s: float) -> float:
        sys.setswitchinterval(interval_s)
        over.clear()
        thread = threading.Thread(target=lambda: [None for _ in iter(over.is_set, True)])
        thread.start()
        try:
            return serve(engine, 8, answer=4)
        finally:
            over.set()
            thread.join()
            sys.setswitchinterval(usual)

    return medians(
        {
            "alone, tokens/s": lambda: serve(engine, 8, answer=4),
            f"busy thread, switched after {1e3 * usual:g} ms, tokens/s": lambda: beside(usual),
            "busy thread, switched after 0.2 ms, tokens/s": lambda: beside(0.0002),
        }
    )


PARTS = (load, adapters, prefix, settings, stall, readers, contention)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", nargs="*", default=[part.__name__ for part in PARTS])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Store().resolve(arguments.model)
    engine = ServingEngine(folder, arguments.model)
    engine.renderer.end_ids = frozenset()  # every answer has its full length
    found: dict[str, dict[str, float]] = {}
    for part in PARTS:
        if part.__name__ in arguments.only:
            found[part.__name__] = part(engine, folder)
            for name, value in found[part.__name__].items():
                click.echo(f"{part.__name__:>10}  {name:<60} {value:8.1f}")
    engine.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
