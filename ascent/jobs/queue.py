"""The durable queue: every change of a job's state is one transaction, and only the holder of its lease may make one.

                    claim             finish, fail
    submit → queued ─────→ running ──────────────→ completed | failed
               ↑  ↓ cancel    │ ↓ cancel
               │  stopped     │ stopping ─────────→ stopped (or completed, when it was through by then)
               └──────────────┘ release, a retry, a lost lease

A lease is judged by watching, never by comparing clocks: whoever calls `expire` remembers each job's count of
heartbeats, and a job is lost when the count has stood still for `lease_s` of the watcher's own monotonic clock, or at
once when its worker was a process of this machine that is gone. So no wall clock, set back or ahead, here or on another
host, ends or prolongs a lease. The wall clock of the host dates rows and times the pauses between attempts.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ascent.jobs.processes import is_gone, shown
from ascent.jobs.specs import (
    ACTIVE,
    ENDED,
    LOG_FILE,
    LONGEST,
    Attempt,
    Job,
    JobSpec,
    Lease,
    LeaseLost,
    LogPart,
    Outcome,
    Quota,
    QuotaExceeded,
    Status,
)
from ascent.jobs.tables import (
    ATTEMPTS,
    JOBS,
    METADATA,
    OWNERS,
    count_jobs,
    job_of,
    job_row,
    lock_owner,
    maybe,
    moment,
    sa,
    stored_bytes,
)
from ascent.observe.database import make_tables
from ascent.records import digest
from ascent.records.errors import BadInput, Busy, UnknownName

LONGEST_PAUSE_S = 300.0
"""Between two attempts at a job."""
LOG_PART = 1 << 20
RETRY_AFTER_S = 30.0
MESSAGE = 4000
NAMED = 5  # jobs that a message about an unknown one offers
GOING = ".removed-"


class Queue:
    """Jobs in a database, their folders beside it. Safe to share between threads, and between processes by address."""

    def __init__(
        self,
        engine: sa.Engine,
        folder: Path,
        *,
        memory_mb: int | None = None,
        quota: Quota | None = None,
        quotas: Mapping[str, Quota] | None = None,
        lease_s: float = 30.0,
        pause_s: float = 5.0,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the queue, making its tables where they are missing.

        Args:
            engine: from `open_database`.
            folder: each job works in a folder of its own below this one; shared storage when workers run elsewhere.
            memory_mb: the most that a worker has to give; a job that needs more is refused at once.
            quota: of every owner.
            quotas: of single owners, instead.
            lease_s: a running job without a heartbeat for so long is taken from its worker.
            pause_s: before a second attempt; doubled before each further one, to five minutes at most.
            wall: seconds since the epoch.
            clock: seconds that never run backwards.
        """
        self.engine, self.folder, self.memory_mb, self.lease_s = engine, folder, memory_mb, lease_s
        self._quota, self._quotas = quota or Quota(), dict(quotas or {})
        self._wall, self._clock, self._pause_s = wall, clock, pause_s
        self._seen: dict[str, tuple[int, int, float]] = {}
        make_tables(engine, METADATA)

    def submit(self, spec: JobSpec, token: str | None = None) -> Job:
        """Put a job in line. The same owner and token again return the same job.

        Raises:
            BadInput: it needs more memory than any worker has, or the token stands for another job.
            Busy: the owner has as many jobs in line as allowed.
            QuotaExceeded: the owner's jobs store as much as allowed.
        """
        if self.memory_mb is not None and spec.limits.memory_mb > self.memory_mb:
            raise BadInput(
                f"the job {spec.name!r} is predicted to need {spec.limits.memory_mb} MiB of memory and this machine "
                f"gives jobs {self.memory_mb} MiB; lower the batch or the context, or run it on a larger machine"
            )
        if token is not None and not 0 < len(token) <= LONGEST:
            raise BadInput(f"a token must have 1 to {LONGEST} characters, not {len(token)}")
        mark = digest(asdict(spec))
        with self._owned(spec.owner) as connection:
            if token is not None:
                row = connection.execute(
                    sa.select(JOBS).where(JOBS.c.owner == spec.owner, JOBS.c.token == token)
                ).one_or_none()
                if row is not None and row.digest != mark:
                    raise BadInput(
                        f"the token {token!r} was used for the job {row.name!r} with other settings; "
                        "give every job a token of its own"
                    )
                if row is not None:
                    return job_of(connection, self.folder, row)
            self._check_quota(connection, spec.owner)
            id = secrets.token_hex(6)
            values = {
                "id": id,
                "owner": spec.owner,
                "kind": spec.kind,
                "name": spec.name,
                "payload": spec.payload,
                "memory_mb": spec.limits.memory_mb,
                "seconds": spec.limits.seconds,
                "attempts": spec.limits.attempts,
                "token": token,
                "digest": mark,
                "status": "queued",
                "created": self._wall(),
            }
            connection.execute(sa.insert(JOBS).values(**values))
            job = job_of(connection, self.folder, job_row(connection, id))
        job.folder.mkdir(parents=True, exist_ok=True)
        return job

    def get(self, id: str, owner: str | None = None) -> Job:
        """Return a job; with an `owner`, only one of theirs. Raises UnknownName."""
        with self._reading() as connection:
            return job_of(connection, self.folder, self._find(connection, id, owner))

    def list(
        self, owner: str | None = None, *, kind: str | None = None, status: Collection[Status] = (), limit: int = 1000
    ) -> tuple[Job, ...]:
        """Return the newest jobs first; all owners' without one, all states without a status."""
        query = sa.select(JOBS).order_by(JOBS.c.number.desc()).limit(limit)
        for column, value in ((JOBS.c.owner, owner), (JOBS.c.kind, kind)):
            query = query if value is None else query.where(column == value)
        query = query.where(JOBS.c.status.in_(status)) if status else query
        with self._reading() as connection:
            return tuple(job_of(connection, self.folder, row) for row in connection.execute(query).all())

    def attempts(self, id: str, owner: str | None = None) -> tuple[Attempt, ...]:
        """Return every start of a job, the first one first. Raises UnknownName."""
        with self._reading() as connection:
            self._find(connection, id, owner)
            query = sa.select(ATTEMPTS).where(ATTEMPTS.c.job == id).order_by(ATTEMPTS.c.number)
            return tuple(
                Attempt(row.number, row.worker, moment(row.started), maybe(row.ended), row.outcome, row.message)
                for row in connection.execute(query)
            )

    def logs(self, id: str, owner: str | None = None, *, since: int = 0) -> LogPart:
        """Return what a job wrote from byte `since` on, at most a mebibyte, in whole lines while it runs.

        Raises UnknownName.
        """
        job = self.get(id, owner)
        try:
            with (job.folder / LOG_FILE).open("rb") as file:
                file.seek(since)
                raw = file.read(LOG_PART)
        except FileNotFoundError:
            raw = b""
        if len(raw) == LOG_PART or job.status not in ENDED:
            raw = raw[: raw.rfind(b"\n") + 1] or (raw if len(raw) == LOG_PART else b"")
        return LogPart(raw.decode(errors="replace"), since + len(raw))

    def cancel(self, id: str, owner: str | None = None) -> Job:
        """Stop a job: one in line at once, a running one as soon as it has saved its state. An ended one stays so.

        Raises UnknownName.
        """
        with self.engine.begin() as connection:
            row = self._find(connection, id, owner, lock=True)
            if row.status == "queued":
                self._set(
                    connection, id, status="stopped", ended=self._wall(), message="stopped while it waited in line"
                )
            elif row.status == "running":
                self._set(connection, id, status="stopping")
            return job_of(connection, self.folder, job_row(connection, id))

    def claim(self, worker: str, *, free_mb: int | None = None, total_mb: int | None = None) -> Lease | None:
        """Take the first job in line whose owner may run another one.

        Args:
            worker: who asks; `this_process()` lets others see at once when it is gone.
            free_mb: memory that it has left. The line waits for a job that does not fit yet, so that none starves.
            total_mb: memory that it has in all; a larger job is left to another worker.
        """
        full = set[str]()
        while True:
            with self.engine.begin() as connection:
                row = connection.execute(self._next(full, total_mb)).one_or_none()
                if row is None or (free_mb is not None and row.memory_mb > free_mb):
                    return None
                lock_owner(connection, row.owner)
                most = self._quota_of(row.owner).running
                if most is not None and count_jobs(connection, row.owner, ACTIVE) >= most:
                    full.add(row.owner)
                    continue
                now, number = self._wall(), row.lease + 1
                started = row.started if row.started is not None else now
                values = {"status": "running", "lease": number, "beat": 0, "worker": worker, "started": started}
                self._set(connection, row.id, **values)
                attempt = {"job": row.id, "number": number, "worker": worker, "started": now, "outcome": "running"}
                connection.execute(sa.insert(ATTEMPTS).values(**attempt))
                return Lease(job_of(connection, self.folder, job_row(connection, row.id)), number, worker)

    def heartbeat(self, lease: Lease, *, stored: int | None = None) -> Status:
        """Say that the job is alive, and how many bytes its folder holds. Returns `stopping` when it is to stop.

        Raises:
            LeaseLost: somebody else has the job; stop it here and leave its folder alone.
        """
        with self._held(lease) as (connection, row):
            values = {} if stored is None else {"stored": stored}
            self._set(connection, row.id, beat=row.beat + 1, **values)
            status: Status = row.status
            return status

    def report(self, lease: Lease, *, phase: str, done: int, total: int | None) -> None:
        """Set how far the job is. Raises LeaseLost."""
        with self._held(lease) as (connection, row):
            self._set(connection, row.id, phase=phase.replace("\0", "")[:LONGEST], done=done, total=total)

    def finish(self, lease: Lease, result: dict[str, Any]) -> None:
        """End the job with its result. Raises LeaseLost, so that a job ends exactly once."""
        with self._held(lease) as (connection, row):
            self._end(connection, row, "completed", "completed", None, result=result)

    def stop(self, lease: Lease) -> None:
        """End a job that was to stop and did. Raises LeaseLost."""
        with self._held(lease) as (connection, row):
            self._end(connection, row, "stopped", "stopped", None)

    def fail(self, lease: Lease, message: str, *, retry: bool = False, memory_mb: int | None = None) -> Status:
        """End the attempt with a failure, and the job with it unless `retry` and an attempt is left.

        Args:
            lease: of the attempt.
            message: what happened, why, and what to do.
            retry: whether another attempt can help; it comes after a pause that doubles every time.
            memory_mb: what the next attempt is to have.

        Returns:
            The job's new state. Raises LeaseLost.
        """
        with self._held(lease) as (connection, row):
            return self._break(connection, row, "failed", message, retry=retry, memory_mb=memory_mb)

    def release(self, lease: Lease, message: str, *, pause_s: float = 0.0) -> Status:
        """Give the job back to the line as it is, without counting a failure. Returns its state; raises LeaseLost."""
        with self._held(lease) as (connection, row):
            if row.status == "stopping":
                return self._end(connection, row, "stopped", "stopped", None)
            values = {"not_before": self._wall() + pause_s, "worker": None}
            return self._end(connection, row, "queued", "released", message, **values)

    def expire(self) -> tuple[Job, ...]:
        """Take jobs back from workers that are gone or silent; returns them as they stand now.

        Call it every few seconds: what was seen by an earlier call of the same object is compared with now.
        """
        columns = (JOBS.c.id, JOBS.c.lease, JOBS.c.beat, JOBS.c.worker)
        with self._reading() as connection:
            rows = connection.execute(sa.select(*columns).where(JOBS.c.status.in_(ACTIVE))).all()
        now, seen, lost = self._clock(), {}, []
        for row in rows:
            lease, beat, since = self._seen.get(row.id, (0, 0, now))
            seen[row.id] = (row.lease, row.beat, since if (lease, beat) == (row.lease, row.beat) else now)
            if now - seen[row.id][2] >= self.lease_s or is_gone(row.worker):
                lost.append(row)
        self._seen = seen
        return tuple(job for row in lost if (job := self._take_back(row)) is not None)

    def stored(self, owner: str) -> int:
        """Return the bytes in the folders of an owner's jobs, as last measured."""
        with self._reading() as connection:
            return stored_bytes(connection, owner)

    def over_quota(self, owner: str) -> str | None:
        """Return what is wrong when an owner's jobs store as much as allowed."""
        with self._reading() as connection:
            return self._too_much(connection, owner)

    def clean(self, older_than_s: float, *, keep: Collection[Path] = ()) -> tuple[str, ...]:
        """Remove the folders of jobs that ended so long ago; their rows stay. Returns the ids.

        Args:
            older_than_s: how long a job's folder is kept after its end.
            keep: folders and files that are still wanted, such as models; a job's folder that holds one of them stays.
        """
        wanted = [path.resolve() for path in keep]
        limit = self._wall() - older_than_s
        query = sa.select(JOBS).where(JOBS.c.status.in_(ENDED), JOBS.c.ended < limit, JOBS.c.removed.is_(False))
        with self._reading() as connection:
            rows = connection.execute(query).all()
        removed = []
        for row in rows:
            folder = (self.folder / row.id).resolve()
            if any(path == folder or folder in path.parents for path in wanted):
                continue
            self._put_away(row.id)
            with self.engine.begin() as connection:
                self._set(connection, row.id, removed=True, stored=0)
            removed.append(row.id)
        self._empty_bin()
        return tuple(removed)

    def delete(self, id: str, owner: str | None = None) -> Job:
        """Remove an ended job for good: its folder, its attempts and its row. Returns what it was.

        Raises:
            UnknownName: the owner has no such job.
            BadInput: it has not ended.
        """
        job = self.get(id, owner)
        if job.status not in ENDED:
            raise BadInput(f"the job {job.name!r} is {job.status}; stop it first")
        self._put_away(id)
        with self.engine.begin() as connection:
            connection.execute(sa.delete(ATTEMPTS).where(ATTEMPTS.c.job == id))
            connection.execute(sa.delete(JOBS).where(JOBS.c.id == id))
        self._empty_bin()
        return job

    def _put_away(self, id: str) -> None:
        """Take a job's folder out of sight in one step."""
        with contextlib.suppress(FileNotFoundError):
            os.replace((self.folder / id).resolve(), self.folder / f"{GOING}{id}")

    def _empty_bin(self) -> None:
        """Remove what was put away, by a process that crashed too."""
        for left in self.folder.glob(f"{GOING}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _next(self, full: Collection[str], total_mb: int | None) -> sa.Select[Any]:
        now = self._wall()
        # A time further ahead than any pause was set by a clock that was put back since.
        ripe = sa.or_(JOBS.c.not_before <= now, JOBS.c.not_before > now + LONGEST_PAUSE_S)
        query = sa.select(JOBS).where(JOBS.c.status == "queued", ripe)
        query = query.where(JOBS.c.owner.not_in(full)) if full else query
        query = query if total_mb is None else query.where(JOBS.c.memory_mb <= total_mb)
        return query.order_by(JOBS.c.number).limit(1).with_for_update(skip_locked=True)

    def _take_back(self, seen: Any) -> Job | None:
        with self.engine.begin() as connection:
            row = connection.execute(sa.select(JOBS).where(JOBS.c.id == seen.id).with_for_update()).one()
            if (row.lease, row.beat) != (seen.lease, seen.beat) or row.status not in ACTIVE:
                return None
            message = f"the worker {shown(row.worker)} was lost (killed, or silent for {self.lease_s:g} s)"
            self._break(connection, row, "lost", message, retry=True, pause=False)
            return job_of(connection, self.folder, job_row(connection, row.id))

    def _break(
        self,
        connection: sa.Connection,
        row: sa.Row[Any],
        outcome: Outcome,
        message: str,
        *,
        retry: bool,
        memory_mb: int | None = None,
        pause: bool = True,
    ) -> Status:
        failures = row.failures + 1
        if row.status == "stopping":
            return self._end(connection, row, "stopped", outcome, message, failures=failures)
        if not retry:
            return self._end(connection, row, "failed", outcome, message, failures=failures)
        if failures >= row.attempts:
            tried = f" (attempt {failures} of {row.attempts})" if row.attempts > 1 else ""
            return self._end(connection, row, "failed", outcome, message + tried, failures=failures)
        wait = min(self._pause_s * 2 ** (failures - 1), LONGEST_PAUSE_S) if pause else 0.0
        values = {"failures": failures, "not_before": self._wall() + wait, "worker": None}
        if memory_mb is not None:
            values["memory_mb"] = memory_mb
        return self._end(connection, row, "queued", outcome, message, **values)

    def _end(
        self,
        connection: sa.Connection,
        row: sa.Row[Any],
        status: Status,
        outcome: Outcome,
        message: str | None,
        **values: Any,
    ) -> Status:
        """Close the attempt of a row that is locked, and set the job's next state."""
        now, message = self._wall(), message and message.replace("\0", "")[:MESSAGE]  # PostgreSQL takes no NUL
        which = sa.and_(ATTEMPTS.c.job == row.id, ATTEMPTS.c.number == row.lease)
        connection.execute(sa.update(ATTEMPTS).where(which).values(ended=now, outcome=outcome, message=message))
        ended = now if status in ENDED else None
        self._set(connection, row.id, status=status, message=message, ended=ended, **values)
        return status

    def _set(self, connection: sa.Connection, id: str, **values: Any) -> None:
        connection.execute(sa.update(JOBS).where(JOBS.c.id == id).values(**values))

    @contextlib.contextmanager
    def _held(self, lease: Lease) -> Iterator[tuple[sa.Connection, sa.Row[Any]]]:
        """A transaction with the job's row locked, open only to the holder of its latest lease."""
        with self.engine.begin() as connection:
            query = sa.select(JOBS).where(JOBS.c.id == lease.job.id).with_for_update()
            row = connection.execute(query).one_or_none()
            if row is None or row.lease != lease.number or row.status not in ACTIVE:
                raise LeaseLost(
                    f"attempt {lease.number} of job {lease.job.id} is no longer the one that counts (the job is "
                    f"{row.status if row else 'gone'}); what this worker did since is dropped"
                )
            yield connection, row

    @contextlib.contextmanager
    def _owned(self, owner: str) -> Iterator[sa.Connection]:
        """A transaction that no other one about the same owner's quotas overlaps."""
        with contextlib.suppress(sa.exc.IntegrityError), self.engine.begin() as connection:
            if connection.execute(sa.select(OWNERS).where(OWNERS.c.owner == owner)).one_or_none() is None:
                connection.execute(sa.insert(OWNERS).values(owner=owner))
        with self.engine.begin() as connection:
            lock_owner(connection, owner)
            yield connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self.engine.connect().execution_options(reads=True) as connection, connection.begin():
            yield connection

    def _check_quota(self, connection: sa.Connection, owner: str) -> None:
        quota = self._quota_of(owner)
        waiting = count_jobs(connection, owner, ("queued",))
        if quota.queued is not None and waiting >= quota.queued:
            raise Busy(
                f"{owner!r} has {waiting} jobs in line and {quota.queued} are allowed; wait until one has started, or "
                "stop one",
                retry_after_s=RETRY_AFTER_S,
            )
        if problem := self._too_much(connection, owner):
            raise QuotaExceeded(problem)

    def _too_much(self, connection: sa.Connection, owner: str) -> str | None:
        most, now = self._quota_of(owner).stored_mb, stored_bytes(connection, owner)
        if most is None or now < most << 20:
            return None
        return (
            f"the jobs of {owner!r} store {now >> 20} MiB and {most} MiB are allowed; remove ended jobs or ask for more"
        )

    def _quota_of(self, owner: str) -> Quota:
        return self._quotas.get(owner, self._quota)

    def _find(self, connection: sa.Connection, id: str, owner: str | None, *, lock: bool = False) -> sa.Row[Any]:
        query = sa.select(JOBS).where(JOBS.c.id == id)
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is not None and owner in (None, row.owner):
            return row
        mine = sa.select(JOBS.c.id).where(JOBS.c.owner == owner).order_by(JOBS.c.number.desc()).limit(NAMED)
        raise UnknownName("job", id, connection.scalars(mine), hint=" (the newest)")
