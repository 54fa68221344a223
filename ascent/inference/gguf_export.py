"""Models out of the store as one GGUF file, with tokenizer and chat template: what llama.cpp and its kin run.

Weights are written as they are or rounded to sixteen bits, never quantised; quantise the file with llama.cpp's own
tool. Vectors (norms, biases) stay in float32, as llama.cpp expects. The file is read back before it is given out, and
its tokenizer must split a set of probes as the model's own does.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ascent.inference.export import export_merged
from ascent.inference.store import ADAPTER_MARK, Store, require_space
from ascent.records.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.generic]

GgufDtype = Literal["f32", "f16", "bf16"]
ARCHITECTURES = {"LlamaForCausalLM": "LLAMA", "Qwen2ForCausalLM": "QWEN2"}
_PERMUTED = {"LLAMA": ("self_attn.q_proj", "self_attn.k_proj")}  # llama.cpp turns neighbouring pairs, not halves
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
PROBES = (
    "Take 1 to 2 tablets by mouth every 4-6 hours, at most 3,000 mg a day.",
    "  two  spaces,\ttabs\n\nand lines\r\n",
    "naïve café — déjà vu; 日本語 и русский 🙂",
    "don't WE'LL it's 12345678 x=3.14e-5 {'a': [1, 2]}",
    "cafe\u0301",
)


def export_gguf(model: str, out: Path, store: Store, *, dtype: GgufDtype = "f16") -> None:
    """Write a model to the GGUF file `out`, which must not exist; an adapter is merged into its base first.

    Args:
        model: a name or id in the store, or a model folder.
        out: the file; it appears whole or not at all.
        store: where names are looked up.
        dtype: of the matrices; f32 and bf16 keep all bits of weights that have that type.

    Raises:
        UnknownName: there is no such model.
        BadInput: `out` exists, or GGUF has no way to say what the model's architecture or tokenizer needs.
        NoSpace: the disk is full; nothing was written.
    """
    if out.exists():
        raise BadInput(f"{out} exists; name another file, or remove it")
    folder = store.resolve(model)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        if (folder / ADAPTER_MARK).is_file():
            export_merged(model, Path(scratch) / "merged", store)
            folder = Path(scratch) / "merged"
        file = Path(scratch) / out.name
        _write(folder, file, dtype)
        _check_tokenizer(folder, file)
        file.replace(out)


def _write(folder: Path, file: Path, dtype: GgufDtype) -> None:
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise BadInput(f"{folder}: {architecture} cannot be exported to GGUF; {', '.join(ARCHITECTURES)} can")
    kind = ARCHITECTURES[architecture]
    arch = gguf.MODEL_ARCH[kind]
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[arch])
    _describe(writer, config, dtype)
    _add_tokenizer(writer, folder, int(config["vocab_size"]))
    names = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    plan = {}
    for name, tensor in _tensors(folder):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise BadInput(
                f"{folder}: tensor {name} has no place in a GGUF file of {architecture}; it cannot be exported"
            )
        stored = dtype if tensor.ndim > 1 else "f32"
        size = tensor.numel() * (4 if stored == "f32" else 2)
        plan[name] = (target, stored)
        raw = gguf.GGMLQuantizationType[stored.upper()]
        shape = list(tensor.shape) if stored != "bf16" else [*tensor.shape[:-1], tensor.shape[-1] * 2]
        writer.add_tensor_info(target, shape, _numpy_type(stored), size, raw_dtype=raw)
    require_space(file, sum(info.nbytes for part in writer.tensors for info in part.values()), "the export")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = int(config["num_attention_heads"])
    per_kind = {"self_attn.q_proj": heads, "self_attn.k_proj": int(config.get("num_key_value_heads") or heads)}
    for name, tensor in _tensors(folder):
        values: Any = tensor.float().numpy()
        for part in _PERMUTED.get(kind, ()):
            values = _paired(values, per_kind[part]) if part in name else values
        writer.write_tensor_data(_stored(values, plan[name][1]))
    writer.close()


def _describe(writer: Any, config: Mapping[str, Any], dtype: GgufDtype) -> None:
    import gguf

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise BadInput(f"rotary scaling {rope.get('rope_type', rope.get('type'))!r} is not exported to GGUF")
    if config.get("use_sliding_window") or config.get("mlp_bias"):
        raise BadInput("sliding-window attention and biases of the MLP are not exported to GGUF")
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_size = int(config.get("head_dim") or width // heads)
    writer.add_context_length(int(config.get("max_position_embeddings") or 2048))
    writer.add_embedding_length(width)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])


def _add_tokenizer(writer: Any, folder: Path, vocab: int) -> None:
    """Write a byte-level BPE tokenizer: its tokens, their kinds, its merges, and the name of how text is split."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        raise BadInput(f"{folder}: a {described['model']['type']} tokenizer is not exported to GGUF; byte-level BPE is")
    tokens = [f"[PAD{index}]" for index in range(vocab)]
    kinds = [_UNUSED] * vocab
    for token, index in tokenizer.get_vocab().items():
        tokens[index], kinds[index] = token, _NORMAL
    for index, token in tokenizer.added_tokens_decoder.items():
        tokens[index], kinds[index] = token.content, _CONTROL if token.special else _USER_DEFINED
    merges = described["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(described, folder))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(False)  # the chat template writes what a conversation begins with
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(described: Mapping[str, Any], folder: Path) -> str:
    """Return llama.cpp's name of the rule by which text is cut before byte pairs are merged."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    rule = described["pre_tokenizer"] or {}
    parts = rule.get("pretokenizers", [rule])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = parts[0]["pattern"].get("Regex")
        for name in ("qwen2", *GGUF_PRE_TOKENIZER_SPLITS):  # of several names for one rule, the plainest
            if GGUF_PRE_TOKENIZER_SPLITS.get(name) == pattern:
                return str(name)
    raise BadInput(f"{folder}: GGUF has no name for how its tokenizer splits text ({kinds}); export it merged")


def _check_tokenizer(folder: Path, file: Path) -> None:
    """Read the tokenizer back as an importer does, and compare.

    Raises:
        BadInput: it splits a probe otherwise than the model's own.
    """
    from transformers import AutoTokenizer

    from ascent.inference.convert import _gguf_facts, _restore_pre_tokenizer, without_bars

    own = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    with without_bars():
        read = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    _restore_pre_tokenizer(read, _gguf_facts(file)[1])
    for probe in PROBES:
        if own.encode(probe, add_special_tokens=False) != read.encode(probe, add_special_tokens=False):
            raise BadInput(
                f"{folder}: its tokenizer splits {probe!r} otherwise once written as GGUF; it is not exported"
            )


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the model's tensors one by one, in a fixed order; a head that is the embedding is left out."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
        for file in files:
            for name in sorted(file.keys()):
                if not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                    yield name, file.get_tensor(name)


def _paired(values: Array, heads: int) -> Array:
    """Interleave the halves of each head's rows: row i and row i + E/2 become neighbours."""
    parts = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return parts.swapaxes(1, 2).reshape(values.shape)


def _stored(values: Array, dtype: str) -> Array:
    import gguf
    import numpy as np

    if dtype == "bf16":
        packed: Array = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
        return packed
    return np.ascontiguousarray(values.astype(np.float16 if dtype == "f16" else np.float32))


def _numpy_type(dtype: str) -> Any:
    import numpy as np

    return np.dtype({"f32": "float32", "f16": "float16", "bf16": "uint8"}[dtype])
