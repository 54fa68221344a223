"""Files that are whole or absent: atomic writes, and JSONL that survives a torn last line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ascent.records.errors import BadInput, Corrupt, NoSpace

# Temporary files are private by default; what replaces a user's file has the permissions that the user's own would.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` with `data` so that a reader sees the old bytes or the new ones, never a mixture.

    Writes a temporary file beside the target, fsyncs it, renames it, and fsyncs the folder.

    Raises:
        NoSpace: the disk is full; the target is unchanged and the temporary file is gone.
    """
    raw = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_UMASK)
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise _as_no_space(error, path) from error
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `path` when the block ends well, and vanishes when it does not.

    An existing `path` is replaced by two renames; a crash between them leaves `path` under a `.old` name that
    `recover_folder` restores.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        scratch.chmod(0o777 & ~_UMASK)
        yield scratch
        for file in sorted(scratch.rglob("*")):
            if file.is_file():
                _sync_file(file)
        old = _old_name(path)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # what a crash left behind after an earlier replacement
            os.replace(path, old)
        os.replace(scratch, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise _as_no_space(error, path) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def recover_folder(path: Path) -> None:
    """Finish or undo a `folder_atomic` that a crash cut off: between its two renames, or before them.

    No other process may be writing `path` at that time.
    """
    scratch = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")
    for left in path.parent.glob(".*.tmp"):
        if scratch.fullmatch(left.name) and left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    old = _old_name(path)
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, path)


def append_jsonl(path: Path, rows: Iterable[dict[str, Any] | str], *, sync: bool = True) -> None:
    """Append rows (dicts, or JSON text without newlines) as one write, fsynced unless `sync` is False.

    A torn last line left by a crash is cut off first, so a new row never joins the debris of an old one. Rows that
    were not fsynced survive a killed process, but not a power cut.
    """
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _cut_torn_tail(file)
        start = file.tell()
        try:
            file.write(("\n".join(lines) + "\n").encode())
            file.flush()
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise _as_no_space(error, path) from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a log that `append_jsonl` wrote. A last line without its newline is skipped.

    Raises:
        Corrupt: a complete line is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                yield json.loads(raw)
            except ValueError as error:
                raise Corrupt(
                    f"{path}:{number}: not JSON ({error}); the log was edited or the disk is failing"
                ) from error


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make a rename inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _old_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _cut_torn_tail(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    step, end = 1 << 16, size
    while end > 0:
        begin = max(0, end - step)
        file.seek(begin)
        cut = file.read(end - begin).rfind(b"\n")
        if cut >= 0:
            file.truncate(begin + cut + 1)
            break
        end = begin
    else:
        file.truncate(0)
    file.seek(0, os.SEEK_END)


def _as_no_space(error: OSError, path: Path) -> OSError | NoSpace:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left while writing {path}; nothing was changed. Free some space and run again")
    return error


def claim_folder(mark: Path, text: str, *, resume: bool, what: str, allowed: str = "") -> None:
    """Take `mark`'s folder for a run or search by writing `text`, which says what it is, into `mark`.

    A folder that has the mark is gone on with only when asked to, and only if it was begun with the same text.

    Raises:
        BadInput: the folder holds another one, or files of something else.
    """
    folder = mark.parent
    if mark.is_file():
        if not resume:
            raise BadInput(f"{folder} holds a {what} already; continue it with --resume, or give another --out")
        if mark.read_text(encoding="utf-8") != text:
            raise BadInput(
                f"{folder} holds a {what} of another {mark.stem} (its {mark.name} differs), and a {what} that changes "
                f"half-way cannot be repeated; undo the change{allowed}, or give another folder with --out"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty and holds no {what}; give an empty or new folder with --out")
    write_atomic(mark, text)
