"""Continuous batching over a tree of caches against transformers' full forward pass, one row at a time.

Given a row's tokens, each must be what the row's own uniform number picks from the distribution that transformers
computes for the whole sequence without a cache; by induction the row is the one that sampling alone would give.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from ascent.inference import cache, sampler
from ascent.inference.chat import Renderer
from ascent.inference.decoder import Decoder, load_decoder
from ascent.inference.engine import Prompt, Sampling
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.sampler import Ending, Row, sample_rows
from ascent.inference.sampling.draw import nucleus, pick
from ascent.inference.sampling.weights import Packed
from ascent.records import FinishReason

SIZES = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
}
END = 17


def random_model(folder: Path, family: str):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[family]).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 1.0)
    theirs.save_pretrained(folder)
    return theirs, load_decoder(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return random_model(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory):
    return random_model(tmp_path_factory.mktemp("models"), "llama")


def random_prompts(dice: random.Random) -> list[list[int]]:
    """Prompts that share a beginning or not, of very different lengths, some of them twice."""
    shared = [dice.randrange(211) for _ in range(dice.choice([0, 0, 1, 5, 40]))]
    found = [shared + [dice.randrange(211) for _ in range(dice.choice([1, 2, 3, 9, 30]))] for _ in range(4)]
    return [*found, dice.choice(found)]


def uniforms(seed: int, sample: int, count: int) -> list[float]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample) % (1 << 63))
    return torch.rand(count, generator=generator).tolist()


def check(theirs, prompt: list[int], row: Row, sampling: Sampling, seed: int) -> None:
    """Compare a row with what transformers makes of its whole sequence."""
    assert len(row.tokens) == len(row.logps)
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + row.tokens])).logits[0, len(prompt) - 1 : -1]
    logp = (logits.double() / (sampling.temperature or 1.0)).log_softmax(-1)
    tokens = torch.tensor(row.tokens)
    scored = logp.gather(1, tokens[:, None]).squeeze(1).float()
    torch.testing.assert_close(torch.tensor(row.logps), scored, atol=1e-5, rtol=1e-5)
    if sampling.temperature == 0:
        assert row.tokens == logits.argmax(-1).tolist()
        return
    drawn = torch.tensor(uniforms(seed, row.sample, sampling.max_tokens), dtype=torch.float64)[: len(tokens)]
    cumulative = logp.exp().cumsum(-1)
    below = torch.where(tokens > 0, cumulative.gather(1, (tokens - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)
    above = cumulative.gather(1, tokens[:, None]).squeeze(1)
    assert (below <= drawn + 1e-6).all() and (drawn <= above + 1e-6).all()


LAYOUTS = {"all levels apart": 0, "everything folded": 1 << 40, "some of each": 2000}


@pytest.fixture(params=LAYOUTS)
def levels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Keep levels apart, fold them, or choose by size; with small prefills."""
    monkeypatch.setattr(cache, "FOLD_BYTES", LAYOUTS[request.param])
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 40)
    yield request.param


def test_rows_of_random_tries_are_those_of_transformers(pair, levels: str) -> None:
    theirs, ours = pair
    dice = random.Random(levels)
    for temperature, limit in itertools.product((0.0, 1.3), (1, 3, 8, 64)):
        prompts = random_prompts(dice)
        sampling = Sampling(n=dice.choice([1, 3, 5]), max_tokens=dice.choice([1, 9, 21]), temperature=temperature)
        seeds = [dice.randrange(1 << 30) for _ in prompts]
        found = sample_rows(ours, prompts, sampling, Ending(frozenset({END})), seeds=seeds, rows_in_flight=limit)
        assert [len(rows) for rows in found] == [sampling.n] * len(prompts)
        for index, rows in enumerate(found):
            assert [(row.prompt, row.sample) for row in rows] == [(index, sample) for sample in range(sampling.n)]
            for row in rows:
                assert len(row.tokens) == sampling.max_tokens or row.tokens[-1] == END
                assert END not in row.tokens[:-1]
                check(theirs, prompts[index], row, sampling, seeds[index])


def test_places_are_used_again_and_grow(llama, levels: str) -> None:
    """Rows of very different lengths follow each other for many more steps than there are places."""
    theirs, ours = llama
    prompts = [[3, 4, index] for index in range(12)]
    lengths = random.Random(1).choices([1, 2, 5, 60], k=len(prompts))
    sampling = Sampling(n=2, max_tokens=70, temperature=1.0)

    def ending(tokens: list[int]) -> bool:
        return len(tokens) == min(70, 3 + lengths[tokens[0] % len(lengths)])

    found = sample_rows(ours, prompts, sampling, Ending(frozenset(), ending), seeds=range(12), rows_in_flight=4)
    for index, rows in enumerate(found):
        for row in rows:
            assert ending(row.tokens)
            check(theirs, prompts[index], row, Sampling(n=2, max_tokens=len(row.tokens)), index)


class Watch:
    """Counts steps and notes the rows of each; keeps the caches that were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.caches: list[cache.Cache] = []
        step = sampler.step

        def counted(weights, tree, tokens_B):
            self.rows.append(len(tokens_B))
            if tree not in self.caches:
                self.caches.append(tree)
            return step(weights, tree, tokens_B)

        monkeypatch.setattr(sampler, "step", counted)


def test_rows_enter_as_others_leave_and_groups_are_handed_over_early(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = llama
    watch = Watch(monkeypatch)
    lengths = [30, 3, 3, 3, 3, 3, 3, 3, 3, 3]

    def stopped(tokens: list[int]) -> bool:
        return len(tokens) == lengths[0 if tokens[0] in first else 1]

    sampling = Sampling(n=2, max_tokens=30, temperature=0)
    prompts = [[5, index, 9] for index in range(10)]
    free = sample_rows(ours, prompts, sampling, Ending(), seeds=[0] * 10, rows_in_flight=64)
    first = {free[0][0].tokens[0]}
    slow = sum(rows[0].tokens[0] in first for rows in free)
    assert 1 <= slow < 4
    watch.rows.clear()
    done: list[int] = []
    groups: list[tuple[int, int]] = []

    def on_group(index: int, rows: list[Row]) -> None:
        assert all(row.ended and row.prompt == index for row in rows) and len(rows) == 2
        groups.append((index, len(watch.rows)))

    found = sample_rows(
        ours,
        prompts,
        sampling,
        Ending(stopped=stopped),
        seeds=[0] * 10,
        rows_in_flight=4 + 2 * slow,
        on_done=done.append,
        on_group=on_group,
    )
    assert sum(done) == 20 and sorted(index for index, _ in groups) == list(range(10))
    assert max(watch.rows) <= 4 + 2 * slow
    assert len(watch.rows) == 29, "the slow group's steps; in waves the others would have come on top"
    assert sum(watch.rows) == sum(len(row.tokens) - 1 for rows in found for row in rows), "no row stayed after its end"
    assert min(step for _, step in groups) == 2 and max(step for _, step in groups) == 29


def test_a_prompt_is_kept_once_for_its_group(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 samples of 3 prompts of 40 own tokens after 60 common ones: places for 60 + 3·48, and 16 more for each row."""
    _, ours = llama
    monkeypatch.setattr(cache, "FOLD_BYTES", 0)
    watch = Watch(monkeypatch)
    dice = random.Random(0)
    shared = [dice.randrange(211) for _ in range(60)]
    prompts = [shared + [index] + [dice.randrange(211) for _ in range(39)] for index in range(3)]
    sample_rows(ours, prompts, Sampling(n=16, max_tokens=12), Ending(), seeds=range(3), rows_in_flight=48)
    (tree,) = watch.caches
    assert tree.common is not None and tree.groups is not None
    stored = [*tree.common.keys, *tree.common.values]
    stored += [*tree.groups.keys, *tree.groups.values, *tree.own.keys, *tree.own.values]
    numbers_per_place = 2 * SIZES["num_hidden_layers"] * 2 * 8
    assert sum(tensor.numel() for tensor in stored) == numbers_per_place * (60 + 3 * 48 + 48 * 16)


def test_packed_weights_give_the_same_rows_and_follow_the_weights(llama) -> None:
    _, ours = llama
    packed, sampling = Packed(), Sampling(n=4, max_tokens=10, temperature=1.0)
    prompts = [[1, 2, 3, 4], [1, 2, 9]]

    def rows(packed: Packed | None) -> list[Row]:
        groups = sample_rows(ours, prompts, sampling, Ending(), seeds=[4, 5], rows_in_flight=8, packed=packed)
        return [row for group in groups for row in group]

    def same() -> list[list[int]]:
        plain, fast = rows(None), rows(packed)
        assert [row.tokens for row in plain] == [row.tokens for row in fast]
        for a, b in zip(plain, fast, strict=True):
            assert a.logps == pytest.approx(b.logps, abs=1e-5)
        return [row.tokens for row in plain]

    before = same()
    kept = [linear.weight.clone() for _, linear in ours.linears()]
    with torch.no_grad():
        for _, linear in ours.linears():
            linear.weight.copy_(linear.weight.flip(0))
    assert same() != before
    for (_, linear), weight in zip(ours.linears(), kept, strict=True):
        linear.weight.data = weight
    assert same() == before


def test_bf16_rows_have_the_log_probs_of_the_fp32_model(tmp_path: Path) -> None:
    theirs, _ = random_model(tmp_path, "llama")
    ours = load_decoder(tmp_path, torch.bfloat16)
    for packed in (None, Packed()):
        found = sample_rows(
            ours, [[1, 2, 3]], Sampling(n=8, max_tokens=12), Ending(), seeds=[3], rows_in_flight=8, packed=packed
        )
        gaps = []
        for row in found[0]:
            with torch.no_grad():
                logp = theirs(torch.tensor([[1, 2, 3, *row.tokens]])).logits[0, 2:-1].log_softmax(-1)
            scored = logp.gather(1, torch.tensor(row.tokens)[:, None]).squeeze(1)
            gaps.append((torch.tensor(row.logps) - scored).abs())
        assert torch.cat(gaps).mean() < 0.05


def test_pick_is_the_inverse_of_the_cumulative_distribution() -> None:
    torch.manual_seed(0)
    for vocab in (5, 256, 257, 1000):
        p = torch.randn(400, vocab).mul(3).softmax(-1)
        p[torch.rand_like(p) < 0.3] = 0.0
        p[:, -1] += 1e-6
        uniform = torch.rand(400)
        uniform[:3] = torch.tensor([0.0, 1 - 2**-24, 1.0])
        found = pick(p, uniform)
        cumulative = p.double().cumsum(-1)
        wanted = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True).squeeze(1)
        assert (found == wanted.clamp(max=vocab - 1)).float().mean() > 0.99
        assert (p.gather(1, found[:, None]) > 0).all()


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_its_mass(spread: float, top_p: float) -> None:
    torch.manual_seed(0)
    p = (torch.randn(6, 2000, dtype=torch.float64) * spread).softmax(-1)
    kept = nucleus(p, top_p)
    for row, found in zip(p.tolist(), kept.tolist(), strict=True):
        mass, wanted = 0.0, []
        for index in sorted(range(2000), key=lambda i, row=row: -row[i]):
            if mass >= top_p:
                break
            wanted.append(index)
            mass += row[index]
        assert {i for i, value in enumerate(found) if value} == set(wanted)
        assert all(found[i] == row[i] for i in wanted)


def test_stop_strings_end_rows_where_the_text_first_holds_them(tiny_model: Path) -> None:
    engine = TorchEngine(load_decoder(tiny_model), Renderer(tiny_model), "tiny")
    prompts = [Prompt(token_ids=(5, 6, index)) for index in range(6)]
    free = engine.generate(prompts, Sampling(n=4, max_tokens=40, seed=2))
    texts = [done.text for group in free for done in group]
    stop = tuple(text[at : at + 3] for text, at in zip(texts[:2], (9, 14), strict=True))
    heard: list[int] = []
    early: dict[int, list] = {}
    found = engine.generate(prompts, Sampling(n=4, max_tokens=40, seed=2, stop=stop), heard.append, early.__setitem__)
    stopped = 0
    for whole, done in zip(itertools.chain(*free), itertools.chain(*found), strict=True):
        places = [at for at in map(whole.text.find, stop) if at >= 0]
        assert done.text == (whole.text[: min(places)] if places else whole.text)
        assert whole.token_ids[: len(done.token_ids)] == done.token_ids
        if places:
            shorter = engine.renderer.decode(done.token_ids[:-1])
            assert not any(word in shorter for word in stop) and done.finish == FinishReason.stop
            stopped += 1
    assert stopped >= 2
    assert sum(heard) == 24 and [early[index] for index in range(6)] == found


def test_synchronised_weights_are_sampled_from(tiny_model: Path, tmp_path: Path) -> None:
    """The engine's fast copies follow the trained policy: it answers as an engine that loads the saved weights."""
    engine = TorchEngine(load_decoder(tiny_model), Renderer(tiny_model), "tiny")
    prompts, sampling = [Prompt(token_ids=(5, 6, index)) for index in range(3)], Sampling(n=3, max_tokens=12, seed=1)
    before = engine.generate(prompts, sampling)
    trained: Decoder = load_decoder(tiny_model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05
            parameter.requires_grad_(True)
    engine.synchronise(trained)
    after = engine.generate(prompts, sampling)
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    trained.save(tmp_path)
    fresh = TorchEngine(load_decoder(tmp_path), Renderer(tmp_path), "tiny").generate(prompts, sampling)
    assert after != before
    for a, b in zip(itertools.chain(*after), itertools.chain(*fresh), strict=True):
        assert a.token_ids == b.token_ids and a.logps == pytest.approx(b.logps, abs=1e-5)
