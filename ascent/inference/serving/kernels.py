"""The serving kernels in C, `kernels.c`, compiled and kept like those of `native` and only where those fit.

Shape letters as in `decoder.py`; tensors are contiguous, in bf16 unless said otherwise. A page holds `PAGE` tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ascent.inference import native

PAGE = native.LANES
STRIP = 6  # tokens that an adapter's product takes at a time
SOFT = 1  # omp_pause_soft of OpenMP 5.0: settings stay
ROWS = 48  # (token, head) pairs of one work item of attention


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there can be none, and then tensor operations do the same."""
    if native.library() is None:
        return None
    found = native.compiled("serving", [Path(__file__).parent / "kernels.c"])
    return found if isinstance(found, ctypes.CDLL) else None


def release_threads() -> None:
    """Let go the helper threads that OpenMP keeps for the calling thread; its next parallel region makes new ones.

    With more of them in a process than processors, gcc's OpenMP puts waiting ones to sleep at once, and a step takes
    twice as long: measured with a model loaded in one thread and run in another.
    """
    with contextlib.suppress(OSError, AttributeError):  # another OpenMP, which has its own ways
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(SOFT)


class _Paged(ctypes.Structure):
    """`paged` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("stretches", "tables", "places", "keys", "values")),
        *((name, ctypes.c_long) for name in ("count", "tokens", "heads", "kv_heads", "size")),
    )


@dataclass(frozen=True)
class Stretches:
    """Whose tokens stand where, in int64.

    `rows` [n, 4] are stretches of one request's tokens: where its pages begin in `tables`, the position of the
    stretch's first token, that token's place in the step, and how many there are. `places` [T] are page · PAGE + slot
    of each token.
    """

    rows: Tensor
    tables: Tensor
    places: Tensor


def paged_attention(qkv_TNE: Tensor, keys: Tensor, values: Tensor, kv_heads: int, stretches: Stretches) -> Tensor:
    """Store keys and values of the step's tokens, and return what the heads attend to [T, H, E].

    `keys` [pages, K, E/2, PAGE, 2] and `values` [pages, K, PAGE/2, E, 2] are one layer's; rows of padding, those after
    the last place, attend to nothing and get zeros.
    """
    across, size = qkv_TNE.shape[1:]
    out = qkv_TNE.new_zeros(len(qkv_TNE), across - 2 * kv_heads, size)
    pointers = (x.data_ptr() for x in (stretches.rows, stretches.tables, stretches.places, keys, values))
    sizes = (len(stretches.rows), len(stretches.places), across - 2 * kv_heads, kv_heads, size)
    _run("paged_attention", ctypes.byref(_Paged(*pointers, *sizes)), qkv_TNE, out)
    return out


def adapt(x_TI: Tensor, y_TO: Tensor, strips: Tensor, ends: Tensor, most: int) -> None:
    """Add low-rank products to y in place.

    `strips` [n, 5] in int64 are addresses of an adapter's packed `down` and `up`, its rank, and the tokens (from, to)
    they are for, at most `STRIP`; `ends` [parts] are where the outputs of each part end; `most` is parts · the largest
    rank.
    """
    inner = x_TI.new_empty(len(x_TI), most)
    sizes = (len(strips), x_TI.shape[1], y_TO.shape[1], len(ends), most)
    _run("adapt", x_TI, y_TO, strips, inner, ends, *map(ctypes.c_long, sizes))


def draw_tokens(logits_BV: Tensor, rows: Tensor, settings: Tensor) -> Tensor:
    """Return a token [n] for each row of logits that `rows` [n] in int64 names.

    `settings` [n, 3] in fp32 are its temperature, `top_p`, and the uniform number that picks the token.
    """
    tokens = torch.zeros(len(rows), dtype=torch.long)
    sizes = map(ctypes.c_long, (len(rows), logits_BV.shape[1]))
    _run("draw_tokens", logits_BV, rows, settings, tokens, *sizes)
    return tokens


def packed(matrix: Tensor) -> Tensor:
    """A matrix [rows, columns] as the kernels read it: [rows/LANES, columns/2, LANES, 2]."""
    rows, columns = matrix.shape
    return matrix.view(rows // native.LANES, native.LANES, columns // 2, 2).transpose(1, 2).contiguous()


def _run(name: str, *arguments: object) -> None:
    kernels = library()
    assert kernels is not None
    passed = (ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments)
    getattr(kernels, name)(*passed, ctypes.c_int(torch.get_num_threads()))
