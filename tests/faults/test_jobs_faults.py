"""Workers and jobs that are killed, frozen or starved of disk: nothing is lost, nothing is done or counted twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults.jobs_work import PHASES, STEPS

from ascent.jobs.queue import Queue
from ascent.jobs.specs import ENDED, Job, JobSpec, Limits
from ascent.jobs.worker import WorkerSettings
from ascent.observe.database import open_database
from ascent.records.files import read_jsonl

TESTS = Path(__file__).parents[1]
OFTEN = 1000
TAKEN_OVER_S = 15.0  # half of the lease: a worker known to be gone is not waited for


class Site:
    """A queue in a folder, and worker processes on it."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        self.folder, self.database = folder, database or str(folder / "jobs.db")
        self.queue = Queue(open_database(database or folder / "jobs.db"), folder / "jobs")
        self.workers: list[subprocess.Popen[str]] = []

    def start(self, **more: Any) -> subprocess.Popen[str]:
        plain = {"slots": 2, "memory_mb": 8000, "poll_s": 0.05, "grace_s": 5.0, "pause_s": 0.1}
        settings = WorkerSettings(
            database=self.database, folder=self.folder / "jobs", kinds="faults.jobs_work:KINDS", **plain | more
        )
        worker = subprocess.Popen(
            [sys.executable, "-m", "ascent.jobs.worker"],
            stdin=subprocess.PIPE,
            stderr=(self.folder / "worker.log").open("a"),
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))},
        )
        assert worker.stdin is not None
        worker.stdin.write(settings.model_dump_json())
        worker.stdin.close()
        self.workers.append(worker)
        return worker

    def submit(self, kind: str = "count", *, attempts: int = OFTEN, **payload: Any) -> Job:
        return self.queue.submit(JobSpec(kind, "anna", f"{kind} it", payload, Limits(100, attempts=attempts)))

    def until(self, holds: Callable[[], Any], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (self.queue.list(), (self.folder / "worker.log").read_text()[-3000:])
            time.sleep(0.01)

    def end(self, job: Job) -> Job:
        self.until(lambda: self.queue.get(job.id).status in ENDED)
        return self.queue.get(job.id)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    close(found)


def close(site: Site) -> None:
    for worker in site.workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
            worker.kill()
        worker.wait()
    for pid in processes_of(*site.queue.list()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(*jobs: Job) -> set[int]:
    """Every process that works for some jobs, found by the folder that it works in."""
    found, folders = set(), {str(job.folder) for job in jobs}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd() in folders and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def main_process(job: Job) -> int | None:
    """The process that the worker started, which leads its session; None while there is none."""
    return next((pid for pid in processes_of(job) if os.getsid(pid) == pid), None)


def assert_done_once(site: Site, job: Job, *ends: str) -> None:
    """Every step is there once, in order; attempts are numbered without a gap and ended as said."""
    job = site.end(job)
    assert (job.status, job.result) == ("completed", {"steps": len(PHASES) * STEPS, "name": "count it"})
    rows = list(read_jsonl(job.folder / "work.jsonl"))
    assert [(row["phase"], row["step"]) for row in rows] == [(phase, step) for phase in PHASES for step in range(STEPS)]
    attempts = site.queue.attempts(job.id)
    assert [attempt.number for attempt in attempts] == list(range(1, job.attempts + 1))
    assert {row["attempt"] for row in rows} <= {attempt.number for attempt in attempts}
    outcomes = [attempt.outcome for attempt in attempts]
    assert outcomes[-1] == "completed" and outcomes.count("completed") == 1
    if ends:
        assert outcomes == [*ends, "completed"]
    site.until(lambda: not processes_of(job))


MATRIX = [(victim, phase) for victim in ("worker", "child") for phase in PHASES]
SAMPLE = [("worker", "train"), ("child", "save")]


def kill_in_phase(site: Site, victim: str, phase: str) -> None:
    job = site.submit(pause=0.3, slow=phase)
    worker = site.start()
    site.until(lambda: site.queue.get(job.id).phase == phase)
    if victim == "worker":
        worker.kill()
        worker.wait()
        site.until(lambda: not processes_of(job), 5)  # before anybody else looks: it took all of them along
        assert site.queue.get(job.id).status == "running"
        site.start()
        site.until(lambda: site.queue.get(job.id).attempts == 2, TAKEN_OVER_S)
        assert_done_once(site, job, "lost")
    else:
        found = main_process(job)
        assert found is not None
        os.kill(found, signal.SIGKILL)
        assert_done_once(site, job, "failed")
        assert "SIGKILL" in (site.queue.attempts(job.id)[0].message or "")


@pytest.mark.parametrize(("victim", "phase"), SAMPLE)
def test_a_kill_in_a_phase_loses_nothing(site: Site, victim: str, phase: str) -> None:
    kill_in_phase(site, victim, phase)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "phase"), [pair for pair in MATRIX if pair not in SAMPLE])
def test_a_kill_in_every_other_phase_loses_nothing(site: Site, victim: str, phase: str) -> None:
    kill_in_phase(site, victim, phase)


@pytest.mark.slow
def test_a_worker_killed_while_jobs_wait_loses_none(site: Site) -> None:
    first, waiting = site.submit(pause=0.1), site.submit(pause=0.0)
    worker = site.start(slots=1)
    site.until(lambda: site.queue.get(first.id).status == "running")
    worker.kill()
    assert (site.queue.get(waiting.id).status, site.queue.get(waiting.id).attempts) == ("queued", 0)
    site.start(slots=1)
    assert_done_once(site, first, "lost")
    assert_done_once(site, waiting)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_any_moment_finish_every_job_once(site: Site, seed: int) -> None:
    """Also while a job is claimed, started, or its end is written down."""
    dice = random.Random(seed)
    jobs = [site.submit(pause=0.06) for _ in range(6)]
    kills = 0
    while any(site.queue.get(job.id).status not in ENDED for job in jobs):
        before = sum(site.queue.get(job.id).attempts for job in jobs)
        worker = site.start()
        site.until(lambda before=before: sum(site.queue.get(job.id).attempts for job in jobs) > before)
        time.sleep(dice.uniform(0, 0.8))
        worker.kill()
        worker.wait()
        kills += 1
        assert kills < 60
    assert kills > 2
    for job in jobs:
        assert_done_once(site, job)
        assert {attempt.outcome for attempt in site.queue.attempts(job.id)} <= {"lost", "completed"}


def two_workers(site: Site) -> None:
    jobs = [site.submit(pause=0.01) for _ in range(8)]
    for _ in range(2):
        site.start()
    for job in jobs:
        assert_done_once(site, job)
        assert len(site.queue.attempts(job.id)) == 1
    workers = {site.queue.attempts(job.id)[0].worker for job in jobs}
    assert len(workers) == 2, "one worker did everything"


def test_two_workers_never_run_one_job_twice(site: Site) -> None:
    two_workers(site)


@pytest.mark.slow
def test_two_workers_on_postgresql_survive_a_kill(tmp_path: Path, postgres: str) -> None:
    site = Site(tmp_path, postgres)
    try:
        two_workers(site)
        for worker in site.workers:
            worker.kill()
        kill_in_phase(site, "worker", "train")
    finally:
        close(site)


@pytest.mark.slow
def test_a_frozen_worker_loses_its_job_and_does_no_harm_when_it_wakes(site: Site) -> None:
    job = site.submit(pause=1.0, slow="train")
    frozen = site.start(lease_s=1.0)
    site.until(lambda: site.queue.get(job.id).phase == "train")
    old = main_process(job)
    os.kill(frozen.pid, signal.SIGSTOP)
    other = site.start(lease_s=1.0)
    site.until(lambda: site.queue.get(job.id).attempts == 2 and main_process(job) not in (None, old))
    assert old not in processes_of(job), "two processes work in one folder"
    os.kill(frozen.pid, signal.SIGCONT)
    assert_done_once(site, job, "lost")
    other.kill()
    other.wait()
    assert site.end(site.submit("echo")).status == "completed", "the woken worker goes on with other jobs"
    assert frozen.poll() is None


def test_a_terminated_worker_gives_its_jobs_back_saved(site: Site) -> None:
    job = site.submit(pause=0.2, slow="train", attempts=1)
    worker = site.start()
    site.until(lambda: site.queue.get(job.id).phase == "train")
    worker.terminate()
    assert worker.wait(30) == 0
    assert site.queue.get(job.id).status == "queued" and not processes_of(job)
    site.start()
    assert_done_once(site, job, "released")


SLOW_ENDS = [pytest.param(end, marks=pytest.mark.slow) for end in ("completed", "crash", "cancel")]


@pytest.mark.parametrize("end", ["worker", *SLOW_ENDS])
def test_what_a_job_forked_is_gone_with_it(site: Site, end: str) -> None:
    seconds = 60 if end in ("cancel", "worker") else 0
    job = site.submit("fork", attempts=1, seconds=seconds, crash=end == "crash")
    worker = site.start()
    site.until(lambda: len(list(read_jsonl(job.folder / "pids.jsonl"))) == 3)
    pids = [row["pid"] for row in read_jsonl(job.folder / "pids.jsonl")]
    if end == "cancel":
        site.queue.cancel(job.id)
    if end == "worker":
        worker.kill()
        worker.wait()
        # Before anybody looks: only the one that made a session of its own is left, for whoever looks next.
        site.until(lambda: processes_of(job) == {pids[1]}, 5)
        site.start()
    expected = {"completed": "completed", "crash": "failed", "cancel": "stopped", "worker": "failed"}[end]
    assert site.end(job).status == expected
    site.until(lambda: not [pid for pid in pids if psutil.pid_exists(pid)] and not processes_of(job), 10)


def test_a_full_disk_under_the_log_fails_the_job_and_not_the_worker(site: Site) -> None:
    worker = site.start()
    limit = 16 << 20
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (limit, limit))
    loud = site.end(site.submit("shout", mb=20))
    assert loud.status == "failed" and loud.attempts == 1
    assert "cannot be written (File too large)" in (loud.message or "") and "log.txt" in (loud.message or "")
    assert (loud.folder / "log.txt").stat().st_size <= limit
    assert site.end(site.submit("echo")).status == "completed" and worker.poll() is None
    assert json.loads((loud.folder / "job.json").read_text())["id"] == loud.id
