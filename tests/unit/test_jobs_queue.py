"""The queue's states, checked against a model of it, and races of threads on one queue and one database."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ascent.jobs.queue import LONGEST_PAUSE_S, Queue
from ascent.jobs.specs import ENDED, JobSpec, LeaseLost, Limits, Quota, QuotaExceeded
from ascent.jobs.tables import ATTEMPTS, sa
from ascent.observe.database import open_database
from ascent.records.errors import BadInput, Busy, UnknownName

LEASE_S = 30.0


class Clock:
    """Both clocks of a queue; the wall one can be put back."""

    def __init__(self) -> None:
        self.now, self.wall_now = 100.0, 1_800_000_000.0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.wall_now += seconds

    def queue(self, folder: Path, engine: Any = None, **more: Any) -> Queue:
        engine = engine if engine is not None else open_database(folder / "jobs.db")
        more = {"lease_s": LEASE_S, "wall": lambda: self.wall_now, "clock": lambda: self.now} | more
        return Queue(engine, folder / "jobs", **more)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(database: Any) -> Any:
    return database


def spec(owner: str = "anna", name: str = "job", **limits: Any) -> JobSpec:
    return JobSpec("echo", owner, name, {"a": 1}, Limits(**limits))


def test_a_job_goes_through_its_states(engine: Any, clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path, engine)
    first, second = queue.submit(spec(name="a")), queue.submit(spec(name="b"))
    assert (first.status, first.position, second.position) == ("queued", 1, 2)
    assert first.folder.is_dir() and first.progress is None
    lease = queue.claim("w")
    assert lease is not None and lease.job.id == first.id and queue.get(second.id).position == 1
    clock.pass_time(5)
    assert queue.heartbeat(lease, stored=123) == "running"
    queue.report(lease, phase="train", done=3, total=4)
    now = queue.get(first.id)
    assert (now.phase, now.progress, now.stored, queue.stored("anna")) == ("train", 0.75, 123, 123)
    queue.finish(lease, {"model": "m"})
    now = queue.get(first.id, "anna")
    assert (now.status, now.result, now.attempts) == ("completed", {"model": "m"}, 1)
    assert now.ended == datetime.fromtimestamp(clock.wall_now, UTC) and now.started is not None
    (attempt,) = queue.attempts(first.id)
    assert (attempt.number, attempt.worker, attempt.outcome) == (1, "w", "completed")
    for late in (lambda: queue.finish(lease, {}), lambda: queue.fail(lease, "x"), lambda: queue.heartbeat(lease)):
        with pytest.raises(LeaseLost, match="completed"):
            late()
    assert [job.name for job in queue.list("anna")] == ["b", "a"]
    assert [job.name for job in queue.list(status=ENDED)] == ["a"] and queue.list("anna", kind="other") == ()


def test_another_owners_job_is_as_if_it_did_not_exist(clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path)
    job = queue.submit(spec("anna"))
    for call in (queue.get, queue.cancel, queue.logs, queue.attempts):
        with pytest.raises(UnknownName) as caught:
            call(job.id, "bert")
        assert str(caught.value).count(job.id) == 1  # the one that was asked for
    assert queue.list("bert") == () and queue.get(job.id).status == "queued"


def test_a_token_stands_for_one_job_of_one_owner(engine: Any, clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path, engine)
    made: list[str] = []

    def submit() -> None:
        made.append(queue.submit(spec(), "t").id)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(set(made)) == 1 and len(queue.list()) == 1
    assert queue.submit(spec("bert"), "t").id != made[0]
    with pytest.raises(BadInput, match="other settings"):
        queue.submit(spec(name="another"), "t")


def test_what_does_not_fit_is_refused_or_waits(clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path, memory_mb=1000)
    with pytest.raises(BadInput, match=r"need 1001 MiB.*gives jobs 1000 MiB"):
        queue.submit(spec(memory_mb=1001))
    large, small = queue.submit(spec(memory_mb=900)), queue.submit(spec(memory_mb=100))
    assert queue.claim("w", free_mb=500, total_mb=1000) is None, "a small job would starve the large one"
    other = queue.claim("small machine", free_mb=500, total_mb=500)
    assert other is not None and other.job.id == small.id
    lease = queue.claim("w", free_mb=900, total_mb=1000)
    assert lease is not None and lease.job.id == large.id


def test_quotas_bound_what_an_owner_runs_queues_and_stores(engine: Any, clock: Clock, tmp_path: Path) -> None:
    quotas = {"vip": Quota()}
    queue = clock.queue(tmp_path, engine, quota=Quota(running=1, queued=2, stored_mb=1), quotas=quotas)
    for _ in range(2):
        queue.submit(spec())
    with pytest.raises(Busy, match="2 jobs in line") as caught:
        queue.submit(spec())
    assert caught.value.retry_after_s > 0
    for _ in range(3):
        queue.submit(spec("vip"))
    claims = [queue.claim("w") for _ in range(5)]
    assert Counter(lease.job.owner for lease in claims if lease) == {"anna": 1, "vip": 3}
    lease = next(lease for lease in claims if lease and lease.job.owner == "anna")
    queue.heartbeat(lease, stored=1 << 20)
    assert "store 1 MiB" in (queue.over_quota("anna") or "") and queue.over_quota("vip") is None
    with pytest.raises(QuotaExceeded, match="1 MiB are allowed"):
        queue.submit(spec())
    queue.finish(lease, {})
    assert queue.claim("w") is not None


def test_a_silent_worker_loses_its_job_and_a_zombie_cannot_end_it(engine: Any, clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path, engine)
    job = queue.submit(spec())
    zombie = queue.claim("zombie")
    assert zombie is not None and queue.expire() == ()
    clock.pass_time(LEASE_S - 1)
    queue.heartbeat(zombie)
    assert queue.expire() == ()
    clock.pass_time(LEASE_S - 1)
    assert queue.expire() == (), "it was heard of within the lease"
    clock.pass_time(1)
    (lost,) = queue.expire()
    assert lost.status == "queued" and "zombie was lost" in (lost.message or "")
    lease = queue.claim("next")
    assert lease is not None and lease.number == 2
    for late in (
        lambda: queue.finish(zombie, {"late": 1}),
        lambda: queue.fail(zombie, "late"),
        lambda: queue.stop(zombie),
        lambda: queue.release(zombie, "late"),
        lambda: queue.report(zombie, phase="late", done=1, total=1),
        lambda: queue.heartbeat(zombie),
    ):
        with pytest.raises(LeaseLost, match="attempt 1"):
            late()
    queue.finish(lease, {"late": 0})
    assert queue.get(job.id).result == {"late": 0}
    assert [attempt.outcome for attempt in queue.attempts(job.id)] == ["lost", "completed"]


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_wall_clock_that_jumps_neither_ends_nor_prolongs_anything(clock: Clock, tmp_path: Path, jump: float) -> None:
    queue = clock.queue(tmp_path)
    queue.submit(spec(attempts=9))
    lease = queue.claim("w")
    assert lease is not None
    queue.expire()
    clock.wall_now += jump
    clock.pass_time(LEASE_S - 1)
    assert queue.expire() == () and queue.heartbeat(lease) == "running"
    assert queue.fail(lease, "crash", retry=True) == "queued"
    clock.wall_now -= abs(jump)  # the pause now seems to end in eleven days
    assert queue.claim("w") is not None
    clock.pass_time(1)
    assert queue.expire() == ()
    clock.pass_time(LEASE_S)
    assert len(queue.expire()) == 1


def test_attempts_are_limited_and_pause_longer_every_time(clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path, pause_s=0.4 * LONGEST_PAUSE_S)
    job = queue.submit(spec(attempts=4))
    for wait in (120, 240, 300):
        lease = queue.claim("w")
        assert lease is not None and queue.fail(lease, "crash", retry=True) == "queued"
        clock.pass_time(wait - 0.01)
        assert queue.claim("w") is None
        clock.pass_time(0.02)
    lease = queue.claim("w")
    assert lease is not None and queue.fail(lease, "crash \0", retry=True) == "failed"
    assert queue.get(job.id).message == "crash  (attempt 4 of 4)"
    again = queue.submit(spec(attempts=3))
    lease = queue.claim("w")
    assert lease is not None and queue.fail(lease, "line 7", retry=False) == "failed"
    assert queue.get(again.id).message == "line 7" and len(queue.attempts(again.id)) == 1


def test_a_job_given_back_counts_no_failure(clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path)
    job = queue.submit(spec(attempts=1))
    for number in (1, 2, 3):
        lease = queue.claim("w")
        assert lease is not None and lease.number == number and queue.release(lease, "shut down") == "queued"
    assert {attempt.outcome for attempt in queue.attempts(job.id)} == {"released"}


@pytest.mark.parametrize("end", ["stop", "fail", "release", "expire", "finish"])
def test_a_running_job_is_stopped_through_stopping(clock: Clock, tmp_path: Path, end: str) -> None:
    queue = clock.queue(tmp_path)
    job = queue.submit(spec())
    assert queue.cancel(queue.submit(spec()).id).status == "stopped"
    lease = queue.claim("w")
    assert lease is not None and queue.cancel(job.id, "anna").status == "stopping"
    assert queue.heartbeat(lease) == "stopping" == queue.cancel(job.id).status
    queue.expire()
    clock.pass_time(LEASE_S)
    {
        "stop": lambda: queue.stop(lease),
        "fail": lambda: queue.fail(lease, "crash", retry=True),
        "release": lambda: queue.release(lease, "drained"),
        "expire": queue.expire,
        "finish": lambda: queue.finish(lease, {"through": True}),
    }[end]()
    expected = "completed" if end == "finish" else "stopped"
    assert queue.get(job.id).status == expected == queue.cancel(job.id).status
    assert queue.claim("w") is None


def test_clean_removes_old_folders_but_no_running_or_referenced_one(clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path)
    names = ("old", "referenced", "running", "young")
    jobs = {name: queue.submit(spec(name=name)) for name in names}
    leases = {name: queue.claim("w") for name in names}
    for job in jobs.values():
        (job.folder / "model").mkdir()
        (job.folder / "model" / "weights").write_bytes(b"x" * 10)
    for name in ("old", "referenced"):
        queue.finish(leases[name], {})  # type: ignore[arg-type]
    clock.pass_time(100)
    queue.finish(leases["young"], {})  # type: ignore[arg-type]
    (tmp_path / "jobs" / ".removed-crashed").mkdir()
    (tmp_path / "link").symlink_to(jobs["referenced"].folder / "model")
    assert queue.clean(50, keep=[tmp_path / "link"]) == (jobs["old"].id,)
    left = {path.name for path in (tmp_path / "jobs").iterdir()}
    assert left == {jobs[name].id for name in ("referenced", "running", "young")}
    assert queue.get(jobs["old"].id).status == "completed" and queue.clean(50, keep=[tmp_path / "link"]) == ()


def test_a_deleted_job_leaves_nothing(engine: Any, clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path, engine)
    job, other = queue.submit(spec(name="gone")), queue.submit(spec(name="stays"))
    with pytest.raises(BadInput, match="is queued; stop it first"):
        queue.delete(job.id)
    lease = queue.claim("w")
    assert lease is not None and lease.job.id == job.id
    queue.finish(lease, {})
    with pytest.raises(UnknownName):
        queue.delete(job.id, "somebody else")
    assert queue.delete(job.id, job.owner).id == job.id
    with pytest.raises(UnknownName):
        queue.get(job.id)
    assert {path.name for path in (tmp_path / "jobs").iterdir()} == {other.id}
    with engine.connect() as connection:
        assert connection.execute(sa.select(ATTEMPTS)).all() == []


def test_logs_are_read_on_from_where_the_last_part_ended(clock: Clock, tmp_path: Path) -> None:
    queue = clock.queue(tmp_path)
    job = queue.submit(spec())
    lease = queue.claim("w")
    assert lease is not None and queue.logs(job.id).text == ""
    text = "step 1: ä\nstep 2\nhalf a li"
    (job.folder / "log.txt").write_text(text)
    part = queue.logs(job.id)
    assert part.text == "step 1: ä\nstep 2\n"
    assert queue.logs(job.id, since=part.next).text == ""
    queue.finish(lease, {})
    assert queue.logs(job.id, since=part.next).text == "half a li"


@pytest.mark.parametrize("limits", [{"memory_mb": 0}, {"seconds": -1.0}, {"attempts": 0}, {"seconds": float("nan")}])
def test_limits_must_be_positive(limits: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(limits))):
        Limits(**limits)


@pytest.mark.parametrize("field", ["kind", "owner", "name"])
@pytest.mark.parametrize("value", ["", "x" * 257, "a\0b"])
def test_names_must_fit_the_database(field: str, value: str) -> None:
    with pytest.raises(BadInput, match=field):
        JobSpec(**({"kind": "k", "owner": "o", "name": "n"} | {field: value}))


def race(queues: list[Queue], jobs: int, quota: int) -> None:
    """Workers with a queue object each claim, break, stop and finish; every job must end once, never in two hands."""
    hands, most, ends = Counter[str](), Counter[str](), Counter[str]()
    lock, left, errors = threading.Lock(), threading.Event(), list[Exception]()

    def run(queue: Queue, index: int) -> None:
        try:
            work(queue, index)
        except Exception as error:
            errors.append(error)
            left.set()

    def work(queue: Queue, index: int) -> None:
        while not left.is_set():
            lease = queue.claim(f"w{index}")
            if lease is None:
                continue
            with lock:
                hands[lease.job.id] += 1
                hands[lease.job.owner] += 1
                most[lease.job.id] = max(most[lease.job.id], hands[lease.job.id])
                most[lease.job.owner] = max(most[lease.job.owner], hands[lease.job.owner])
            queue.heartbeat(lease)
            with lock:
                hands[lease.job.id] -= 1
                hands[lease.job.owner] -= 1
            if lease.number == 1:
                queue.release(lease, "once more")
            else:
                queue.finish(lease, {"worker": index})
                with lock:
                    ends[lease.job.id] += 1
                    if len(ends) == jobs:
                        left.set()

    made = [queues[0].submit(spec(f"owner{number % 2}")).id for number in range(jobs)]
    threads = [threading.Thread(target=run, args=(queue, index)) for index, queue in enumerate(queues)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert ends == dict.fromkeys(made, 1) and {most[id] for id in made} == {1}
    assert all(most[f"owner{number}"] <= quota for number in range(2))
    for id in made:
        assert [attempt.outcome for attempt in queues[0].attempts(id)] == ["released", "completed"]


def test_threads_on_one_database_never_hold_one_job_twice(engine: Any, clock: Clock, tmp_path: Path) -> None:
    queues = [clock.queue(tmp_path, engine, quota=Quota(running=2)) for _ in range(6)]
    race(queues, 12, 2)


class Model(RuleBasedStateMachine):
    """Two workers, a zombie's late calls, cancels and time, beside the plainest description of what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.clock = Clock()
        engine = open_database("sqlite://")  # in memory, one connection
        self.queues = [self.clock.queue(Path(self.place.name), engine) for _ in range(2)]
        self.status: dict[str, str] = {}
        self.holder: dict[str, Any] = {}
        self.heard: dict[str, float] = {}
        self.old: list[Any] = []
        self.failures: Counter[str] = Counter()
        self.claims: Counter[str] = Counter()

    def teardown(self) -> None:
        self.place.cleanup()

    @rule()
    def submit(self) -> None:
        job = self.queues[0].submit(spec(attempts=2))
        self.status[job.id] = "queued"

    @rule(worker=st.integers(0, 1))
    def claim(self, worker: int) -> None:
        waiting = [id for id, status in self.status.items() if status == "queued"]
        lease = self.queues[worker].claim(f"w{worker}")
        if lease is None:
            assert all(self.failures[id] or self.claims[id] for id in waiting), "only a pause may keep a job waiting"
            return
        assert lease.job.id in waiting and self.holder.get(lease.job.id) is None
        self.status[lease.job.id] = "running"
        self.holder[lease.job.id] = lease
        self.heard[lease.job.id] = self.clock.now
        self.claims[lease.job.id] += 1
        assert lease.number == self.claims[lease.job.id]

    @precondition(lambda self: any(self.holder.values()))
    @rule(data=st.data(), how=st.sampled_from(["beat", "finish", "fail", "retry", "release", "stop"]))
    def holder_acts(self, data: st.DataObject, how: str) -> None:
        id = data.draw(st.sampled_from([id for id, lease in self.holder.items() if lease]))
        lease, queue, stopping = self.holder[id], self.queues[0], self.status[id] == "stopping"
        if how == "beat":
            assert queue.heartbeat(lease) == self.status[id]
            self.heard[id] = self.clock.now
            return
        if how == "finish":
            queue.finish(lease, {})
            self.status[id] = "completed"
        elif how == "stop":
            queue.stop(lease)
            self.status[id] = "stopped"
        elif how == "release":
            queue.release(lease, "drained")
            self.status[id] = "stopped" if stopping else "queued"
        else:
            self.failures[id] += 1
            last = how == "fail" or self.failures[id] >= 2
            queue.fail(lease, "x", retry=how == "retry")
            self.status[id] = "stopped" if stopping else "failed" if last else "queued"
        self.old.append(lease)
        self.holder[id] = None

    @precondition(lambda self: self.old)
    @rule(data=st.data(), how=st.sampled_from(["heartbeat", "finish", "fail", "release", "stop"]))
    def zombie_acts(self, data: st.DataObject, how: str) -> None:
        lease = data.draw(st.sampled_from(self.old))
        arguments = {"finish": ({"late": True},), "fail": ("late",), "release": ("late",)}.get(how, ())
        with pytest.raises(LeaseLost):
            getattr(self.queues[1], how)(lease, *arguments)

    @precondition(lambda self: self.status)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(list(self.status)))
        after = {"queued": "stopped", "running": "stopping"}
        self.status[id] = after.get(self.status[id], self.status[id])
        assert self.queues[0].cancel(id).status == self.status[id]

    @rule(seconds=st.floats(0, 40), jump=st.sampled_from([0.0, 0.0, -1e5, 1e5]), worker=st.integers(0, 1))
    def wait(self, seconds: float, jump: float, worker: int) -> None:
        for queue in self.queues:
            self._expire(queue)
        self.clock.wall_now += jump
        self.clock.pass_time(seconds)
        self._expire(self.queues[worker])
        assert seconds < LEASE_S or not any(self.holder.values()), "a silent worker kept its job"

    def _expire(self, queue: Queue) -> None:
        for job in queue.expire():
            lease = self.holder[job.id]
            assert lease is not None and self.clock.now - self.heard[job.id] >= LEASE_S, "a living worker lost its job"
            self.failures[job.id] += 1
            left = "failed" if self.failures[job.id] >= 2 else "queued"
            self.status[job.id] = "stopped" if self.status[job.id] == "stopping" else left
            assert job.status == self.status[job.id]
            self.old.append(lease)
            self.holder[job.id] = None

    @invariant()
    def the_database_says_the_same(self) -> None:
        assert {job.id: job.status for job in self.queues[1].list()} == self.status
        for id, count in self.claims.items():
            attempts = self.queues[1].attempts(id)
            assert [attempt.number for attempt in attempts] == list(range(1, count + 1))
            open_ones = [attempt for attempt in attempts if attempt.outcome == "running"]
            assert len(open_ones) == (1 if self.holder[id] else 0)


Model.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestModel = Model.TestCase
