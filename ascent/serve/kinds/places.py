"""Where callers' files lie: `s3://`, `file://` and every other fsspec address, copied in before use and out at the end.

A caller's address is data of a stranger: chained and wrapped filesystems are refused, `file://` never reaches the
server's own folders, and where roots are set, nothing outside them is reached. `s3://` goes through obstore, because
s3fs needs an older botocore than the wire; what stores take from the environment they find there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ascent.records.errors import AscentError, BadInput, MissingExtra, NoSpace, Unavailable
from ascent.records.files import write_atomic

WRAPPERS = frozenset(
    {
        *("asynclocal", "async_wrapper", "asyncwrapper", "blockcache", "cached", "dask", "data", "dir", "filecache"),
        *("generic", "git", "jlab", "jupyter", "libarchive", "local", "memory", "pyscript", "reference", "simplecache"),
        *("tar", "zip"),
    }
)
"""Protocols that lead to other filesystems, to this process or to this machine's files by another name."""
CHUNK = 1 << 20
LIMIT_MB = 4096


@dataclass(frozen=True)
class Rules:
    """What a caller may address.

    Attributes:
        roots: folders, and addresses such as `s3://bucket/folder`, below which all must lie; None allows any.
        closed: folders that `file://` never reaches, such as the server's own.
        limit_mb: the most that one address may hold.
    """

    roots: Sequence[str] | None = None
    closed: Sequence[str] = ()
    limit_mb: int = LIMIT_MB


@dataclass(frozen=True)
class Fetched:
    """A caller's file in the job's folder."""

    uri: str
    path: Path
    sha256: str
    size: int = field(compare=False)


def check_place(uri: str, rules: Rules) -> str:
    """Return the protocol of an address that may be used, without reaching for it.

    Raises:
        BadInput: it is no address, of a kind that is not supported, or of a folder that is closed.
        MissingExtra: fsspec is not installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtra("serve", "reading and writing data") from error
    protocol, mark, path = uri.partition("://")
    if not mark or not path.strip("/") or "::" in uri:
        raise BadInput(
            f"{uri!r} is no address of data; write s3://BUCKET/KEY, file:///FOLDER/FILE or another fsspec URL"
        )
    if protocol in WRAPPERS or protocol not in fsspec.available_protocols():
        raise BadInput(f"{uri!r}: {protocol}:// is not supported here; use s3://, file:// or another store of fsspec")
    if protocol == "s3" and not _s3_is_here():
        raise BadInput(f"{uri!r}: this server cannot read S3; install it there: pip install 'ascent-posttrain[s3]'")
    place = os.path.realpath("/" + path.lstrip("/")) if protocol == "file" else uri
    if protocol == "file" and any(_within(place, root) for root in rules.closed):
        raise BadInput(f"{uri!r} lies in the server's own folder, which no caller reaches; put the data elsewhere")
    if ".." in path.split("/") and protocol != "file":
        raise BadInput(f"{uri!r} has a '..'; write the address that it leads to")
    if rules.roots is not None and not any(_below(place, root) for root in rules.roots):
        raise BadInput(
            f"{uri!r} is not where this server takes data from and puts results; that is "
            f"{', '.join(rules.roots) or 'nowhere'}, by `data` of its configuration: put the data there, or let the "
            "server's operator add a place"
        )
    return protocol


def fetch(uri: str, folder: Path, rules: Rules, *, name: str = "") -> Fetched:
    """Copy one file into `folder`, once: a second call returns what the first one copied, whatever lies there by then.

    Args:
        uri: its address.
        folder: where it goes, beside a note of address and sha256.
        rules: what may be addressed.
        name: what to call the copy, without suffix; by default, as the file. One without suffix counts as JSON Lines.

    Raises:
        BadInput: nothing lies there, it is a folder, it is too large, or it may not be addressed.
        Unavailable: the store cannot be reached.
    """
    files, fs, _ = _files(uri, rules)
    if len(files) != 1 or files[0][1] != "":
        raise BadInput(f"{uri!r} is a folder; give the address of one file in it")
    stem, suffix = posixpath.splitext(posixpath.basename(files[0][0]))
    return _copy(fs, files[0][0], uri, folder / f"{name or stem}{suffix or '.jsonl'}")


def fetch_all(uri: str, folder: Path, rules: Rules, *, suffixes: Sequence[str] = ()) -> list[Fetched]:
    """Copy a file, or all files below a folder that have one of `suffixes`, into `folder`. Otherwise as `fetch`."""
    files, fs, protocol = _files(uri, rules, tuple(suffixes))
    if not files:
        raise BadInput(f"{uri!r} holds no file that ends in {', '.join(suffixes)}")
    found = []
    for path, relative in files:
        address = f"{uri.rstrip('/')}/{relative}" if relative else uri
        if protocol == "file":
            check_place(address, rules)  # a link may lead out
        found.append(_copy(fs, path, address, folder / (relative or posixpath.basename(path))))
    return found


def put(uri: str, files: dict[str, Path], rules: Rules) -> None:
    """Write files below the folder at `uri`, by their relative names; what is there under the same name is replaced.

    Raises:
        BadInput: the folder may not be addressed.
        Unavailable: the store cannot be reached or refuses.
    """
    import fsspec

    protocol = check_place(uri, rules)
    with _reaching(uri):
        fs, root = fsspec.core.url_to_fs(uri)
        for name, file in files.items():
            target = posixpath.join(root, name)
            if protocol == "file":
                write_atomic(Path(target), file.read_bytes())
                continue
            fs.makedirs(posixpath.dirname(target), exist_ok=True)
            fs.put_file(str(file), target)


def _files(uri: str, rules: Rules, suffixes: tuple[str, ...] = ()) -> tuple[list[tuple[str, str]], Any, str]:
    """Return ((path, path relative to `uri`; empty for `uri` itself), …), the filesystem and its protocol."""
    import fsspec

    protocol = check_place(uri, rules)
    with _reaching(uri):
        fs, root = fsspec.core.url_to_fs(uri)
        if fs.isfile(root):
            found = {root: fs.info(root)}
        else:
            found = {str(path): info for path, info in fs.find(root, detail=True).items()}
            if not found:
                raise FileNotFoundError(uri)
    below = root.rstrip("/") + "/"
    chosen = [
        (path, "" if path == root else path.removeprefix(below))
        for path in sorted(found)
        if path == root or (path.startswith(below) and path.endswith(suffixes or ("",)))
    ]
    size = sum(int(found[path].get("size") or 0) for path, _ in chosen)
    if size > rules.limit_mb << 20:
        raise BadInput(f"{uri!r} holds {size >> 20:,} MiB and {rules.limit_mb:,} MiB are allowed; split the data")
    if any(".." in relative.split("/") for _, relative in chosen):
        raise BadInput(f"{uri!r} holds a name with '..', which leads out of the folder; rename it")
    return chosen, fs, protocol


def _copy(fs: Any, path: str, uri: str, target: Path) -> Fetched:
    note = target.with_name(f".{target.name}.source.json")
    if note.is_file() and target.is_file():
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["uri"] == uri:
            return Fetched(uri, target, known["sha256"], target.stat().st_size)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    digest = hashlib.sha256()
    with _reaching(uri), fs.open(path, "rb") as source, partial.open("wb") as file:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
    os.replace(partial, target)
    write_atomic(note, json.dumps({"uri": uri, "sha256": digest.hexdigest()}))
    return Fetched(uri, target, digest.hexdigest(), target.stat().st_size)


@contextlib.contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """Word what an fsspec store raises; each has an error tree of its own."""
    try:
        yield
    except (AscentError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise BadInput(f"nothing lies at {uri!r}; check the address") from error
    except PermissionError as error:
        raise BadInput(
            f"{uri!r} may not be reached ({_first_line(error)}); check its permissions and the server's own"
        ) from error
    except ImportError as error:
        raise BadInput(f"{uri!r}: the server lacks the driver ({error}); install it where the server runs") from error
    except OSError as error:
        if error.errno == 28:
            raise NoSpace(f"no space left while copying {uri!r}; free some and submit again") from error
        raise Unavailable(f"{uri!r} cannot be reached ({_first_line(error)}); it is tried again") from error
    except Exception as error:
        told = f"{type(error).__name__}: {_first_line(error)}"
        raise Unavailable(f"{uri!r} cannot be reached ({told}); it is tried again") from error


def _first_line(error: Exception) -> str:
    """Stores add pages of what they were doing."""
    return str(error).partition("\n")[0][:500]


def _below(place: str, root: str) -> bool:
    """Whether a real path lies below a folder, or an address below an address."""
    if "://" not in place:
        return "://" not in root.removeprefix("file://") and _within(place, root.removeprefix("file://"))
    return place == root or place.startswith(root.rstrip("/") + "/")


def _within(path: str, root: str) -> bool:
    top = os.path.realpath(root)
    return path == top or path.startswith(top.rstrip("/") + "/")


@cache
def _s3_is_here() -> bool:
    """Let fsspec open `s3://` through obstore; False where that is not installed."""
    try:
        from obstore.fsspec import register
    except ImportError:
        return False
    register("s3")
    return True
