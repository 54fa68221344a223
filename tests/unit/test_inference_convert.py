from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_files import CHATML, CONTEXT, HEADS, KV_HEADS, LAYERS, WIDTH, sha256, vocabulary, write_gguf
from safetensors.numpy import load_file, save_file
from test_embeddings_files import write_tiny_embedder

from ascent.inference.chat import Renderer
from ascent.inference.convert import EmbedderConfig, convert_gguf, import_model, inspect_folder
from ascent.inference.lora import read_adapter_config
from ascent.inference.store import Store
from ascent.records.errors import AscentError, BadInput, Corrupt, NoSpace


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray], Path]:
    """The GGUF file, the weights that it stores, and the converted folder."""
    place = tmp_path_factory.mktemp("convert")
    stored = write_gguf(place / "tiny.gguf")
    convert_gguf(place / "tiny.gguf", place / "m")
    return place / "tiny.gguf", stored, place / "m"


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A copy of the converted folder that a test may damage."""
    shutil.copytree(converted[2], tmp_path / "copy")
    return tmp_path / "copy"


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order that Llama GGUF files give query and key rows: pairs interleaved instead of halves apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_weights_are_the_dequantised_ones_of_the_file(converted):
    _, stored, folder = converted
    tensors = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], stored["token_embd.weight"])
    np.testing.assert_array_equal(tensors["model.norm.weight"], stored["output_norm.weight"])
    names = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for layer in range(LAYERS):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for gguf_name, name in names.items():
            np.testing.assert_array_equal(tensors[f"{ours}.{name}.weight"], stored[f"{theirs}.{gguf_name}.weight"])
        for gguf_name, name, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)):
            np.testing.assert_array_equal(
                tensors[f"{ours}.self_attn.{name}.weight"],
                unpermuted(stored[f"{theirs}.{gguf_name}.weight"], heads),
            )
    assert len(tensors) == 2 + LAYERS * 9, "the tied output matrix is not stored a second time"


def test_configuration_carries_over_and_nothing_quantised_remains(converted):
    config = json.loads((converted[2] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_key_value_heads"]) == (WIDTH, KV_HEADS)
    assert (config["max_position_embeddings"], config["tie_word_embeddings"]) == (CONTEXT, True)
    assert "quantization_config" not in config
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)
    generation = json.loads((converted[2] / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)


def test_the_converted_model_loads_trains_and_saves(converted, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted[2])
    assert not getattr(model, "is_quantized", False)
    ids = torch.tensor([[1, 40, 50, 60, 2]])
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)


def test_tokenizer_cuts_digits_and_pads_apart_from_the_end(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[2])
    assert tokenizer.tokenize("the  12") == ["t", "he", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("½ the\n\n12")) == "½ the\n\n12"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (tokenizer.chat_template, tokenizer.model_max_length) == (CHATML, CONTEXT)
    assert Renderer(converted[2]).end_ids == {2}


def test_qwen_tokenizers_compose_characters_first(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "q.gguf", pre="qwen2")
    convert_gguf(tmp_path / "q.gguf", tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_nothing_of_this_machine_is_in_the_folder(converted):
    for file in converted[2].glob("*.json"):
        assert str(converted[2].parent) not in file.read_text()


def test_a_gguf_import_has_a_full_card_and_the_same_id_every_time(converted, tmp_path):
    gguf_file, stored, _ = converted
    first = import_model(gguf_file, "tiny", Store(tmp_path / "a"), licence="MIT")
    moved = tmp_path / "elsewhere" / gguf_file.name
    moved.parent.mkdir()
    shutil.copy(gguf_file, moved)
    second = import_model(moved, "tiny", Store(tmp_path / "b"), licence="MIT")
    assert first.name == second.name
    card = Store(tmp_path / "a").verify("tiny")
    assert card.source == f"file:tiny.gguf@{sha256(gguf_file.read_bytes())}"
    assert card.parameters == sum(weight.size for weight in stored.values())
    assert (card.kind, card.family, card.dtype, card.context) == ("base", "llama", "float32", CONTEXT)
    assert [path.name for path in (tmp_path / "a").glob(".convert-*")] == [], "no scratch folder is left"


def test_bfloat16_on_request_is_the_rounded_weight(converted, tmp_path):
    from safetensors.torch import load_file as load_torch

    gguf_file, stored, _ = converted
    folder = import_model(gguf_file, "tiny", Store(tmp_path), dtype="bfloat16")
    embedding = load_torch(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, torch.from_numpy(stored["token_embd.weight"]).bfloat16())
    assert Store(tmp_path).card("tiny").dtype == "bfloat16"


@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
def test_a_cut_off_gguf_is_refused_and_nothing_is_registered(converted, tmp_path, kept):
    data = converted[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises((Corrupt, BadInput), match=r"cut\.gguf"):
        import_model(tmp_path / "cut.gguf", "tiny", Store(tmp_path / "s"))
    assert Store(tmp_path / "s").list() == []


def test_other_files_are_refused_with_what_is_accepted(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x02pickle")
    with pytest.raises(BadInput, match=r"not a GGUF file .*a folder with config\.json.*can run code"):
        import_model(tmp_path / "model.bin", "tiny", Store(tmp_path / "s"))
    with pytest.raises(BadInput, match="does not exist; give a GGUF file"):
        import_model(tmp_path / "none", "tiny", Store(tmp_path / "s"))


def test_a_full_disk_is_told_before_the_conversion(converted, tmp_path, monkeypatch):
    import collections

    from ascent.inference import store as store_module

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage(9, 9, 1_000_000))
    with pytest.raises(NoSpace, match=r"the converted tiny\.gguf needs"):
        import_model(converted[0], "tiny", Store(tmp_path))


def test_a_safetensors_folder_is_taken_as_it_is(folder, tmp_path):
    stored = import_model(folder, "mine", Store(tmp_path / "s"), licence="MIT", family="tinyllama")
    assert (stored / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    card = Store(tmp_path / "s").card("mine")
    assert (card.source, card.family, card.context) == ("file:copy", "tinyllama", CONTEXT)
    assert Renderer(stored).end_ids == {2}


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not None}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"neither a model folder \(no config.json\)"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda f: edit(f / "config.json", model_type=None), "field 'model_type' is missing"),
        (lambda f: edit(f / "config.json", architectures=["BertModel"]), "'architectures' is .*BertModel.*causal"),
        (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "the weights are quantised"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin is pickled"),
        (lambda f: cut(f / "model.safetensors"), "bytes long but its header describes"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50), "not a safetensors file or is cut off"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "header does not parse"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
            "lists files that are missing: model-1.safetensors",
        ),
        (
            lambda f: save_file({"a": np.zeros(4, np.int8)}, f / "model.safetensors"),
            "holds I8 tensors; floating-point weights are needed",
        ),
    ],
)
def test_a_faulty_folder_is_refused_with_file_and_field(folder, tmp_path, damage, message):
    damage(folder)
    with pytest.raises(AscentError, match=message) as caught:
        import_model(folder, "mine", Store(tmp_path / "s"))
    assert isinstance(caught.value, BadInput | Corrupt) and str(folder) in str(caught.value)
    assert Store(tmp_path / "s").list() == []


def test_shards_count_together(folder):
    tensors = load_file(folder / "model.safetensors")
    whole = inspect_folder(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect_folder(folder) == whole


@pytest.fixture
def adapter(converted, tmp_path) -> Path:
    """A LoRA adapter as the peft library writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted[2])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_needs_its_base_in_the_store(converted, adapter, tmp_path):
    store = Store(tmp_path / "s")
    edit(adapter / "adapter_config.json", base_model_name_or_path="org/Tiny-Base")
    with pytest.raises(BadInput, match=r"base model 'org/Tiny-Base' is not in the store.*--base"):
        import_model(adapter, "tuned", store)
    base = import_model(converted[2], "tiny-base", store)
    stored = import_model(adapter, "tuned", store, licence="MIT")
    card = store.verify("tuned")
    assert (card.kind, card.parent, card.family, card.context) == ("adapter", base.name, "llama", CONTEXT)
    narrow = WIDTH * KV_HEADS // HEADS
    assert card.parameters == LAYERS * 4 * ((WIDTH + WIDTH) + (WIDTH + narrow))
    assert (stored / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    other = import_model(adapter, "again", store, base=base.name)
    assert store.card(other.name).parent == base.name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f / "adapter_config.json", peft_type="IA3"), "'peft_type' is 'IA3'; only LORA"),
        (lambda f: edit(f / "adapter_config.json", base_model_name_or_path=""), "is empty; name the base with --base"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda f: cut(f / "adapter_model.safetensors"), "bytes long but its header describes"),
    ],
)
def test_a_faulty_adapter_is_refused(adapter, tmp_path, damage, message):
    damage(adapter)
    with pytest.raises(AscentError, match=message):
        import_model(adapter, "tuned", Store(tmp_path / "s"))


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_an_adapter_of_another_arithmetic_is_refused(adapter, kind):
    """rsLoRA scales by α/√r and DoRA splits off magnitudes (peft): read as plain LoRA they would give other answers."""
    edit(adapter / "adapter_config.json", **{kind: True})
    with pytest.raises(BadInput, match="merge it into its base"):
        read_adapter_config(adapter)


def test_the_test_vocabulary_is_a_real_one():
    assert len(vocabulary()) == len(set(vocabulary()))


def test_an_embedder_is_imported_with_its_layout(tmp_path):
    from transformers import BertModel

    folder = write_tiny_embedder(tmp_path / "m")
    store = Store(tmp_path / "s")
    stored = import_model(folder, "tiny", store, licence="MIT")
    card = store.card("tiny")
    size = sum(parameter.numel() for parameter in BertModel.from_pretrained(folder).parameters())
    assert (card.kind, card.family, card.context, card.parameters) == ("embedder", "bert", 16, size)
    assert EmbedderConfig.from_folder(stored) == EmbedderConfig(
        pooling="mean", normalise=True, max_tokens=16, prompts={}
    )


def test_the_layout_of_sentence_transformers_6_reads_alike(tmp_path):
    """Full module paths, one field for the pooling, and the length in the tokenizer's configuration."""
    folder = write_tiny_embedder(tmp_path / "m", prompts={"query": "q: ", "document": ""})
    modules = json.loads((folder / "modules.json").read_text())
    names = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling")
    for module, name in zip(modules, (*names, "base.modules.normalize.Normalize"), strict=True):
        module["type"] = f"sentence_transformers.{name}"
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}))
    (folder / "sentence_bert_config.json").write_text("{}")
    assert EmbedderConfig.from_folder(folder) == EmbedderConfig(
        pooling="cls", normalise=True, max_tokens=64, prompts={"query": "q: "}
    )
    pooling.write_text(json.dumps({"pooling_mode": "mean", "include_prompt": False}))
    with pytest.raises(BadInput, match="field 'include_prompt' is false"):
        EmbedderConfig.from_folder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "modules.json").write_text("{}"), "the modules are none"),
        (lambda f: (f / "modules.json").write_text('[{"idx": 0}]'), "is not a list of modules"),
        (lambda f: (f / "1_Pooling" / "config.json").unlink(), "1_Pooling/config.json: is not JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: [file.unlink() for file in [*f.glob("tokenizer.json"), f / "vocab.txt"]], "has no tokenizer"),
    ],
)
def test_a_faulty_embedder_is_refused(tmp_path, damage, message):
    folder = write_tiny_embedder(tmp_path / "m")
    damage(folder)
    store = Store(tmp_path / "s")
    with pytest.raises(AscentError, match=message):
        import_model(folder, "tiny", store)
    assert store.list() == []
