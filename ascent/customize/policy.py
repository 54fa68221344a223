"""The model under training: `measure` is all an algorithm ever sees of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ascent.customize import parallel
from ascent.customize.batch import Scored, TokenBatch, TrainSequence, collate, pack
from ascent.inference import lora
from ascent.inference.decoder import Decoder, load_decoder
from ascent.inference.head import Distance, divergence, logp_and_entropy
from ascent.inference.tensors import write_tensors
from ascent.inference.tree import Tree
from ascent.records.errors import BadInput

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD = "head.safetensors"
HeadKind = Literal["value", "reward"]


@dataclass(frozen=True)
class Teacher:
    """A frozen model to learn from: its log-probs of sampled tokens, or, with a `distance`, its whole distribution."""

    decoder: Decoder
    distance: Distance | None = None


class Policy:
    """A decoder with its trainable parameters: a fresh LoRA adapter on a frozen base, or all weights in fp32.

    The reference of DPO and of KL terms is the policy as it was before training: the adapter switched off, or, when all
    weights train, a frozen copy. A `value` head reads the state before each target, a `reward` head the last token;
    both share the policy's trunk and start at zero.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        adapter: lora.LoraConfig | None,
        seed: int = 0,
        frozen: Decoder | None = None,
        head: HeadKind | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.decoder, self.adapter, self._frozen = decoder, adapter, frozen
        self.head_kind, self.teacher = head, teacher
        if adapter is not None:
            self.parameters = lora.attach(decoder, adapter, seed)
        else:
            self.parameters = list(decoder.parameters())
            for parameter in self.parameters:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self.head = None if head is None else zero_head(decoder)
        if self.head is not None:
            self.parameters += list(self.head.parameters())
        if teacher is not None and teacher.decoder.config.vocab != decoder.config.vocab:
            raise BadInput(
                f"the teacher has {teacher.decoder.config.vocab:,} tokens and the student "
                f"{decoder.config.vocab:,}, so their "
                "log-probs speak of different things; take a teacher with the same tokenizer, or distil its texts "
                "(distill_sequence)"
            )

    @classmethod
    def load(
        cls,
        folder: Path,
        precision: str,
        adapter: lora.LoraConfig | None,
        seed: int = 0,
        *,
        head: HeadKind | None = None,
        teacher: Teacher | None = None,
    ) -> Policy:
        """Load the start model. With `adapter=None` a second, frozen copy is kept as the reference."""
        dtype = DTYPES[precision]
        if adapter is not None:
            return cls(load_decoder(folder, dtype), adapter=adapter, seed=seed, head=head, teacher=teacher)
        decoder = load_decoder(folder, torch.float32)  # what trains keeps all bits of the start model
        decoder.dtype = dtype
        return cls(decoder, adapter=None, frozen=load_decoder(folder, dtype), head=head, teacher=teacher)

    def measure(self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False) -> Scored:
        """Return everything an objective may read of a batch: log-probs, entropy, head, divergence to the teacher.

        A policy with a reward head computes nothing of the vocabulary: its log-probs are empty.
        """
        moved = batch.to(self.decoder.device)
        hidden_TD = self.decoder.hidden_packed(moved.tokens_T, batch.tree)
        if self.head is not None and self.head_kind == "reward":
            reward_N = self.head(hidden_TD[moved.last_N].float()).squeeze(-1)
            return Scored(torch.empty(0), torch.empty(0), reward_N)
        hidden_UD = hidden_TD.index_select(0, moved.at_U)
        weight = self.decoder.head_weight
        logp_U, entropy_U = logp_and_entropy(
            hidden_UD, weight, moved.targets_U, temperature=temperature, entropy=entropy
        )
        logp, ent = logp_U[moved.pick_M], entropy_U[moved.pick_M]
        value = torch.empty(0) if self.head is None else self.head(hidden_UD.float()).squeeze(-1)[moved.pick_M]
        if self.teacher is None or self.teacher.distance is None:
            return Scored(logp, ent, value)
        with torch.no_grad():
            known = self.teacher.decoder.hidden_packed(moved.tokens_T, batch.tree).index_select(0, moved.at_U)
        away_U = divergence(hidden_UD, weight, known, self.teacher.decoder.head_weight, self.teacher.distance)
        return Scored(logp, ent, value, away_U[moved.pick_M])

    def score(self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = True) -> tuple[Tensor, Tensor]:
        """Return (logp_M, entropy_M) in fp32 of the batch's target tokens under the current policy."""
        return _score(self.decoder, batch, temperature, entropy)

    @torch.no_grad()
    def reference(self, batch: TokenBatch, *, temperature: float = 1.0) -> Tensor:
        """Return logp_M under the policy as it was before training."""
        if self._frozen is not None:
            return _score(self._frozen, batch, temperature, False)[0]
        lora.enable(self.decoder, False)
        try:
            return _score(self.decoder, batch, temperature, False)[0]
        finally:
            lora.enable(self.decoder, True)

    @torch.no_grad()
    def embed(self, prompts: Sequence[tuple[int, ...]], token_budget: int) -> Tensor:
        """Mean final hidden state [N, D] in fp32 of each prompt under the policy as it was before training."""
        decoder = self._frozen or self.decoder
        found = torch.empty(len(prompts), decoder.config.width)
        if self._frozen is None:
            lora.enable(self.decoder, False)
        try:
            per_call = max(1, token_budget // max(map(len, prompts)))
            for begin in range(0, len(prompts), per_call):
                part = prompts[begin : begin + per_call]
                tokens = torch.tensor([token for prompt in part for token in prompt], device=decoder.device)
                hidden = decoder.hidden_packed(tokens, Tree.flat([len(prompt) for prompt in part])).float().cpu()
                pieces = torch.split(hidden, [len(prompt) for prompt in part])
                found[begin : begin + len(part)] = torch.stack([piece.mean(0) for piece in pieces])
        finally:
            if self._frozen is None:
                lora.enable(self.decoder, True)
        return found

    def add_reference(
        self, units: Sequence[Sequence[TrainSequence]], token_budget: int, *, temperature: float = 1.0
    ) -> None:
        """Fill `reference_logps` of every sequence."""
        sequences = [seq for unit in units for seq in unit]
        logps = per_target(sequences, token_budget, lambda batch: self.reference(batch, temperature=temperature))
        for seq, values in zip(sequences, logps, strict=True):
            seq.reference_logps = values

    def save(self, folder: Path, base: str) -> None:
        """Write `adapter/` (PEFT format) when there is one, the merged weights, and a reward head beside them."""
        if self.adapter is not None:
            lora.save_adapter(self.decoder, self.adapter, folder / "adapter", base)
        self.decoder.save(folder)
        if self.head is not None and self.head_kind == "reward":
            write_tensors(folder / HEAD, {name: p.detach().clone() for name, p in self.head.named_parameters()})


def zero_head(decoder: Decoder) -> nn.Linear:
    """A scalar head in fp32 that says 0 of everything until it is trained."""
    head = nn.Linear(decoder.config.width, 1, device=decoder.device)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return head


@torch.no_grad()
def per_target(
    sequences: Sequence[TrainSequence], token_budget: int, measure: Callable[[TokenBatch], Tensor]
) -> list[list[float]]:
    """Run `measure` (a batch to [M]) over sequences in micro-batches; return one list per sequence, in their order."""
    found: dict[int, list[float]] = {}
    bins = pack([[seq.token_ids] for seq in sequences], token_budget)
    mine = parallel.share([sum(len(sequences[index].token_ids) for index in chosen) for chosen in bins])[
        parallel.rank()
    ]
    for chosen in (bins[place] for place in mine):
        values = measure(collate([sequences[index] for index in chosen])).float().cpu()
        parts = torch.split(values, [sequences[index].targets for index in chosen])
        for index, part in zip(chosen, parts, strict=True):
            found[index] = part.tolist()
    return parallel.collected(found, len(sequences))


def _score(decoder: Decoder, batch: TokenBatch, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    moved = batch.to(decoder.device)
    hidden_TD = decoder.hidden_packed(moved.tokens_T, batch.tree)
    logp_U, entropy_U = logp_and_entropy(
        hidden_TD.index_select(0, moved.at_U),
        decoder.head_weight,
        moved.targets_U,
        temperature=temperature,
        entropy=entropy,
    )
    return logp_U[moved.pick_M], entropy_U[moved.pick_M]


def teacher_logps(
    teacher: Teacher, sequences: Sequence[TrainSequence], token_budget: int, temperature: float = 1.0
) -> list[list[float]]:
    """Log-probs of the sampled tokens under the teacher."""
    return per_target(sequences, token_budget, lambda batch: _score(teacher.decoder, batch, temperature, False)[0])
