"""Image features without a model: colour, texture and gradient statistics, computed with NumPy.

They are hand-written descriptors of the years before learned encoders: enough to tell a carton from an apple, not to
read a label or to know a thing from another side. Use them to begin with photos at once, and as the baseline that an
encoder has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ascent.customize.features.extract import Features, Item, identity_of
from ascent.customize.features.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

Plane = npt.NDArray[np.float64]

SIDE, CELLS = 96, 4
HUES, SATURATIONS, VALUES, ANGLES = 12, 4, 3, 9
COLOURS, PATTERNS = HUES * SATURATIONS * VALUES, 59
DIMENSIONS = COLOURS + 6 * CELLS * CELLS + PATTERNS + ANGLES * CELLS * CELLS


class PixelStatistics:
    """443 numbers of an image squeezed to 96 × 96; no weights.

    | numbers | what |
    |---|---|
    | 144 | joint histogram of hue (12), saturation (4) and value (3) |
    | 96 | mean and deviation of red, green and blue in each cell of a 4 × 4 grid |
    | 59 | histogram of uniform local binary patterns (Ojala et al. 2002, PAMI 24:971, section 2) |
    | 144 | histogram of 9 unsigned gradient orientations in each cell (Dalal & Triggs 2005, CVPR, section 6.2) |

    Histograms are shares under a square root, so that distances between them are Hellinger's.
    """

    name = "pixel-statistics"
    dimensions = DIMENSIONS
    identity = identity_of("pixel-statistics/1")

    def extract(self, items: Sequence[Item]) -> Features:
        """Return features [N, 443]. Raises `BadItem` for an item that is no image or does not decode."""
        found = [_describe(open_image(item, index)) for index, item in enumerate(items)]
        return np.stack(found).astype(np.float32) if found else np.zeros((0, DIMENSIONS), np.float32)


def _describe(image: Image) -> Plane:
    small = image.resize((SIDE, SIDE))
    rgb = np.asarray(small, np.float64) / 255
    grey = rgb @ np.array([0.299, 0.587, 0.114])
    parts = [
        _colours(np.asarray(small.convert("HSV"), np.int64)),
        _cell_colours(rgb),
        _patterns(grey),
        _gradients(grey),
    ]
    return np.concatenate(parts)


def _colours(hsv: npt.NDArray[np.int64]) -> Plane:
    hue, saturation, value = (hsv[..., place] * bins // 256 for place, bins in enumerate((HUES, SATURATIONS, VALUES)))
    return _shares((hue * SATURATIONS + saturation) * VALUES + value, COLOURS)


def _cell_colours(rgb: Plane) -> Plane:
    step = SIDE // CELLS
    cells = rgb.reshape(CELLS, step, CELLS, step, 3)
    return np.concatenate([cells.mean(axis=(1, 3)).ravel(), cells.std(axis=(1, 3)).ravel()])


def _patterns(grey: Plane) -> Plane:
    """Each inner pixel's eight neighbours, compared with it, make a byte; bytes with over two changes share a bin."""
    around = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
    inner = grey[1:-1, 1:-1]
    code = np.zeros(inner.shape, np.int64)
    for bit, (down, right) in enumerate(around):
        neighbour = grey[1 + down : SIDE - 1 + down, 1 + right : SIDE - 1 + right]
        code |= (neighbour >= inner).astype(np.int64) << bit
    return _shares(_UNIFORM[code], PATTERNS)


def _gradients(grey: Plane) -> Plane:
    down, right = np.gradient(grey)
    turn = np.arctan2(down, right) % np.pi / np.pi * ANGLES  # in bins; unsigned, so half a turn covers all
    low = np.floor(turn).astype(np.int64)
    share = turn - low  # each gradient is shared between the two nearest bins
    step = SIDE // CELLS
    cell = np.arange(SIDE) // step
    place = (cell[:, None] * CELLS + cell[None, :]) * ANGLES
    length = np.hypot(down, right)
    total = np.zeros(CELLS * CELLS * ANGLES)
    for angle, weight in ((low % ANGLES, length * (1 - share)), ((low + 1) % ANGLES, length * share)):
        total += np.bincount((place + angle).ravel(), weight.ravel(), len(total))
    return np.sqrt(total / max(float(total.sum()), 1e-12))


def _shares(codes: npt.NDArray[np.int64], bins: int) -> Plane:
    counts = np.bincount(codes.ravel(), minlength=bins)
    return np.sqrt(counts / codes.size)


def _uniform() -> npt.NDArray[np.int64]:
    """Return byte -> bin: one bin for each of the 58 bytes with at most two changes around the circle, one for all."""
    turned = [(byte >> 1) | ((byte & 1) << 7) for byte in range(256)]
    smooth = [byte for byte in range(256) if (byte ^ turned[byte]).bit_count() <= 2]
    table = np.full(256, len(smooth), np.int64)
    table[smooth] = np.arange(len(smooth))
    return table


_UNIFORM = _uniform()
