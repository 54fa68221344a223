"""What a decoder costs: matrix-product operations, bytes through memory and bytes held, derived from its shapes.

Every number follows from the layers of `inference/decoder.py`; letters as in CONTRIBUTING, c the bytes of a number in
the compute type. A product of [m, k] and [k, n] is 2·m·k·n operations. With P parameters in the linear layers a forward
pass is 2·P·T; the backward pass is 2·P·T on a frozen base, which needs gradients of activations only, and 4·P·T when
the base trains too: full fine-tuning is the well-known 6·P·T (Kaplan et al. 2020, arXiv 2001.08361 §2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ascent.inference.decoder import SHORT, Decoder, DecoderConfig, rounded_up
from ascent.inference.head import CHUNK
from ascent.inference.lora import LoraConfig

CAST = 24
"""Bytes per trainable number of a linear layer and micro-batch: cast to the compute type, its gradient cast back (2·6)
and added to what is there (12)."""
ADAMW = 84
"""Bytes per trainable number and step of the passes of clipping (12) and multi-tensor AdamW (72)."""
DRAW = 24
"""Bytes per row and vocabulary entry of choosing a token: logits, normaliser, probabilities, running sum."""


@dataclass(frozen=True)
class Work:
    """Operations in the compute type, operations in fp32, and bytes read from and written to memory."""

    operations: float = 0.0
    single: float = 0.0
    traffic: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.single + other.single, self.traffic + other.traffic)

    def __mul__(self, times: float) -> Work:
        return Work(self.operations * times, self.single * times, self.traffic * times)


@dataclass(frozen=True)
class Packed:
    """A micro-batch by its lengths alone: tokens per sequence, and how many of all are targets."""

    lengths: tuple[int, ...]
    targets: int

    @cached_property
    def tokens(self) -> int:
        """Tokens in the matrix products: their sum, rounded up as `Packing` does."""
        return rounded_up(sum(self.lengths), 64)

    @cached_property
    def longest(self) -> int:
        """L of attention's padded view [N, L], rounded up as `Packing` does."""
        return rounded_up(max(self.lengths), 16)

    @property
    def places(self) -> int:
        """N·L."""
        return len(self.lengths) * self.longest

    @property
    def heads(self) -> int:
        """Targets in the vocabulary head, rounded up as `logp_and_entropy` does."""
        return rounded_up(self.targets, 32)


def pack(units: Sequence[Sequence[tuple[int, int]]], token_budget: int) -> list[Packed]:
    """Split units of (tokens, targets) into micro-batches as `batch.micro_batches` splits their sequences."""
    batches: list[list[tuple[int, int]]] = []
    size = token_budget + 1
    for unit in sorted(units, key=lambda unit: max(tokens for tokens, _ in unit)):
        tokens = sum(tokens for tokens, _ in unit)
        if size + tokens > token_budget:
            batches.append([])
            size = 0
        batches[-1] += unit
        size += tokens
    return [Packed(tuple(tokens for tokens, _ in batch), sum(targets for _, targets in batch)) for batch in batches]


class Shapes:
    """A decoder with an adapter (or none: all weights train) in a compute type of `size` bytes."""

    def __init__(self, config: DecoderConfig, adapter: LoraConfig | None, size: int) -> None:
        self.config, self.adapter, self.size = config, adapter, size
        with torch.device("meta"):
            decoder = Decoder(config)
        self.parameters = sum(parameter.numel() for parameter in decoder.parameters())
        self.linear = sum(linear.weight.numel() for _, linear in decoder.linears())
        self.adapters, self.blocks, self.ranks, taught = 0, 0, 0, 0
        for _, linear in decoder.linears():
            sizes = [n for part, n in linear.parts.items() if adapter is None or part in adapter.targets]
            taught += linear.inputs if sizes else 0
            if adapter is not None and sizes:
                self.adapters += adapter.rank * sum(linear.inputs + n for n in sizes)
                self.ranks += adapter.rank * len(sizes)
                # `Linear._up` joins the B of several projections in one block matrix, zeros included
                self.blocks += adapter.rank * len(sizes) * (linear.inputs + linear.weight.shape[0])
        self._inputs_kept = taught // config.layers

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return self.parameters if self.adapter is None else self.adapters

    @property
    def weights(self) -> int:
        """Bytes of the base as it is kept: fp32 when it trains, else the compute type."""
        return self.parameters * (4 if self.adapter is None else self.size)

    def forward(self, batch: Packed) -> Work:
        """One forward pass of the layers.

        Products: 2·(P + adapter)·T, and attention's two, 4·N·L²·H·E a layer (half where the kernel for long rows runs).
        Traffic: what the backward pass needs (`kept`) is written once and read once.
        """
        attention = self._attention(batch)
        products = 2 * (self.linear + self.blocks) * batch.tokens
        return Work(products + attention / (2 if batch.longest > SHORT else 1), traffic=2 * self.kept(batch))

    def backward(self, batch: Packed) -> Work:
        """One backward pass of the layers.

        Products: 2·P·T for the activations, 4·adapter·T (or 4·P·T in all when the base trains); attention's products
        twice, and once more where the kernel recomputes its scores. Traffic: each kept number is read beside a gradient
        that is written and read; each trainable number is cast both ways (`CAST`).
        """
        attention = self._attention(batch)
        own = 4 * self.linear if self.adapter is None else 2 * self.linear + 4 * self.blocks
        cast = CAST * (self.linear if self.adapter is None else self.blocks)
        factor = 5 / 4 if batch.longest > SHORT else 2
        return Work(own * batch.tokens + factor * attention, traffic=3 * self.kept(batch) + cast)

    def _attention(self, batch: Packed) -> int:
        m = self.config
        return 4 * m.layers * batch.places * batch.longest * m.heads * m.head_size

    def head(self, targets: int, *, backward: bool, entropy: bool = False) -> Work:
        """Log-probs of the targets.

        Products: 2·D·V·M forward; backward computes the logits again and multiplies once more (twice when the head
        trains, then in fp32). Traffic: the passes over [M, V] in `inference/head.py`.
        """
        c, products, cells = self.size, 2 * self.config.width * self.config.vocab * targets, self.config.vocab * targets
        work = Work(products, traffic=cells * (2 * c + 12 + (24 if entropy else 0)))
        if backward:
            work += Work(2 * products, traffic=cells * (4 * c + 40 + (36 if entropy else 0)))
            if self.adapter is None:
                work += Work(single=products, traffic=8 * self.config.vocab * self.config.width * (targets / CHUNK))
        return work

    def update(self) -> Work:
        """Clipping and AdamW over all trainable numbers, fp32."""
        return Work(traffic=ADAMW * self.trainable)

    def merge(self) -> Work:
        """Bring the trained policy into the sampling copy: B·A in fp32 and five passes over the linear layers."""
        rank = self.adapter.rank if self.adapter else 0
        return Work(single=2 * self.linear * rank, traffic=self.linear * (12 + 2 * self.size))

    def sampling(self, prompts: Sequence[int], shared: int, samples: int, tokens: int, rows: int) -> list[Work]:
        """Sample `samples` answers of `tokens` tokens to prompts of these lengths, `rows` in flight.

        Returns one `Work` per kind of step: filling caches, and decoding. A decode step of B rows is 2·P·B operations
        but reads all weights, the keys and values of each row and of the shared prefix: below some B memory decides.
        """
        c, config = self.size, self.config
        kv = 2 * config.layers * config.kv_heads * config.head_size * c
        fill = Work(2 * self.linear * shared, traffic=self.linear * c)
        decode = Work()
        wave = max(1, rows // samples)
        ordered = sorted(prompts, reverse=True)
        for start in range(0, len(ordered), wave):
            own = [length - shared for length in ordered[start : start + wave]]
            places = len(own) * own[0]
            scores = 4 * config.layers * config.heads * config.head_size * places * (own[0] + shared)
            fill += Work(2 * self.linear * places + scores, traffic=self.linear * c + kv * places * samples)
            batch = len(own) * samples
            flat = 2 * (self.linear + config.vocab * config.width) * batch
            read = (self.linear + config.vocab * config.width) * c + batch * config.vocab * DRAW + kv * shared
            decode += Work(flat, traffic=read + kv * batch * (own[0] + tokens / 2)) * tokens
        return [fill, decode]

    def kept(self, batch: Packed) -> int:
        """Bytes that a forward pass keeps for its backward pass: the layers' and the last norm's, and `copies`."""
        return self.config.layers * self.layer_kept(batch) + self._norm * batch.tokens + self.copies

    @property
    def _norm(self) -> int:
        """Bytes per token that a norm keeps: its fp32 input, and the input of its weight when that trains."""
        return self.config.width * (4 if self.adapter is not None else 4 + self.size)

    @property
    def copies(self) -> int:
        """Bytes of trainable matrices in the compute type that a graph holds: `Linear` casts them in each pass."""
        if self.adapter is not None:
            return self.blocks * self.size
        return self.linear * self.size if self.size < 4 else 0

    def layer_kept(self, batch: Packed) -> int:
        """Bytes that one layer keeps for its backward pass.

        Per token: the fp32 input of both norms (and the compute-type input of their weights when those train); the
        inputs of linear layers that train; q, k, v before padding (v with the joined buffer it is a view of); gate and
        up, silu(gate), the adapter's middle. Per padded place: q, k, v for attention, and its softmax [H, L] in fp32
        and in the compute type, or, for long rows, its result and normaliser.
        """
        m, c = self.config, self.size
        q, kv = m.heads * m.head_size, m.kv_heads * m.head_size
        inputs = c * (self._inputs_kept + self.ranks // m.layers)
        token = 2 * self._norm + inputs + c * (2 * q + 3 * kv) + 3 * c * m.mlp
        place = c * (q + 2 * kv)
        if batch.longest > SHORT:
            place += c * q + 4 * m.heads
        else:
            place += m.heads * batch.longest * (4 if c == 4 else 4 + c)
        return token * batch.tokens + place * batch.places

    def head_held(self, targets: int) -> int:
        """Bytes while the head runs.

        One chunk of logits in the compute type and three in fp32; its inputs and their gradient; and when it trains,
        its own gradient twice in fp32 and its copy in the compute type.
        """
        m, c = self.config, self.size
        own = m.vocab * m.width * (8 + (c if c < 4 else 0)) if self.adapter is None else 0
        return min(CHUNK, targets) * m.vocab * (c + 12) + 2 * targets * m.width * c + own

    def caches(self, prompts: Sequence[int], shared: int, samples: int, tokens: int, rows: int) -> int:
        """Bytes while sampling: keys and values, and the numbers per row and vocabulary entry.

        While ended rows are dropped, the keys of all layers are there twice.
        """
        m = self.config
        longest = max(prompts) - shared + tokens
        flight = min(max(1, rows // samples), len(prompts)) * samples
        kv = m.layers * m.kv_heads * m.head_size * self.size
        return int(kv * (3 * flight * longest + 2 * shared)) + flight * m.vocab * 16
