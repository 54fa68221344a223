"""The trainer's side of the environment processes: one per episode, many asked at once, a lost one never waited for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from ascent.customize.agentic.environment import Step
from ascent.customize.agentic.worker import ANSWER, END, REQUEST, SPAWN
from ascent.records import Message, Task
from ascent.records.errors import BadInput, Unavailable

START_LIMIT_S = 60.0
"""How long the program may take to load, and the first process to answer any request."""

STEP_LIMIT = 1 << 16
"""Bytes that one step may answer: far more than a context holds, and little enough to keep for every episode."""

_START = (
    "import json,sys; sys.path[:]=json.loads(sys.argv[1]); from ascent.customize.agentic.worker import main; main()"
)


@dataclass(frozen=True)
class Lost:
    """What became of an episode whose environment hung, crashed, flooded or failed."""

    reason: str


@dataclass(frozen=True)
class Seat:
    """One episode's process, the channel to it, and the process that forked it."""

    pid: int
    channel: socket.socket
    parent: subprocess.Popen[bytes]


@dataclass(frozen=True)
class Question:
    """What an environment is asked: to reset to `task` (without a seat, which the answer then has), or to step."""

    seat: Seat | None
    task: Task
    seed: int
    text: str = ""

    def line(self) -> bytes:
        """The question as its process reads it."""
        if self.seat is None:
            return json.dumps({"task": self.task.model_dump(mode="json"), "seed": self.seed}).encode() + b"\n"
        return json.dumps({"text": self.text}).encode() + b"\n"


Answer = tuple[Seat, Step] | Lost


@dataclass
class _Asked:
    """A question under way."""

    place: int
    seat: Seat
    deadline: float
    heard: bytes = b""


class Processes:
    """The environment processes of one program.

    Every reset and every step has `step_seconds` of wall clock; at most `parallel` of them run at the same time, so
    that environments do not take each other's time. All processes end when this one does.
    """

    def __init__(self, program: Path, environment: str, *, step_seconds: float, parallel: int) -> None:
        """Describe the program; nothing is started yet."""
        if parallel < 1 or not step_seconds > 0:
            raise BadInput(f"environments need a positive limit and at least 1 at once, got {step_seconds}, {parallel}")
        self.program, self.environment = Path(program).resolve(), environment
        self.step_seconds, self.parallel = step_seconds, parallel
        self._first: subprocess.Popen[bytes] | None = None
        self._control: socket.socket

    def start(self) -> None:
        """Start the process that forks the others, unless it runs.

        Raises:
            BadInput: the program does not load, or has no environment of that name.
        """
        if self._first is not None and self._first.poll() is None:
            return
        self.close()
        self._control, theirs = socket.socketpair()
        paths = [str(Path(entry).resolve()) if entry == "" else entry for entry in sys.path]
        settings = {
            "program": str(self.program),
            "environment": self.environment,
            "step_seconds": self.step_seconds,
        }
        with theirs:
            self._first = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(paths), str(theirs.fileno()), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONHASHSEED": "0"},  # sets iterate alike in every run
            )
        self._control.settimeout(START_LIMIT_S)
        failure = self._greeting()
        if failure:
            self.close()
            raise BadInput(failure)

    def _greeting(self) -> str:
        """Wait for the program to load; return what went wrong, or nothing."""
        heard = b""
        try:
            while not heard.endswith(b"\n"):
                data = self._control.recv(1 << 16)
                if not data:
                    return f"{self.program} ends the process that loads it; let its top level only define things"
                heard += data
        except TimeoutError:
            return f"{self.program} did not load within {START_LIMIT_S:g} s; move slow work out of its top level"
        return str(json.loads(heard).get("failure", ""))

    def close(self) -> None:
        """End the first process. Episodes still open see their channel closed, or are killed by their own clock."""
        if self._first is None:
            return
        first, self._first = self._first, None
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(1.0)
        if first.returncode is None:
            first.kill()
            first.wait()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions, in their order. The seat of a lost one has been ended."""
        answers: dict[int, Answer] = {}
        waiting = deque(enumerate(questions))
        busy: dict[socket.socket, _Asked] = {}
        while waiting or busy:
            while waiting and len(busy) < self.parallel:
                place, question = waiting.popleft()
                asked = self._begin(place, question)
                if isinstance(asked, Lost):
                    answers[place] = asked
                else:
                    busy[asked.seat.channel] = asked
            if busy:
                first = min(asked.deadline for asked in busy.values())
                ready = set(wait(list(busy), max(0.0, first - time.monotonic())))
                for channel, asked in list(busy.items()):
                    answer = self._hear(asked, channel in ready)
                    if answer is not None:
                        answers[asked.place] = answer
                        del busy[channel]
        return [answers[place] for place in range(len(questions))]

    def end(self, seat: Seat) -> str:
        """End an episode's process and return how it ended, in words."""
        seat.channel.close()
        if seat.parent is not self._first:
            return "was left behind when the process that forked it died"
        try:
            code = self._request(END, seat.pid)
        except OSError:
            return "is gone, together with the process that forked it"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def _begin(self, place: int, question: Question) -> _Asked | Lost:
        seat = question.seat or self._open()
        asked = _Asked(place, seat, time.monotonic() + self.step_seconds)
        seat.channel.settimeout(self.step_seconds)
        try:
            seat.channel.sendall(question.line())
        except OSError:  # also when it does not read within its time
            return Lost(f"the environment's process {self.end(seat)} between two steps")
        return asked

    def _hear(self, asked: _Asked, ready: bool) -> Answer | None:
        """Read what has arrived; None while the answer is not whole and there is time left."""
        if ready:
            try:
                data = asked.seat.channel.recv(STEP_LIMIT)
            except OSError:
                data = b""
            asked.heard += data
            if not data:
                return Lost(f"the environment's process {self.end(asked.seat)}")
            if len(asked.heard) > STEP_LIMIT:
                self.end(asked.seat)
                return Lost(f"one step of the environment said more than {STEP_LIMIT} bytes")
            if asked.heard.endswith(b"\n"):
                return self._understood(asked)
        if time.monotonic() < asked.deadline:
            return None
        self.end(asked.seat)
        return Lost(f"the environment did not answer within {self.step_seconds:g} s and was stopped")

    def _understood(self, asked: _Asked) -> Answer:
        try:
            said = json.loads(asked.heard)
            if "failure" not in said:
                messages = tuple(Message(role=role, content=content) for role, content in said["messages"])
                return asked.seat, Step(messages, said["done"], said["score"])
            reason = f"the environment failed: {said['failure']}"
        except (ValueError, KeyError, TypeError):
            reason = "the environment wrote into its channel; it must leave open file descriptors alone"
        self.end(asked.seat)
        return Lost(reason)

    def _open(self) -> Seat:
        """Fork a process for an episode.

        Raises:
            Unavailable: the process that forks dies again and again.
        """
        for _ in range(3):
            self.start()
            assert self._first is not None
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    return Seat(self._request(SPAWN, 0, theirs), ours, self._first)
            except OSError:  # an environment killed it, or this machine did
                ours.close()
                self._first.kill()
                self._first.wait()
        raise Unavailable("environment processes cannot be started; look for a lack of memory on this machine")

    def _request(self, what: int, pid: int, channel: socket.socket | None = None) -> int:
        """Send a request to the process that forks and return its answer. Raises OSError when it is gone."""
        files = [channel.fileno()] if channel is not None else []
        socket.send_fds(self._control, [REQUEST.pack(what, pid)], files)
        heard = b""
        while len(heard) < ANSWER.size:
            data = self._control.recv(ANSWER.size - len(heard))
            if not data:
                raise ConnectionResetError("the process that forks environments is gone")
            heard += data
        return int(ANSWER.unpack(heard)[0])
