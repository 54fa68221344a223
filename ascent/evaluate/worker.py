"""What runs inside a grader worker: load the program once, then finish and grade what arrives.

The worker imports records, the graders and the user's file, nothing else. It speaks to the pool over one
socket: pickled chunks come in behind an 8-byte length, one line of JSON goes out per call. Standard output
belongs to the grader.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any

import pydantic_core

from ascent.evaluate.graders import BUILTIN, Grader, as_score, failed
from ascent.evaluate.program import Program, describe_error
from ascent.records import Episode, Score, Task
from ascent.records.errors import BadInput

LENGTH = struct.Struct("!Q")
"""The header of a message to the worker: the length of the pickle behind it."""

Chunk = list[tuple[Task, Episode, tuple[str, ...]]]
"""Tasks with their episodes and the names of the graders that are still to be called."""


def main() -> None:
    """Serve chunks until the pool closes its end. Arguments: the socket, the pool's process id."""
    channel, parent = socket.socket(fileno=int(sys.argv[-2])), int(sys.argv[-1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    setup = _receive(channel, parent)
    if setup is None:
        return
    try:
        program = Program.load(setup["program"]) if setup["program"] else Program()
        known = BUILTIN | {name: program.grader(name) for name in program.grader_names}
    except BadInput as error:
        _send(channel, json.dumps({"failure": str(error)}))
        return
    _send(channel, json.dumps({"graders": sorted(known)}))
    backstop_s = setup["time_limit_s"] + 1
    while (chunk := _receive(channel, parent)) is not None:
        for task, episode, names in chunk:
            _grade(channel, program, {name: known[name] for name in names}, task, episode, backstop_s)
            _arm(0)


def _grade(
    channel: socket.socket,
    program: Program,
    graders: dict[str, Grader],
    task: Task,
    episode: Episode,
    backstop_s: float,
) -> None:
    """Send one line for `finish` and, if it worked, one line per grader."""
    _arm(backstop_s)
    try:
        output = program.finish(episode.text, task.input, episode.doubtful)
        line = b'{"output":' + _json(output) + b"}"
    except BaseException as error:
        _send(channel, json.dumps({"failure": f"finish() failed: {describe_error(error, program.path)}"}))
        return
    episode = episode.model_copy(update={"output": output})
    _send(channel, line)
    for name, grader in graders.items():
        _arm(backstop_s)
        score = _call(name, grader, program, task, episode)
        _send(channel, score.to_json())


def _call(name: str, grader: Grader, program: Program, task: Task, episode: Episode) -> Score:
    try:
        return as_score(name, grader(task, episode))
    except BaseException as error:  # a grader may call sys.exit(); that is its error, not the worker's end
        return failed(name, describe_error(error, program.path))


def _json(output: Any) -> bytes:
    """Write an output as JSON. Raises TypeError when it has none; half a surrogate pair becomes `?`."""
    try:
        return pydantic_core.to_json(output, inf_nan_mode="null")
    except ValueError as error:
        if "surrogates" in str(error):
            plain = pydantic_core.to_jsonable_python(output, inf_nan_mode="null")
            return json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace")
        raise TypeError(f"what it returned cannot be written as JSON: {error}") from None


def _arm(seconds: float) -> None:
    """Have the kernel end this process if a call outlives both its limit and the parent that enforces it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _send(channel: socket.socket, line: bytes | str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    try:
        channel.sendall(raw + b"\n")
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


def _receive(channel: socket.socket, parent: int) -> Any:
    """Return the next message, or None when the pool has closed its end or is gone."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while not poll.poll(1000):
        if os.getppid() != parent:
            return None
    header = _exactly(channel, LENGTH.size)
    body = _exactly(channel, LENGTH.unpack(header)[0]) if header else None
    return pickle.loads(body) if body else None


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = channel.recv(min(size - len(parts), 1 << 20))
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
