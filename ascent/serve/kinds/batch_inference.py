"""The batch inference job: every record of JSON Lines files answered by one model, and again from where it broke off.

A record is `{"recordId", "modelInput"}`. `modelInput` is a Converse request, messages as OpenAI and Anthropic write
them, or a bare `prompt`; the output has the form that goes with it. A record that cannot be answered gets an `error`
and the job goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ascent.inference.store import Store
from ascent.records import FinishReason, Message
from ascent.records.errors import BadInput, Interrupted
from ascent.records.files import append_jsonl, read_jsonl, write_atomic
from ascent.serve.kinds.home import begin, stored_model
from ascent.serve.kinds.places import Rules, fetch_all, put

if TYPE_CHECKING:
    from ascent.inference.engine import Completion, Sampling
    from ascent.inference.engines.torch import TorchEngine
    from ascent.jobs.context import JobContext

Form = Literal["Converse", "messages", "prompt"]
SUFFIXES = (".jsonl",)
BATCH = 32
"""Records answered and written at a time; a killed job repeats at most so many."""
MAX_TOKENS = 512


@dataclass(frozen=True)
class Record:
    """One line of the input that can be answered."""

    line: int
    id: str
    given: dict[str, Any]
    form: Form
    messages: tuple[Message, ...]
    sampling: Sampling


def run(job: JobContext) -> dict[str, Any]:
    """Answer every record of the payload's `input` with its `model`; write outputs and manifest to its `output`.

    Returns:
        Counts of records and tokens.

    Raises:
        BadInput: there is no input, or the model cannot be run.
        Interrupted: the job is to stop; it goes on behind the last record that was written.
    """
    from ascent.inference.engines.torch import TorchEngine

    payload, rules = job.payload, Rules(**job.payload["rules"])
    begin(job, "validating")
    files = fetch_all(payload["input"], job.folder / "input", rules, suffixes=SUFFIXES)
    totals = {file.path: sum(1 for _ in _lines(file.path)) for file in files}
    total = sum(totals.values())
    if total == 0:
        raise BadInput(f"{payload['input']} holds no record; write one JSON object per line")
    begin(job, "answering")
    engine = TorchEngine.load(stored_model(payload["model"], Store()), payload["shown_as"])
    done = 0
    outputs: dict[str, Path] = {}
    for file in files:
        name = f"{file.path.relative_to(job.folder / 'input').as_posix()}.out"
        out = outputs[name] = job.folder / "output" / name
        finished = {row["line"] for row in read_jsonl(_progress(out))}
        done += len(finished)
        job.progress(done, total)
        for batch in _batches([pair for pair in _lines(file.path) if pair[0] not in finished]):
            rows = _answered(batch, engine, payload["converse"])
            append_jsonl(_progress(out), rows)
            done += len(rows)
            job.progress(done, total)
            if job.cancelled():
                raise Interrupted(f"stopped after {done} of {total} records; they are kept")
    begin(job, "writing")
    counts = _write(job, outputs, total)
    put(payload["output"], {f"{job.id}/{name}": path for name, path in outputs.items()}, rules)
    job.meter(
        "answering",
        model=payload["shown_as"],
        prompt_tokens=counts["inputTokenCount"],
        completion_tokens=counts["outputTokenCount"],
    )
    return counts


def _write(job: JobContext, outputs: dict[str, Path], total: int) -> dict[str, int]:
    """Put the finished lines in the order of the input, beside a manifest with the counts."""
    counts = dict.fromkeys(
        ("processedRecordCount", "successRecordCount", "errorRecordCount", "inputTokenCount", "outputTokenCount"), 0
    )
    for path in outputs.values():
        rows = sorted(read_jsonl(_progress(path)), key=lambda row: row["line"])
        text = "".join(json.dumps(row["record"], ensure_ascii=False) + "\n" for row in rows)
        write_atomic(path, text)
        for row in rows:
            counts["processedRecordCount"] += 1
            counts["errorRecordCount" if "error" in row["record"] else "successRecordCount"] += 1
            counts["inputTokenCount"] += row["tokens"][0]
            counts["outputTokenCount"] += row["tokens"][1]
    counts = {"totalRecordCount": total, **counts}
    manifest = job.folder / "output" / "manifest.json.out"
    write_atomic(manifest, json.dumps(counts))
    outputs[manifest.name] = manifest
    job.log(", ".join(f"{name} {value:,}" for name, value in counts.items()))
    return counts


def _progress(out: Path) -> Path:
    return out.with_name(f".{out.name}.progress")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _batches(lines: Sequence[tuple[int, str]]) -> Iterator[Sequence[tuple[int, str]]]:
    for begun in range(0, len(lines), BATCH):
        yield lines[begun : begun + BATCH]


def _answered(lines: Sequence[tuple[int, str]], engine: TorchEngine, converse: bool) -> list[dict[str, Any]]:
    """Return one row per line: the record as it is written, its line, and its tokens (prompt, answer)."""
    from ascent.inference.engine import Prompt

    rows: dict[int, dict[str, Any]] = {}
    alike: dict[Sampling, list[Record]] = {}
    for line, text in lines:
        try:
            record = read_record(line, text, converse)
            _check_length(record, engine)
            alike.setdefault(record.sampling, []).append(record)
        except BadInput as error:
            rows[line] = {"line": line, "tokens": (0, 0), "record": _failed(line, text, str(error))}
    for sampling, records in alike.items():
        answers = engine.generate([Prompt(record.messages) for record in records], sampling)
        for record, (completion,) in zip(records, answers, strict=True):
            counts = len(completion.prompt_ids), len(completion.token_ids)
            written = {"recordId": record.id, "modelInput": record.given, "modelOutput": _output(record, completion)}
            rows[record.line] = {"line": record.line, "tokens": counts, "record": written}
    return [rows[line] for line, _ in lines]


def read_record(line: int, text: str, converse: bool) -> Record:
    """Read one line of the input.

    Args:
        line: its number, from 1, which also names a record without a `recordId`.
        text: JSON.
        converse: whether the job's `modelInvocationType` is Converse.

    Raises:
        BadInput: it is no record, or asks for something that cannot be done here.
    """
    from ascent.inference.engine import Sampling

    try:
        row = json.loads(text)
        given = row["modelInput"]
        if not isinstance(given, dict):
            raise TypeError("modelInput must be an object")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f'line {line} is no record ({error}); write {{"recordId": "...", "modelInput": {{...}}}}'
        ) from error
    form: Form = "prompt" if "prompt" in given and not converse else "Converse" if converse else "messages"
    settings: Mapping[str, Any] = given.get("inferenceConfig", {}) if form == "Converse" else given
    if given.get("toolConfig") or given.get("tools"):
        raise BadInput(f"line {line}: tools cannot be called in a batch; leave them out")
    stop = settings.get("stopSequences") or settings.get("stop_sequences") or settings.get("stop") or ()
    try:
        sampling = Sampling(
            max_tokens=int(_first(settings, "maxTokens", "max_tokens", "max_gen_len", "maxTokenCount") or MAX_TOKENS),
            temperature=float(settings.get("temperature", 1.0)),
            top_p=float(_first(settings, "topP", "top_p") or 1.0),
            seed=int(settings.get("seed", 0)),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
        messages = _messages(given, form)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"line {line}: modelInput cannot be read ({error})") from error
    return Record(line, str(row.get("recordId") or f"LINE{line:07d}"), given, form, messages, sampling)


def _messages(given: Mapping[str, Any], form: Form) -> tuple[Message, ...]:
    if form == "prompt":
        return (Message(role="user", content=str(given["prompt"])),)
    system = given.get("system")
    turns = [{"role": "system", "content": system}] if system else []
    turns += given["messages"]
    return tuple(Message(role=turn["role"], content=_text(turn["content"])) for turn in turns)


def _text(content: Any) -> str:
    """Return the text of a turn's content: text itself, or a list of blocks that all hold text."""
    if isinstance(content, str):
        return content
    return "\n".join(block["text"] for block in content)


def _first(settings: Mapping[str, Any], *names: str) -> Any:
    return next((settings[name] for name in names if name in settings), None)


def _check_length(record: Record, engine: TorchEngine) -> None:
    prompt, context = len(engine.renderer.prompt_ids(record.messages)), engine.decoder.config.context
    if prompt + record.sampling.max_tokens > context:
        raise BadInput(
            f"line {record.line}: the prompt has {prompt} tokens and asks for {record.sampling.max_tokens} more, "
            f"the context holds {context}; shorten it or lower the limit"
        )


def _failed(line: int, text: str, message: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
        id, given = str(row.get("recordId") or f"LINE{line:07d}"), row.get("modelInput")
    except (ValueError, AttributeError):
        id, given = f"LINE{line:07d}", None
    return {"recordId": id, "modelInput": given, "error": {"errorCode": 400, "errorMessage": message}}


def _output(record: Record, completion: Completion) -> dict[str, Any]:
    """Return the answer in the form that goes with the record's input."""
    cut = completion.finish is FinishReason.length
    prompt, answer = len(completion.prompt_ids), len(completion.token_ids)
    if record.form == "Converse":
        return {
            "output": {"message": {"role": "assistant", "content": [{"text": completion.text}]}},
            "stopReason": "max_tokens" if cut else "end_turn",
            "usage": {"inputTokens": prompt, "outputTokens": answer, "totalTokens": prompt + answer},
        }
    if record.form == "prompt":
        return {
            "generation": completion.text,
            "prompt_token_count": prompt,
            "generation_token_count": answer,
            "stop_reason": "length" if cut else "stop",
        }
    return {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": completion.text},
                "finish_reason": "length" if cut else "stop",
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
    }
