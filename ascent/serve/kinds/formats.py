"""Callers' data to the rows that training reads: Bedrock's own formats, our own, and plain text.

| a row has | it becomes |
|---|---|
| `prompt`, `completion` | `input.prompt`, `target` (with `label`: a judged `answer`, `good`) |
| `messages` whose content is a list of `{"text"}`, `system` | `messages` with text (bedrock-conversation-2024) |
| `input` as text | `text`, a document |
| `referenceResponse`, `reference_answer` | `expected` (a text as its `answer`) |
| `recordId` | `id` |

Everything else is left as it is. Rows keep their line, so that whatever is found later names the caller's own line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascent.records.errors import BadData
from ascent.records.files import write_atomic

if TYPE_CHECKING:
    from ascent.customize.data.problems import Problems
    from ascent.customize.feed import Feed

SCHEMA = "bedrock-conversation-2024"


def convert(path: Path, out: Path, uri: str, feed: Feed) -> None:
    """Write the rows of a caller's file to the JSON Lines file `out`, each on its own line of the original.

    Args:
        path: the copy of the file.
        out: where the rows go.
        uri: what the caller calls the file; messages name it.
        feed: what the rows are to be.

    Raises:
        BadData: the file cannot be read or a row is malformed; up to twenty problems with line and field.
    """
    from ascent.customize.data.problems import Problems
    from ascent.customize.data.read import read_rows

    if path.suffix.lower() == ".txt":
        write_atomic(out, json.dumps({"text": _plain(path, uri)}, ensure_ascii=False) + "\n")
        return
    problems = Problems(uri)
    rows, _ = as_callers(lambda: read_rows(path, problems), path, uri)
    lines = [""] * max((row.line for row in rows), default=0)
    for row in rows:
        lines[row.line - 1] = json.dumps(_converted(row.values, row.line, problems, feed), ensure_ascii=False)
    problems.raise_any()
    write_atomic(out, "\n".join(lines) + "\n")


def as_callers(load: Any, path: Path, uri: str) -> Any:
    """Call `load` and let what it says of `path` speak of the caller's `uri` instead.

    Raises:
        BadData: as `load`.
    """
    try:
        return load()
    except BadData as error:
        told = BadData(str(error).replace(str(path), uri))
        told.file, told.line, told.field = uri, error.line, error.field
        raise told from error


def _plain(path: Path, uri: str) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8 at byte {error.start}; convert it first", file=uri) from error
    if not text.strip():
        raise BadData("the file is empty; write some text", file=uri)
    return text


def _converted(values: dict[str, Any], line: int, problems: Problems, feed: Feed) -> dict[str, Any]:
    row = dict(values)
    version = row.pop("schemaVersion", SCHEMA)
    if version != SCHEMA:
        problems.add(line, "schemaVersion", f"is {version!r}; only {SCHEMA} is known")
    if "messages" in row:
        row["messages"] = _messages(row.pop("system", None), row["messages"], line, problems)
    if "prompt" in row and "input" not in row:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            problems.add(line, "prompt", "must be text that is not empty")
        row["input"] = {"prompt": row.pop("prompt")}
    if isinstance(row.get("input"), str) and "text" not in row:
        row["text"] = row.pop("input")
    if "completion" in row:
        _completion(row, line, problems, feed)
    for name in ("referenceResponse", "reference_answer"):
        if name in row and "expected" not in row:
            answer = row.pop(name)
            row["expected"] = answer if isinstance(answer, dict) else {"answer": answer}
    if "recordId" in row and "id" not in row:
        row["id"] = row.pop("recordId")
    return row


def _completion(row: dict[str, Any], line: int, problems: Problems, feed: Feed) -> None:
    completion = row.pop("completion")
    if not isinstance(completion, str) or not completion.strip():
        problems.add(line, "completion", "must be text that is not empty")
    elif feed == "feedback":
        row.setdefault("answer", completion)
        row.setdefault("good", row.pop("label", None))
    else:
        row.setdefault("target", completion)
        if feed == "tasks":
            row.setdefault("expected", {"answer": completion})


def _messages(system: Any, messages: Any, line: int, problems: Problems) -> Any:
    """Return turns with plain text; what is malformed otherwise is left for the loader to say."""
    if not isinstance(messages, list):
        return messages
    turns = []
    for index, turn in enumerate(messages):
        listed = isinstance(turn, dict) and isinstance(turn.get("content"), list)
        place = f"messages[{index}].content"
        turns.append({**turn, "content": _text(turn["content"], place, line, problems)} if listed else turn)
    if isinstance(system, list):
        system = _text(system, "system", line, problems)
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def _text(blocks: list[Any], place: str, line: int, problems: Problems) -> str:
    texts = []
    for index, block in enumerate(blocks):
        text = block.get("text") if isinstance(block, dict) else None
        if not isinstance(text, str):
            problems.add(line, f"{place}[{index}]", 'must be {"text": "..."}; other kinds of content cannot be learnt')
        else:
            texts.append(text)
    return "\n".join(texts)
