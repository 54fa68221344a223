"""What a decoder costs: matrix-product operations, bytes through memory and bytes held, derived from its shapes.

Every number follows from the layers of `inference/decoder.py`; letters as in CONTRIBUTING, c the bytes of a number in
the compute type. A product of [m, k] and [k, n] is 2·m·k·n operations. With P parameters in the linear layers a forward
pass is 2·P·T; the backward pass is 2·P·T on a frozen base, which needs gradients of activations only, and 4·P·T when
the base trains too: full fine-tuning is the well-known 6·P·T (Kaplan et al. 2020, arXiv 2001.08361 §2.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ascent.customize.batch import TokenBatch
from ascent.inference import native
from ascent.inference.cache import STEP, layout
from ascent.inference.decoder import TOKENS, Decoder, DecoderConfig
from ascent.inference.head import CHUNK, NATIVE_CHUNK
from ascent.inference.lora import LoraConfig
from ascent.inference.sampler import PREFILL_TOKENS
from ascent.inference.sampling.passes import QUERIES
from ascent.inference.sampling.weights import PACKED_BYTES
from ascent.inference.tree import ROUND, SCORES, Tree, rounded_up

BF16 = 2  # bytes
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
    """A micro-batch by its shapes alone: the tree of its tokens, and U, the predictions that are made in it."""

    tree: Tree
    predictions: int

    @classmethod
    def of(cls, batch: TokenBatch) -> Packed:
        """Those of a real micro-batch."""
        return cls(batch.tree, len(batch.at_U))

    @property
    def tokens(self) -> int:
        """T of the matrix products, rounded up as `hidden_packed` does."""
        return rounded_up(self.tree.nodes, TOKENS)

    @property
    def rows(self) -> int:
        """Rows of the vocabulary head, rounded up as `logp_and_entropy` does."""
        return rounded_up(self.predictions, 32)

    def scores(self, heads: int) -> int:
        """Attention scores of one query head: in each tile of `attention.py`, query places times the keys they see."""
        count = 0
        for family in self.tree.families(heads):
            above, longest = family.prefix, family.longest
            step = max(ROUND, SCORES // (heads * family.rows * (above + longest)) // ROUND * ROUND)
            count += family.rows * causal_scores(longest, above, step)
        return count


def causal_scores(length: int, above: int, step: int) -> int:
    """Scores of `length` query places taken `step` at a time, each step over what is above and up to its own end."""
    ends = [min(begin + step, length) for begin in range(0, length, step)]
    return sum((end - begin) * (above + end) for begin, end in zip([0, *ends], ends, strict=False))


class Shapes:
    """A decoder with an adapter (or none: all weights train) in a compute type of `size` bytes."""

    def __init__(self, config: DecoderConfig, adapter: LoraConfig | None, size: int) -> None:
        self.config, self.adapter, self.size = config, adapter, size
        with torch.device("meta"):
            decoder = Decoder(config)
        self.parameters = sum(parameter.numel() for parameter in decoder.parameters())
        self.linear = sum(linear.weight.numel() for _, linear in decoder.linears())
        self.head_weight = config.vocab * config.width
        self.adapters, self.blocks, self.ranks, self.delta, taught = 0, 0, 0, 0, 0
        for _, linear in decoder.linears():
            sizes = [n for part, n in linear.parts.items() if adapter is None or part in adapter.targets]
            taught += linear.inputs if sizes else 0
            if adapter is not None and sizes:
                # `Linear._up` joins the B of several projections in one block matrix, zeros included
                rank = adapter.rank * len(sizes)
                self.adapters += adapter.rank * sum(linear.inputs + n for n in sizes)
                self.ranks += rank
                self.blocks += rank * (linear.inputs + linear.weight.shape[0])
                self.delta += rank * linear.weight.numel()
        self._inputs_kept = taught // config.layers

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return self.parameters if self.adapter is None else self.adapters

    @property
    def weights(self) -> int:
        """Bytes of the base as it is kept: fp32 when it trains, else the compute type."""
        return self.parameters * (4 if self.adapter is None else self.size)

    def forward(self, batch: Packed, *, trains: bool = True) -> Work:
        """One forward pass of the layers; one that does not train has no adapter and keeps nothing.

        Products: 2·(P + adapter)·T, and attention's two, 4·H·E a score and layer. Traffic: the weights are read, and
        what the backward pass needs (`kept`) is written once and read once; the rest stays in cache.
        """
        work = Work(2 * self.linear * batch.tokens + 4 * self._attention(batch), traffic=self.linear * self.size)
        return work + Work(2 * self.blocks * batch.tokens, traffic=2 * self.kept(batch)) if trains else work

    def backward(self, batch: Packed) -> Work:
        """One backward pass of the layers.

        Products: 2·P·T for the activations, 4·adapter·T (or 4·P·T in all when the base trains); attention's scores
        again and two for each of its forward products, 10·H·E a score and layer. Traffic: the weights, each kept
        number beside a gradient that is written and read, and each trainable number cast both ways (`CAST`).
        """
        own = 4 * self.linear if self.adapter is None else 2 * self.linear + 4 * self.blocks
        products = own * batch.tokens + 10 * self._attention(batch)
        cast = CAST * (self.linear if self.adapter is None else self.blocks)
        return Work(products, traffic=self.linear * self.size + 3 * self.kept(batch) + cast)

    def _attention(self, batch: Packed) -> int:
        """Scores times head size, over all heads and layers."""
        m = self.config
        return m.layers * m.heads * m.head_size * batch.scores(m.heads)

    def head(self, rows: int, *, backward: bool, entropy: bool = False, bonus: bool = False) -> Work:
        """Log-probs of so many predictions; with their `entropy`, whose gradient a `bonus` asks for.

        Products: 2·D·V·M for the logits, and as much for the slope, which a frozen head takes in the forward pass.
        With a bonus, or when the head trains, backward computes the logits again and multiplies once more (twice when
        the head trains, then in fp32). Traffic: the matrix once a chunk and product, and the passes over [M, V] in
        `inference/head.py`.
        """
        c, cells = self.size, self.config.vocab * rows
        products, matrix = 2 * self.config.width * cells, self.head_weight * -(-rows // CHUNK)
        early = backward and self.adapter is not None
        work = Work(products, traffic=matrix * c + cells * (2 * c + 12))  # logits, their fp32 copy, log-softmax
        if early:
            work += Work(products, traffic=matrix * c + cells * (2 * c + 12))  # probabilities, rounded for the product
        if entropy:
            work += Work(single=2 * cells, traffic=cells * (8 if early else 16))
        if backward and (bonus or not early):
            work += Work(2 * products, traffic=2 * matrix * c + cells * (4 * c + 40 + (28 if bonus else 0)))
        if backward and not early:
            work += Work(single=products, traffic=16 * matrix)
        return work

    def divergence(self, predictions: int, teacher: Shapes) -> Work:
        """The distance to a teacher's distribution and its gradient: both models' logits twice, then one more product.

        Traffic as of a KL divergence: per pass the logits, log-softmax of both and five passes; then the gradient's.
        """
        c, cells = self.size, self.config.vocab * predictions
        both, own = 2 * cells * (self.config.width + teacher.config.width), 2 * cells * self.config.width
        matrices = (2 * (self.head_weight + teacher.head_weight) + self.head_weight) * -(-predictions // CHUNK)
        passes = 2 * (4 * c + 60) + 2 * c + 28
        return Work(2 * both + own * (1 if self.adapter else 2), traffic=matrices * c + cells * passes)

    def update(self) -> Work:
        """Clipping and AdamW over all trainable numbers, fp32."""
        return Work(traffic=ADAMW * self.trainable)

    @property
    def repacked(self) -> int:
        """Numbers that the sampler keeps a second time, in the layout that its products want; none of a large model."""
        return self.linear + self.head_weight if self.parameters * self.size <= PACKED_BYTES else 0

    def merge(self) -> Work:
        """Bring the trained policy into the sampling copy: B·A in fp32, added, rounded, and laid out again."""
        c = self.size
        if self.adapter is None:
            return Work(traffic=self.parameters * (4 + c) + 2 * c * self.repacked)
        again = self.linear if self.repacked else 0
        return Work(single=2 * self.delta, traffic=self.linear * (24 + 2 * c) + 2 * c * again)

    @property
    def _kv(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.config.layers * self.config.kv_heads * self.config.head_size * self.size

    def sampling(self, prompts: Sequence[int], shared: int, samples: int, tokens: int, rows: int) -> list[Work]:
        """Sample `samples` answers of `tokens` tokens to prompts of these lengths, `rows` in flight.

        Returns one `Work` per kind of step: filling caches, and decoding. Each prompt is computed once, after the
        prefix that all share. A decode step of B rows is 2·P·B operations but reads all weights, and the keys and
        values of each row, of each prompt in flight (once for its rows, where that is worth it) and of the prefix:
        below some B memory decides.
        """
        m, c, kv = self.config, self.size, self._kv
        total, tails = len(prompts) * samples, [length - shared for length in prompts]
        laid = layout(m, c, tails, shared, total, rows)
        scores = [(shared, 0)] + [(tail, shared) for tail in tails]
        seen = sum(causal_scores(length, above, QUERIES) for length, above in scores)
        places, lead = sum(tails), 0 if laid.prefix_apart else shared
        calls = (shared > 0) + max(-(-places // PREFILL_TOKENS), -(-total // rows))
        written = (places + lead * len(tails)) * (1 if laid.groups_apart else samples)
        products = 2 * self.linear * (shared + places) + 4 * m.layers * m.heads * m.head_size * seen
        fill = Work(products, traffic=self.linear * c * calls + kv * (shared + written))
        own, prompt = tokens / 2 + STEP / 2, places / len(tails)
        slots = self._groups(len(prompts), total, rows) if laid.groups_apart else laid.rows
        read = laid.rows * own + slots * (lead + prompt) + (shared if laid.prefix_apart else 0)
        weights = self.linear + self.head_weight
        step = Work(
            2 * laid.rows * (weights + 2 * m.layers * m.heads * m.head_size * (own + prompt + shared)),
            traffic=weights * c + kv * read + laid.rows * m.vocab * DRAW,
        )
        return [fill, step * max(tokens, total * tokens / rows)]

    @staticmethod
    def _groups(prompts: int, total: int, rows: int) -> int:
        """Prompts in flight at once."""
        return min(prompts, math.ceil(min(rows, total) * prompts / total))

    def caches(self, prompts: Sequence[int], shared: int, samples: int, tokens: int, rows: int) -> int:
        """Bytes while sampling: keys and values of rows, prompts and prefix, and what choosing a token needs.

        While the places of rows grow, the old ones are there too.
        """
        m, total = self.config, len(prompts) * samples
        laid = layout(m, self.size, [length - shared for length in prompts], shared, total, rows)
        prompt = rounded_up(laid.tail + (0 if laid.prefix_apart else shared), STEP)
        own = rounded_up(tokens, STEP) + (0 if laid.groups_apart else prompt)
        apart = self._groups(len(prompts), total, rows) * prompt if laid.groups_apart else 0
        places = laid.rows * (2 * own - STEP) + apart
        return self._kv * (places + shared) + laid.rows * m.vocab * (self.size + 12)

    def kept(self, batch: Packed) -> int:
        """Bytes that a forward pass keeps for its backward pass.

        The layers', the rotations that all of them share, `copies`, and the last norm's input; a frozen base does
        without the first norm's.
        """
        token = self.config.layers * self.layer_kept() + self.size * self.config.head_size
        if self.adapter is None:
            token += self._norm
        return token * batch.tokens + self.copies

    @property
    def _norm(self) -> int:
        """Bytes per token that a norm keeps: its input, and the inverse of its length."""
        return self.config.width * self.size + 4

    @property
    def copies(self) -> int:
        """Bytes of trainable matrices in the compute type that a graph holds: `Linear` casts them in each pass."""
        if self.adapter is not None:
            return self.blocks * self.size
        return self.linear * self.size if self.size < 4 else 0

    def layer_kept(self) -> int:
        """Bytes per token that one layer keeps for its backward pass.

        What both norms keep; the inputs of linear layers that train, and the adapter's middle; q, k and v as rotated,
        in one buffer; gate and up. With norms of q and k, also the buffer before them, and the inverses of lengths.
        """
        m, c = self.config, self.size
        q, kv = m.heads * m.head_size, m.kv_heads * m.head_size
        buffers = (q + 2 * kv) * (2 if m.qk_norm else 1)
        numbers = self._inputs_kept + self.ranks // m.layers + buffers + 2 * m.mlp
        return 2 * self._norm + c * numbers + (4 * (m.heads + m.kv_heads) if m.qk_norm else 0)

    def head_held(self, batch: Packed) -> int:
        """Bytes while the head runs.

        Logits of one chunk in the compute type, and twice in fp32 where no kernel works on them in place; the hidden
        states of all tokens and, picked and rounded up, of the predictions, and their slope or gradient. When the head
        trains: its gradient in fp32, what is added to that or the gradient of the logits in a lower compute type, and
        its copy in that.
        """
        m, c = self.config, self.size
        chunk = min(CHUNK, batch.rows) * m.vocab
        logits = chunk * (c + 8)
        if self.adapter is not None and c == BF16 and native.library() is not None:
            logits = min(NATIVE_CHUNK, batch.rows) * m.vocab * c
        held = logits + (batch.tree.nodes + batch.predictions + 2 * batch.rows) * m.width * c
        if self.adapter is None:
            low = c if c < 4 else 0
            held += self.head_weight * (4 + low) + max(4 * self.head_weight, low * chunk)
        return held
