"""The serving engine's parts and its behaviour at the edges: queue, cancellation, deadlines, adapters, failure."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from laws.helpers import write_tiny_model
from laws.test_serving import ADAPTERS, write_adapter

from ascent.inference import lora, native
from ascent.inference.sampling.draw import nucleus, pick
from ascent.inference.sampling.weights import Weights
from ascent.inference.serving import kernels
from ascent.inference.serving.adapters import same_base
from ascent.inference.serving.choose import Choice, allowed_tokens, choose
from ascent.inference.serving.engine import ServingEngine
from ascent.inference.serving.pages import PAGE, Pages
from ascent.inference.serving.request import Finish, Generation, Running
from ascent.inference.serving.schedule import Row, Rows
from ascent.records.errors import BadInput, Busy, Unavailable, UnknownName

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason=native.problem() or "gcc refused kernels.c")
ROUNDING = 2**-8  # bf16 keeps eight bits
PROMPT = tuple(range(10, 50))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def away(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance by norm, as a share of what was wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[ServingEngine]:
    """An engine whose answers end by length or by what a test does."""
    engine = ServingEngine(tiny_model, "tiny", rows=4, waiting=8, dtype=torch.float32)
    engine.renderer.end_ids = frozenset()
    yield engine
    engine.close()


@pytest.fixture
def fresh(tiny_model: Path) -> Iterator[ServingEngine]:
    """One that a test may break, with room for long prompts."""
    engine = ServingEngine(tiny_model, "tiny", rows=2, waiting=2, dtype=torch.float32)
    engine.renderer.end_ids = frozenset()
    yield engine
    engine.close()


# Kernels against float64


@needs_kernels
@pytest.mark.parametrize(
    ("before", "counts", "heads", "kv_heads", "size"),
    [
        ([0, 5, 100, 63, 64, 0], [1, 1, 1, 1, 1, 200], 9, 3, 64),
        ([0, 5, 100], [1, 7, 30], 8, 2, 128),
        ([33], [7], 50, 1, 64),
    ],
)
def test_paged_attention(before: list[int], counts: list[int], heads: int, kv_heads: int, size: int) -> None:
    """Rows of any length on scattered pages, padding after them."""
    dice, total, group = random.Random(0), sum(counts), heads // kv_heads
    count = sum(-(-(old + new) // PAGE) for old, new in zip(before, counts, strict=True)) + 3
    left = dice.sample(range(count), count)
    keys, values = drawn(count * PAGE, kv_heads, size), drawn(count * PAGE, kv_heads, size, seed=1)
    paired_keys = keys.view(count, PAGE, kv_heads, size // 2, 2).permute(0, 2, 3, 1, 4).contiguous()
    paired_values = values.view(count, PAGE // 2, 2, kv_heads, size).permute(0, 3, 1, 4, 2).contiguous()
    qkv = drawn(total + 3, heads + 2 * kv_heads, size, seed=2)
    rows, tables, places, wanted, first = [], [], [], [], 0
    for old, new in zip(before, counts, strict=True):
        pages = [left.pop() for _ in range(-(-(old + new) // PAGE))]
        spots = [pages[at // PAGE] * PAGE + at % PAGE for at in range(old + new)]
        most = max(1, kernels.ROWS // group)
        rows += [(len(tables), old + at, first + at, min(most, new - at)) for at in range(0, new, most)]
        tables += pages
        places += spots[old:]
        q, k, v = qkv[first : first + new].double().split([heads, kv_heads, kv_heads], 1)
        k = torch.cat((keys[spots[:old]].double(), k)).repeat_interleave(group, 1)
        v = torch.cat((values[spots[:old]].double(), v)).repeat_interleave(group, 1)
        hidden = torch.ones(new, old + new).triu(old + 1).bool()
        p = (torch.einsum("qhe,khe->hqk", q, k) * size**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        wanted.append(torch.einsum("hqk,khe->qhe", p, v))
        first += new
    stretches = kernels.Stretches(*(torch.tensor(x) for x in (rows, tables, places)))
    found = kernels.paged_attention(qkv, paired_keys, paired_values, kv_heads, stretches)
    assert away(found[:total], torch.cat(wanted)) < ROUNDING
    assert not found[total:].any()


@needs_kernels
def test_low_rank_products_by_segments() -> None:
    sizes, inputs, rank = [64, 16, 16], 96, 16
    x, y, ends = drawn(20, inputs), drawn(20, sum(sizes), seed=1), torch.tensor(sizes).cumsum(0)
    wanted, kept, strips = y.double(), [], []
    for at, (begin, end) in enumerate([(2, 9), (9, 10), (12, 20)]):
        down, up = drawn(3 * rank, inputs, seed=2 + at), drawn(sum(sizes), rank, seed=5 + at)
        kept += [kernels.packed(down), kernels.packed(up)]
        inner = (x[begin:end].double() @ down.double().T).split(rank, 1)
        parts = [a @ b.T for a, b in zip(inner, up.double().split(sizes), strict=True)]
        wanted[begin:end] += torch.cat(parts, 1)
        step = kernels.STRIP
        strips += [[*(k.data_ptr() for k in kept[-2:]), rank, t, min(t + step, end)] for t in range(begin, end, step)]
    kernels.adapt(x, y, torch.tensor(strips), ends, 3 * rank)
    assert away(y, wanted) < ROUNDING


@needs_kernels
def test_bf16_engine_agrees_with_transformers_and_peft(tiny_model: Path, tmp_path: Path) -> None:
    """Every token of a mixed batch, prompts in several stretches and adapters of two ranks, against PEFT in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = write_tiny_model(tmp_path / "native")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes, **heads, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter) * (parameter.ndim > 1)).bfloat16())
    theirs.save_pretrained(folder)
    engine = ServingEngine(folder, "native", cache_tokens=1024)
    engine.renderer.end_ids = frozenset()
    assert engine._cache.native
    assert engine._weights.native
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        engine.load_adapter(name, write_adapter(folder, config, tmp_path / name, seed, "native"))
    dice = random.Random(0)
    stem = tuple(dice.randrange(300) for _ in range(70))
    prompts = [(*stem[: 10 * at], *(dice.randrange(300) for _ in range(9))) for at in range(8)]
    requests = [
        Generation(prompt, 20, seed=5, adapter=name)
        for prompt, name in zip(prompts, [None, *ADAPTERS] * 2, strict=True)
    ]
    runs = [engine.submit(request) for request in requests]
    answers = [run.collect(60) for run in runs]
    engine.close()
    for run, answer in zip(runs, answers, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if run.generation.adapter is not None:
            model = PeftModel.from_pretrained(model, str(tmp_path / run.generation.adapter))
        ids = [*run.generation.prompt_ids, *(token.id for token in answer)]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)[len(run.generation.prompt_ids) - 1 : -1]
        wanted = logp[torch.arange(20), [token.id for token in answer]]
        assert (wanted - torch.tensor([token.logp for token in answer])).abs().mean() < 0.05


# Drawing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_draw_by_their_own_settings(tiny_model: Path, engine: ServingEngine, dtype: torch.dtype) -> None:
    """Against the batch sampler's `nucleus` and `pick`, and log-softmax in float64."""
    from ascent.inference.decoder import load_decoder

    weights = Weights(load_decoder(tiny_model, dtype))
    hidden, dice = 3 * drawn(9, 32).to(dtype), random.Random(0)
    logits = hidden @ weights.head_VD.T
    mask = np.array([0, 0b1010, *[0] * 8], dtype=np.int32)
    allowed = allowed_tokens(mask, len(weights.head_VD))
    assert allowed.nonzero().flatten().tolist() == [33, 35]
    choices = [
        Choice(temperature, top_p, dice.random(), top, held)
        for temperature, top_p, top, held in [
            (0.0, 1.0, 0, None),
            (1.0, 1.0, 3, None),
            (0.7, 1.0, 0, None),
            (1.0, 0.9, 0, None),
            (2.0, 0.5, 20, None),
            (0.0, 1.0, 2, allowed),
            (1.5, 1.0, 0, allowed),
            (0.7, 0.3, 0, allowed),
            (0.7, 1.0, 1, None),
        ]
    ]
    tokens = choose(hidden, weights, choices)
    logps = (hidden.double() @ weights.head_VD.double().T).log_softmax(-1)
    for row, (choice, token) in enumerate(zip(choices, tokens, strict=True)):
        z = logits[row].float()
        if choice.allowed is not None:
            z = z.masked_fill(~choice.allowed, float("-inf"))
        if choice.temperature == 0:
            assert token.id == int(z.argmax())
        else:
            p = (z / choice.temperature).softmax(-1)[None]
            kept = nucleus(p, choice.top_p) if choice.top_p < 1 else p
            assert token.id == int(pick(kept, torch.tensor([choice.uniform])))
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert token.logp == pytest.approx(float(logps[row, token.id]), abs=tolerance)
        best = logps[row].topk(choice.top) if choice.top else None
        assert len(token.top) == choice.top
        if best is not None:
            assert [logp for _, logp in token.top] == pytest.approx(best.values.tolist(), abs=tolerance)
            assert all(float(logps[row, one]) == pytest.approx(logp, abs=tolerance) for one, logp in token.top)


@needs_kernels
@pytest.mark.parametrize("seed", range(5))
def test_draws_follow_the_nucleus(seed: int) -> None:
    """Against sorting in float64: what is kept, and the token at the uniform number of what is kept."""
    vocab, dice = 4096 + 16 * seed, random.Random(seed)
    logits, settings = 4 * drawn(24, vocab, seed=seed), []
    logits[::5, dice.randrange(vocab) :] = float("-inf")  # as a constraint leaves it
    for _ in range(24):
        settings.append([dice.choice([0.3, 1.0, 3.0]), dice.choice([1.0, 0.95, 0.5, 1e-6]), dice.random()])
    rows = torch.tensor(dice.sample(range(24), 24))
    found = kernels.draw_tokens(logits, rows, torch.tensor(settings))
    for row, (temperature, top_p, uniform), token in zip(rows.tolist(), settings, found.tolist(), strict=True):
        p = (logits[row].double() / temperature).softmax(-1)
        ordered = p.sort(descending=True).values
        least = ordered[int((ordered.cumsum(0) < top_p * (1 - 1e-6)).sum().clamp(max=vocab - 1))] if top_p < 1 else 0.0
        kept = torch.where(p >= least * (1 - 1e-9), p, 0.0)
        cumulative = kept.cumsum(0) / kept.sum()
        assert kept[token] > 0
        assert float(cumulative[token] - kept[token] / kept.sum()) <= uniform + 1e-5
        assert float(cumulative[token]) >= uniform - 1e-5


def test_a_request_answers_within_its_grammar(engine: ServingEngine) -> None:
    """llguidance, unmodified, beside rows without a grammar."""
    import llguidance
    import llguidance.hf
    import llguidance.numpy

    class Grammar:
        def __init__(self) -> None:
            tokenizer = llguidance.hf.from_tokenizer(engine.renderer.tokenizer, n_vocab=engine.vocab)
            self.matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex("[0-9]{3}-[a-c]+x"))

        def allowed(self) -> np.ndarray:
            mask = llguidance.numpy.allocate_token_bitmask(1, engine.vocab)
            llguidance.numpy.fill_next_token_bitmask(self.matcher, mask)
            return mask[0]

        def accept(self, token: int) -> None:
            self.matcher.consume_token(token)

    end = frozenset({engine.renderer.tokenizer.eos_token_id})
    free = Generation(PROMPT, 30, seed=3)
    alone = [token.id for token in engine.submit(free).collect(60)]
    held = [engine.submit(Generation(PROMPT, 100, seed=at, constraint=Grammar(), stop_ids=end)) for at in range(3)]
    beside = engine.submit(free)
    for run in held:
        text = engine.renderer.decode([token.id for token in run.collect(60)])
        assert run.ended.finish is Finish.stop
        assert re.fullmatch("[0-9]{3}-[a-c]+x", text)
    assert [token.id for token in beside.collect(60)] == alone


def test_a_broken_constraint_ends_its_own_request_alone(engine: ServingEngine) -> None:
    class Broken:
        def allowed(self) -> np.ndarray:
            return np.zeros(10, dtype=np.int32)

        def accept(self, token: int) -> None:
            raise AssertionError(token)

    broken, beside = engine.submit(Generation(PROMPT, 5, constraint=Broken())), engine.submit(Generation(PROMPT, 5))
    with pytest.raises(BadInput, match="allows no token"):
        broken.collect(60)
    assert len(beside.collect(60)) == 5
    assert engine.healthy


# Pages


@pytest.mark.parametrize("seed", range(20))
def test_pages_are_neither_lost_nor_given_twice(seed: int) -> None:
    """Requests over few tokens take, find, fill and leave pages in any order; a found page holds what it should."""
    dice, pages = random.Random(seed), Pages(12)
    roots, holds = [pages.root(), pages.root()], {}
    alive: list[tuple[int, list[int], list[int]]] = []
    for _ in range(300):
        if alive and (dice.random() < 0.4 or len(alive) == 4):
            root, _, own = alive.pop(dice.randrange(len(alive)))
            pages.leave(own)
        else:
            root = dice.choice(roots)
            tokens = [block for _ in range(dice.randint(1, 4)) for block in [dice.randrange(2)] * PAGE]
            own = pages.find(root, tokens, [])
            for at, page in enumerate(own):
                assert holds[page] == (root, tokens[: (at + 1) * PAGE])
            for at in range(len(own), len(tokens) // PAGE):
                page = pages.take()
                if page is None:
                    break
                assert all(page not in others for _, _, others in alive)
                holds[page] = (root, tokens[: (at + 1) * PAGE])
                own.append(pages.know(root, own[-1] if own else None, page, tokens[at * PAGE : (at + 1) * PAGE]))
            alive.append((root, tokens, own))
        assert pages.used == len({page for _, _, own in alive for page in own})
    for _, _, own in alive:
        pages.leave(own)
    assert pages.used == 0
    assert [pages.take() for _ in range(13)].count(None) == 1


def test_a_shared_prompt_is_stored_once_and_turns_continue(engine: ServingEngine) -> None:
    stem = tuple(range(100, 180))
    first = engine.submit(Generation((*stem, 1, 2), 20, temperature=0))
    answer = tuple(token.id for token in first.collect(60))
    runs = [engine.submit(Generation((*stem, at), 100, seed=at)) for at in range(4)]
    while engine.stats().running < 4 or not all(run._arrived for run in runs):
        time.sleep(0.001)
    with engine._steps:
        tables = [row.pages for row in engine._rows.flying]
        shared = set.intersection(*map(set, tables))
        assert len(shared) == len(stem) // PAGE
        assert engine._pages.used == len(set().union(*tables))
    for run in runs:
        run.collect(60)
        assert run.ended.cached_tokens == len(stem)
    follow = engine.submit(Generation((*stem, 1, 2, *answer, 5), 1))
    follow.collect(60)
    assert follow.ended.cached_tokens == (len(stem) + 2 + len(answer) - 1) // PAGE * PAGE


def test_tenants_find_nothing_of_each_other(engine: ServingEngine) -> None:
    prompt = tuple(range(250, 250 + 4 * PAGE))

    def ask(tenant: str) -> tuple[list[int], int]:
        run = engine.submit(Generation(prompt, 5, temperature=0, tenant=tenant))
        return [token.id for token in run.collect(60)], run.ended.cached_tokens

    answers = [ask(tenant) for tenant in ("ann", "bob", "ann", "bob", "")]
    assert [cached for _, cached in answers] == [0, 0, 3 * PAGE, 3 * PAGE, 0]
    assert len({tuple(tokens) for tokens, _ in answers}) == 1


def test_a_prompt_that_is_cached_whole_still_answers(engine: ServingEngine) -> None:
    prompt = tuple(range(200, 200 + 4 * PAGE))
    first, second = (engine.submit(Generation(prompt, 9, temperature=0)).collect(60) for _ in range(2))
    assert [token.id for token in first] == [token.id for token in second]
    again = engine.submit(Generation(prompt, 1))
    again.collect(60)
    assert again.ended.cached_tokens == 3 * PAGE


# Which rows compute what


def waiting_rows(prompts: list[int], pages: int, limit: int = 4) -> Rows:
    rows = Rows(Pages(pages), limit)
    for at, count in enumerate(prompts):
        tokens = tuple(range(100 * at, 100 * at + count))
        rows.waiting.append(Row(Running(Generation(tokens, 50)), None, rows.pages.root(), [], list(tokens)))
    return rows


def test_prompts_share_the_tokens_of_a_step() -> None:
    rows = waiting_rows([40, 40, 40], pages=20)
    rows.enter(0.0)
    counts = []
    while sum(row.computed for row in rows.flying) < 120:
        planned = rows.plan(30)
        counts.append([count for _, count in planned])
        for row, count in planned:
            rows.advance(row, count)
    assert counts == [[30], [10, 20], [20, 10], [30]]


def test_who_gives_up_pages_is_the_next_to_come_back() -> None:
    """Two rows fill all pages; the later one makes room, waits before those who came after it, and keeps its tokens."""
    rows = waiting_rows([30, 30, 30], pages=4, limit=2)
    first, second, third = rows.waiting
    rows.enter(0.0)
    for _ in range(4):
        for row, count in rows.plan(100):
            rows.advance(row, count)
            row.tokens.append(7)
        if rows.preempted:
            break
    assert rows.preempted == 1
    assert rows.flying == [first]
    assert list(rows.waiting) == [second, third]
    assert (second.pages, second.computed, second.drawn) == ([], 0, 3)
    rows.enter(1.0)
    assert rows.flying == [first]  # nobody enters without pages, not even with a row free
    rows.remove([first])
    rows.enter(2.0)
    assert rows.flying == [second]
    assert second.entered_s == 0.0


# Behaviour


def test_what_cannot_run_is_refused(engine: ServingEngine) -> None:
    with pytest.raises(BadInput, match="exceed the context of 256"):
        engine.submit(Generation(PROMPT, 217))
    with pytest.raises(BadInput, match="from 0 to"):
        engine.submit(Generation((5, engine.vocab), 1))
    with pytest.raises(UnknownName, match="unknown adapter 'nobody'"):
        engine.submit(Generation(PROMPT, 1, adapter="nobody"))
    with pytest.raises(UnknownName, match="unknown adapter"):
        engine.unload_adapter("nobody")
    for wrong in ({"top_p": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_logprobs": 21}):
        with pytest.raises(BadInput):
            Generation(PROMPT, 1, **wrong)
    with pytest.raises(BadInput, match="needs a prompt"):
        Generation((), 1)


def test_a_full_queue_says_when_to_come_back(fresh: ServingEngine) -> None:
    """As long as those who wait need, two at a time, going by how long others took."""
    began = time.monotonic()
    for _ in range(12):
        fresh.submit(Generation(PROMPT, 5)).collect(60)
    took_s = (time.monotonic() - began) / 12
    assert fresh._service_s == pytest.approx(took_s + (1 - 0.2) ** 12 * (1 - took_s), abs=0.05)
    fresh._service_s = 12.0
    runs = [fresh.submit(Generation(PROMPT, 200)) for _ in range(4)]
    with pytest.raises(Busy, match=r"requests are waiting for .tiny. already") as refused:
        for _ in range(3):
            runs.append(fresh.submit(Generation(PROMPT, 200)))
    assert refused.value.retry_after_s in (18.0, 24.0, 30.0)
    for run in runs:
        assert len(run.collect(60)) == 200
    assert len(fresh.submit(Generation(PROMPT, 2)).collect(60)) == 2


def test_the_first_come_is_the_first_served(fresh: ServingEngine) -> None:
    runs = [fresh.submit(Generation(PROMPT, 60, seed=at)) for at in range(4)]
    for run in runs:
        run.collect(60)
    entered = [run.submitted_s + run.ended.queue_s for run in runs]
    assert entered == sorted(entered)
    assert runs[2].ended.queue_s > runs[0].ended.first_token_s


def test_cancellation_and_deadlines_free_the_row(engine: ServingEngine) -> None:
    for _ in range(3):
        run = engine.submit(Generation(PROMPT, 200))
        while not run._arrived:
            time.sleep(0.0005)
        before = engine.stats().steps
        run.cancel()
        assert len(run.collect(60)) < 200
        assert run.ended.finish is Finish.cancelled
        assert engine.stats().running == 0
        assert engine.stats().steps <= before + 2  # the one under way, and at most one that began meanwhile
    late = engine.submit(Generation(PROMPT, 200, deadline_s=0.02))
    assert len(late.collect(60)) < 200
    assert late.ended.finish is Finish.timeout


def test_a_thousand_requests_with_random_disconnects_leak_nothing(tiny_model: Path) -> None:
    """From two event loops at once, some readers leaving, some requests cancelled, some out of time."""
    engine = ServingEngine(tiny_model, "tiny", rows=8, waiting=40, cache_tokens=40 * PAGE, dtype=torch.float32)
    lengths, wrong = [], []

    async def one(dice: random.Random) -> None:
        prompt = tuple(dice.randrange(20) for _ in range(dice.choice([3, 20, 60])))
        leave_at, kill_at = dice.choice([1, 3, 100]), dice.choice([0, 2, 100])
        deadline_s = dice.choice([None, None, 0.01])
        while True:
            try:
                run = engine.submit(Generation(prompt, dice.randint(1, 20), seed=1, deadline_s=deadline_s))
                break
            except Busy:
                await asyncio.sleep(0.01)
        count = 0
        stream = run.__aiter__()
        async for _ in stream:
            count += 1
            if count == kill_at:
                run.cancel()
            if count == leave_at:
                break
        await stream.aclose()
        lengths.append(count)
        if count > run.generation.max_tokens:
            wrong.append(run)

    async def many(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(10):
            await asyncio.gather(*(one(random.Random(dice.random())) for _ in range(50)))

    threads = [threading.Thread(target=asyncio.run, args=(many(seed),)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert engine.drain(30)
    stats = engine.stats()
    assert len(lengths) == stats.requests == stats.finished + stats.cancelled == 1000
    assert not wrong
    assert stats.cancelled > 100
    assert (stats.running, stats.waiting, stats.cache_used) == (0, 0, 0)
    assert [engine._pages.take() for _ in range(41)].count(None) == 1
    engine.close()


def test_tokens_of_a_step_come_in_one_call_into_the_loop(engine: ServingEngine) -> None:
    calls = []

    async def read(run) -> list[int]:
        return [token.id async for token in run]

    async def main() -> list[list[int]]:
        loop = asyncio.get_running_loop()
        plain = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), plain(*args))[1]  # type: ignore[method-assign]
        runs = [engine.submit(Generation(PROMPT, 30, seed=at)) for at in range(4)]
        return await asyncio.gather(*map(read, runs))

    before = engine.stats().steps
    answers = asyncio.run(main())
    assert [len(answer) for answer in answers] == [30] * 4
    assert 1 < len(calls) <= engine.stats().steps - before
    assert answers[2] == [token.id for token in engine.submit(Generation(PROMPT, 30, seed=2)).collect(60)]


def test_leaving_the_iteration_cancels(engine: ServingEngine) -> None:
    async def first_of(run: Running) -> int:
        stream = run.__aiter__()
        async for token in stream:
            await stream.aclose()
            return token.id
        raise AssertionError("no token came")

    run = engine.submit(Generation(PROMPT, 200, temperature=0))
    first = asyncio.run(first_of(run))
    run.collect(60)
    assert run.ended.finish is Finish.cancelled
    assert first == engine.submit(Generation(PROMPT, 1, temperature=0)).collect(60)[0].id


def test_a_loop_that_was_closed_cancels_what_it_read(engine: ServingEngine) -> None:
    run, loop = engine.submit(Generation(PROMPT, 200)), asyncio.new_event_loop()

    async def read() -> None:
        async for _ in run:
            pass

    task = loop.create_task(read())
    loop.run_until_complete(asyncio.sleep(0.005))
    loop.close()
    assert not task.done()
    run.collect(60)
    assert run.ended.finish is Finish.cancelled


def test_a_long_prompt_does_not_hold_up_those_who_answer(tmp_path: Path) -> None:
    engine = ServingEngine(write_tiny_model(tmp_path / "long", context=4096), "long", rows=4, dtype=torch.float32)
    engine.renderer.end_ids = frozenset()
    answering = engine.submit(Generation(PROMPT, 3000))
    while not answering._arrived:
        time.sleep(0.001)
    before = len(answering._arrived)
    long = engine.submit(Generation(tuple(at % 300 for at in range(3000)), 1))
    long.collect(60)
    meanwhile = len(answering._arrived) - before
    answering.cancel()
    answering.collect(60)
    engine.close()
    assert meanwhile >= 3000 // 512  # a token beside every stretch of the prompt


def test_adapters_come_and_go_while_requests_run(fresh: ServingEngine, tiny_model: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_adapter(tiny_model, ADAPTERS["all"], tmp_path / str(seed), seed)
    request = Generation(PROMPT, 100, temperature=0, adapter="a")
    fresh.load_adapter("a", tmp_path / "0")
    alone = [token.id for token in fresh.submit(request).collect(60)]
    old = fresh.submit(request)
    while not old._arrived:
        time.sleep(0.001)
    fresh.load_adapter("a", tmp_path / "1")
    new = fresh.submit(request)
    fresh.unload_adapter("a")
    with pytest.raises(UnknownName):
        fresh.submit(request)
    assert fresh.stats().adapters == ()
    assert [token.id for token in old.collect(60)] == alone
    replaced = [token.id for token in new.collect(60)]
    assert len(replaced) == 100
    assert replaced != alone
    assert new.ended.cached_tokens == 0  # what the old one computed is not the new one's


def test_an_adapter_of_another_base_is_refused(engine: ServingEngine, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_adapter(tiny_model, lora.LoraConfig(4, 8.0), tmp_path / "a", 0, "org/Qwen3-0.6B")
    with pytest.raises(BadInput, match=r"made for the base 'org/Qwen3-0\.6B', and this engine runs 'tiny'"):
        engine.load_adapter("a", folder)
    (folder / "card.json").write_text('{"parent": "tiny@0123456789ab"}')  # the store's card knows better
    engine.load_adapter("a", folder)
    engine.unload_adapter("a")
    wide = write_tiny_model(tmp_path / "wide")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes, num_attention_heads=4, num_key_value_heads=2))
    other.save_pretrained(wide)
    shaped = write_adapter(wide, lora.LoraConfig(4, 8.0), tmp_path / "b", 0, "tiny")
    with pytest.raises(BadInput, match=r"q_proj\.lora_A should have shape \(4, 32\) .* found \(4, 64\)"):
        engine.load_adapter("b", shaped)


def test_names_of_one_base() -> None:
    assert same_base("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct@0123456789ab")
    assert same_base("models/tiny@0123456789ab/", "tiny@0123456789ab")
    assert not same_base("tiny@0123456789ab", "tiny@ba9876543210")
    assert not same_base("tiny", "tiny-2")


def test_draining_ends_what_runs_and_refuses_what_comes(fresh: ServingEngine) -> None:
    runs = [fresh.submit(Generation(PROMPT, 100)) for _ in range(3)]
    assert not fresh.drain(0.001)
    with pytest.raises(Unavailable, match="shutting down"):
        fresh.submit(Generation(PROMPT, 1))
    assert fresh.drain(60)
    assert [len(run.collect(0)) for run in runs] == [100] * 3
    assert fresh.healthy


def test_closing_fails_what_runs(fresh: ServingEngine) -> None:
    run = fresh.submit(Generation(PROMPT, 200))
    fresh.close()
    with pytest.raises(Unavailable, match="was closed"):
        run.collect(60)
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = run.ended
    with pytest.raises(Unavailable, match="failed or was closed"):
        fresh.submit(Generation(PROMPT, 1))
    assert not fresh.healthy
    assert fresh.stats().cache_used == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_fails_every_request_and_shows(fresh: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [fresh.submit(Generation(PROMPT, 200)) for _ in range(3)]
    monkeypatch.setattr(fresh._cache, "attend", lambda *_: 1 / 0)

    async def read() -> None:
        async for _ in runs[0]:
            pass

    with pytest.raises(Unavailable, match="ZeroDivisionError"):
        asyncio.run(read())
    for run in runs[1:]:
        with pytest.raises(Unavailable, match="ZeroDivisionError"):
            run.collect(60)
    assert not fresh.healthy
    assert fresh.drain(1)
    with pytest.raises(Unavailable):
        fresh.submit(Generation(PROMPT, 1))
