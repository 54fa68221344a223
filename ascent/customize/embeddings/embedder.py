"""A text encoder in sentence-transformers layout: texts in, vectors out, trainable and saved in the same layout.

The encoder itself is the one of `transformers` (BERT and its relatives); pooling, prompts and lengths are as the folder
says. Dropout is off in training too: chunks of a batch can then be computed twice with the same result, and a resumed
run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ascent.inference.convert import EmbedderConfig, inspect_folder, without_bars
from ascent.inference.tensors import write_tensors
from ascent.records.errors import BadInput

Precision = Literal["fp32", "bf16"]
Role = Literal["query", "document"]
Floats = npt.NDArray[np.float32]
LAYOUT = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "[0-9]_*/config.json",
)
"""Files of a folder that stay as they are when its weights are trained."""


class Embedder:
    """Turns texts into vectors of length D.

    `parameters` are the weights that training changes: all that have a part in the vectors, in fp32. With precision
    `bf16` matrix products are computed in bfloat16, pooling and vectors stay fp32.
    """

    def __init__(self, model: Any, tokenizer: Any, config: EmbedderConfig, precision: Precision) -> None:
        self.model, self.tokenizer, self.config, self.precision = model.eval(), tokenizer, config, precision
        for name, parameter in model.named_parameters():
            # The pooler of BERT is for classification; no vector depends on it.
            parameter.requires_grad_(not name.startswith("pooler."))
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]

    @classmethod
    def load(cls, folder: Path, precision: Precision = "fp32") -> Embedder:
        """Load a folder in sentence-transformers layout.

        Raises:
            BadInput: the folder is no embedder, or pools in a way that is not supported.
            Corrupt: a file is missing, cut off, or does not parse.
        """
        if not (folder / "modules.json").is_file():
            raise BadInput(
                f"{folder} is no embedder: it has no modules.json; fetch one with: ascent models pull all-minilm-l6-v2"
            )
        inspect_folder(folder)
        from transformers import AutoModel, AutoTokenizer

        place = {"pretrained_model_name_or_path": str(folder), "local_files_only": True, "trust_remote_code": False}
        with without_bars():
            model = AutoModel.from_pretrained(**place, dtype=torch.float32, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(**place)
        return cls(model, tokenizer, EmbedderConfig.from_folder(folder), precision)

    @property
    def width(self) -> int:
        """The length D of the vectors."""
        return int(self.model.config.hidden_size)

    def tokenise(self, texts: Sequence[str], role: Role | None = None) -> list[tuple[int, ...]]:
        """Return each text's token ids, with the prompt of its role before it, cut off at the folder's length."""
        prompt = self.config.prompts.get(role, "") if role else ""
        if not texts:
            return []
        coded = self.tokenizer(
            [prompt + text for text in texts], truncation=True, max_length=self.config.max_tokens, padding=False
        )
        return [tuple(ids) for ids in coded["input_ids"]]

    def embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the vectors of tokenised texts, [N, D] in fp32 with their gradient.

        Mean pooling divides the sum of the last layer's states over a text's own tokens by their number (Reimers and
        Gurevych 2019, arXiv 1908.10084, section 3); padding has no part in it.
        """
        device, longest = self.model.device, max(len(row) for row in ids)
        pad = self.tokenizer.pad_token_id
        ids_NL = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ids], device=device)
        lengths_N = torch.tensor([len(row) for row in ids], device=device)
        mask_NL = (torch.arange(longest, device=device) < lengths_N[:, None]).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            hidden_NLD = self.model(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        if self.config.pooling == "cls":
            vectors_ND = hidden_NLD[:, 0].float()
        else:
            vectors_ND = (hidden_NLD.float() * mask_NL[:, :, None]).sum(1) / lengths_N[:, None]
        return F.normalize(vectors_ND, dim=1) if self.config.normalise else vectors_ND

    @torch.no_grad()
    def embed_all(self, ids: Sequence[Sequence[int]], batch_size: int = 32) -> Tensor:
        """Return the vectors of any number of tokenised texts, [N, D], without gradient; sorted by length inside."""
        order = by_length(ids)
        vectors_ND = torch.empty(len(ids), self.width)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            vectors_ND[part] = self.embed([ids[i] for i in part]).cpu()
        return vectors_ND

    def encode(self, texts: Sequence[str], batch_size: int = 32, role: Role | None = None) -> Floats:
        """Return the vectors of texts, float32 [N, D].

        Args:
            texts: the texts; those beyond the folder's `max_tokens` are cut off.
            batch_size: texts computed at once; bounds memory.
            role: puts the folder's prompt for queries or documents, if it has one, before each text.
        """
        vectors: Floats = self.embed_all(self.tokenise(texts, role), batch_size).numpy()
        return vectors

    def save(self, start: Path, folder: Path) -> None:
        """Write the weights into `folder`, and beside them what else the folder `start` holds of the layout."""
        for pattern in LAYOUT:
            for file in start.glob(pattern):
                target = folder / file.relative_to(start)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        config = json.loads((start / "config.json").read_text(encoding="utf-8"))
        config.update({name: "float32" for name in ("dtype", "torch_dtype") if name in config})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def by_length(ids: Sequence[Sequence[int]]) -> list[int]:
    """Return indices that sort tokenised texts by their length, so that a batch holds little padding."""
    return sorted(range(len(ids)), key=lambda index: len(ids[index]))
