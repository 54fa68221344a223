"""Kernels in C for bf16 on processors with AVX-512 and its bf16 dot products (Zen 4, Cooper Lake, and later).

Between matrix products a processor waits for memory, and plain tensor operations read and write it many times. These
do each job in one pass. They are compiled by the machine's gcc at first use, which takes seconds, and kept in the
store's folder under a name that stands for sources, compiler and processor. Without gcc, on another processor or in
another type the tensor operations beside each call do the same; `ASCENT_NATIVE=0` asks for them.

Shape letters as in `decoder.py`; all tensors are contiguous, in bf16 unless said otherwise.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCES = ("elementwise.c", "attention.c", "decode.c")
HEADER = Path(__file__).parent / "vector.h"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
LANES, WIDE, COLUMNS = 16, 32, 64
"""Numbers of a vector in fp32 and in bf16, and the columns of attention's products: rows must be multiples of them."""
COMPILE_TIMEOUT_S = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there can be none; `problem()` says why."""
    found = _built()
    return found if isinstance(found, ctypes.CDLL) else None


def problem() -> str:
    """Why there are no kernels here; empty when there are."""
    found = _built()
    return found if isinstance(found, str) else ""


@cache
def _built() -> ctypes.CDLL | str:
    """Compile the kernels, unless that was done before, and load them; or say why not."""
    if os.environ.get("ASCENT_NATIVE") == "0":
        return "switched off by ASCENT_NATIVE=0"
    if os.name != "posix":
        return "they are made for POSIX systems"
    if not torch.cpu._is_avx512_bf16_supported():
        return "this processor has no bf16 dot products in AVX-512"
    here = Path(__file__).parent
    return compiled("kernels", [here / name for name in SOURCES])


def compiled(name: str, sources: Sequence[Path]) -> ctypes.CDLL | str:
    """Compile sources that include `vector.h`, unless that was done before, and load them; or say why not.

    Only what nobody else could have written is loaded.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        return "there is no gcc"
    place = _folder() / f"{name}-{_fingerprint(compiler, sources)}.so"
    if not place.is_file():
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            made = Path(scratch) / place.name
            command = [compiler, *FLAGS, f"-I{HEADER.parent}", *map(str, sources), "-o", str(made), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"gcc could not be run: {error}"
            if done.returncode != 0:
                return f"gcc could not compile the kernels: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
            made.chmod(0o700)
            made.replace(place)  # another process may have done the same meanwhile
    if not _only_ours(place.parent) or not _only_ours(place):
        return f"others could write to {place.parent}, from which code would be loaded; make it yours alone"
    try:
        return ctypes.CDLL(str(place))
    except OSError as error:
        return f"the compiled kernels cannot be loaded ({error}); delete {place}"


def _folder() -> Path:
    return Path(os.environ.get("ASCENT_HOME") or Path.home() / ".cache" / "ascent") / "native"


def _only_ours(place: Path) -> bool:
    """Whether nobody but this user (and the system's) can write there."""
    found = place.stat()
    return found.st_uid in (0, os.getuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _fingerprint(compiler: str, sources: Sequence[Path]) -> str:
    """A hash of all that the compiled code depends on."""
    parts = [file.read_bytes() for file in (*sources, HEADER)]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return hashlib.sha256(b"\0".join([*parts, version, flags.encode(), " ".join(FLAGS).encode()])).hexdigest()[:16]


def fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors, whose last sizes are those of the rows."""
    for x in tensors:
        if x is None:
            continue
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.shape[-1] % LANES or not x.is_contiguous():
            return False
    return library() is not None


def add_norm(x: Tensor, added: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + added (x itself without), its norm times the weight, and 1/rms [rows] in fp32."""
    width = x.shape[-1]
    total = x if added is None else torch.empty_like(x)
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _call("add_norm_forward", x, added, weight_D, total, y, scale, x.numel() // width, width, ctypes.c_float(eps))
    return total, y, scale


def add_norm_slope(grad: Tensor, passed: Tensor | None, total: Tensor, weight_D: Tensor, scale: Tensor) -> Tensor:
    """The gradient of `add_norm` in x, and so in `added`; `passed` is the gradient of the sum itself."""
    out, width = torch.empty_like(total), total.shape[-1]
    _call("add_norm_backward", grad, passed, total, weight_D, scale, out, total.numel() // width, width)
    return out


def swiglu(both: Tensor) -> Tensor:
    """silu(a)·b for [.., 2F] = [a, b]."""
    width = both.shape[-1] // 2
    y = both.new_empty(*both.shape[:-1], width)
    _call("swiglu_forward", both, y, both.numel() // (2 * width), width)
    return y


def swiglu_slope(both: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `swiglu`."""
    out, width = torch.empty_like(both), both.shape[-1] // 2
    _call("swiglu_backward", both, grad, out, both.numel() // (2 * width), width)
    return out


def rotate(x_TNE: Tensor, cos: Tensor, sin: Tensor, heads: int, *, back: bool = False) -> Tensor:
    """Turn the first heads by the angles [T, 1, E/2], or back, and copy the others."""
    out = torch.empty_like(x_TNE)
    _call("rotate", x_TNE, cos, sin, out, *x_TNE.shape[:2], heads, x_TNE.shape[2], int(back))
    return out


def target_logp(
    logits_MV: Tensor, targets_M: Tensor, exact_M: Tensor, temperature: float, *, entropy: bool, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (logp_M, entropy_M or None) in fp32; the targets' own logits are `exact_M`.

    Overwrites the logits: with `slope` by softmax(logits / temperature) − onehot(target).
    """
    logp_M = torch.empty_like(exact_M)
    entropy_M = torch.empty_like(exact_M) if entropy else None
    sizes = (*logits_MV.shape, ctypes.c_float(temperature), int(slope))
    _call("target_logp", logits_MV, targets_M, exact_M, logp_M, entropy_M, *sizes)
    return logp_M, entropy_M


def pick_tokens(logits_BV: Tensor, uniform_B: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's token at `uniform` of its cumulative softmax(logits / temperature), or the first highest one.

    Beside it that token's logit / temperature and the logarithm of the normaliser, in fp32.
    """
    tokens_B = torch.empty(len(logits_BV), dtype=torch.long)
    chosen_B, lse_B = torch.empty(2, len(logits_BV)).unbind()
    _call("pick_tokens", logits_BV, uniform_B, tokens_B, chosen_B, lse_B, *logits_BV.shape, ctypes.c_float(temperature))
    return tokens_B, chosen_B, lse_B


class _Layout(ctypes.Structure):
    """`layout` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tasks", "stretches", "items", "bounds")),
        *((name, ctypes.c_long) for name in ("parts", "nodes", "tokens", "heads", "kv_heads", "size")),
        ("threads", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Schedule:
    """Which thread attends where, in int64.

    `tasks` [n, 5] are a segment's first node, its first token in the task and one past the last, and the place and
    number of its `stretches` [s, 2], the nodes (from, to) above it. `items` (task · K + key head) of part p are those
    from `bounds[p]` to `bounds[p + 1]`.
    """

    tasks: Tensor
    stretches: Tensor
    items: Tensor
    bounds: Tensor
    nodes: int

    def layout(self, tokens: int, heads: int, kv_heads: int, size: int) -> _Layout:
        """As the kernels read it."""
        places = (x.data_ptr() for x in (self.tasks, self.stretches, self.items, self.bounds))
        parts = len(self.bounds) - 1
        return _Layout(*places, parts, self.nodes, tokens, heads, kv_heads, size, torch.get_num_threads())


def attention(qkv_TNE: Tensor, kv_heads: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return what the heads attend to [T, H, E], and the logarithms of their normalisers [T, H] in fp32."""
    tokens, heads, size = len(qkv_TNE), qkv_TNE.shape[1] - 2 * kv_heads, qkv_TNE.shape[2]
    out, lse = qkv_TNE.new_empty(tokens, heads, size), qkv_TNE.new_empty(tokens, heads, dtype=torch.float32)
    layout = schedule.layout(tokens, heads, kv_heads, size)
    _run("attention_forward", ctypes.byref(layout), qkv_TNE, out, lse)
    return out, lse


def attention_slope(
    qkv_TNE: Tensor, out: Tensor, lse: Tensor, grad: Tensor, kv_heads: int, schedule: Schedule
) -> Tensor:
    """The gradient of `attention` in its queries, keys and values."""
    into, (tokens, heads, size) = torch.empty_like(qkv_TNE), out.shape
    layout = schedule.layout(tokens, heads, kv_heads, size)
    parts = out.new_empty(layout.parts, schedule.nodes, 2 * kv_heads, size, dtype=torch.float32)
    _run("attention_backward", ctypes.byref(layout), qkv_TNE, out, lse, grad, into, parts)
    return into


Level = tuple[Tensor, Tensor, Tensor | None]
"""A level of `decode_attention`: keys [slots, K, E, S], values [slots, K, S, E], and which places of a slot are seen
[slots, S] in bool; None where all are."""


class _Level(ctypes.Structure):
    """`level` of decode.c."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("keys", "values", "seen")), ("places", ctypes.c_int64))


class _Tree(ctypes.Structure):
    """`tree` of decode.c."""

    _fields_ = (
        ("levels", _Level * 3),
        ("group_of", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "size", "column")),
    )


def decode_attention(
    qkv_BNE: Tensor,
    kv_heads: int,
    column: int,
    own: Level,
    group: Level | None,
    group_of_B: Tensor,
    common: Level | None,
) -> Tensor:
    """Store each row's new key and value at its own place `column`, and return what the heads attend to [B, H, E].

    Row b has slot b of its `own` level, slot `group_of_B[b]`, in int64, of its group's, and slot 0 of what all rows
    have in `common`. E is a multiple of `WIDE`.
    """
    rows, across, size = qkv_BNE.shape
    out = qkv_BNE.new_empty(rows, across - 2 * kv_heads, size)
    levels = [_level(*each) if each is not None else _Level() for each in (own, group, common)]
    places = (group_of_B.data_ptr(), rows, across - 2 * kv_heads, kv_heads, size, column)
    _run("decode_attention", ctypes.byref(_Tree((_Level * 3)(*levels), *places)), qkv_BNE, out, torch.get_num_threads())
    return out


def _level(keys: Tensor, values: Tensor, seen: Tensor | None) -> _Level:
    return _Level(keys.data_ptr(), values.data_ptr(), None if seen is None else seen.data_ptr(), keys.shape[-1])


def _call(name: str, *arguments: object) -> None:
    """Call a kernel that takes the number of threads last."""
    _run(name, *arguments, torch.get_num_threads())


def _run(name: str, *arguments: object) -> None:
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(*map(_passed, arguments))


def _passed(argument: object) -> object:
    """An argument as C takes it."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_long(argument) if isinstance(argument, int) else argument
