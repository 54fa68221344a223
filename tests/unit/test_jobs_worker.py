"""A worker and the processes of its jobs, watched from outside."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults.jobs_work import KINDS
from sqlalchemy.exc import OperationalError

from ascent.inference.machine import this_machine
from ascent.jobs.attempt import LOG_BYTES
from ascent.jobs.child import explain
from ascent.jobs.ledger import Ledger
from ascent.jobs.prices import PriceList
from ascent.jobs.processes import is_gone, shown, this_process
from ascent.jobs.queue import Queue
from ascent.jobs.share import memory_mb_of, slots_of
from ascent.jobs.specs import Job, JobSpec, Limits, Quota
from ascent.jobs.worker import Worker, WorkerSettings, make_worker
from ascent.observe.database import open_database
from ascent.records.errors import BadInput, Busy, MissingExtra, NoSpace

TESTS = Path(__file__).parents[1]
IMPORTED = os.pathsep.join((str(TESTS), str(TESTS.parent)))


class House:
    """A queue and one worker on it, driven by hand."""

    def __init__(self, folder: Path, **worker: Any) -> None:
        self.engine = open_database(folder / "jobs.db")
        self.queue = Queue(self.engine, folder / "jobs", quota=worker.pop("quota", None), pause_s=0.0)
        settings = {"slots": 2, "memory_mb": 4000, "grace_s": 5.0, "poll_s": 0.05, "ledger": None} | worker
        self.worker = Worker(self.queue, KINDS, **settings)

    def submit(self, kind: str, payload: dict[str, Any] | None = None, **limits: Any) -> Job:
        return self.queue.submit(JobSpec(kind, "anna", f"{kind} it", payload or {}, Limits(**limits)))

    def until(self, holds: Callable[[], Any], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, [job for job in self.queue.list()]
            self.worker.wait()
            self.worker.step()

    def end(self, *jobs: Job) -> list[Job]:
        self.until(lambda: all(self.queue.get(job.id).status in ("completed", "failed", "stopped") for job in jobs))
        return [self.queue.get(job.id) for job in jobs]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("PYTHONPATH", IMPORTED)
    monkeypatch.setenv("SERVER_SECRET", "hunter2")
    monkeypatch.setenv("WANTED", "yes")
    return House(tmp_path, passed=("WANTED",))


def test_jobs_run_in_processes_of_their_own(house: House) -> None:
    echo, count = house.submit("echo", {"ä": [1, None]}), house.submit("count")
    first, second = house.end(echo, count)
    assert first.status == second.status == "completed" and second.result == {"steps": 12, "name": "count it"}
    assert (second.phase, second.done, second.total, second.progress) == ("register", 3, 3, 1.0)
    assert first.result is not None and first.result["payload"] == {"ä": [1, None]}
    assert first.result["folder"] == str(first.folder) and str(first.folder) not in first.result["path"]
    assert house.queue.logs(echo.id).text == "hello from echo it of anna\n"
    assert first.stored > 0
    seen = first.result["environment"]
    assert seen["WANTED"] == "yes" and "SERVER_SECRET" not in seen
    assert seen["OMP_NUM_THREADS"] == str(max(1, this_machine().cores // 2))
    assert not [name for name in seen if name.startswith("ASCENT_JOB_")]
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert first.result["nice"] == 19 and first.result["autogroup"] in ("", "nice 19")
    assert first.result["oom_score_adj"] == max(500, own) and own < 500, "the kernel ends jobs before their worker"


def test_what_a_job_ends_with_is_said_and_retried_only_where_it_helps(house: House) -> None:
    kinds = ("refuse", "away", "broken", "crash", "full", "unknown")
    refused, away, broken, crashed, full, unknown = house.end(*(house.submit(kind, attempts=2) for kind in kinds))
    assert (refused.status, refused.message, refused.attempts) == ("failed", "data.jsonl:7: no target; add one", 1)
    assert (away.status, away.result, away.attempts) == ("completed", {"attempt": 2}, 2)
    assert broken.attempts == 1 and "not JSON serializable" in (broken.message or "")
    assert crashed.attempts == 2 and "status 7" in (crashed.message or "") and "2 of 2" in (crashed.message or "")
    assert full.attempts == 1 and "disk is full" in (full.message or "")
    assert "unknown kind of job 'unknown'" in (unknown.message or "")
    assert "Traceback" in house.queue.logs(broken.id).text


@pytest.mark.parametrize(
    ("error", "outcome", "retry"),
    [
        (BadInput("x"), "failed", False),
        (MissingExtra("serve", "x"), "failed", False),
        (NoSpace("x"), "failed", False),
        (Busy("x", retry_after_s=1), "failed", True),
        (ConnectionResetError("x"), "failed", True),
        (ZeroDivisionError("x"), "failed", False),
        (MemoryError(), "memory", None),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "memory", None),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_errors_are_sorted(error: BaseException, outcome: str, retry: bool | None) -> None:
    found = explain(error)
    assert (found["outcome"], found.get("retry")) == (outcome, retry) and found["message"]


@pytest.mark.slow
def test_too_much_memory_ends_a_job_of_two_processes_and_tries_it_alone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascent.jobs.worker.MEASURE_S", 0.2)
    other = house.submit("sleep", {"seconds": 2}, memory_mb=100)
    # Two processes of 150 MiB: neither is above the limit, both together are.
    job = house.submit("hog", {"mb": 150, "seconds": 1.5}, memory_mb=250)
    house.until(lambda: house.queue.attempts(job.id) and house.queue.attempts(job.id)[0].outcome == "failed")
    (first,) = house.queue.attempts(job.id)
    assert "its limit is 250 MiB" in (first.message or "") and "once more, alone" in (first.message or "")
    assert house.queue.get(job.id).spec.limits.memory_mb == house.worker.memory_mb
    ended, _ = house.end(job, other)
    assert ended.status == "completed" and ended.attempts == 2
    assert ended.started is not None and house.queue.attempts(job.id)[1].started >= house.queue.get(other.id).ended


def test_a_job_beyond_all_memory_fails_at_once(house: House) -> None:
    house.worker.memory_mb = 250
    (job,) = house.end(house.submit("hog", {"mb": 200, "seconds": 30}, memory_mb=250))
    assert job.status == "failed" and job.attempts == 1 and "lower its batch" in (job.message or "")


def test_admission_is_by_the_sum_of_memory(house: House) -> None:
    jobs = [house.submit("sleep", {"seconds": 0.2}, memory_mb=2500) for _ in range(2)]
    most = 0

    def over() -> bool:
        nonlocal most
        most = max(most, len(house.worker.runs))
        return all(house.queue.get(job.id).status == "completed" for job in jobs)

    house.until(over)
    assert most == 1


@pytest.mark.slow
def test_a_time_limit_ends_a_job_with_its_reason(house: House) -> None:
    (job,) = house.end(house.submit("sleep", seconds=0.5))
    assert job.status == "failed" and job.attempts == 1 and "limit of 0.5 s" in (job.message or "")


@pytest.mark.parametrize("kind", ["sleep", pytest.param("stubborn", marks=pytest.mark.slow)])
def test_a_cancel_ends_a_job_that_listens_and_one_that_does_not(
    house: House, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.worker.grace_s = 0.3 if kind == "stubborn" else 60.0  # one that listens needs no more than the first signal
    monkeypatch.setattr("ascent.jobs.attempt.TERM_S", 0.3)
    job = house.submit(kind)
    house.until(lambda: house.queue.get(job.id).phase == "asleep")
    pid = house.worker.runs[0].process.pid
    assert house.queue.cancel(job.id).status == "stopping"
    (job,) = house.end(job)
    assert job.status == "stopped" and not psutil.pid_exists(pid)


def test_a_job_over_its_owners_storage_is_ended(tmp_path: Path, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascent.jobs.worker.STORED_S", 0.1)
    other = House(tmp_path / "small", quota=Quota(stored_mb=1))
    job = other.submit("sleep")
    (job.folder / "checkpoint").write_bytes(b"x" * (2 << 20))
    (job,) = other.end(job)
    assert job.status == "failed" and "store 2 MiB" in (job.message or "")


def test_a_long_log_is_cut_and_the_job_goes_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascent.jobs.attempt.LOG_BYTES", 1 << 20)
    (job,) = house.end(house.submit("shout", {"mb": 3}))
    size = (job.folder / "log.txt").stat().st_size
    assert job.status == "completed" and 1 << 20 <= size < 1 << 21 < LOG_BYTES
    assert (job.folder / "log.txt").read_text().endswith("what follows is left out]\n")


def test_what_jobs_use_is_charged_once_though_they_are_resumed(tmp_path: Path, house: House) -> None:
    prices = PriceList.model_validate({"models": {"tiny": {"training": "0.5"}}, "default": {"second": "1"}})
    other = House(tmp_path / "charged", ledger=Ledger(open_database(tmp_path / "charged" / "jobs.db"), prices))
    (job,) = other.end(other.submit("count", {"die": "save"}))
    assert job.status == "completed" and job.attempts == 2
    assert other.worker.ledger is not None
    time_used, trained = other.worker.ledger.totals("anna", by="model")
    assert (trained.name, trained.rows, trained.training_tokens) == ("tiny", 12, 1200)
    assert trained.cost_micros == 600_000  # 1.2 thousand at half a dollar
    assert time_used.rows == 2 and time_used.cost_micros == 1000 * time_used.milliseconds > 0


def test_a_database_that_is_away_does_not_end_the_worker(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job = house.submit("count", {"pause": 0.02})
    house.until(lambda: house.worker.runs)
    calls = {"failed": 0}
    real = house.queue.heartbeat

    def heartbeat(*arguments: Any, **more: Any) -> Any:
        if calls["failed"] < 3:
            calls["failed"] += 1
            raise OperationalError("update", {}, RuntimeError("disk I/O error"))
        return real(*arguments, **more)

    monkeypatch.setattr(house.queue, "heartbeat", heartbeat)
    (job,) = house.end(job)
    assert (job.status, job.attempts, calls["failed"]) == ("completed", 1, 3)


def test_a_folder_in_which_another_process_works_is_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker of another host may still do, whose processes cannot be ended from here."""
    monkeypatch.setattr("ascent.jobs.worker.HELD_PAUSE_S", 0.0)
    job = house.submit("echo", attempts=1)
    with (job.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        house.until(lambda: len(house.queue.attempts(job.id)) == 2)
    (job,) = house.end(job)
    assert job.status == "completed" and house.queue.attempts(job.id)[0].outcome == "released"


def test_a_process_is_known_by_more_than_its_number() -> None:
    name = this_process()
    assert not is_gone(name) and not is_gone("another-host/1/1") and not is_gone("w") and not is_gone(None)
    machine, pid, started = name.split("/")
    assert shown(name) == f"{socket.gethostname()}:{os.getpid()}" and shown("w") == "w"
    assert is_gone(f"{machine}/{pid}/{int(started) - 1}"), "the number was given to another process since"
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, this_process().encode())
        os._exit(0)
    theirs = os.read(read, 1000).decode()
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert is_gone(theirs), "a zombie does nothing any more"
    os.waitpid(child, 0)
    assert is_gone(theirs)


def test_jobs_take_less_than_the_machine() -> None:
    machine = this_machine()
    assert 1 <= slots_of(machine) <= machine.cores and 0 < memory_mb_of(machine) << 20 < machine.memory


def test_a_worker_without_its_kinds_does_not_start(tmp_path: Path) -> None:
    for kinds in ("faults.jobs_work:NONE", "faults.nothing:KINDS", "faults"):
        with pytest.raises(BadInput, match=r"package\.module:NAME"):
            make_worker(WorkerSettings(database=str(tmp_path / "jobs.db"), folder=tmp_path, kinds=kinds))


@pytest.mark.slow
def test_a_job_that_never_stops_writing_lets_others_run(house: House) -> None:
    """Its log is read in turns; heartbeats, limits and cancels go on."""
    (job,) = house.end(house.submit("shout", {"mb": 100_000}, seconds=1.0))
    assert job.status == "failed" and "limit of 1 s" in (job.message or "")


def test_pipes_and_processes_do_not_leak(house: House) -> None:
    house.end(house.submit("echo"))
    before = open_pipes(), set(psutil.Process().children())
    house.end(*(house.submit("echo") for _ in range(2)))
    assert (open_pipes(), set(psutil.Process().children())) == before


def open_pipes() -> int:
    """How many of this process's descriptors are pipes or job logs."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(name.startswith("pipe:") or name.endswith("log.txt") for name in found)
