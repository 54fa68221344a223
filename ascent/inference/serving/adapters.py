"""Many LoRA adapters on one base in one step: the base's product once for all tokens, then each adapter's own.

Tokens of one adapter stand next to each other, so that its low-rank product is one per linear layer (Chen et al. 2023,
arXiv 2310.18547). As in `lora.py`, y = x Wᵀ + (x Aᵀ) Bᵀ with the scale in B, and projections joined in one matrix have
their A side by side. Ranks are rounded up to whole vectors with zeros.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference import native
from ascent.inference.lora import LoraConfig, block_of, read_adapter_config
from ascent.inference.sampling.weights import LayerWeights, Product, Weights
from ascent.inference.serving import kernels
from ascent.inference.tensors import read_tensors
from ascent.inference.tree import rounded_up
from ascent.records.errors import BadInput, Corrupt

LINEARS = 4  # of a layer: q/k/v, out, gate/up, down


@dataclass(frozen=True)
class Matrices:
    """One linear layer's update: `down` [parts·R, in], and `up` [out, R] whose rows belong to one part each."""

    down: Tensor
    up: Tensor
    rank: int


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter. `root` begins its pages in the prefix cache; `linears` has None where nothing is adapted.

    `table` [linears, 3] in int64 are the kernels' view: addresses of `down` and `up`, and the rank.
    """

    name: str
    root: int
    linears: tuple[Matrices | None, ...]
    table: Tensor


@dataclass(frozen=True)
class Segment:
    """Tokens from `begin` to `end` of a step, and the adapter that they go through."""

    adapter: Adapter
    begin: int
    end: int


class AdaptedWeights:
    """A decoder's weights whose products add the adapters of the step at hand, which `through` names."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.model = weights, weights.model
        self.sizes = [list(linear.parts.values()) for _, linear in self.model.linears()]
        self.ends = [torch.tensor(sizes).cumsum(0) for sizes in self.sizes]
        self.native = kernels.library() is not None and all(
            native.fits(linear.weight) and all(size % native.LANES == 0 for size in linear.parts.values())
            for _, linear in self.model.linears()
        )
        self.layers = [self._adapted(layer, index) for index, layer in enumerate(weights.layers)]
        self._segments: Sequence[Segment] = ()
        self._strips: Tensor | None = None
        self._rank = 0

    def through(self, segments: Sequence[Segment]) -> None:
        """Say which tokens of the next step go through which adapter."""
        self._segments, self._strips = segments, None
        if not segments or not self.native:
            return
        ranges = [
            (segment, begin, min(begin + kernels.STRIP, segment.end))
            for segment in segments
            for begin in range(segment.begin, segment.end, kernels.STRIP)
        ]
        tables = {s.adapter: s.adapter.table for s in segments}
        places = {adapter: at for at, adapter in enumerate(tables)}
        stacked = torch.stack(list(tables.values()), 1)
        strips = stacked.index_select(1, torch.tensor([places[s.adapter] for s, _, _ in ranges]))
        spans = torch.tensor([[begin, end] for _, begin, end in ranges])
        self._strips = torch.cat((strips, spans.expand(len(strips), -1, -1)), -1)
        self._rank = int(stacked[..., 2].max())

    def _adapted(self, layer: LayerWeights, index: int) -> LayerWeights:
        products = (layer.qkv, layer.out, layer.gate_up, layer.down)
        return LayerWeights(
            layer.layer, *(partial(self._times, product, LINEARS * index + at) for at, product in enumerate(products))
        )

    def _times(self, product: Product, linear: int, x: Tensor) -> Tensor:
        y = product(x)
        if self._strips is not None:
            ends = self.ends[linear]
            kernels.adapt(x, y, self._strips[linear], ends, len(ends) * self._rank)
            return y
        for segment in self._segments:
            matrices, tokens = segment.adapter.linears[linear], slice(segment.begin, segment.end)
            if matrices is not None:
                parts = torch.split(F.linear(x[tokens], matrices.down), matrices.rank, -1)
                ups = torch.split(matrices.up, self.sizes[linear])
                y[tokens] += torch.cat([F.linear(part, up) for part, up in zip(parts, ups, strict=True)], -1)
        return y

    def load(self, name: str, folder: Path, bases: Sequence[str], root: int) -> Adapter:
        """Read an adapter in PEFT's format.

        Raises:
            BadInput: it was made for another base, or adapts what cannot be adapted here.
            Corrupt: a file is missing or malformed.
        """
        config, base = read_adapter_config(folder)
        base = _parent(folder) or base
        if not any(same_base(base, known) for known in bases):
            raise BadInput(
                f"adapter {name!r} was made for the base {base!r}, and this engine runs {bases[0]!r}; deploy it on its "
                f"own base, or train it on this one"
            )
        tensors = read_tensors(folder / "adapter_model.safetensors")
        linears = [
            self._matrices(tensors, config, linear.parts, linear.inputs, index, f"adapter {name!r} for base {base!r}")
            for index, linear in self.model.linears()
        ]
        if tensors:
            raise BadInput(
                f"adapter {name!r} has tensors that are not served, such as {min(tensors)}; only LoRA matrices of the "
                f"linear layers are. Merge it into its base and deploy that"
            )
        table = torch.zeros(len(linears), 3, dtype=torch.long)
        if self.native:
            linears = [m and Matrices(kernels.packed(m.down), kernels.packed(m.up), m.rank) for m in linears]
            rows = [(m.down.data_ptr(), m.up.data_ptr(), m.rank) if m else (0, 0, 0) for m in linears]
            table = torch.tensor(rows)
        return Adapter(name, root, tuple(linears), table)

    def _matrices(
        self, tensors: dict[str, Tensor], config: LoraConfig, parts: dict[str, int], inputs: int, layer: int, what: str
    ) -> Matrices | None:
        """Take one linear layer's tensors; parts that are not adapted get zeros, and None says that none is."""
        dtype, rank = self.model.dtype, rounded_up(config.rank, native.LANES)
        downs, ups, adapted = [], [], False
        for part, size in parts.items():
            stem = f"base_model.model.model.layers.{layer}.{block_of(part)}.{part}"
            down, up = (tensors.pop(f"{stem}.lora_{side}.weight", None) for side in "AB")
            if down is None and up is None and part not in config.targets:
                down, up = torch.zeros(config.rank, inputs), torch.zeros(size, config.rank)
            else:
                adapted = True
            for matrix, shape, side in ((down, (config.rank, inputs), "A"), (up, (size, config.rank), "B")):
                if matrix is None or matrix.shape != shape:
                    found = "nothing" if matrix is None else tuple(matrix.shape)
                    raise BadInput(
                        f"{what}: {stem}.lora_{side} should have shape {shape} on this engine's base, found {found}"
                    )
            assert down is not None
            assert up is not None
            downs.append(F.pad(down.float(), (0, 0, 0, rank - config.rank)))
            ups.append(F.pad(up.float() * config.scale, (0, rank - config.rank)))
        if not adapted:
            return None
        device = self.model.device
        return Matrices(torch.cat(downs).to(device, dtype), torch.cat(ups).to(device, dtype), rank)


def same_base(first: str, second: str) -> bool:
    """Whether two names mean one model: `org/Model`, `model@1234` and a folder's path all name `model`.

    Where both say which content they mean, after the @, that must agree.
    """
    (one, _, digest), (other, _, digest_2) = (
        text.rstrip("/").rsplit("/", 1)[-1].lower().partition("@") for text in (first, second)
    )
    return one == other and (not digest or not digest_2 or digest == digest_2)


def _parent(folder: Path) -> str | None:
    """The base that a stored adapter's card names."""
    try:
        parent = json.loads((folder / "card.json").read_text(encoding="utf-8")).get("parent")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise Corrupt(f"{folder / 'card.json'} is not a card ({error}); import the adapter again") from error
    return str(parent) if parent else None
