"""The local executor: takes jobs from the queue and runs each in processes of its own, as many as the machine bears.

`python -m ascent.jobs.worker` reads `WorkerSettings` as JSON from standard input, so that no password of a database
shows in a list of processes. SIGTERM drains it: its jobs save their state and go back to the line.
"""

from __future__ import annotations

import errno
import importlib
import logging
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ConfigDict, Field

from ascent.inference.machine import this_machine
from ascent.jobs.attempt import AttemptRun, Ended, folder_bytes
from ascent.jobs.ledger import Ledger, Usage
from ascent.jobs.processes import end_all, follow, this_process
from ascent.jobs.queue import Queue
from ascent.jobs.share import memory_mb_of, slots_of
from ascent.jobs.specs import ENDED, USAGE_FILE, Job, Lease, LeaseLost, Quota
from ascent.jobs.tables import DBAPIError
from ascent.records.errors import BadInput, Corrupt, NoSpace, UnknownName
from ascent.records.files import read_jsonl

log = logging.getLogger("ascent.jobs")

BEATS = 5
"""Heartbeats within the time that a silent worker keeps its lease."""
MEASURE_S, STORED_S, REPORT_S = 1.0, 10.0, 1.0
"""Between two looks at a job's memory; at the size of its folder; between two notes of its progress."""
HELD_PAUSE_S = 5.0
AWAY = "the job database does not answer, trying again: %s"


class Worker:
    """Runs jobs until it is drained. One thread: it must be the one that lives as long as the process."""

    def __init__(
        self,
        queue: Queue,
        kinds: Mapping[str, str],
        slots: int | None = None,
        *,
        memory_mb: int | None = None,
        grace_s: float = 30.0,
        poll_s: float = 0.5,
        ledger: Ledger | None = None,
        passed: Iterable[str] = (),
    ) -> None:
        """Prepare a worker.

        Args:
            queue: where jobs come from.
            kinds: the function `package.module:name` of each kind.
            slots: jobs at a time; by default what the machine bears.
            memory_mb: what all of them together may hold; by default most of what the machine has.
            grace_s: how long a job that is to stop may take to save its state.
            poll_s: how often the line is looked at.
            ledger: where what jobs used is entered.
            passed: names of environment variables that jobs are given besides the harmless ones.
        """
        machine = this_machine()
        self.queue, self.kinds, self.ledger, self.passed = queue, dict(kinds), ledger, tuple(passed)
        self.slots = slots_of(machine) if slots is None else slots
        self.memory_mb = memory_mb or memory_mb_of(machine)
        self.threads = max(1, machine.cores // max(1, self.slots))
        self.grace_s, self.poll_s, self.name = grace_s, poll_s, this_process()
        self.runs: list[AttemptRun] = []
        self._due: dict[tuple[str, str], float] = {}
        self._draining = threading.Event()

    def drain(self) -> None:
        """Take no more jobs; let those that run save their state and go back to the line. `run` then returns."""
        self._draining.set()

    def run(self) -> None:
        """Work until drained, and on if the database is away for a while."""
        while not (self._draining.is_set() and not self.runs):
            self.wait()
            try:
                self.step()
            except DBAPIError as error:
                log.warning(AWAY, error.orig)
                time.sleep(self.poll_s)

    def step(self) -> None:
        """Look once at everything: processes, leases, the line."""
        for run in list(self.runs):
            self._look_after(run)
        if self._is_due("", "expire", self.queue.lease_s / BEATS):
            for job in self.queue.expire():
                log.warning("job %s is %s again: %s", job.id, job.status, job.message)
                end_all(job.id, range(job.attempts + 1))
                if job.status in ENDED:
                    self._charge(job)
        while len(self.runs) < self.slots and not self._draining.is_set() and self._is_due("", "claim", self.poll_s):
            free = self.memory_mb - sum(run.lease.job.spec.limits.memory_mb for run in self.runs)
            lease = self.queue.claim(self.name, free_mb=free, total_mb=self.memory_mb)
            if lease is None:
                break
            self._begin(lease)
            self._due.pop(("", "claim"))

    def wait(self) -> None:
        """Wait until a job has written something, `poll_s` at most."""
        pipes = [pipe for run in self.runs for pipe in run.pipes]
        poll = select.poll()
        for pipe in pipes:
            poll.register(pipe, select.POLLIN)
        poll.poll(self.poll_s * 1000)

    def _begin(self, lease: Lease) -> None:
        job = lease.job
        log.info("job %s (%s) starts, attempt %d", job.id, job.kind, lease.number)
        try:
            if job.kind not in self.kinds:
                raise UnknownName("kind of job", job.kind, self.kinds)
            run = AttemptRun(lease, self.kinds[job.kind], threads=self.threads, passed=self.passed)
        except (OSError, NoSpace, UnknownName) as error:
            again = isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM)
            self.queue.fail(lease, f"the job could not be started: {error}", retry=again)
            return
        self.runs.append(run)

    def _look_after(self, run: AttemptRun) -> None:
        run.read()
        ended = run.poll()
        try:
            if ended is not None:
                self._settle(run, ended)
            else:
                self._watch(run)
        except LeaseLost as error:
            log.warning("%s", error)
            run.kill()
            if ended is None:
                run.process.wait()
                run.poll()
            self._forget(run)
        except DBAPIError as error:
            log.warning(AWAY, error.orig)

    def _watch(self, run: AttemptRun) -> None:
        job, limits = run.lease.job, run.lease.job.spec.limits
        if self._draining.is_set():
            run.ask()
        run.press_on(self.grace_s)
        if run.trouble is None and limits.seconds is not None and run.seconds > limits.seconds:
            what = f"it took longer than its limit of {limits.seconds:g} s; what it saved lies in its folder"
            run.give_up(Ended("failed", what))
        if self._is_due(job.id, "memory", MEASURE_S) and run.memory_mb() > limits.memory_mb:
            what = f"its processes held {run.peak_mb:.0f} MiB of memory and its limit is {limits.memory_mb} MiB"
            run.give_up(Ended("memory", what), at_once=True)
        if self._is_due(job.id, "stored", STORED_S):
            self.queue.heartbeat(run.lease, stored=folder_bytes(run.folder))
            if problem := self.queue.over_quota(job.owner):
                run.give_up(Ended("failed", problem))
        if self._is_due(job.id, "beat", self._beat_s) and self.queue.heartbeat(run.lease) == "stopping":
            run.ask()
        if run.moved_on or (run.changed and self._is_due(job.id, "report", REPORT_S)):
            self._report(run)

    def _report(self, run: AttemptRun) -> None:
        self.queue.report(run.lease, phase=run.phase, done=run.done, total=run.total)
        run.changed = run.moved_on = False

    @property
    def _beat_s(self) -> float:
        return min(self.queue.lease_s / BEATS, max(self.poll_s, 1.0))  # a second, for a cancel to be quick

    def _settle(self, run: AttemptRun, ended: Ended) -> None:
        """Enter what was used, then close the attempt: repeated whole if the database breaks off in between."""
        queue, lease = self.queue, run.lease
        status = queue.heartbeat(lease, stored=folder_bytes(run.folder))
        if run.changed:
            self._report(run)
        time_used = Usage(f"{lease.job.id}/{lease.number}/time", lease.job.owner, job=lease.job.id, seconds=run.seconds)
        self._charge(lease.job, time_used)
        leaving = self._draining.is_set() and run.trouble is None and ended.outcome != "failed"
        if ended.outcome == "completed":
            queue.finish(lease, ended.result or {})
        elif status == "stopping":
            queue.stop(lease)
        elif leaving:
            queue.release(lease, "given back to the line: its worker was shut down")
        elif ended.outcome == "held":
            queue.release(lease, "another process still works in its folder", pause_s=HELD_PAUSE_S)
        elif ended.outcome == "memory":
            alone = lease.job.spec.limits.memory_mb < self.memory_mb
            hint = "; it is tried once more, alone" if alone else "; lower its batch or context, or raise its limit"
            queue.fail(lease, ended.message + hint, retry=alone, memory_mb=self.memory_mb)
        else:
            queue.fail(lease, ended.message, retry=ended.retry or ended.outcome == "interrupted")
        self._forget(run)
        took = (run.seconds, run.peak_mb)
        log.info(
            "job %s: attempt %d %s after %.1f s, at most %.0f MiB", lease.job.id, lease.number, ended.outcome, *took
        )

    def _charge(self, job: Job, *more: Usage) -> None:
        """Enter what the job noted in its folder; what an earlier attempt's end entered is known by its key."""
        if self.ledger is None:
            return
        usage = list(more)
        try:
            for row in read_jsonl(job.folder / USAGE_FILE):
                key = f"{job.id}:{row.pop('key')}"
                usage.append(Usage(key, job.owner, job=job.id, operation=job.kind, **row))
        except (BadInput, Corrupt, TypeError, KeyError) as error:
            log.error("what job %s used cannot be read: %s", job.id, error)
        self.ledger.record(*usage)

    def _forget(self, run: AttemptRun) -> None:
        self.runs.remove(run)
        gone = (run.lease.job.id, "")  # with it goes the wait before the line is looked at again
        self._due = {(job, what): at for (job, what), at in self._due.items() if job not in gone or what == "expire"}

    def _is_due(self, job: str, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.get((job, what), 0.0):
            return False
        self._due[job, what] = now + every_s
        return True


class WorkerSettings(BaseModel):
    """What a worker process is told.

    Attributes:
        database: an SQLAlchemy address, or a file's path.
        folder: of the jobs.
        kinds: `package.module:NAME` of the mapping from kind to function.
        slots, memory_mb: for all its jobs; what the machine bears when left out.
        lease_s, pause_s: as `Queue` takes them.
        grace_s, poll_s: as `Worker` takes them.
        prices: a price list; without one, use costs nothing.
        quota, quotas: of every owner, and the exceptions.
        passed: names of environment variables that jobs are given.
        parent: the process that started the worker; the worker ends with it, and its jobs go on with the next one.
    """

    model_config = ConfigDict(extra="forbid")

    database: str
    folder: Path
    kinds: str
    slots: int | None = Field(default=None, ge=1)
    memory_mb: int | None = Field(default=None, ge=1)
    lease_s: float = Field(default=30.0, gt=0)
    grace_s: float = Field(default=30.0, ge=0)
    poll_s: float = Field(default=0.5, gt=0)
    pause_s: float = Field(default=5.0, ge=0)
    prices: Path | None = None
    quota: Quota = Quota()
    quotas: dict[str, Quota] = {}
    passed: tuple[str, ...] = ()
    parent: int | None = None


def make_worker(settings: WorkerSettings) -> Worker:
    """Return the worker that settings describe. Raises BadInput when kinds or database cannot be opened."""
    from ascent.jobs.prices import load_prices
    from ascent.observe.database import open_database

    module, _, name = settings.kinds.partition(":")
    try:
        kinds: dict[str, str] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"no kinds of jobs at {settings.kinds!r} ({error}); write package.module:NAME") from error
    engine = open_database(settings.database if "://" in settings.database else Path(settings.database))
    queue = Queue(
        engine,
        settings.folder,
        quota=settings.quota,
        quotas=settings.quotas,
        lease_s=settings.lease_s,
        pause_s=settings.pause_s,
    )
    return Worker(
        queue,
        kinds,
        settings.slots,
        memory_mb=settings.memory_mb,
        grace_s=settings.grace_s,
        poll_s=settings.poll_s,
        ledger=Ledger(engine, load_prices(settings.prices)),
        passed=settings.passed,
    )


def main() -> None:
    """Run the worker whose settings stand on standard input, until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = WorkerSettings.model_validate_json(sys.stdin.read())
    worker = make_worker(settings)

    def drain(number: int, frame: FrameType | None) -> None:
        worker.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain)
    if settings.parent is not None:
        follow(settings.parent, signal.SIGTERM)
    worker.run()


if __name__ == "__main__":
    main()
