"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): y = x Wᵀ + (α/r) x Aᵀ Bᵀ.

A `Linear` may join several named projections (q, k, v) in one matrix; an adapter has its own A and B for each, as in
the PEFT format, and still costs two products. Master weights are fp32; B starts at zero, so that a new adapter
changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ascent.inference.kernels import adapted_linear
from ascent.inference.store import ADAPTER_MARK
from ascent.inference.tensors import read_tensors, write_tensors
from ascent.records.errors import BadInput, Corrupt
from ascent.records.files import write_atomic

if TYPE_CHECKING:
    from ascent.inference.decoder import Decoder

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def block_of(part: str) -> str:
    """The block of a Hugging Face layer that holds a projection."""
    return "self_attn" if part in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale numerator α (the update is multiplied by α/rank) and the projections that are adapted."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_LINEAR

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(ALL_LINEAR)
        if unknown or not self.targets or self.rank < 1:
            raise BadInput(
                f"LoRA rank must be at least 1 and targets among {', '.join(ALL_LINEAR)}; "
                f"got rank {self.rank}, targets {', '.join(self.targets) or 'none'}"
            )


class Linear(nn.Module):
    """A matrix product over one or more named projections stacked along the output, with an optional adapter."""

    def __init__(self, inputs: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__()
        self.inputs, self.parts = inputs, parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), inputs))
        self.bias = nn.Parameter(torch.empty(sum(parts.values()))) if bias else None
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        self.scale = 0.0
        self.enabled = True

    @property
    def adapted(self) -> list[str]:
        """Names of the parts that carry an adapter."""
        return [part for part in self.parts if part in self.lora_a]

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., sum of parts]."""
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not self.enabled or not len(self.lora_a):
            return F.linear(x, weight, bias)
        down = torch.cat([self.lora_a[part] for part in self.adapted]).to(x.dtype)
        return adapted_linear(x, weight, bias, down, self._up().to(x.dtype))

    def _up(self) -> Tensor:
        """The block matrix [outputs, adapted parts * rank] that holds each part's scaled B in its own rows."""
        rows: list[Tensor] = []
        names = self.adapted
        for part, size in self.parts.items():
            if part not in self.lora_b:
                rank = next(iter(self.lora_a.values())).shape[0]
                rows.append(self.weight.new_zeros(size, rank * len(names), dtype=torch.float32))
                continue
            b = self.lora_b[part] * self.scale
            at = names.index(part)
            rows.append(F.pad(b, (at * b.shape[1], (len(names) - at - 1) * b.shape[1])))
        return torch.cat(rows)

    def delta(self) -> Tensor | None:
        """The adapter's weight update [outputs, inputs] in fp32, or None without one."""
        if not len(self.lora_a):
            return None
        return self._up() @ torch.cat([self.lora_a[part] for part in self.adapted])

    def split(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield (part, weight with any adapter merged, bias)."""
        delta = self.delta()
        weight = self.weight if delta is None else (self.weight.float() + delta).to(self.weight.dtype)
        sizes = list(self.parts.values())
        biases: Iterable[Tensor | None] = [None] * len(sizes) if self.bias is None else torch.split(self.bias, sizes)
        yield from zip(self.parts, torch.split(weight, sizes), biases, strict=True)

    def fill(self, take: Callable[[str, torch.Size], nn.Parameter], prefix: str) -> None:
        """Assemble the stacked weight from tensors under Hugging Face names that begin with `prefix`."""
        stems = {part: f"{prefix}{block_of(part)}.{part}" for part in self.parts}
        weights = [take(f"{stems[p]}.weight", torch.Size((n, self.inputs))) for p, n in self.parts.items()]
        self.weight = nn.Parameter(torch.cat([w.data for w in weights]), requires_grad=False)
        if self.bias is not None:
            biases = [take(f"{stems[p]}.bias", torch.Size((n,))) for p, n in self.parts.items()]
            self.bias = nn.Parameter(torch.cat([b.data for b in biases]), requires_grad=False)


def attach(model: Decoder, config: LoraConfig, seed: int = 0) -> list[nn.Parameter]:
    """Add a fresh adapter (A ~ uniform(±1/√in), B = 0, as PEFT initialises) and return its parameters.

    Raises:
        BadInput: the model already carries an adapter; detach or merge it first.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, linear in model.linears():
        if len(linear.lora_a):
            raise BadInput("the model already carries an adapter; detach or merge it before attaching another")
        for part, size in linear.parts.items():
            if part not in config.targets:
                continue
            bound = 1 / math.sqrt(linear.inputs)
            a = torch.empty(config.rank, linear.inputs).uniform_(-bound, bound, generator=generator)
            linear.lora_a[part] = nn.Parameter(a.to(linear.weight.device))
            linear.lora_b[part] = nn.Parameter(torch.zeros(size, config.rank, device=linear.weight.device))
        linear.scale = config.scale
    return adapter_parameters(model)


def detach(model: Decoder) -> None:
    """Remove the adapter; the base is as it was."""
    for _, linear in model.linears():
        linear.lora_a, linear.lora_b = nn.ParameterDict(), nn.ParameterDict()


def merge(model: Decoder) -> None:
    """Fold the adapter into the base weights and remove it."""
    for _, linear in model.linears():
        delta = linear.delta()
        if delta is not None:
            linear.weight.data = (linear.weight.float() + delta).to(linear.weight.dtype).detach()
    detach(model)


def enable(model: Decoder, on: bool) -> None:
    """Switch the adapter on or off without removing it; off is the base model, bit for bit."""
    for _, linear in model.linears():
        linear.enabled = on


def adapter_parameters(model: Decoder) -> list[nn.Parameter]:
    """All A and B tensors in a fixed order."""
    return [tensor for _, tensor in _named(model)]


def policy_hash(model: Decoder) -> str:
    """The sha256 of what trains (the adapter, or all weights without one): same base and hash, same policy."""
    sha = hashlib.sha256()
    for name, tensor in list(_named(model)) or list(model.named_parameters()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()


def save_adapter(model: Decoder, config: LoraConfig, folder: Path, base: str) -> None:
    """Write the adapter in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _named(model)}
    if not tensors:
        raise BadInput("the model carries no adapter to save")
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    card = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_atomic(folder / ADAPTER_MARK, json.dumps(card, indent=2))


def read_adapter_config(folder: Path) -> tuple[LoraConfig, str]:
    """Return the adapter's shape and the name of its base model."""
    try:
        card = json.loads((folder / ADAPTER_MARK).read_text())
        if card.get("use_rslora") or card.get("use_dora"):
            raise BadInput(f"{folder}: rsLoRA and DoRA adapters are not supported; merge it into its base with peft")
        targets = card["target_modules"]
        names = ALL_LINEAR if targets == "all-linear" else tuple(t for t in ALL_LINEAR if t in targets)
        return LoraConfig(card["r"], float(card["lora_alpha"]), names), str(card["base_model_name_or_path"])
    except (OSError, ValueError, KeyError) as error:
        raise Corrupt(f"{folder / ADAPTER_MARK} is not a PEFT LoRA configuration: {error!r}") from error


def load_adapter(model: Decoder, folder: Path) -> LoraConfig:
    """Attach the adapter stored in `folder`. Raises `Corrupt` when its tensors do not fit this base."""
    config, base = read_adapter_config(folder)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    attach(model, config)
    for name, parameter in _named(model):
        if name not in tensors or tensors[name].shape != parameter.shape:
            detach(model)
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise Corrupt(
                f"{folder}: adapter tensor {name} should have shape {tuple(parameter.shape)}, found {found}; "
                f"the adapter was made for {base!r}"
            )
        parameter.data.copy_(tensors[name])
    return config


def _named(model: Decoder) -> Iterator[tuple[str, nn.Parameter]]:
    """Adapter tensors under PEFT's names, A before B, in layer order."""
    for index, linear in model.linears():
        for part in linear.adapted:
            stem = f"base_model.model.model.layers.{index}.{block_of(part)}.{part}"
            yield f"{stem}.lora_A.weight", linear.lora_a[part]
            yield f"{stem}.lora_B.weight", linear.lora_b[part]
