"""A decoder's weights as sampling reads them: in the layout that the processor's products want.

A decoding step reads every weight once for a few rows. From a matrix in oneDNN's own blocked layout a product takes
two thirds of the time at 32 rows and half at 8, since nothing is reordered on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ascent.inference.decoder import Decoder, Layer
from ascent.inference.kernels import swiglu
from ascent.inference.lora import Linear

PACKED_BYTES = 4 << 30  # larger models are not copied: they belong on an accelerator, and memory would run out first
ROWS = 32  # what the blocked layout is chosen for


Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """One layer and the products with its four matrices."""

    layer: Layer
    qkv: Product
    out: Product
    gate_up: Product
    down: Product

    def attend(self, x_TD: Tensor, added: Tensor | None, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the layer's input, x + added, and q, k and v of its tokens [T, H+2K, E] at their positions."""
        x_TD, normed = self.layer.norm_attention.after(x_TD, added)
        return x_TD, self.layer.turn(self.qkv(normed), rope)

    def finish(self, attended_TD: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after attention, and what the rest of the layer adds to it."""
        x_TD, normed = self.layer.norm_mlp.after(x_TD, self.out(attended_TD))
        return x_TD, self.down(swiglu(self.gate_up(normed)))


class Packed:
    """Copies of weight matrices in oneDNN's layout, each made again once its weight has changed in place."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}

    def of(self, key: str, weight: Tensor) -> Tensor:
        """Return `weight` [outputs, inputs] in blocked layout."""
        kept = self._kept.get(key)
        version = 0 if weight.is_inference() else weight._version
        if kept is None or kept[0].data_ptr() != weight.data_ptr() or kept[1] != version:
            self._kept.pop(key, None)  # the old copy's memory first
            copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            self._kept[key] = kept = (weight.detach(), version, copy)
        return kept[2]


class Weights:
    """What `prefill`, `step` and `draw` multiply by: packed copies where there are any, else the decoder's own."""

    def __init__(self, model: Decoder, packed: Packed | None = None) -> None:
        self.model, self._packed = model, packed if packed is not None and can_pack(model) else None
        self.layers = [self._layer(layer, index) for index, layer in enumerate(model.blocks)]
        self.head_VD = model.head_weight
        self.head = self._product("head", self.head_VD, None)

    def _layer(self, layer: Layer, index: int) -> LayerWeights:
        names = ("qkv", "out", "gate_up", "down")
        return LayerWeights(layer, *(self._linear(f"{index}.{name}", getattr(layer, name)) for name in names))

    def _linear(self, key: str, linear: Linear) -> Product:
        if self._packed is None or (linear.enabled and len(linear.lora_a)) or linear.weight.dtype != self.model.dtype:
            return linear
        return self._product(key, linear.weight, linear.bias)

    def _product(self, key: str, weight: Tensor, bias: Tensor | None) -> Product:
        if self._packed is None:
            return partial(F.linear, weight=weight, bias=bias)
        return partial(_times, self._packed.of(key, weight), bias)


def can_pack(model: Decoder) -> bool:
    """Whether oneDNN has products from packed weights for this model here, and a second copy is small enough."""
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    known = model.dtype == torch.float32 or (
        model.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return bool(known) and sum(p.numel() * p.element_size() for p in model.parameters()) <= PACKED_BYTES


def _times(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return product
