"""What crosses the queue: what a job asks for, how it stands, and the right to run it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from ascent.records.errors import AscentError, BadInput

Status = Literal["queued", "running", "stopping", "completed", "failed", "stopped"]
Outcome = Literal["running", "completed", "failed", "stopped", "released", "lost"]
ACTIVE: tuple[Status, ...] = ("running", "stopping")
ENDED: tuple[Status, ...] = ("completed", "failed", "stopped")

JOB_FILE = "job.json"
LOG_FILE = "log.txt"
STOP_FILE = ".stop.{}"  # of one attempt
USAGE_FILE = "usage.jsonl"
LONGEST = 256  # characters of a name


class LeaseLost(AscentError):
    """The job belongs to somebody else by now, or has ended: what this worker did since counts for nothing."""


class QuotaExceeded(BadInput):
    """The owner holds as much as the quota allows; something of it must go first."""


@dataclass(frozen=True)
class Limits:
    """What one job may take.

    Attributes:
        memory_mb: resident memory of all its processes, as `ascent plan` predicts it; it starts when that fits.
        seconds: wall time of one attempt; None sets no limit.
        attempts: how often it may break off (crash, lost worker, out of memory, service away) before it has failed.

    Raises:
        BadInput: a limit is not positive.
    """

    memory_mb: int = 2048
    seconds: float | None = None
    attempts: int = 3

    def __post_init__(self) -> None:
        for name, value in (("memory_mb", self.memory_mb), ("seconds", self.seconds), ("attempts", self.attempts)):
            if value is not None and not value > 0:
                raise BadInput(f"the job's limit {name} is {value}; give a number above zero")


@dataclass(frozen=True)
class JobSpec:
    """A job to be done: a registered kind, and a payload of JSON values that its function understands.

    Raises:
        BadInput: kind, owner or name is empty or too long.
    """

    kind: str
    owner: str
    name: str
    payload: dict[str, Any] = field(default_factory=dict)
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        for name, value in (("kind", self.kind), ("owner", self.owner), ("name", self.name)):
            if not 0 < len(value) <= LONGEST or "\0" in value:
                raise BadInput(f"the job's {name} must have 1 to {LONGEST} characters and no NUL, not {value[:80]!r}")


@dataclass(frozen=True)
class Quota:
    """What one owner may hold: jobs that run, jobs that wait, and MiB in the folders of all jobs. None is no limit."""

    running: int | None = None
    queued: int | None = None
    stored_mb: int | None = None


@dataclass(frozen=True)
class Job:
    """A job as it stood when it was read.

    Attributes:
        phase, done, total: what the job last said of its progress.
        attempts: how often it was started.
        message: why it failed, or what the last attempt broke off with.
        result: what its function returned.
        folder: where it works; everything that it must find again after a restart lies there.
        position: 1 for the next in line, None unless queued.
        stored: bytes in the folder when it was last measured.
    """

    id: str
    spec: JobSpec
    status: Status
    phase: str
    done: int
    total: int | None
    attempts: int
    created: datetime
    started: datetime | None
    ended: datetime | None
    message: str | None
    result: dict[str, Any] | None
    folder: Path
    position: int | None
    stored: int

    @property
    def kind(self) -> str:
        """The registered kind."""
        return self.spec.kind

    @property
    def owner(self) -> str:
        """Whom it belongs to."""
        return self.spec.owner

    @property
    def name(self) -> str:
        """What its owner calls it."""
        return self.spec.name

    @property
    def payload(self) -> dict[str, Any]:
        """What its function is given."""
        return self.spec.payload

    @property
    def progress(self) -> float | None:
        """The share of the present phase that is done, 0 to 1, once its total is known."""
        return min(1.0, self.done / self.total) if self.total else None


@dataclass(frozen=True)
class Attempt:
    """One start of a job, by its lease number, and how it ended."""

    number: int
    worker: str
    started: datetime
    ended: datetime | None
    outcome: Outcome
    message: str | None


@dataclass(frozen=True)
class Lease:
    """The right to run a job. `number` grows with every claim, so that a holder of an older one is recognised."""

    job: Job
    number: int
    worker: str


@dataclass(frozen=True)
class LogPart:
    """A stretch of a job's log, and where the next one begins, in bytes."""

    text: str
    next: int
