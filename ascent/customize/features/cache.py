"""Features on disk, found again by what they were computed from."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ascent.customize.features.extract import BadItem, Extractor, Features, Item
from ascent.records.errors import NoSpace

_DIGEST = 32
_CHUNK = 64


class Cached:
    """An extractor that remembers. It has the name, dimensions and identity of the one inside.

    One file per item, `<identity>/<first two digits>/<sha256 of the item's bytes>`: a sha256 over key and values,
    then D little-endian float32. A file that fails its checksum is computed again. Two processes may share a
    folder: files appear whole, and both write the same. New items are stored every 64, so a run that breaks off
    loses little. To forget everything, delete the folder.

    Attributes:
        hits: items answered from disk so far.
        computed: items given to the extractor so far.
    """

    def __init__(self, extractor: Extractor, folder: Path) -> None:
        self.extractor, self.folder = extractor, folder / extractor.identity[:16]
        self.name, self.dimensions, self.identity = extractor.name, extractor.dimensions, extractor.identity
        self.hits = self.computed = 0

    def extract(self, items: Sequence[Item]) -> Features:
        """Return features [N, D]; equal items are computed once. Raises `BadItem` as the extractor does."""
        keys = [content_key(item, index) for index, item in enumerate(items)]
        found: dict[str, Features] = {}
        missing: dict[str, int] = {}  # key -> the first item that has it
        for index, key in enumerate(keys):
            if key in found or key in missing:
                continue
            if (stored := self._read(key)) is not None:
                found[key] = stored
            else:
                missing[key] = index
        self.hits += len(items) - len(missing)
        wanted = list(missing.items())
        for begin in range(0, len(wanted), _CHUNK):
            part = wanted[begin : begin + _CHUNK]
            try:
                values = self.extractor.extract([items[index] for _, index in part])
            except BadItem as error:
                place = part[error.index][1]
                raise BadItem(place, error.reason, items[place]) from error
            self.computed += len(part)
            for (key, _), row in zip(part, values, strict=True):
                found[key] = row
                if np.isfinite(row).all():
                    self._write(key, row)
        return np.stack([found[key] for key in keys]) if keys else np.zeros((0, self.dimensions), np.float32)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _read(self, key: str) -> Features | None:
        try:
            raw = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        values = raw[_DIGEST:]
        if len(values) != 4 * self.dimensions or raw[:_DIGEST] != self._checksum(key, values):
            return None
        return np.frombuffer(values, "<f4").astype(np.float32)

    def _write(self, key: str, row: Features) -> None:
        values = row.astype("<f4").tobytes()
        path = self._path(key)
        scratch = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(self._checksum(key, values) + values)
            os.replace(scratch, path)  # not fsynced: what a power cut tears fails its checksum and is computed again
        except OSError as error:
            scratch.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"no space left for the feature cache {self.folder}; free some and run again") from error
            raise

    def _checksum(self, key: str, values: bytes) -> bytes:
        return hashlib.sha256(f"{self.identity}:{key}:".encode() + values).digest()


def content_key(item: Item, index: int = 0) -> str:
    """Return the sha256 of an item's bytes: an image file and its bytes have the same key, a text another.

    Raises:
        BadItem: the file cannot be read; `index` says which item it is.
    """
    if isinstance(item, str):
        return hashlib.sha256(b"text:" + item.encode("utf-8", "surrogatepass")).hexdigest()
    try:
        raw = item if isinstance(item, bytes) else item.read_bytes()
    except OSError as error:
        raise BadItem(
            index, f"the file cannot be read ({error.strerror}); restore it or remove the row", item
        ) from error
    return hashlib.sha256(b"image:" + raw).hexdigest()
