"""Image features from pretrained models in a local folder: an image encoder, or a vision-language model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ascent.customize.features.extract import Features, Item, identity_of, model_sha256
from ascent.customize.features.images import open_image
from ascent.records.errors import BadInput, Corrupt

if TYPE_CHECKING:
    from PIL.Image import Image

_POOLER = "pooler"


class ImageEncoder:
    """A frozen image encoder that transformers' `AutoModel` reads: CLIP, SigLIP, DINOv2, ViT, ResNet.

    A model with a text half (CLIP, SigLIP) is used by its vision half. Features are the model's own pooled output,
    or, where it has none, the mean over the last hidden state.
    """

    def __init__(self, folder: Path, *, batch_size: int = 16, device: str = "cpu") -> None:
        """Load the model in fp32 and its image processor.

        Raises:
            BadInput: the folder holds no image model or no image processor.
            Corrupt: weights are missing.
        """
        from transformers import AutoImageProcessor, AutoModel

        with _loading(folder):
            self._processor: Any = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
            model, missing = _load(AutoModel, folder)
        # A pooler that the checkpoint does not have would be random numbers.
        self._pooled = not any(_POOLER in name for name in missing)
        _refuse_missing([name for name in missing if _POOLER not in name], folder)
        self._model = getattr(model, "vision_model", model).to(device).eval()
        self._device, self.batch_size, self.name = device, batch_size, "image-encoder"
        self.dimensions = _width(self._encode, folder)
        self.identity = identity_of("image-encoder/1", model=model_sha256(folder))

    def extract(self, items: Sequence[Item]) -> Features:
        """Return features [N, D]. Raises `BadItem` for an item that is no image or does not decode."""
        parts = [np.zeros((0, self.dimensions), np.float32)]
        for begin in range(0, len(items), self.batch_size):
            places = range(begin, min(begin + self.batch_size, len(items)))
            parts.append(self._encode([open_image(items[place], place) for place in places]))
        return np.concatenate(parts)

    def _encode(self, images: Sequence[Image]) -> Features:
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        with torch.inference_mode():
            out = self._model(**inputs)
        pooled = getattr(out, "pooler_output", None) if self._pooled else None
        if pooled is None:
            states = out.last_hidden_state
            pooled = states.mean(dim=1) if states.ndim == 3 else states.mean(dim=(2, 3))
        values: Features = pooled.flatten(1).float().cpu().numpy()
        return values


class VisionLanguageModel:
    """The hidden states of a frozen vision-language model that has been shown an image and a question.

    The question steers what the states speak of: "Is this packaging damaged?" gives other features of a photo than
    "Which fruit is this?". One image at a time, so that no padding is needed and no item depends on another.
    """

    def __init__(
        self,
        folder: Path,
        *,
        question: str,
        pooling: Literal["mean", "last"] = "last",
        precision: Literal["bf16", "fp32"] = "bf16",
        device: str = "cpu",
    ) -> None:
        """Load the model and its processor.

        Args:
            folder: a folder that transformers' `AutoModel` and `AutoProcessor` read, such as SmolVLM or LLaVA.
            question: what is asked about every image.
            pooling: the last token, which has seen image and question, or the mean over all of them.
            precision: the weights' type.
            device: where to compute, in torch's words.

        Raises:
            BadInput: the folder holds no such model, or its processor cannot place an image.
            Corrupt: weights are missing.
        """
        import torch
        from transformers import AutoModel, AutoProcessor

        with _loading(folder):
            self._processor: Any = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
            model, missing = _load(AutoModel, folder)
        _refuse_missing([name for name in missing if not name.startswith("lm_head")], folder)
        self._dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        self._model = model.to(device, self._dtype).eval()
        self._device, self.pooling, self.name = device, pooling, f"vlm-{pooling}"
        self._prompt = _prompt(self._processor, question, folder)
        self.dimensions = _width(self._encode, folder)
        self.identity = identity_of(
            "vlm/1", model=model_sha256(folder), prompt=self._prompt, pooling=pooling, precision=precision
        )

    def extract(self, items: Sequence[Item]) -> Features:
        """Return features [N, D]. Raises `BadItem` for an item that is no image or does not decode."""
        parts = [np.zeros((0, self.dimensions), np.float32)]
        parts += [self._encode([open_image(item, index)]) for index, item in enumerate(items)]
        return np.concatenate(parts)

    def _encode(self, images: Sequence[Image]) -> Features:
        import torch

        inputs = self._processor(images=list(images), text=[self._prompt] * len(images), return_tensors="pt")
        with torch.inference_mode():
            out = self._model(**inputs.to(self._device, self._dtype))
        states = out.last_hidden_state.float()
        pooled = states[:, -1] if self.pooling == "last" else states.mean(dim=1)
        values: Features = pooled.cpu().numpy()
        return values


def _prompt(processor: Any, question: str, folder: Path) -> str:
    """Return the text in which the processor puts one image before the question."""
    mark = getattr(processor, "image_token", None)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        if mark is None or mark in text:  # else it is the template of the text model inside, which knows no images
            return text
    if mark:
        return f"{mark}\n{question}"
    raise BadInput(f"{folder}: the processor has neither a chat template nor an image token; use a VLM's folder")


def _load(kind: Any, folder: Path) -> tuple[Any, list[str]]:
    model, info = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    return model, sorted(info["missing_keys"])


def _refuse_missing(missing: list[str], folder: Path) -> None:
    if missing:
        raise Corrupt(
            f"{folder}: {len(missing)} weights are missing, {missing[0]} among them, and would be random; fetch the "
            "model again"
        )


def _width(encode: Any, folder: Path) -> int:
    """Return D, as a grey image shows it."""
    from PIL import Image

    try:
        return int(encode([Image.new("RGB", (64, 64), "grey")]).shape[1])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder}: this model gives no image features ({error}); use an image encoder") from error


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Word what transformers says of a folder that it cannot read."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise BadInput(
            f"{folder}: transformers cannot load an image model with its processor from here ({error}); give the "
            "folder of a whole checkpoint, config.json and preprocessor_config.json included"
        ) from error
