"""Grading in worker processes that can be killed, so that no grader can hang, crash or corrupt a run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ascent.evaluate.graders import failed
from ascent.evaluate.worker import LENGTH
from ascent.records import Episode, FinishReason, Score, Task, Unscored
from ascent.records.errors import BadInput, Unavailable, UnknownName

START_LIMIT_S = 60.0
"""How long a worker may take to start and to load the program."""

CHUNK = 64
LOG_LIMIT = 1 << 20
_START = "import json,sys; sys.path[:]=json.loads(sys.argv[1]); from ascent.evaluate.worker import main; main()"


class GraderPool:
    """Runs a program's `finish` and graders in their own processes.

    Every call of `finish` or of a grader has `time_limit_s` of wall clock. A call that hangs is killed with
    its process and scored `timeout`, one that takes its process down is scored `crash`, one that raises or
    returns no number is scored `error`; the rest of the chunk goes on in a new process. Workers are started
    afresh (no fork), import neither torch nor NumPy, and end when this process does. One call of `grade` runs
    at a time.

    Raises:
        UnknownName: at start, a grader that neither the program nor `BUILTIN` has.
        BadInput: at start, the program does not load; later, its file was changed while the pool was open.
    """

    def __init__(
        self, program: Path | None, graders: Sequence[str], *, workers: int = 1, time_limit_s: float = 5.0
    ) -> None:
        if workers < 1 or not time_limit_s > 0:
            raise BadInput(f"a pool needs at least 1 worker and a positive limit, got {workers} and {time_limit_s}")
        self.program = Path(program).resolve() if program is not None else None
        self.graders = tuple(dict.fromkeys(graders))
        self.time_limit_s = time_limit_s
        self._workers = [_Worker(self.program, time_limit_s) for _ in range(workers)]
        self._known: list[str] = []
        self._fingerprint: str | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        with self._lock:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers: the idle ones by closing their channel, the busy ones by killing them."""
        for worker in self._workers:
            worker.stop()

    def grade(self, pairs: Sequence[tuple[Task, Episode]]) -> list[Episode]:
        """Return the episodes with `output` and `scores`, in the same order.

        A score of the same name from an earlier grading is replaced. An episode whose sampling failed is not
        shown to any grader: all its scores are unscored with `no_output`.
        """
        with self._lock:
            board = _Board(pairs, self.graders)
            try:
                self._start()
                while board.waiting or any(worker.jobs for worker in self._workers):
                    for worker in self._workers:
                        if not worker.jobs and board.waiting:
                            self._assign(worker, board)
                    self._listen(board)
            except BaseException:
                self.close()
                raise
            return board.episodes()

    def _start(self) -> None:
        """Start the workers that do not run, all at once, and check the names of the graders."""
        fresh = [worker for worker in self._workers if worker.process is None]
        if not fresh:
            return
        fingerprint = self._fingerprint_now()
        if self._fingerprint not in (None, fingerprint):
            raise BadInput(f"{self.program} was changed while a pool had it open; open a new pool to grade with it")
        self._fingerprint = fingerprint
        try:
            for worker in fresh:
                worker.launch()
            for worker in fresh:
                self._known = worker.greet()
            for name in self.graders:
                if name not in self._known:
                    raise UnknownName("grader", name, self._known)
        except BaseException:
            self.close()
            raise

    def _fingerprint_now(self) -> str:
        if self.program is None or not self.program.is_file():
            return ""
        return hashlib.sha256(self.program.read_bytes()).hexdigest()

    def _assign(self, worker: _Worker, board: _Board) -> None:
        size = min(CHUNK, -(-len(board.waiting) // len(self._workers)))
        jobs = [board.waiting.popleft() for _ in range(size)]
        for _ in range(3):
            with contextlib.suppress(OSError):
                worker.send(jobs, board)
                return
            worker.stop()  # it died while idle, through no fault of these jobs
            self._start()
        raise Unavailable("grader workers die before they get any work; look for a lack of memory on this machine")

    def _listen(self, board: _Board) -> None:
        """Take what the busy workers have sent, and deal with those that died or passed their deadline."""
        busy = {worker.channel: worker for worker in self._workers if worker.jobs}
        if not busy:
            return
        first = min(worker.deadline for worker in busy.values())
        ready = set(wait(list(busy), max(0.0, first - time.monotonic())))
        for channel, worker in busy.items():
            if channel in ready:
                fault = worker.read(board)
            elif time.monotonic() >= worker.deadline:
                fault = (Unscored.timeout, f"did not end within {self.time_limit_s:g} s and was stopped")
            else:
                fault = None
            if fault is not None:
                cause, reason = fault
                if cause is Unscored.crash:
                    cause, reason = worker.post_mortem()
                worker.stop()
                board.blame(worker, cause, reason)
                self._start()


@dataclass(frozen=True)
class _Job:
    """One episode on its way: its place in the input and the graders still to be called."""

    position: int
    names: tuple[str, ...]


class _Board:
    """The results so far, and the jobs that no worker has."""

    def __init__(self, pairs: Sequence[tuple[Task, Episode]], graders: tuple[str, ...]) -> None:
        self.pairs = pairs
        self.graders = graders
        self.outputs: dict[int, Any] = {}
        self.scores: list[dict[str, Score]] = [{} for _ in pairs]
        self.waiting: deque[_Job] = deque()
        for position, (_, episode) in enumerate(pairs):
            if episode.finish is FinishReason.error:
                reason = episode.error or "sampling failed"
                for name in graders:
                    self.scores[position][name] = failed(name, reason, Unscored.no_output)
            else:
                self.waiting.append(_Job(position, graders))

    def fail(self, job: _Job, names: Sequence[str], cause: Unscored, reason: str) -> None:
        for name in names:
            self.scores[job.position][name] = failed(name, reason, cause)

    def blame(self, worker: _Worker, cause: Unscored, reason: str) -> None:
        """Put the fault on the call that was under way, and the rest of the worker's chunk back in front."""
        job = worker.jobs.popleft()
        if worker.finished:
            at = worker.step
            self.fail(job, job.names[at : at + 1], cause, reason)
            if job.names[at + 1 :]:
                worker.jobs.appendleft(replace(job, names=job.names[at + 1 :]))
        else:
            self.outputs.setdefault(job.position, None)
            self.fail(job, job.names, cause, f"finish(): {reason}")
        self.waiting.extendleft(reversed(worker.jobs))
        worker.jobs.clear()

    def episodes(self) -> list[Episode]:
        graded = []
        for position, (_, episode) in enumerate(self.pairs):
            own = self.scores[position]
            kept = tuple(score for score in episode.scores if score.name not in own)
            scores = kept + tuple(own[name] for name in self.graders)
            output = self.outputs.get(position)
            graded.append(episode.model_copy(update={"output": output, "scores": scores}))
        return graded


class _Worker:
    """One worker process, what it was given, and how far it has come."""

    def __init__(self, program: Path | None, time_limit_s: float) -> None:
        self.program = program
        self.time_limit_s = time_limit_s
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket
        self.log: Any = None
        self.jobs: deque[_Job] = deque()
        self.finished, self.step = False, 0
        self.deadline = 0.0
        self.ready = False
        self._buffer = b""

    def launch(self) -> None:
        """Start the process in its own session: Ctrl-C spares it, and a kill takes its children too."""
        self.channel, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        fcntl.fcntl(self.log, fcntl.F_SETFL, os.O_APPEND)
        paths = [str(Path(entry).resolve()) if entry == "" else entry for entry in sys.path]
        command = [sys.executable, "-c", _START, json.dumps(paths), str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        self._buffer, self.ready = b"", False
        self._write({"program": self.program, "time_limit_s": self.time_limit_s})

    def greet(self) -> list[str]:
        """Wait for the worker to be ready and return the names of the graders it has."""
        until = time.monotonic() + START_LIMIT_S
        while b"\n" not in self._buffer:
            if not wait([self.channel], max(0.0, until - time.monotonic())):
                raise BadInput(
                    f"{self.program} did not load within {START_LIMIT_S:g} s; move slow work out of its top level"
                )
            data = self._receive()
            if not data:
                _, reason = self.post_mortem()
                raise BadInput(f"a grader worker could not start with {self.program or 'no program'}: {reason}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        hello = json.loads(line)
        if "failure" in hello:
            raise BadInput(hello["failure"])
        self.ready = True
        return list(hello["graders"])

    def send(self, jobs: list[_Job], board: _Board) -> None:
        if os.fstat(self.log.fileno()).st_size > LOG_LIMIT:
            os.ftruncate(self.log.fileno(), 0)
        self._write([(*board.pairs[job.position], job.names) for job in jobs])
        self.jobs = deque(jobs)
        self.finished, self.step = False, 0
        self.deadline = time.monotonic() + self.time_limit_s

    def read(self, board: _Board) -> tuple[Unscored, str] | None:
        """Book the lines that have arrived. Returns a fault if the worker died or speaks gibberish."""
        data = self._receive()
        if not data:
            return Unscored.crash, ""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            for line in lines:
                self._book(line, board)
        except (ValueError, IndexError, KeyError):
            return (
                Unscored.error,
                "wrote into the pool's channel; a grader must leave open file descriptors alone",
            )
        if lines:
            self.deadline = time.monotonic() + self.time_limit_s
        return None

    def _book(self, line: bytes, board: _Board) -> None:
        job = self.jobs[0]
        if not self.finished:
            message = json.loads(line)
            if "failure" in message:
                board.outputs[job.position] = None
                board.fail(job, job.names, Unscored.error, message["failure"])
                self.jobs.popleft()
                return
            board.outputs[job.position] = message["output"]
            self.finished, self.step = True, 0
        else:
            name = job.names[self.step]
            board.scores[job.position][name] = Score.model_validate_json(line)
            self.step += 1
        if self.step == len(job.names):
            self.jobs.popleft()
            self.finished = False

    def post_mortem(self) -> tuple[Unscored, str]:
        """Say how the process ended and what it last wrote."""
        assert self.process is not None
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return Unscored.crash, "closed the pool's channel"
        if code == -signal.SIGALRM:
            return Unscored.timeout, f"did not end within {self.time_limit_s:g} s and was stopped"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        size = os.fstat(self.log.fileno()).st_size
        words = os.pread(self.log.fileno(), 2000, max(0, size - 2000)).decode("utf-8", "replace").strip()
        if "Fatal Python error" in words:
            words = words[words.rindex("Fatal Python error") :][:300]
        return Unscored.crash, f"its process {how}" + (f"; it last wrote: {words[-300:]}" if words else "")

    def stop(self) -> None:
        """End the process and everything it started. An idle worker gets a moment to leave by itself."""
        if self.process is None:
            return
        process, self.process = self.process, None
        self.channel.close()
        if self.ready and not self.jobs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.log.close()

    def _write(self, message: object) -> None:
        raw = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self.channel.settimeout(START_LIMIT_S)
        self.channel.sendall(LENGTH.pack(len(raw)) + raw)

    def _receive(self) -> bytes:
        try:
            return self.channel.recv(1 << 18)
        except OSError:
            return b""
