"""Conversion into the store's one format: a Hugging Face folder with safetensors, a tokenizer and a card.

GGUF files are dequantised once, here; everything else in Ascent only ever loads the folder. Models below 300
million parameters are kept in float32 (they are small, and a dequantised weight is a product of two float16
numbers that bfloat16 would round), larger ones in bfloat16. The card records which.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from ascent.inference.chat import separate_pad
from ascent.inference.store import ADAPTER_MARK, Store, require_space
from ascent.records import ModelCard
from ascent.records.errors import BadInput, Corrupt, UnknownName
from ascent.records.files import sha256_file

Dtype = Literal["float32", "bfloat16"]
FLOAT32_BELOW = 300_000_000
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_BYTES = {"float32": 4, "bfloat16": 2}
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Facts(BaseModel):
    """What a model folder says about itself, read from its headers without loading a weight."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["base", "adapter", "embedder"]
    family: str
    parameters: int
    dtype: str
    context: int = 0
    base: str | None = None


class EmbedderConfig(BaseModel):
    """How a folder in sentence-transformers layout says that a text becomes a vector.

    Attributes:
        pooling: mean over the tokens of the attention mask, or the first token.
        normalise: whether vectors are divided by their L2 norm.
        max_tokens: longer texts are cut off, special tokens included.
        prompts: what goes before a text by its role, such as `query` and `document`.
    """

    model_config = ConfigDict(frozen=True)

    pooling: Literal["mean", "cls"]
    normalise: bool
    max_tokens: int
    prompts: dict[str, str]

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read `modules.json` and what it names, in the forms of sentence-transformers 2 to 6.

        Raises:
            BadInput: the modules are not a transformer, then mean or first-token pooling, then nothing or L2 norm.
            Corrupt: a JSON file is missing or does not parse.
        """
        path = folder / "modules.json"
        try:
            modules = json.loads(path.read_text(encoding="utf-8"))
            kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
            places = [folder / module["path"] for module in modules]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{path}: is not a list of modules ({error!r}); fetch it again") from error
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or places[0] != folder:
            raise BadInput(
                f"{path}: the modules are {', '.join(kinds) or 'none'}; an embedder is a Transformer in the folder "
                f"itself, a Pooling and, if vectors are to have length 1, a Normalize"
            )
        optional = (folder / name for name in ("sentence_bert_config.json", "config_sentence_transformers.json"))
        transformer, general = (_read_json(file) if file.is_file() else {} for file in optional)
        limits = [_read_json(folder / "config.json").get("max_position_embeddings")]
        if (folder / "tokenizer_config.json").is_file():
            limits.append(_read_json(folder / "tokenizer_config.json").get("model_max_length"))
        longest = transformer.get("max_seq_length") or min((int(limit) for limit in limits if limit), default=512)
        prompts = {name: text for name, text in (general.get("prompts") or {}).items() if text}
        return cls(
            pooling=_pooling(places[1] / "config.json"), normalise=len(kinds) == 3, max_tokens=longest, prompts=prompts
        )


def _pooling(path: Path) -> Literal["mean", "cls"]:
    config = _read_json(path)
    active = [name.removeprefix("pooling_mode_") for name, on in config.items() if on is True and "mode_" in name]
    modes = active or [str(config.get("pooling_mode"))]
    if not config.get("include_prompt", True):
        raise BadInput(f"{path}: field 'include_prompt' is false; only pooling over all tokens is supported")
    if modes in (["mean"], ["mean_tokens"]):
        return "mean"
    if modes in (["cls"], ["cls_token"]):
        return "cls"
    raise BadInput(f"{path}: pools by {modes}; only mean pooling and first-token (cls) pooling are supported")


def import_model(
    path: Path,
    name: str,
    store: Store,
    *,
    source: str = "",
    licence: str = "unknown",
    family: str = "",
    base: str | None = None,
    dtype: Dtype | None = None,
) -> Path:
    """Bring a GGUF file, a safetensors folder, an adapter or an embedder into the store; return the stored folder.

    Args:
        path: the GGUF file or the folder.
        name: what the model shall be called.
        store: where it goes.
        source: where it came from, for the card; default: the file's name. A GGUF file's sha256 is appended.
        licence: SPDX identifier of the weights.
        family: shown in lists; default: the architecture.
        base: for an adapter, the stored base model; default: what its `adapter_config.json` names.
        dtype: for GGUF, the precision to keep; default: by size (see the module).

    Raises:
        BadInput: the path is none of the three, or something in it is missing; the message names the file and
            field.
        Corrupt: a file is cut off or not what its name says.
        NoSpace: the disk is full; the store is as it was.
    """
    origin = source or f"file:{path.name}"
    if path.is_dir():
        facts = inspect_folder(path)
        parent = None
        if facts.kind == "adapter":
            parent = _parent(path, base or facts.base, store)
        card = _card(facts, name, origin, licence, family, parent)
        return store.add(path, card)
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give a GGUF file, a safetensors model folder or a PEFT adapter folder")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BadInput(
            f"{path} is not a GGUF file (it begins with {magic!r}); give a GGUF file, a folder with "
            "config.json and *.safetensors, or a PEFT adapter folder. Pickled weights (.bin, .pt) are not "
            "read because they can run code"
        )
    sha256 = sha256_file(path)
    with store.lock(f"convert-{sha256[:12]}"):
        folder = store.root / f".convert-{sha256[:12]}"
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
        folder.mkdir()
        try:
            convert_gguf(path, folder, dtype=dtype)
            card = _card(inspect_folder(folder), name, f"{origin}@{sha256}", licence, family, None)
            return store.add(folder, card, consume=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def convert_gguf(gguf: Path, out: Path, *, dtype: Dtype | None = None) -> None:
    """Write the model and tokenizer of a GGUF file to the folder `out` as unquantised safetensors.

    Embedding and output matrices that the file stores apart stay apart, even when they are nearly equal. The
    pad token is set apart from the end token where the vocabulary has one, because a loss that masks padding
    would otherwise mask the end token too and the model would never learn to stop.

    Raises:
        BadInput: the architecture is not one that transformers can read from GGUF.
        Corrupt: the file is cut off or malformed.
        NoSpace: the result would not fit on the disk.
    """
    parameters, pre_tokenizer = _gguf_facts(gguf)
    kept: Dtype = dtype or ("float32" if parameters < FLOAT32_BELOW else "bfloat16")
    require_space(out, parameters * _BYTES[kept] + 50_000_000, f"the converted {gguf.name}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(**place)
            loaded = AutoModelForCausalLM.from_pretrained(
                **place,
                dtype=getattr(torch, kept),
                quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
            )
    except (ValueError, NotImplementedError, KeyError) as error:
        raise BadInput(
            f"{gguf}: transformers cannot convert this GGUF file ({error}); use the model's safetensors "
            f"release: ascent models import FOLDER"
        ) from error
    config = loaded.config
    for stale in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, stale):
            delattr(config, stale)
    separate_pad(tokenizer)
    _restore_pre_tokenizer(tokenizer, pre_tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    # A fresh instance, filled with the loaded tensors, carries nothing of the quantised loading into the
    # files.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, kept))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    for holder in (model.config, model.generation_config):
        holder.pad_token_id = tokenizer.pad_token_id
    with without_bars():
        model.save_pretrained(out, max_shard_size="1000GB")
    tokenizer.save_pretrained(out)
    _forget_paths(out)


def inspect_folder(folder: Path) -> Facts:
    """Check that a folder holds a causal language model, an adapter or an embedder; return what its headers say.

    Raises:
        BadInput: a file or a field is missing, or the folder is none of the three.
        Corrupt: a weights file is cut off or a JSON file does not parse.
    """
    if (folder / ADAPTER_MARK).is_file():
        return _inspect_adapter(folder)
    if not (folder / "config.json").is_file():
        raise BadInput(
            f"{folder} is neither a model folder (no config.json) nor an adapter folder (no adapter_config.json)"
        )
    config = _read_json(folder / "config.json")
    family = str(config.get("model_type") or "")
    if not family:
        raise BadInput(f"{folder / 'config.json'}: field 'model_type' is missing; it names the architecture")
    architectures = config.get("architectures") or []
    embedder = EmbedderConfig.from_folder(folder) if (folder / "modules.json").is_file() else None
    if embedder is None and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise BadInput(
            f"{folder / 'config.json'}: field 'architectures' is {architectures}; a causal language model "
            f"(…ForCausalLM) is needed, or modules.json that makes the folder an embedder"
        )
    if "quantization_config" in config:
        raise BadInput(
            f"{folder / 'config.json'}: field 'quantization_config': the weights are quantised; import an "
            f"unquantised release or the GGUF file"
        )
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise BadInput(f"{folder}: has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it from the model's release")
    parameters, dtype = _weights(_weight_files(folder))
    if embedder is not None:
        return Facts(kind="embedder", family=family, parameters=parameters, dtype=dtype, context=embedder.max_tokens)
    context = int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
    return Facts(kind="base", family=family, parameters=parameters, dtype=dtype, context=context)


def _inspect_adapter(folder: Path) -> Facts:
    path = folder / ADAPTER_MARK
    config = _read_json(path)
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{path}: field 'peft_type' is {config.get('peft_type')!r}; only LORA adapters can be used")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise BadInput(f"{folder}: adapter_model.safetensors is missing; export the adapter in safetensors format")
    parameters, dtype = _weights([weights])
    base = config.get("base_model_name_or_path") or None
    return Facts(kind="adapter", family="lora", parameters=parameters, dtype=dtype, base=base)


def _parent(folder: Path, base: str | None, store: Store) -> ModelCard:
    if base is None:
        raise BadInput(f"{folder / ADAPTER_MARK}: field 'base_model_name_or_path' is empty; name the base with --base")
    try:
        return store.card(base)
    except UnknownName:
        pass
    # Adapters made elsewhere name a hub repository, such as org/Model-Name; its last part is how we call
    # models.
    short = base.rstrip("/").rsplit("/", 1)[-1].lower()
    try:
        return store.card(short)
    except UnknownName as error:
        raise BadInput(
            f"{folder}: the adapter's base model {base!r} is not in the store ({error}); pull or import it "
            f"first, or name the stored base with --base"
        ) from error


def _card(facts: Facts, name: str, source: str, licence: str, family: str, parent: ModelCard | None) -> ModelCard:
    return ModelCard(
        id=name,
        family=family or (parent.family if parent else facts.family),
        source=source,
        licence=licence,
        sha256="",
        kind=facts.kind,
        parent=parent.id if parent else None,
        parameters=facts.parameters,
        dtype=facts.dtype,
        context=facts.context or (parent.context if parent else 0),
    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            raise BadInput(
                f"{folder}: {index.name} lists files that are missing: {', '.join(missing) or 'none listed'}"
            )
        return [folder / shard for shard in shards]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = next((file.name for file in folder.glob("pytorch_model*.bin")), None)
    why = f"; {pickled} is pickled and is not read because it can run code" if pickled else ""
    raise BadInput(f"{folder}: has no model.safetensors{why}")


def _weights(files: list[Path]) -> tuple[int, str]:
    """Return the number of parameters in safetensors files and the dtype that most of them have."""
    counts: dict[str, int] = {}
    for file in files:
        for tensor in _safetensors_header(file).values():
            size = 1
            for length in tensor["shape"]:
                size *= length
            counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + size
    main = max(counts, key=lambda dtype: counts[dtype])
    if main not in _SAFETENSORS_DTYPES:
        raise BadInput(f"{files[0]}: holds {main} tensors; floating-point weights are needed")
    floats = (size for dtype, size in counts.items() if dtype in _SAFETENSORS_DTYPES)
    return sum(floats), _SAFETENSORS_DTYPES[main]


def _safetensors_header(file: Path) -> dict[str, Any]:
    """Return name → {dtype, shape, data_offsets}; the file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise Corrupt(f"{file}: is not a safetensors file or is cut off; fetch it again")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
            end = max(tensor["data_offsets"][1] for tensor in tensors.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"{file}: its safetensors header does not parse ({error}); fetch it again") from error
    if size != 8 + length + end:
        raise Corrupt(f"{file}: is {size} bytes long but its header describes {8 + length + end}; fetch it again")
    return tensors


def _gguf_facts(gguf: Path) -> tuple[int, str]:
    """Return the number of parameters and the name of the pre-tokenizer."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(gguf))
        pre = reader.get_field("tokenizer.ggml.pre")
        return sum(int(tensor.n_elements) for tensor in reader.tensors), str(pre.contents()) if pre else ""
    except (ValueError, IndexError, KeyError) as error:
        raise Corrupt(
            f"{gguf}: is not a whole GGUF file ({error}); its sha256 is {sha256_file(gguf)}. Fetch it again"
        ) from error


def _restore_pre_tokenizer(tokenizer: Any, name: str) -> None:
    """Restore what comes before byte-pair merging and what transformers' GGUF reader leaves out.

    A GGUF file holds only the rule's name. Under `smollm` every digit is cut off from its neighbours first;
    without that, white space before a number is merged differently from what the model saw in training. Under
    `qwen2` characters are composed first (NFC), so that an accent typed as a character of its own makes no
    difference.
    """
    from tokenizers import normalizers, pre_tokenizers

    if name == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    if name != "smollm":
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; they would tear the caller's display."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), reader.tqdm
    logging.disable_progress_bar()
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _forget_paths(folder: Path) -> None:
    """Drop what transformers notes about where and how it loaded, so that equal models hash equally."""
    for file in folder.glob("*.json"):
        content = _read_json(file)
        stale = {"_name_or_path", "name_or_path", "is_local", "local_files_only"} & content.keys()
        if stale:
            kept = {key: value for key, value in content.items() if key not in stale}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Corrupt(f"{path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise Corrupt(f"{path}: must hold a JSON object; fetch it again")
    return content
