"""Token batches: sequences folded into a prefix tree, with one entry per *target* token in every stream.

Shape letters: T tokens of the tree, M target tokens (those the policy produced), N sequences, U distinct predictions: a
token after a node. Sequences that agree up to and with a target share its prediction, which the model makes once.
A stream's weights are computed once for the *global* batch (`weights.py`) and already contain 1/N, so that any split
into micro-batches sums to the same loss and the same gradient.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ascent.inference.tree import Tree, branching, common_prefix, fold

SIBLINGS = 0.25
"""By this share of a unit as large as the budget, those that share three quarters of it may make its tree larger: it
has to be computed whole in any case, and without them once more for each of them."""


@dataclass
class TrainSequence:
    """One sequence and its streams: one number for all its targets, or one per target.

    Per target: weights of the cross-entropy, policy-gradient and KL terms, advantage, log-probs of the behaviour
    policy and of the reference, mismatch correction, critic's values at sampling time and the returns they should
    have had. Per
    sequence: the weight of its pair or answer, its reward (or ±1 for a good or bad answer), the anchor z0, and the
    embedding of its prompt.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    ce_weight: float = 0.0
    rl_weight: float = 0.0
    kl_weight: float = 0.0
    advantage: float | Sequence[float] = 0.0
    old_logps: float | Sequence[float] = 0.0
    reference_logps: float | Sequence[float] = 0.0
    correction: float | Sequence[float] = 1.0
    old_values: float | Sequence[float] = 0.0
    returns: float | Sequence[float] = 0.0
    pair_weight: float = 0.0
    reward: float = 0.0
    anchor: float = 0.0
    embedding: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError("token_ids and loss_mask must have the same length")
        if self.loss_mask[0]:
            raise ValueError("the first token has nothing before it and cannot be a target")

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return sum(self.loss_mask)


class Scored(NamedTuple):
    """What the model says of a batch, in fp32: `logp` and `entropy` [M] always.

    `head` is the value per target [M] or the reward per sequence [N] where a head is attached; `divergence` [M] the
    distance to the teacher's distribution where a row asks for it. Both are empty otherwise.
    """

    logp: Tensor
    entropy: Tensor
    head: Tensor = torch.empty(0)
    divergence: Tensor = torch.empty(0)


@dataclass
class TokenBatch:
    """A micro-batch: what the model needs (tree, predictions) and what objectives need (the streams).

    Prediction u is of `targets_U[u]` from node `at_U[u]`; target m of the streams is prediction `pick_M[m]`.
    `last_N` is the node of each sequence's last token.
    """

    tokens_T: Tensor
    tree: Tree
    at_U: Tensor
    targets_U: Tensor
    pick_M: Tensor
    last_N: Tensor
    sequence_M: Tensor
    ce_weight_M: Tensor
    rl_weight_M: Tensor
    kl_weight_M: Tensor
    advantage_M: Tensor
    old_logp_M: Tensor
    reference_logp_M: Tensor
    correction_M: Tensor
    old_value_M: Tensor
    return_M: Tensor
    pair_weight_N: Tensor
    reward_N: Tensor
    anchor_N: Tensor
    embedding_ND: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """Move every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: t.to(device) for name, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **moved)

    @property
    def sequences(self) -> int:
        """N."""
        return len(self.last_N)

    @property
    def at_M(self) -> Tensor:
        """The node that predicts each target."""
        return self.at_U[self.pick_M]

    @property
    def targets_M(self) -> Tensor:
        """The token ids of the targets."""
        return self.targets_U[self.pick_M]


STREAMS = {
    "ce_weight_M": "ce_weight",
    "rl_weight_M": "rl_weight",
    "kl_weight_M": "kl_weight",
    "advantage_M": "advantage",
    "old_logp_M": "old_logps",
    "reference_logp_M": "reference_logps",
    "correction_M": "correction",
    "old_value_M": "old_values",
    "return_M": "returns",
}
"""Batch tensor [M] → field of `TrainSequence`."""


def collate(sequences: Sequence[TrainSequence]) -> TokenBatch:
    """Fold sequences into one tree and list their targets, sequence by sequence."""
    tree, tokens, paths = fold([seq.token_ids for seq in sequences])
    tokens_T = torch.tensor(tokens)
    nodes: list[Tensor] = []
    targets: list[Tensor] = []
    owner: list[int] = []
    streams: dict[str, list[float]] = {name: [] for name in STREAMS}
    for index, (seq, path) in enumerate(zip(sequences, paths, strict=True)):
        places = torch.tensor([i for i, kept in enumerate(seq.loss_mask) if kept], dtype=torch.long)
        nodes.append(path[places - 1])
        targets.append(tokens_T[path[places]])
        owner += [index] * len(places)
        for name, stream in streams.items():
            value = getattr(seq, STREAMS[name])
            stream += value if isinstance(value, Sequence) else [value] * len(places)
    base = int(tokens_T.max()) + 1
    keys_U, pick_M = torch.unique(torch.cat(nodes) * base + torch.cat(targets), return_inverse=True)
    return TokenBatch(
        tokens_T=tokens_T,
        tree=tree,
        at_U=keys_U // base,
        targets_U=keys_U % base,
        pick_M=pick_M,
        last_N=torch.tensor([int(path[-1]) for path in paths]),
        sequence_M=torch.tensor(owner, dtype=torch.long),
        **{name: torch.tensor(values, dtype=torch.float32) for name, values in streams.items()},
        pair_weight_N=torch.tensor([seq.pair_weight for seq in sequences]),
        reward_N=torch.tensor([seq.reward for seq in sequences]),
        anchor_N=torch.tensor([seq.anchor for seq in sequences]),
        embedding_ND=torch.tensor([seq.embedding for seq in sequences]),
    )


def micro_batches(units: Sequence[Sequence[TrainSequence]], token_budget: int) -> list[TokenBatch]:
    """Split units (sequences that must stay together, such as a preference pair) into micro-batches, see `pack`."""
    tokens = [[seq.token_ids for seq in unit] for unit in units]
    return [collate([seq for index in chosen for seq in units[index]]) for chosen in pack(tokens, token_budget)]


def pack(units: Sequence[Sequence[Sequence[int]]], token_budget: int) -> list[list[int]]:
    """Put units of token sequences into as few trees of at most `token_budget` tokens as best fit decreasing finds.

    Units that begin alike are kept together first, as many as fit the budget. A unit larger than it makes a larger
    tree; those that share nearly all of it go along, see `SIBLINGS`.

    Returns:
        the indices of each tree's units.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for size, members in sorted(_alike(units, token_budget), key=lambda cluster: -cluster[0]):
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            free, index = room.pop(at)
            bins[index] += members
        else:
            free, index = token_budget, len(bins)
            bins.append(members)
        bisect.insort(room, (free - size, index))
    return bins


def _alike(units: Sequence[Sequence[Sequence[int]]], token_budget: int) -> list[tuple[int, list[int]]]:
    """Cluster units with a common beginning: (tokens of their tree, indices), at most the budget or `SIBLINGS` more.

    Sizes are those of `fold` where units are one sequence each; of larger ones, which it may find another order for,
    they are off by a few tokens.
    """
    clusters: list[tuple[int, list[int]]] = []
    last: Sequence[int] = ()
    ends: list[int] = []
    longest = 0
    for index in sorted(range(len(units)), key=lambda i: [tuple(tokens) for tokens in units[i]]):
        added, after = _added(units[index], last, ends)
        alone, fresh = _added(units[index], (), [])
        longest = max(longest, alone)
        limit = token_budget if added * 4 > alone else max(token_budget, int(longest * (1 + SIBLINGS)))
        if clusters and added < alone and clusters[-1][0] + added <= limit:
            size, members = clusters[-1]
            clusters[-1], ends = (size + added, [*members, index]), after
        else:
            clusters.append((alone, [index]))
            ends, longest = fresh, alone
        last = units[index][-1]
    return clusters


def _added(unit: Sequence[Sequence[int]], last: Sequence[int], ends: list[int]) -> tuple[int, list[int]]:
    """Tokens that a unit adds after `last`, the path of which has segments that end at `ends`; and its last path's."""
    added = 0
    for tokens in unit:
        at = branching(ends, common_prefix(last, tokens))
        added += len(tokens) - at
        ends = [*(end for end in ends if end < at), *([at] if at else []), len(tokens)]
        last = tokens
    return added, ends
