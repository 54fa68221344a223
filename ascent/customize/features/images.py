"""Image items: decoded alike for every extractor, with errors that say which one does not decode."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ascent.customize.features.extract import BadItem, Item
from ascent.records.errors import MissingExtra

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(item: Item, index: int) -> Image:
    """Return an item as an RGB image, turned as its EXIF tag says, transparency on white.

    Raises:
        BadItem: the item is a text, the file cannot be read, or it does not decode; `index` says which item it is.
        MissingExtra: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtra("features", "reading images") from error
    if isinstance(item, str):
        reason = "an image is needed, this is a text; give a pathlib.Path or the image's bytes"
        raise BadItem(index, reason, item)
    try:
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as raw:
            image = ImageOps.exif_transpose(raw)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = f"the image does not decode ({error}); replace or remove it, or exclude unreadable items"
        raise BadItem(index, reason, item) from error
