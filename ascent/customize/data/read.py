"""Bytes on disk to raw rows with line numbers: JSON Lines, CSV, TSV and Parquet.

JSON Lines is parsed here, line by line, because no library keeps the line, column and byte of every mistake.
CSV and Parquet values come from `datasets`, which is imported only when such a file is met (it takes about a
second); a strict pass before it finds the line on which each CSV record starts.

A table has columns instead of nested objects. A column named `input.sig` becomes `row["input"]["sig"]`,
likewise `expected.dose`; a text cell in a column `input`, `expected` or `messages` is read as JSON. Cells of
a CSV file are text. An empty cell is absent; a cell below `expected.` is read as a JSON scalar where it is
one (`2`, `true`, `null`), so that labels keep their type, and stays text otherwise.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascent.customize.data.problems import Problems
from ascent.records import DataSource
from ascent.records.errors import BadData

FIELDS = frozenset(
    {
        "id",
        "group",
        "input",
        "messages",
        "expected",
        "target",
        "chosen",
        "rejected",
        "chosen_score",
        "rejected_score",
        "answer",
        "good",
        "text",
    }
)
NESTED = ("input", "expected")
AS_JSON = (*NESTED, "messages")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = ".jsonl, .ndjson, .csv, .tsv or .parquet"
_BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class RawRow:
    """A row as the file has it, with the 1-based line it starts on (for Parquet: its 1-based row number)."""

    line: int
    values: dict[str, Any]


def describe(path: Path, name: str | None = None) -> DataSource:
    """Return what a data file is: its name, its number of rows and the sha256 of its bytes.

    Rows are counted without being checked; a file that does not load is described all the same.

    Raises:
        BadData: the file is missing, empty, unreadable or of an unknown kind.
    """
    data = _read_bytes(path)
    kind = path.suffix.lower()
    if kind in _DELIMITERS:
        text = data.removeprefix(_BOM).decode(errors="replace")
        records = csv.reader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[kind])
        rows = max(0, sum(1 for record in records if record) - 1)
    elif kind == ".parquet":
        rows = _parquet_count(path, data)
    else:
        rows = sum(1 for line in data.removeprefix(_BOM).split(b"\n") if line.strip())
    return DataSource(name=name or path.stem, path=str(path), rows=rows, sha256=hashlib.sha256(data).hexdigest())


def read_rows(path: Path, problems: Problems) -> tuple[list[RawRow], str]:
    """Return a file's good rows and the sha256 of its bytes; note the bad rows in `problems`.

    Raises:
        BadData: nothing can be read at all (missing, empty, of an unknown kind, not a table).
    """
    data = _read_bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        rows = list(_jsonl(data, problems))
    elif kind in _DELIMITERS:
        rows = _csv(path, data, _DELIMITERS[kind], problems)
    else:
        rows = _parquet(path, problems) if _parquet_count(path, data) else []
    if not rows and not problems.found:
        raise BadData("no rows, only blank lines or a header; write at least one row", file=path)
    return rows, sha256


def _read_bytes(path: Path) -> bytes:
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".parquet", *_DELIMITERS):
        hint = "; write one JSON object per line and call the file .jsonl" if kind == ".json" else ""
        raise BadData(f"unknown kind of data file {kind or 'without a suffix'!r}; use {_SUFFIXES}{hint}", file=path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadData("no such file; check the path in the use case or recipe", file=path) from None
    except IsADirectoryError:
        raise BadData("this is a folder; name the data file inside it", file=path) from None
    except OSError as error:
        raise BadData(f"cannot be read ({error.strerror}); check its permissions and the disk", file=path) from error
    if not data.removeprefix(_BOM).strip():
        raise BadData("the file is empty; write at least one row", file=path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadData("not UTF-8 but UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 IN > OUT", file=path, line=1)
    return data


def _jsonl(data: bytes, problems: Problems) -> Iterator[RawRow]:
    offset = len(_BOM) if data.startswith(_BOM) else 0
    for number, raw in enumerate(data[offset:].split(b"\n"), 1):
        text = _decode(raw, offset, number, problems)
        offset += len(raw) + 1
        if text is None or not text.strip():
            continue
        values = _parse(text, number, problems)
        if isinstance(values, dict):
            yield RawRow(number, values)
        elif values is not _FAILED:
            problems.add(
                number,
                None,
                f"a JSON {kind_of(values)}, not an object; every line must be one object {{...}}",
            )


def _decode(raw: bytes, offset: int, line: int, problems: Problems) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        problems.add(line, None, _not_utf8(raw[error.start], offset + error.start))
        return None


def _not_utf8(byte: int, offset: int) -> str:
    return (
        f"not UTF-8: byte 0x{byte:02x} at byte offset {offset} of the file; convert it first, "
        "for example with: iconv -f WINDOWS-1252 -t UTF-8 IN > OUT"
    )


_FAILED = object()


def _parse(text: str, line: int, problems: Problems) -> Any:
    """Parse strict JSON, or note the problem and return `_FAILED`."""
    try:
        value = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        problems.add(
            line,
            None,
            f"malformed JSON at column {error.colno}: {error.msg}; every line must be one whole JSON object",
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        problems.add(line, None, f"unusable JSON: {reason}")
    else:
        if "\\u" in text and _has_surrogate(value):
            problems.add(
                line,
                None,
                "half of a surrogate pair (\\ud800 to \\udfff) in a text; write the whole character",
            )
            return _FAILED
        return value
    return _FAILED


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice in one object; keep one of them")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null or a number")


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return any(_has_surrogate(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(_has_surrogate(part) for part in value)


def kind_of(value: Any) -> str:
    """Name a value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {dict: "object", list: "array", str: "string", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _csv(path: Path, data: bytes, delimiter: str, problems: Problems) -> list[RawRow]:
    text = _decode_table(data, path)
    header, lines = _csv_lines(text, delimiter, path, problems)
    if problems.found or not lines:
        return []
    with _datasets() as (datasets, cache):
        try:
            table = datasets.Dataset.from_csv(
                str(path),
                cache_dir=cache,
                keep_in_memory=True,
                features=datasets.Features({name: datasets.Value("string") for name in header}),
                delimiter=delimiter,
                encoding="utf-8-sig",
                na_filter=False,
            ).to_list()
        except Exception as error:  # boundary: pandas, pyarrow and datasets each have their own error tree
            raise BadData(f"cannot be read as a table ({error}); save it again as plain CSV", file=path) from error
    if len(table) != len(lines):
        raise BadData(
            f"{len(lines)} records by one CSV reader and {len(table)} by another; a stray quote or a line "
            "of blanks makes the file ambiguous. Save it again with every text in quotes, or use JSON Lines",
            file=path,
        )
    rows = []
    for line, cells in zip(lines, table, strict=True):
        values = {name: cell for name, cell in cells.items() if cell is not None and cell != ""}
        row = _nest(values, line, problems, text_cells=True)
        rows += [RawRow(line, row)] if row is not None else []
    return rows


def _decode_table(data: bytes, path: Path) -> str:
    try:
        return data.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        skipped = len(_BOM) if data.startswith(_BOM) else 0
        line = data.count(b"\n", 0, error.start + skipped) + 1
        message = _not_utf8(data[error.start + skipped], error.start + skipped)
        raise BadData(message, file=path, line=line) from error


def _csv_lines(text: str, delimiter: str, path: Path, problems: Problems) -> tuple[list[str], list[int]]:
    """Check the shape of a CSV file; return its header and the line on which each record starts."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    lines: list[int] = []
    start = 1
    try:
        for record in reader:
            if record and not header:
                header = record
                _check_header(header, delimiter, start, path)
            elif record and len(record) != len(header):
                problems.add(
                    start,
                    None,
                    f"{len(record)} cells, but the header has {len(header)} columns; put cells that hold "
                    f"{delimiter!r}, quotes or line breaks in double quotes",
                )
            elif record:
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        problems.add(start, None, f"malformed CSV in the record that starts here: {error}; check its quotes")
    return header, lines


def _check_header(header: list[str], delimiter: str, line: int, path: Path) -> None:
    if len(header) == 1 and delimiter == "," and ";" in header[0]:
        raise BadData("the columns are separated by ';'; save the file with commas", file=path, line=line)
    for name in header:
        if not name.strip():
            raise BadData("a column without a name; name it or delete it", file=path, line=line)
        if header.count(name) > 1:
            raise BadData("this column occurs twice; keep one", file=path, line=line, field=name)
        if name in NESTED and any(other.startswith(f"{name}.") for other in header):
            raise BadData(
                f"there are both a column {name!r} and columns {name + '.*'!r}; use one of the two forms",
                file=path,
                line=line,
                field=name,
            )


def _parquet(path: Path, problems: Problems) -> list[RawRow]:
    with _datasets() as (datasets, cache):
        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()
        except Exception as error:  # boundary: pyarrow and datasets each have their own error tree
            raise _bad_parquet(path, error) from error
    if table:
        _check_header(list(table[0]), "", 1, path)
    rows = []
    for number, cells in enumerate(table, 1):
        values = {name: cell for name, cell in cells.items() if cell is not None}
        odd = {n: cell for n, cell in values.items() if n.split(".")[0] in FIELDS and not _is_json(cell)}
        for name, cell in odd.items():
            what = f"{cell!r} is" if isinstance(cell, float) else f"a {kind_of(cell)} that is or holds a value"
            message = f"{what} not representable in JSON; store text, finite numbers, booleans, lists or structs"
            problems.add(number, name, message)
        row = _nest(values, number, problems, text_cells=False) if not odd else None
        rows += [RawRow(number, row)] if row is not None else []
    return rows


def _parquet_count(path: Path, data: bytes) -> int:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        return int(pq.read_metadata(io.BytesIO(data)).num_rows)
    except (ValueError, OSError) as error:
        raise _bad_parquet(path, error) from error


def _bad_parquet(path: Path, error: Exception) -> BadData:
    return BadData(f"not a readable Parquet file ({error}); write it again or use JSON Lines", file=path)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(part) for key, part in value.items())
    if isinstance(value, list):
        return all(_is_json(part) for part in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int | bool)


def _nest(cells: dict[str, Any], line: int, problems: Problems, *, text_cells: bool) -> dict[str, Any] | None:
    """Turn flat columns into the row that JSON Lines would have; None if a cell that must be JSON is not."""
    row: dict[str, Any] = {}
    for name, cell in cells.items():
        outer, dot, inner = name.partition(".")
        if dot and outer in NESTED:
            typed = _scalar(cell) if text_cells and outer == "expected" else cell
            row.setdefault(outer, {})[inner] = typed
        elif name in AS_JSON and isinstance(cell, str):
            row[name] = _json_cell(name, cell, line, problems)
        else:
            row[name] = cell
    return None if any(value is _FAILED for value in row.values()) else row


def _json_cell(name: str, cell: str, line: int, problems: Problems) -> Any:
    inner = Problems(problems.file)
    value = _parse(cell, line, inner)
    for problem in inner.found:
        remedy = f"write JSON in this column, or use columns {name}.NAME" if name in NESTED else "write JSON here"
        problems.add(line, name, f"{problem.message.partition(';')[0]} (inside the cell); {remedy}")
    return value


def _scalar(cell: str) -> Any:
    try:
        value = json.loads(cell, parse_constant=_no_constant)
    except ValueError:
        return cell
    return cell if isinstance(value, str) else value


@contextmanager
def _datasets() -> Iterator[tuple[Any, str]]:
    """Yield `datasets` and a throw-away cache folder: no network, no telemetry, nothing left behind."""
    quiet = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    import datasets

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="ascent-data-") as cache:
            yield datasets, cache
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
