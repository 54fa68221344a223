"""Files for retrieval: pairs to learn from; a corpus, queries and judgements to measure on.

| file | fields of a row |
|---|---|
| pairs | `query`, `positive`, optionally `negatives` (a list of texts), `id`, `group` |
| corpus | `id`, `text`, optionally `title` |
| queries | `id`, `query`, optionally `group` |
| judgements | `query` and `document` (ids), optionally `relevance` (default 1; 0: judged and not relevant) |

All kinds of file that other data come in are read. `group` is what a query belongs to (a customer, a manual); splits
keep it whole and statistics cluster by it. Other fields are ignored, unless they look like a misspelt one.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ascent.customize.data.load import Loaded
from ascent.customize.data.problems import Problems
from ascent.customize.data.read import kind_of, read_rows
from ascent.customize.data.rows import Row
from ascent.records import DataSource, Message, Record, digest
from ascent.records.errors import nearest


class TextRow(Record):
    """What rows of texts have in common with other data: an id, a group, and an input to find repetitions by."""

    id: str
    group: str | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """Nothing: these rows are no conversations."""
        return ()


class Pair(TextRow):
    """A query, a text that answers it, and texts that are known not to."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()

    @property
    def input(self) -> dict[str, Any]:
        """The query: leakage is a matter of queries, for corpora are shared."""
        return {"query": self.query}


class Query(TextRow):
    """A query to measure on."""

    query: str

    @property
    def input(self) -> dict[str, Any]:
        """The query."""
        return {"query": self.query}


class Document(TextRow):
    """A text that can be found; the title, if any, is its beginning."""

    text: str

    @property
    def input(self) -> dict[str, Any]:
        """The text."""
        return {"text": self.text}


R = TypeVar("R", Pair, Query, Document)


@dataclass(frozen=True)
class RetrievalSet:
    """What retrieval is measured on. `source` is the judgements' file."""

    queries: Loaded[Query]
    corpus: Loaded[Document]
    qrels: Mapping[str, Mapping[str, float]]
    source: DataSource


def load_pairs(path: Path) -> Loaded[Pair]:
    """Load pairs of a query and a text that answers it.

    Raises:
        BadData: anything is wrong with the file; the message lists the first twenty problems with their lines.
    """

    def build(row: Row, name: str) -> Pair | None:
        query = row.text("query", "the query's text")
        positive = row.text("positive", "a text that answers the query")
        negatives = _texts(row, "negatives")
        if positive in negatives:
            row.problem("negatives", "holds the row's own positive; a text cannot be both, delete one")
        if query is None or positive is None:
            return None
        return Pair(id=name, query=query, positive=positive, negatives=negatives, group=row.label("group"))

    return _load(path, build, ("query", "positive", "negatives", "group"))


def load_queries(path: Path) -> Loaded[Query]:
    """Load queries. Raises as `load_pairs` does."""

    def build(row: Row, name: str) -> Query | None:
        query = row.text("query", "the query's text")
        return Query(id=name, query=query, group=row.label("group")) if query is not None else None

    return _load(path, build, ("query", "group"), named=True)


def load_corpus(path: Path) -> Loaded[Document]:
    """Load documents. Raises as `load_pairs` does."""

    def build(row: Row, name: str) -> Document | None:
        text = row.text("text", "the document's text")
        title = row.text("title", "the title") if row.has("title") else ""
        return Document(id=name, text=f"{title} {text}".strip()) if text is not None and title is not None else None

    return _load(path, build, ("text", "title"), named=True)


def load_retrieval_set(queries: Path, corpus: Path, judgements: Path) -> RetrievalSet:
    """Load queries, a corpus and the judgements that refer to both.

    Raises:
        BadData: anything is wrong with a file, or a judgement names a query or document that is not there.
    """
    asked, texts = load_queries(queries), load_corpus(corpus)
    problems = Problems(judgements)
    raw_rows, sha256 = read_rows(judgements, problems)
    qrels: dict[str, dict[str, float]] = {}
    for raw in raw_rows:
        row = Row(raw, problems)
        _check_names(row, ("query", "document", "relevance"))
        query, document = _reference(row, "query", asked.lines), _reference(row, "document", texts.lines)
        relevance = _relevance(row)
        if query is None or document is None or relevance is None:
            continue
        if document in qrels.setdefault(query, {}):
            row.problem("document", f"document {document!r} was judged for query {query!r} before; keep one judgement")
        qrels[query][document] = relevance
    problems.raise_any()
    source = DataSource(name=judgements.stem, path=str(judgements), rows=len(raw_rows), sha256=sha256)
    return RetrievalSet(asked, texts, qrels, source)


def _load(
    path: Path, build: Callable[[Row, str], R | None], fields: tuple[str, ...], *, named: bool = False
) -> Loaded[R]:
    """Read a file, build a record of each row, and raise once with all problems or return everything."""
    problems = Problems(path)
    raw_rows, sha256 = read_rows(path, problems)
    lines: dict[str, int] = {}
    found: list[R] = []
    for raw in raw_rows:
        row = Row(raw, problems)
        _check_names(row, ("id", *fields))
        name = row.label("id")
        if name is None and named and not row.has("id"):
            row.problem("id", "is missing; judgements refer to rows by their ids, so give every row its own")
        if name is not None and name in lines:
            row.problem("id", f"the id {name!r} is already used on line {lines[name]}; give every row its own")
        if name is None:
            content = digest({field: row.values.get(field) for field in fields})[:16]
            name = content if content not in lines else f"{content}-{row.line}"
        lines.setdefault(name, row.line)
        record = build(row, name)
        if record is not None and row.sound:
            found.append(record)
    problems.raise_any()
    return Loaded(tuple(found), lines, DataSource(name=path.stem, path=str(path), rows=len(found), sha256=sha256))


def _check_names(row: Row, fields: tuple[str, ...]) -> None:
    absent = [field for field in fields if field not in row.values and field != "id"]
    for name in sorted(row.values.keys() - set(fields)):
        if meant := difflib.get_close_matches(name, absent, n=1, cutoff=0.8):
            row.problem(name, f"unknown field; did you mean {meant[0]!r}? Rename it")


def _texts(row: Row, field: str) -> tuple[str, ...]:
    value = row.values.get(field)
    if value is None:
        return ()
    if not isinstance(value, list):
        row.problem(field, f"must be a list of texts, is {kind_of(value)}")
        return ()
    for index, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            row.problem(f"{field}[{index}]", "must be a text that is not empty; write it or delete the entry")
            return ()
    return tuple(value)


def _reference(row: Row, field: str, known: Mapping[str, int]) -> str | None:
    name = row.label(field)
    if name is None:
        if not row.has(field):
            row.problem(field, f"is missing; name the {field} that the judgement is about by its id")
        return None
    if name not in known:
        row.problem(
            field, f"there is no {field} {name!r}{nearest(name, known)}; correct the id or delete the judgement"
        )
        return None
    return name


def _relevance(row: Row) -> float | None:
    value = row.values.get("relevance", 1)
    if isinstance(value, str):  # tables hold text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        row.problem("relevance", f"must be a number of at least 0, is {value!r}")
        return None
    return float(value)
