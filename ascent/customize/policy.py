"""The model under training: one function, `score`, is all an algorithm ever sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ascent.customize.batch import TokenBatch, TrainSequence, micro_batches
from ascent.inference import lora
from ascent.inference.decoder import Decoder, load_decoder
from ascent.inference.head import logp_and_entropy

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Policy:
    """A decoder with its trainable parameters: a fresh LoRA adapter on a frozen base, or all weights in fp32.

    The reference of DPO and of KL terms is the policy as it was before training: the adapter switched off, or, when all
    weights train, a frozen copy.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        adapter: lora.LoraConfig | None,
        seed: int = 0,
        frozen: Decoder | None = None,
    ) -> None:
        self.decoder, self.adapter, self._frozen = decoder, adapter, frozen
        if adapter is not None:
            self.parameters = lora.attach(decoder, adapter, seed)
        else:
            self.parameters = list(decoder.parameters())
            for parameter in self.parameters:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)

    @classmethod
    def load(cls, folder: Path, precision: str, adapter: lora.LoraConfig | None, seed: int = 0) -> Policy:
        """Load the start model. With `adapter=None` a second, frozen copy is kept as the reference."""
        dtype = DTYPES[precision]
        if adapter is not None:
            return cls(load_decoder(folder, dtype), adapter=adapter, seed=seed)
        decoder = load_decoder(folder, torch.float32)  # what trains keeps all bits of the start model
        decoder.dtype = dtype
        return cls(decoder, adapter=None, frozen=load_decoder(folder, dtype))

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

    def add_reference(
        self, units: Sequence[Sequence[TrainSequence]], token_budget: int, *, temperature: float = 1.0
    ) -> None:
        """Fill `reference_logps` of every sequence."""
        sequences = [seq for unit in units for seq in unit]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].token_ids))
        batches = micro_batches([[sequences[i]] for i in order], token_budget)
        logps = torch.cat([self.reference(batch, temperature=temperature).cpu() for batch in batches])
        start = 0
        for index in order:
            end = start + sequences[index].targets
            sequences[index].reference_logps = logps[start:end].tolist()
            start = end

    def save(self, folder: Path, base: str) -> None:
        """Write `adapter/` (PEFT format) when there is one, and the merged weights beside it."""
        if self.adapter is not None:
            lora.save_adapter(self.decoder, self.adapter, folder / "adapter", base)
        self.decoder.save(folder)


def _score(decoder: Decoder, batch: TokenBatch, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    moved = batch.to(decoder.device)
    hidden_TD = decoder.hidden_packed(moved.tokens_T, batch.lengths)
    return logp_and_entropy(
        hidden_TD.index_select(0, moved.at_M),
        decoder.head_weight,
        moved.targets_M,
        temperature=temperature,
        entropy=entropy,
    )
