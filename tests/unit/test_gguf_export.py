"""GGUF export: our importer reads the same weights back, and transformers, on its own path, has the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from ascent.inference.chat import Renderer
from ascent.inference.convert import import_model
from ascent.inference.decoder import load_decoder
from ascent.inference.gguf_export import PROBES, GgufDtype, _paired, export_gguf
from ascent.inference.lora import LoraConfig, attach, save_adapter
from ascent.inference.store import Store
from ascent.records import Message
from ascent.records.errors import BadInput

TALK = [Message(role="user", content="Take 12 tablets, won't you?  Déjà vu.")]


@pytest.fixture(scope="module")
def qwen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with biases, an output matrix of its own, and Qwen's way of splitting text."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "qwen"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 5,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def logits(model: AutoModelForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits.float()


@pytest.mark.parametrize(("family", "dtype"), [("llama", "f32"), ("llama", "f16"), ("qwen2", "f32"), ("qwen2", "bf16")])
def test_what_is_written_reads_back(
    tiny_model: Path, qwen: Path, tmp_path: Path, family: str, dtype: GgufDtype
) -> None:
    folder = tiny_model if family == "llama" else qwen
    file, store = tmp_path / "model.gguf", Store(tmp_path / "home")
    export_gguf(str(folder), file, store, dtype=dtype)
    stored = import_model(file, "back", store, dtype="float32")
    rounded = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    own, back = load_file(folder / "model.safetensors"), load_file(stored / "model.safetensors")
    assert own.keys() == back.keys()
    for name, tensor in own.items():
        expected = tensor.to(rounded if tensor.ndim > 1 else torch.float32).float()
        assert torch.equal(back[name], expected), name
    ids = Renderer(folder).prompt_ids(TALK)
    assert Renderer(stored).prompt_ids(TALK) == ids
    assert Renderer(stored).end_ids == Renderer(folder).end_ids
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if dtype != "f32":
        with torch.no_grad():
            for parameter in expected.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(parameter.to(rounded).float())
    assert torch.allclose(logits(theirs, ids), logits(expected, ids), atol=1e-5)


def test_an_adapter_is_merged_first(tiny_model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    base = import_model(tiny_model, "base", store)
    decoder = load_decoder(base)
    config = LoraConfig(2, 4.0)
    with torch.no_grad():
        for parameter in attach(decoder, config):
            parameter.normal_(0, 0.2)
    save_adapter(decoder, config, tmp_path / "adapter", base.name)
    import_model(tmp_path / "adapter", "tuned", store)
    export_gguf("tuned", tmp_path / "tuned.gguf", store, dtype="f32")
    back = load_file(import_model(tmp_path / "tuned.gguf", "back", store) / "model.safetensors")
    for index, linear in decoder.linears():
        for part, weight, _ in linear.split():
            block = "self_attn" if part[0] in "qkvo" else "mlp"
            assert torch.allclose(back[f"model.layers.{index}.{block}.{part}.weight"], weight, atol=1e-6), part


def test_pairs_are_neighbours_as_llama_cpp_turns_them() -> None:
    rows = np.arange(16).reshape(16, 1)
    assert _paired(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_what_gguf_cannot_say_is_refused_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def refused(match: str) -> None:
        with pytest.raises(BadInput, match=match):
            export_gguf(str(folder), tmp_path / "out" / "odd.gguf", store)
        assert not list((tmp_path / "out").iterdir())

    config = json.loads((folder / "config.json").read_text())
    for change, match in (
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(match)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors") | {"extra.bias": torch.ones(2)}, folder / "model.safetensors")
    refused("extra.bias")
    (folder / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("how its tokenizer splits")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(BadInput, match="exists"):
        export_gguf(str(tiny_model), tmp_path / "there.gguf", store)


@pytest.mark.slow
def test_smollm2_keeps_its_tokens_and_logits(smollm2: Path, tmp_path: Path) -> None:
    file, store = tmp_path / "smollm2.gguf", Store(tmp_path / "home")
    export_gguf(str(smollm2), file, store, dtype="f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    renderer = Renderer(smollm2)
    ids = renderer.prompt_ids(TALK)
    assert torch.allclose(logits(theirs, ids), logits(own, ids), atol=1e-4)
    stored = Renderer(import_model(file, "back", store))
    for probe in PROBES:
        assert stored.tokenizer.encode(probe) == renderer.tokenizer.encode(probe)
