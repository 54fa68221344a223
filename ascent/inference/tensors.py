"""Tensor files in the safetensors format, failing with the operating system's errors and the house's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ascent.records.errors import Corrupt


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file of tensors.

    Raises:
        OSError: the file could not be written; a full disk has its own errno, which `folder_atomic` makes `NoSpace`.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:  # the library keeps the errno only in its text
        cause = re.search(r"os error (\d+)", str(error))
        if cause is None:
            raise
        raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors.

    Raises:
        Corrupt: the file is missing, cut short or not in the format.
    """
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise Corrupt(f"{path}: not a whole safetensors file ({error}); pull, import or train it again") from error
    return found
