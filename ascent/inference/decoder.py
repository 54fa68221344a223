"""One decoder for training and sampling: the Llama family, written plainly.

Llama, Mistral, Qwen2 and Qwen3 differ in three switches (bias on q/k/v, RMS norm on q/k, tied embeddings), so one page
of arithmetic serves them all. Two ways through it:

- `hidden_packed`: a prefix tree of whole sequences, without padding, for training and scoring (`tree.py`).
- layer by layer on top of key/value caches, for sampling (`sampler.py`).

Shape letters: T tokens of all sequences, B rows, D model width, H query heads, K key/value heads, G = H/K, E head size,
V vocabulary, P shared-prefix tokens, S cached tokens per row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ascent.inference import flex
from ascent.inference.attention import attention_plan, parted, tree_attention
from ascent.inference.kernels import add_norm, rms_norm, rotate, swiglu
from ascent.inference.lora import Linear, block_of
from ascent.inference.tensors import read_tensors, write_tensors
from ascent.inference.tree import Tree, rounded_up
from ascent.records.errors import BadInput, Corrupt

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

TOKENS = 64  # the token count is rounded up to a multiple: matrix products are compiled per shape


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a checkpoint's `config.json` that the arithmetic needs."""

    architecture: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tied: bool
    context: int

    @classmethod
    def from_folder(cls, folder: Path) -> DecoderConfig:
        """Read a Hugging Face `config.json`. Raises `BadInput` for an architecture outside the family."""
        try:
            raw = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise Corrupt(f"{folder / 'config.json'} is missing or not JSON ({error}); pull or import again") from error
        architecture = (raw.get("architectures") or ["?"])[0]
        if architecture not in ARCHITECTURES:
            raise BadInput(
                f"architecture {architecture} cannot be run by the embedded engine; it runs "
                f"{', '.join(ARCHITECTURES)}. Serve the model elsewhere and use it as a remote engine"
            )
        family = ARCHITECTURES[architecture]
        if raw.get("sliding_window") and (family == "mistral" or raw.get("use_sliding_window")):
            raise BadInput(f"{folder}: sliding-window attention is not supported; use a checkpoint without it")
        rope = raw.get("rope_parameters") or {}
        scaling = raw.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        heads = raw["num_attention_heads"]
        return cls(
            architecture=architecture,
            vocab=raw["vocab_size"],
            width=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_size=raw.get("head_dim") or raw["hidden_size"] // heads,
            mlp=raw["intermediate_size"],
            norm_eps=raw["rms_norm_eps"],
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            qkv_bias=family == "qwen2" or bool(raw.get("attention_bias")),
            output_bias=bool(raw.get("attention_bias")) and family != "qwen2",
            qk_norm=family == "qwen3",
            tied=bool(raw.get("tie_word_embeddings")),
            context=int(raw.get("max_position_embeddings") or 2048),
        )


class Norm(nn.Module):
    """The scale of a root-mean-square norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x) * weight, in x's dtype."""
        return rms_norm(x, self.weight.to(x.dtype), self.eps)

    def after(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + added (x itself without) and its norm."""
        return add_norm(x, added, self.weight.to(x.dtype), self.eps)


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU; q/k/v and gate/up are one matrix product each."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.config = c
        kv = c.kv_heads * c.head_size
        q = c.heads * c.head_size
        self.norm_attention = Norm(c.width, c.norm_eps)
        self.qkv = Linear(c.width, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=c.qkv_bias)
        self.out = Linear(q, {"o_proj": c.width}, bias=c.output_bias)
        self.norm_mlp = Norm(c.width, c.norm_eps)
        self.gate_up = Linear(c.width, {"gate_proj": c.mlp, "up_proj": c.mlp})
        self.down = Linear(c.mlp, {"down_proj": c.width})
        self.norm_q = Norm(c.head_size, c.norm_eps) if c.qk_norm else None
        self.norm_k = Norm(c.head_size, c.norm_eps) if c.qk_norm else None

    def turn(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Return [T, H+2K, E] from [T, (H+2K)·E]: q and k with their norms, if any, and rotary positions."""
        c = self.config
        qkv = qkv.view(len(qkv), -1, c.head_size)
        if self.norm_q is not None and self.norm_k is not None:
            q, k, v = parted(qkv, c.kv_heads)
            qkv = torch.cat((self.norm_q(q), self.norm_k(k), v), -2)
        return rotate(qkv, rope, c.heads + c.kv_heads)

    def mlp(self, normed_TD: Tensor) -> Tensor:
        """The SwiGLU block."""
        out: Tensor = self.down(swiglu(self.gate_up(normed_TD)))
        return out


class Decoder(nn.Module):
    """A causal language model. Trainable tensors are kept in fp32 by their owner and cast to `dtype` in use."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = nn.Parameter(torch.zeros(config.vocab, config.width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = Norm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Parameter(torch.zeros(config.vocab, config.width))
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    @property
    def blocks(self) -> Iterator[Layer]:
        """The layers, typed."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    @property
    def head_weight(self) -> Tensor:
        """The [V, D] output matrix in compute dtype (the embedding itself when tied)."""
        weight = self.embedding if self.head is None else self.head
        return weight.to(self.dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def linears(self) -> Iterator[tuple[int, Linear]]:
        """Every linear layer that LoRA may adapt, with its layer index."""
        for index, layer in enumerate(self.blocks):
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
                yield index, linear

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [.., 1, E/2] for these positions."""
        angles = positions.float().unsqueeze(-1) * self.frequencies  # type: ignore[operator]
        return angles.cos().unsqueeze(-2).to(self.dtype), angles.sin().unsqueeze(-2).to(self.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look token ids up."""
        return F.embedding(tokens, self.embedding).to(self.dtype)

    def hidden_packed(self, tokens_T: Tensor, tree: Tree) -> Tensor:
        """Return the final hidden states [T, D] of a tree's tokens; each sees its path and nothing else."""
        size, device, kv_heads = rounded_up(tree.nodes, TOKENS), tokens_T.device, self.config.kv_heads
        spare = size - tree.nodes
        rope = self.rope(F.pad(tree.positions_T, (0, spare)).to(device))
        attend: Callable[[Tensor], Tensor]
        if flex.fits(self.config.head_size, self.dtype, device):
            attend = partial(flex.flex_tree_attention, kv_heads=kv_heads, mask=flex.tree_mask(tree, size, device))
        else:
            plan = attention_plan(tree, self.config, self.dtype, device)
            attend = partial(tree_attention, kv_heads=kv_heads, plan=plan)
        x, added = self.embed(F.pad(tokens_T, (0, spare))), None
        for layer in self.blocks:
            x, normed = layer.norm_attention.after(x, added)
            attended = attend(layer.turn(layer.qkv(normed), rope))
            x, normed = layer.norm_mlp.after(x, layer.out(attended.flatten(1)))
            added = layer.mlp(normed)
        _, final = self.norm.after(x, added)
        return final[: tree.nodes]

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` under Hugging Face names, any adapter merged, in the weights' own dtype."""
        tensors: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm.weight,
        }
        if self.head is not None:
            tensors["lm_head.weight"] = self.head
        for index, layer in enumerate(self.blocks):
            prefix = f"model.layers.{index}."
            for norm, name in _norms(layer):
                tensors[f"{prefix}{name}.weight"] = norm.weight
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
                for part, weight, bias in linear.split():
                    tensors[f"{prefix}{block_of(part)}.{part}.weight"] = weight
                    if bias is not None:
                        tensors[f"{prefix}{block_of(part)}.{part}.bias"] = bias
        copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        write_tensors(folder / "model.safetensors", copies, {"format": "pt"})


def rope_frequencies(config: DecoderConfig) -> Tensor:
    """Inverse frequencies [E/2]; linear and llama3 scaling as published with those checkpoints."""
    base = config.rope_theta ** (-torch.arange(0, config.head_size, 2).float() / config.head_size)
    scaling = config.rope_scaling
    if scaling is None:
        return base
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "linear":
        return base / float(scaling["factor"])
    if kind == "llama3":
        names = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        old, low, high = (float(scaling[name]) for name in names)
        turns = old * base / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return base * (blend + (1 - blend) / float(scaling["factor"]))
    raise BadInput(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3")


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Load a Hugging Face folder (one or many safetensors files) into a frozen decoder.

    Raises:
        Corrupt: a weight is missing or has the wrong shape.
    """
    config = DecoderConfig.from_folder(folder)
    raw: dict[str, Tensor] = {}
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise Corrupt(f"{folder} holds no model*.safetensors; pull or import the model again")
    for file in files:
        raw.update(read_tensors(file))
    with torch.device("meta"):
        model = Decoder(config, dtype)

    def take(name: str, shape: torch.Size) -> nn.Parameter:
        if name not in raw or raw[name].shape != shape:
            found = tuple(raw[name].shape) if name in raw else "nothing"
            raise Corrupt(f"{folder}: weight {name} should have shape {tuple(shape)}, found {found}")
        return nn.Parameter(raw.pop(name).to(dtype), requires_grad=False)

    model.embedding = take("model.embed_tokens.weight", model.embedding.shape)
    model.norm.weight = take("model.norm.weight", model.norm.weight.shape)
    if model.head is not None:
        model.head = take("lm_head.weight", model.head.shape)
    for index, layer in enumerate(model.blocks):
        prefix = f"model.layers.{index}."
        for norm, name in _norms(layer):
            norm.weight = take(f"{prefix}{name}.weight", norm.weight.shape)
        for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
            linear.fill(take, prefix)
    model.frequencies = rope_frequencies(config)
    return model


def _norms(layer: Layer) -> Iterator[tuple[Norm, str]]:
    yield layer.norm_attention, "input_layernorm"
    yield layer.norm_mlp, "post_attention_layernorm"
    if layer.norm_q is not None and layer.norm_k is not None:
        yield layer.norm_q, "self_attn.q_norm"
        yield layer.norm_k, "self_attn.k_norm"
