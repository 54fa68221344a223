"""The floor of a workload: what its mathematics must compute and move, at this machine's measured peaks.

    seconds = operations / peak of bf16 matrix products + bytes / bandwidth

Counted is what any program must do: each distinct token once, wherever sequences begin alike; attention over exactly
those pairs that see each other; the vocabulary for targets only; each weight read once per pass and, when sampling,
once per token, since a token must be drawn before the next is computed. Not counted: anything computed again to save
memory, padding, activations written and read, everything between the matrix products. So no program can be faster, and
none is as fast. A product of [m, k] and [k, n] is 2·m·k·n operations.

Letters as in CONTRIBUTING: T tokens, M targets, B rows, P the parameters of the linear layers, A those of the adapter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from workloads import Workload

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Amount:
    """Operations of matrix products, and bytes read and written."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.operations + other.operations, self.bytes + other.bytes)

    def seconds(self, peak: float, bandwidth: float) -> float:
        """Time at `peak` operations and `bandwidth` bytes per second, nothing overlapping."""
        return self.operations / peak + self.bytes / bandwidth


@dataclass(frozen=True)
class Stretch:
    """`count` pieces of `tokens` tokens, each seeing itself causally and `above` tokens before it."""

    count: int
    tokens: int
    above: int = 0

    @property
    def pairs(self) -> int:
        """(query, key) pairs of attention."""
        return self.count * (self.tokens * (self.tokens + 1) // 2 + self.tokens * self.above)


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's `config.json` that decide its arithmetic."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """Read a model folder."""
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = raw["num_attention_heads"]
        return cls(
            layers=raw["num_hidden_layers"],
            width=raw["hidden_size"],
            mlp=raw["intermediate_size"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_size=raw.get("head_dim") or raw["hidden_size"] // heads,
            vocab=raw["vocab_size"],
        )

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's projections: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        d, m = self.width, self.mlp
        return [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]

    @property
    def linear(self) -> int:
        """P."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self._sizes)

    @property
    def head(self) -> int:
        """D·V."""
        return self.width * self.vocab

    def adapter(self, rank: int) -> int:
        """A, on all linear layers."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self._sizes)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_size * BF16 * tokens

    def scored(self, tree: tuple[Stretch, ...], targets: int, rank: int = 0) -> Amount:
        """A forward pass with log-probs of the targets: 2·(P + A)·T, 4·H·E per pair and layer, 2·D·V·M."""
        tokens = sum(part.count * part.tokens for part in tree)
        pairs = sum(part.pairs for part in tree)
        dense = 2 * (self.linear + self.adapter(rank)) * tokens + 2 * self.head * targets
        attention = 4 * self.layers * self.heads * self.head_size * pairs
        return Amount(dense + attention, BF16 * (self.linear + self.head))

    def trained(self, tree: tuple[Stretch, ...], targets: int, rank: int) -> Amount:
        """Forward, backward and AdamW with a LoRA adapter on a frozen base.

        The backward pass needs the base's gradients of activations only, 2·P·T, the adapter's of activations and of
        weights, 4·A·T, twice the attention of the forward pass, and 2·D·V·M through the vocabulary; nothing needs the
        gradient of what the first layer's q, k and v read. Base and vocabulary are read once more. AdamW reads weights,
        gradients and two moments, and writes back three of them.
        """
        forward = self.scored(tree, targets, rank)
        tokens = sum(part.count * part.tokens for part in tree)
        attention = 4 * self.layers * self.heads * self.head_size * sum(part.pairs for part in tree)
        spared = 2 * sum(inputs * (outputs + rank) for inputs, outputs in self._sizes[:3]) * tokens
        backward = Amount(
            forward.operations + 2 * self.adapter(rank) * tokens + attention - spared,
            forward.bytes,
        )
        return forward + backward + Amount(0, 7 * FP32 * self.adapter(rank))

    def sampled(self, prompts: int, prompt: int, group: int, new: int) -> Amount:
        """Read each prompt once, then draw `new` tokens for each of its `group` samples.

        The first token comes of the prompt; each of the new−1 steps after it is 2·(P + D·V)·B and attention, and reads
        the weights, each prompt's keys and values once, and each row's own.
        """
        rows, steps = prompts * group, new - 1
        fill = self.scored((Stretch(prompts, prompt),), prompts)
        pairs = rows * sum(prompt + drawn + 1 for drawn in range(steps))
        own = rows * sum(drawn + 1 for drawn in range(steps))
        operations = (
            2 * (self.linear + self.head) * rows * steps + 4 * self.layers * self.heads * self.head_size * pairs
        )
        read = BF16 * (self.linear + self.head) * steps + self.kv_bytes(prompts * prompt * steps + own)
        return fill + Amount(operations, read)

    def merged(self, rank: int) -> Amount:
        """Bring the adapter into a sampling copy: B·A, the base read and the copy written."""
        return Amount(2 * self.linear * rank, 2 * BF16 * self.linear)


def floor(shape: Shape, work: Workload) -> Amount:
    """What one step of a workload must do; DPO, and GRPO with a KL term, also score answers with the reference."""
    if work.kind == "sft":
        tree = tuple(Stretch(1, length) for length in work.lengths)
        return shape.trained(tree, sum(work.lengths) - len(work.lengths), work.rank)
    if work.kind == "sampling":
        return shape.sampled(work.prompts, work.prompt_tokens, work.group, work.new_tokens)
    rows = work.prompts * work.group
    # an answer's last token predicts nothing, and its first is predicted by the prompt
    tree = (Stretch(work.prompts, work.prompt_tokens), Stretch(rows, work.new_tokens - 1, work.prompt_tokens))
    step = shape.trained(tree, rows * work.new_tokens, work.rank)
    if work.beta > 0:
        step += shape.scored(tree, rows * work.new_tokens)
    if work.kind == "grpo":
        step += shape.sampled(work.prompts, work.prompt_tokens, work.group, work.new_tokens) + shape.merged(work.rank)
    return step
