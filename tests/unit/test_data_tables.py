"""CSV, TSV and Parquet: the same rows as JSON Lines would give, and errors on the right line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ascent.customize.data import describe, load_demonstrations, load_tasks
from ascent.records.errors import BadData

GOOD = '{"id": "g", "input": {"sig": "x"}}'


def jsonl(folder: Path, *lines: str | bytes | dict[str, Any], name: str = "d.jsonl") -> Path:
    path = folder / name
    raw = [
        line if isinstance(line, bytes) else (json.dumps(line) if isinstance(line, dict) else line).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def fails(load: Any, path: Path, **settings: Any) -> BadData:
    with pytest.raises(BadData) as caught:
        load(path, **settings)
    assert str(caught.value).startswith(str(path))
    return caught.value


def test_csv_rows_equal_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    header = [
        "id",
        "group",
        "input.sig",
        "input.drug",
        "expected.dose",
        "expected.prn",
        "expected.route",
        "expected.note",
        "comment",
    ]
    cells = [
        ["007", "g1", 'take 1,\n"now"', "NA", "2", "true", "oral", "", "x"],
        ["008", "", "tägl. 1", "", "0.5", "null", "007", "nan", ""],
    ]
    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows([header, *cells])
        loaded = load_tasks(path)
        same = load_tasks(
            jsonl(
                tmp_path,
                {
                    "id": "007",
                    "group": "g1",
                    "input": {"sig": 'take 1,\n"now"', "drug": "NA"},
                    "expected": {"dose": 2, "prn": True, "route": "oral"},
                },
                {
                    "id": "008",
                    "input": {"sig": "tägl. 1"},
                    "expected": {"dose": 0.5, "prn": None, "route": "007", "note": "nan"},
                },
            )
        )
        assert loaded.rows == same.rows
        assert loaded.lines == {"007": 2, "008": 4}
        assert loaded.source == describe(path)


def test_csv_errors_have_the_line_on_which_the_record_starts(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"

    def error(text: str | bytes) -> BadData:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return fails(load_tasks, path)

    ragged = error('id,input.sig\na,"two\nlines"\n\nb,x,y\nc\n')
    assert ragged.line == 5 and "3 cells, but the header has 2" in str(ragged) and "line 6: 1 cells" in str(ragged)
    unclosed = error('id,input.sig\na,x\nb,"open\nc,y\n')
    assert unclosed.line == 3 and "malformed CSV" in str(unclosed)
    assert error(b"id,input.sig\na,x\nb,caf\xe9\n").line == 3
    assert "separated by ';'" in str(error("id;input.sig\na;x\n"))
    twin = error("id,input.a,id\na,x,b\n")
    assert twin.field == "id" and "occurs twice" in str(twin)
    assert "both a column 'input' and" in str(error("id,input,input.a\na,{},x\n"))
    cell = error('id,input\na,"{""x"": 1}"\nb,{x}\n')
    assert (cell.line, cell.field) == (3, "input") and "inside the cell" in str(cell)
    assert "problems in all" not in str(cell)
    assert "no rows" in str(error("id,input.sig\n"))
    blank = error("id,input.sig\na,x\nb,\n")
    assert (blank.line, blank.field) == (3, "input")


def test_parquet_rows_equal_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    path = tmp_path / "d.parquet"
    columns = {
        "id": ["a", "b"],
        "input": [{"sig": "x", "n": 1}, {"sig": "y", "n": 2}],
        "expected": ['{"dose": 1.5}', None],
        "seen": [1.0, float("nan")],
    }
    pq.write_table(pa.table(columns), path)
    same = jsonl(
        tmp_path,
        {"id": "a", "input": {"sig": "x", "n": 1}, "expected": {"dose": 1.5}},
        {"id": "b", "input": {"sig": "y", "n": 2}},
    )
    assert load_tasks(path).rows == load_tasks(same).rows
    assert load_tasks(path).source == describe(path)
    pq.write_table(pa.table({"id": [1], "messages": [turns], "target": ["hello"]}), path)
    assert [m.content for m in load_demonstrations(path).rows[0].messages] == ["hi", "hello"]
    pq.write_table(pa.table({"id": ["a", "b"], "input": [{"x": 1.0}, {"x": float("nan")}]}), path)
    error = fails(load_tasks, path)
    assert (error.line, error.field) == (2, "input") and "not representable in JSON" in str(error)
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), path)
    assert "no rows" in str(fails(load_tasks, path))
    path.write_bytes(b"PAR1 and then nothing of use")
    assert "not a readable Parquet file" in str(fails(load_tasks, path))
    assert "not a readable Parquet file" in str(fails(describe, path))


def test_reading_tables_leaves_no_cache_behind_and_reading_json_lines_needs_no_datasets(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "d.csv").write_text("id,input.x\na,1\n")
    jsonl(tmp_path, GOOD)
    code = (
        "import sys; from pathlib import Path; from ascent.customize.data import load_tasks\n"
        "load_tasks(Path('d.jsonl')); assert 'datasets' not in sys.modules and 'torch' not in sys.modules\n"
        "load_tasks(Path('d.csv')); assert 'torch' not in sys.modules\n"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"HOME": str(home), "TMPDIR": str(scratch), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        timeout=60,
    )
    assert list(home.rglob("*")) == [] and list(scratch.rglob("*")) == []
