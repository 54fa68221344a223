"""The decoder, its adapters and its sampler against transformers and peft on tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ascent.inference import lora
from ascent.inference.decoder import Decoder, load_decoder
from ascent.inference.engine import Sampling
from ascent.inference.head import logp_and_entropy
from ascent.inference.sampler import Ending, sample_rows
from ascent.inference.sampling.draw import draw
from ascent.inference.tree import Tree

SIZES = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True),
    "llama3-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
}


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path):
    """(transformers model, our decoder, folder) with the same random weights in fp32."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[request.param]).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 1.0)
    theirs.save_pretrained(tmp_path)
    return theirs, load_decoder(tmp_path), tmp_path


def packed_logp(model: Decoder, sequences: list[list[int]]) -> list[torch.Tensor]:
    tokens = torch.tensor([t for s in sequences for t in s])
    hidden = model.hidden_packed(tokens, Tree.flat([len(s) for s in sequences]))
    found = []
    start = 0
    for sequence in sequences:
        rows = hidden[start : start + len(sequence) - 1]
        found.append(logp_and_entropy(rows, model.head_weight, torch.tensor(sequence[1:]))[0])
        start += len(sequence)
    return found


def reference_logp(model, sequence: list[int]) -> torch.Tensor:
    ids = torch.tensor([sequence])
    logits = model(ids).logits.float()
    return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)


SEQUENCES = [
    [5, 9, 200, 31, 7],
    [3, 4],
    [100, 17, 17, 60, 2, 8, 9, 120, 33, 1, 0, 44, 45, 46, 47, 48, 50, 51, 52, 53],
]


def test_packed_log_probs_equal_transformers(pair) -> None:
    theirs, ours, _ = pair
    for sequence, logp in zip(SEQUENCES, packed_logp(ours, SEQUENCES), strict=True):
        torch.testing.assert_close(logp, reference_logp(theirs, sequence), atol=2e-5, rtol=1e-5)


def test_no_sequence_sees_another(pair) -> None:
    _, ours, _ = pair
    changed = [SEQUENCES[0], [9, 8, 7, 6], SEQUENCES[2]]
    before, after = packed_logp(ours, SEQUENCES), packed_logp(ours, changed)
    torch.testing.assert_close(before[0], after[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(before[2], after[2], atol=1e-6, rtol=0)


def test_saved_weights_load_in_transformers(pair, tmp_path: Path) -> None:
    theirs, ours, folder = pair
    (folder / "model.safetensors").unlink()
    ours.save(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(reference_logp(again, SEQUENCES[2]), reference_logp(theirs, SEQUENCES[2]))


@pytest.mark.parametrize("rows_in_flight", [1, 3, 64])
def test_greedy_tokens_equal_generate_at_any_batch_size(pair, rows_in_flight: int) -> None:
    theirs, ours, _ = pair
    shared = [11, 12, 13, 14, 15]
    prompts = [shared + tail for tail in ([1, 2], [7], [9, 9, 9, 30], [1, 2, 3, 4, 5, 6, 7], [199])]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=17, pad_token_id=0)
        wanted.append(out[0, len(prompt) :].tolist())
    rows = sample_rows(
        ours,
        prompts,
        Sampling(max_tokens=16, temperature=0),
        Ending(frozenset({17})),
        seeds=[0] * len(prompts),
        rows_in_flight=rows_in_flight,
    )
    assert [group[0].tokens for group in rows] == wanted
    for prompt, group in zip(prompts, rows, strict=True):
        logp = reference_logp(theirs, prompt + group[0].tokens)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(group[0].logps), logp, atol=3e-5, rtol=1e-5)


def test_adapter_equals_peft_and_survives_the_round_trip(pair, tmp_path: Path) -> None:
    theirs, ours, _ = pair
    config = lora.LoraConfig(rank=4, alpha=12.0)
    lora.attach(ours, config, seed=3)
    torch.manual_seed(1)
    for parameter in lora.adapter_parameters(ours):
        parameter.data.normal_(0, 0.2)
    lora.save_adapter(ours, config, tmp_path / "adapter", "base")
    wrapped = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    theirs_logp = reference_logp(wrapped, SEQUENCES[2])
    torch.testing.assert_close(packed_logp(ours, SEQUENCES)[2], theirs_logp, atol=3e-5, rtol=1e-4)
    digest = lora.policy_hash(ours)
    lora.detach(ours)
    lora.load_adapter(ours, tmp_path / "adapter")
    assert lora.policy_hash(ours) == digest
    lora.merge(ours)
    torch.testing.assert_close(packed_logp(ours, SEQUENCES)[2], theirs_logp, atol=3e-5, rtol=1e-4)


def test_adapter_of_peft_loads_here(pair, tmp_path: Path) -> None:
    theirs, ours, _ = pair
    wrapped = get_peft_model(theirs, PeftConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    lora.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(
        packed_logp(ours, SEQUENCES)[2], reference_logp(wrapped.eval(), SEQUENCES[2]), atol=3e-5, rtol=1e-4
    )


def test_adapter_off_is_the_base_bit_for_bit(pair) -> None:
    _, ours, _ = pair
    before = packed_logp(ours, SEQUENCES)
    lora.attach(ours, lora.LoraConfig(rank=4))
    for parameter in lora.adapter_parameters(ours):
        parameter.data.normal_(0, 0.5)
    changed = packed_logp(ours, SEQUENCES)
    lora.enable(ours, False)
    off = packed_logp(ours, SEQUENCES)
    assert all(torch.equal(a, b) for a, b in zip(before, off, strict=True))
    assert not torch.allclose(changed[2], before[2])


def test_head_values_and_gradients_equal_autograd_in_float64() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (300,))
    g_logp, g_entropy = torch.randn(300), torch.randn(300)
    logp, entropy = logp_and_entropy(hidden, weight, targets, temperature=0.7)
    grads = torch.autograd.grad((logp * g_logp + entropy * g_entropy).sum(), (hidden, weight))
    plain = (hidden @ weight.T / 0.7).log_softmax(-1)
    plain_logp = plain.gather(1, targets[:, None]).squeeze(1)
    plain_entropy = -(plain.exp() * plain).sum(-1)
    expected = torch.autograd.grad((plain_logp * g_logp + plain_entropy * g_entropy).sum(), (hidden, weight))
    torch.testing.assert_close(logp.double(), plain_logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), plain_entropy, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bf16_head_loses_less_than_plain_rounding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(500, 64).bfloat16()
    targets = torch.randint(0, 500, (40,))
    hidden = (weight[targets].float() * 0.1 + torch.randn(40, 64) * 0.2).bfloat16()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    plain = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    ours, _ = logp_and_entropy(hidden, weight, targets)
    assert (ours - exact).abs().max() < 5e-3
    assert (ours - exact).abs().mean() * 3 < (plain - exact).abs().mean()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampler_and_trainer_agree_on_bf16_log_probs(temperature: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 64).bfloat16()
    hidden = (torch.randn(200, 64) * torch.linspace(0.05, 1.5, 200)[:, None]).bfloat16()
    tokens, drawn = draw(hidden, weight, temperature, 1.0, torch.rand(200))
    scored, _ = logp_and_entropy(hidden, weight, tokens, temperature=temperature)
    torch.testing.assert_close(drawn, scored, atol=2e-4, rtol=1e-4)


def test_samples_follow_the_distribution_and_ignore_the_batch(pair) -> None:
    _, ours, _ = pair
    many = Sampling(n=4000, max_tokens=1, temperature=1.3)
    rows = sample_rows(ours, [[3, 4, 5]], many, Ending(), seeds=[1], rows_in_flight=64)[0]
    hidden = ours.hidden_packed(torch.tensor([3, 4, 5]), Tree.flat([3]))[-1:]
    p = (hidden @ ours.head_weight.T / 1.3).softmax(-1)[0]
    counts = torch.bincount(torch.tensor([row.tokens[0] for row in rows]), minlength=len(p))
    expected = p * 4000
    big = expected > 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum()
    assert chi2 < 2 * big.sum() + 40
    few = Sampling(n=3, max_tokens=6, temperature=1.3)
    alone = sample_rows(ours, [[3, 4, 5]], few, Ending(), seeds=[7], rows_in_flight=1)[0]
    crowd = sample_rows(ours, [[9, 1], [3, 4, 5], [8]], few, Ending(), seeds=[1, 7, 2], rows_in_flight=64)[1]
    assert [row.tokens for row in alone] == [row.tokens for row in crowd]
