"""Features of texts: a language model's hidden states, or a sentence embedder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ascent.customize.features.extract import BadItem, Features, Item, identity_of, model_sha256, texts_of
from ascent.records.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["mean", "last"]


class HiddenStates:
    """The hidden states of a decoder, pooled over a text's tokens. The model is never changed.

    Attributes:
        truncate: whether a text longer than the model's context loses its end instead of raising.
        token_budget: tokens per forward pass.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pooling: Pooling = "mean",
        layers: int | None = None,
        precision: Literal["bf16", "fp32"] = "bf16",
        truncate: bool = False,
        token_budget: int = 4096,
        device: str = "cpu",
    ) -> None:
        """Load a model folder.

        Args:
            folder: a model of the store, or any folder in Hugging Face layout that the embedded engine runs.
            pooling: the mean over the tokens, or the last token, which alone has seen the whole text.
            layers: how many layers to run; None runs all. The middle ones often separate classes better and cost
                less. The model's final norm is applied in either case.
            precision: the weights' type. In bf16 a text's features move by about 1 % with the batch it is in.
            truncate: see above.
            token_budget: see above.
            device: where to compute, in torch's words.

        Raises:
            BadInput: the model has fewer layers, or its architecture or tokenizer cannot be used.
            Corrupt: weights are missing.
        """
        import torch
        from torch import nn
        from transformers import AutoTokenizer

        from ascent.inference.decoder import load_decoder

        self._decoder = load_decoder(folder, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]).to(device)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{folder}: no tokenizer can be loaded ({error}); give a model folder") from error
        depth = self._decoder.config.layers
        if not 1 <= (layers or depth) <= depth:
            raise BadInput(f"{folder} has {depth} layers, so {layers} of them cannot be run; give 1 to {depth}")
        self._decoder.layers = nn.ModuleList(list(self._decoder.layers)[:layers])
        self.pooling, self.truncate, self.token_budget = pooling, truncate, token_budget
        self.name, self.dimensions = f"hidden-{pooling}", self._decoder.config.width
        self.identity = identity_of(
            "hidden-states/1",
            model=model_sha256(folder),
            pooling=pooling,
            layers=layers or depth,
            precision=precision,
            truncate=truncate,
        )

    def extract(self, items: Sequence[Item]) -> Features:
        """Return features [N, D] with D the model's width.

        Raises:
            BadItem: an item is no text, has no token, or is longer than the context and may not be cut.
        """
        import torch

        tokens = [self._tokens(index, text) for index, text in enumerate(texts_of(items))]
        found = np.zeros((len(tokens), self.dimensions), np.float32)
        with torch.inference_mode():
            for batch in _batches([len(ids) for ids in tokens], self.token_budget):
                found[batch] = self._pooled([tokens[index] for index in batch]).cpu().numpy()
        return found

    def _tokens(self, index: int, text: str) -> list[int]:
        ids = list(self._tokenizer(text)["input_ids"])
        limit = self._decoder.config.context
        if not ids:
            raise BadItem(index, "the text has no token; write it or delete the row", text)
        if len(ids) > limit and not self.truncate:
            reason = f"the text has {len(ids)} tokens, the model reads {limit}; shorten it or pass truncate=True"
            raise BadItem(index, reason, text)
        return ids[:limit]

    def _pooled(self, tokens: list[list[int]]) -> Tensor:
        import torch

        from ascent.inference.tree import Tree

        lengths = [len(ids) for ids in tokens]
        device = self._decoder.device
        tokens_T = torch.tensor([token for ids in tokens for token in ids], device=device)
        hidden_TD = self._decoder.hidden_packed(tokens_T, Tree.flat(lengths)).float()
        sizes_N = torch.tensor(lengths, device=device)
        if self.pooling == "last":
            return hidden_TD[sizes_N.cumsum(0) - 1]
        rows_T = torch.repeat_interleave(torch.arange(len(tokens), device=device), sizes_N)
        sums_ND = hidden_TD.new_zeros(len(tokens), self.dimensions).index_add_(0, rows_T, hidden_TD)
        return sums_ND / sizes_N[:, None]


class TextEmbedding:
    """A sentence embedder: any function from texts to vectors."""

    def __init__(
        self,
        encode: Callable[[list[str]], npt.NDArray[Any]],
        *,
        model_sha256: str,
        name: str = "embedding",
        batch_size: int = 64,
    ) -> None:
        """Wrap an embedder.

        Args:
            encode: gives [N, D] for N texts; it is asked once here to learn D.
            model_sha256: names the embedder's weights and settings, so that a changed one is noticed.
            name: how reports name it.
            batch_size: texts per call.

        Raises:
            BadInput: `model_sha256` is empty, or `encode` gives no matrix.
        """
        if not model_sha256:
            raise BadInput("an embedder needs a model_sha256, or features of a retrained one would pass for its own")
        probe = np.asarray(encode(["a"]))
        if probe.ndim != 2 or len(probe) != 1:
            raise BadInput(f"encode must give [N, D], it gave shape {probe.shape} for one text")
        self.encode, self.batch_size = encode, batch_size
        self.name, self.dimensions = name, int(probe.shape[1])
        self.identity = identity_of("text-embedding/1", model=model_sha256, dimensions=self.dimensions)

    def extract(self, items: Sequence[Item]) -> Features:
        """Return features [N, D]. Raises `BadItem` for an item that is no text or an empty one."""
        texts = texts_of(items)
        parts = [np.zeros((0, self.dimensions), np.float32)]
        for begin in range(0, len(texts), self.batch_size):
            parts.append(np.asarray(self.encode(texts[begin : begin + self.batch_size]), np.float32))
        return np.concatenate(parts)


def _batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return places in batches of similar length, whose padded size stays within the budget where it can."""
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if found and lengths[place] * (len(found[-1]) + 1) <= budget:
            found[-1].append(place)
        else:
            found.append([place])
    return found
