"""What runs beside the trainer: one process that loads the program once and forks a child for every episode.

A fork of a small process takes milliseconds and shares its memory; a process of its own per episode means that a hang
or a crash costs that episode alone. The parent process here has no thread, no torch and no NumPy. It answers two
requests on its control socket: SPAWN (with the child's socket attached) by a process id, END (with a process id) by the
exit status of a child that is killed if it still runs. Children speak JSON lines with the trainer directly.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ascent.customize.agentic.environment import Environment, Step
from ascent.evaluate.program import Program, describe_error
from ascent.records import Message, Task
from ascent.records.errors import BadInput, UnknownName

REQUEST = struct.Struct("!Bq")
"""A request: what to do, and the process id it is about (0 for SPAWN)."""

ANSWER = struct.Struct("!q")
SPAWN, END = 1, 2
MEMORY_LIMIT = 2 << 30  # bytes an episode's process may allocate


def main() -> None:
    """Serve until the trainer closes the control socket. Arguments: the socket, then the settings as JSON."""
    control, settings = socket.socket(fileno=int(sys.argv[-2])), json.loads(sys.argv[-1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        program = Program.load(settings["program"])
        make = _environment(program.module, settings["environment"])
    except BadInput as error:
        control.sendall(json.dumps({"failure": str(error)}).encode() + b"\n")
        return
    control.sendall(b"{}\n")
    while True:
        request, files, _, _ = socket.recv_fds(control, REQUEST.size, 1)
        if not request:
            return
        what, pid = REQUEST.unpack(request)
        if what == SPAWN:
            with socket.socket(fileno=files[0]) as channel:
                control.sendall(ANSWER.pack(_spawn(control, channel, make, settings)))
        else:
            control.sendall(ANSWER.pack(_end(pid)))


def _environment(module: ModuleType | None, name: str) -> Any:
    """Return what makes the environment. Raises `UnknownName` with the names of the program that could."""
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in known:
        raise UnknownName("environment", name, known)
    return getattr(module, name)


def _spawn(control: socket.socket, channel: socket.socket, make: Any, settings: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        control.close()
        os.setpgid(0, 0)  # so that what it starts is killed with it
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
        _serve(channel, make, Path(settings["program"]), settings["step_seconds"] + 1)
    finally:
        os._exit(1)


def _end(pid: int) -> int:
    """Kill a child's group if it still runs, and return how it ended: its exit code, or minus the signal."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _serve(channel: socket.socket, make: Any, program: Path, backstop_s: float) -> None:
    """Answer each line with a line until the trainer closes its end."""
    environment: Environment | None = None
    with channel.makefile("rb") as lines:
        for line in lines:
            signal.setitimer(signal.ITIMER_REAL, backstop_s)  # should the trainer die while this step hangs
            message = json.loads(line)
            try:
                if environment is None:
                    random.seed(message["seed"])
                    environment = make()
                    step = Step(tuple(environment.reset(Task.model_validate(message["task"]))))
                else:
                    step = environment.step(message["text"])
                answer = _line(step)
            except BaseException as error:
                channel.sendall(json.dumps({"failure": describe_error(error, program)}).encode() + b"\n")
                raise
            channel.sendall(answer)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _line(step: Step) -> bytes:
    """Write a step as JSON. Raises TypeError or ValueError when it is no step."""
    if not isinstance(step, Step):
        raise TypeError(f"an environment's step() must return a Step, not a {type(step).__name__}")
    if not step.done and not step.messages:
        raise ValueError("an environment must say something to the model, or end the episode")
    if not all(isinstance(message, Message) for message in step.messages):
        raise TypeError("an environment's messages must be Message records")
    said = [[message.role, message.content] for message in step.messages]
    score = None if step.score is None else float(step.score)
    return json.dumps({"messages": said, "done": bool(step.done), "score": score}).encode() + b"\n"
