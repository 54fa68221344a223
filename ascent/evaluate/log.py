"""Reports on disk: written once, named after their own checksum, verified on every read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ascent.records import Report
from ascent.records.errors import BadInput, Corrupt
from ascent.records.files import write_atomic

_NAME = re.compile(r".*-([0-9a-f]{16})\.json")


def write_report(report: Report, folder: Path) -> Path:
    """Write `<stage>-<first 16 digits of the sha256>.json` and return its path. The file is made read-only.

    Writing the same report again changes nothing.

    Raises:
        Corrupt: a file of that name exists with other bytes.
    """
    raw = (report.to_json(indent=1) + "\n").encode()
    stage = re.sub(r"[^A-Za-z0-9._-]+", "-", report.stage).strip(".-") or "report"
    path = folder / f"{stage}-{_checksum(raw)}.json"
    if path.exists():
        _verify(path, path.read_bytes())
        return path
    write_atomic(path, raw)
    path.chmod(0o444)
    return path


def read_report(path: Path) -> Report:
    """Read a report that `write_report` wrote.

    Raises:
        BadInput: there is no such file, or its name holds no checksum.
        Corrupt: the file's bytes do not match the checksum in its name, or are not a report.
    """
    if not path.is_file():
        raise BadInput(f"there is no report {path}")
    raw = path.read_bytes()
    _verify(path, raw)
    try:
        return Report.from_json(raw)
    except Corrupt as error:
        raise Corrupt(f"{path}: {error}") from error


def _verify(path: Path, raw: bytes) -> None:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise BadInput(f"{path.name} is not a report's file name (stage-checksum.json); reports keep the name they got")
    found = _checksum(raw)
    if found != match[1]:
        raise Corrupt(
            f"{path}: the content has checksum {found}, its name says {match[1]}: the file was edited, "
            "cut off or renamed. Reports are immutable; restore it or measure again"
        )


def _checksum(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
