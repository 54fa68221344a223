"""What was used, by whom, and what it cost: rows are added, never changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from ascent.jobs.prices import PriceList
from ascent.jobs.specs import LONGEST
from ascent.jobs.tables import sa
from ascent.observe.database import make_tables
from ascent.records.errors import BadInput, UnknownName

By = Literal["job", "deployment", "owner", "model", "key_id", "operation"]

METADATA = sa.MetaData()

USAGE = sa.Table(
    "usage",
    METADATA,
    sa.Column("key", sa.String(256), primary_key=True),
    sa.Column("at", sa.Float, nullable=False, index=True),
    sa.Column("owner", sa.String(256), nullable=False),
    sa.Column("key_id", sa.String(64), nullable=False),
    sa.Column("job", sa.String(32), nullable=False),
    sa.Column("deployment", sa.String(256), nullable=False),
    sa.Column("model", sa.String(256), nullable=False),
    sa.Column("operation", sa.String(128), nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("training_tokens", sa.BigInteger, nullable=False),
    sa.Column("milliseconds", sa.BigInteger, nullable=False),
    sa.Column("cost_micros", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
)
GROUPS: dict[str, sa.Column[str]] = {
    name: USAGE.c[name] for name in ("job", "deployment", "owner", "model", "key_id", "operation")
}
COUNTED = ("prompt_tokens", "completion_tokens", "cached_tokens", "training_tokens", "milliseconds", "cost_micros")


@dataclass(frozen=True)
class Usage:
    """Some use of the machine.

    Attributes:
        key: names the event; the same key again is the same event and is not charged twice.
        owner, key_id: who pays; the access key that was used.
        job, deployment, model, operation: what for; empty where it does not apply.
        prompt_tokens, completion_tokens, cached_tokens, training_tokens: counts; cached ones are part of the prompt's.
        seconds: of a job's run time, or of a call.

    Raises:
        BadInput: a count is negative, or more is cached than the prompt holds.
    """

    key: str
    owner: str
    key_id: str = ""
    job: str = ""
    deployment: str = ""
    model: str = ""
    operation: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    training_tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        counts = (self.prompt_tokens, self.completion_tokens, self.cached_tokens, self.training_tokens)
        if min(counts) < 0 or not 0 <= self.seconds < math.inf or self.cached_tokens > self.prompt_tokens:
            raise BadInput(f"the use {self.key!r} cannot be entered: negative, or more cached than prompted: {self}")
        if not 0 < len(self.key) <= LONGEST:
            raise BadInput(f"the key of a use must have 1 to {LONGEST} characters, not {self.key[:80]!r}")


@dataclass(frozen=True)
class Total:
    """The sum of some rows. `cost_micros` are millionths of the currency."""

    name: str
    currency: str
    rows: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    training_tokens: int
    milliseconds: int
    cost_micros: int


class Ledger:
    """The rows of use in a database, priced as they are entered: a new price list changes no old row."""

    def __init__(self, engine: sa.Engine, prices: PriceList, *, wall: Callable[[], float] = time.time) -> None:
        """Open the ledger, making its table where it is missing. `wall` gives seconds since the epoch."""
        self.engine, self.prices, self._wall = engine, prices, wall
        make_tables(engine, METADATA)

    def record(self, *usages: Usage) -> int:
        """Enter use, all in one transaction. Returns how many rows are new; known keys are left as they are."""
        added = 0
        with self.engine.begin() as connection:
            for usage in usages:
                try:
                    with connection.begin_nested():
                        connection.execute(sa.insert(USAGE).values(**self._priced(usage)))
                    added += 1
                except sa.exc.IntegrityError:
                    continue
        return added

    def totals(
        self,
        owner: str | None = None,
        *,
        by: By = "model",
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> tuple[Total, ...]:
        """Return sums by job, deployment, owner, model, key or operation, ordered by name.

        Args:
            owner: whose; everybody's without one.
            by: what is summed together.
            since: entered at or after this aware datetime.
            until: entered before this aware datetime.

        Raises:
            UnknownName: `by` is nothing that can be summed by.
            BadInput: a time without its zone.
        """
        if by not in GROUPS:
            raise UnknownName("grouping", by, GROUPS)
        if any(at is not None and at.tzinfo is None for at in (since, until)):
            raise BadInput("since and until need a time zone; give aware datetimes, such as with tzinfo=UTC")
        sums = [sa.cast(sa.func.sum(USAGE.c[name]), sa.BigInteger) for name in COUNTED]
        query = sa.select(GROUPS[by], USAGE.c.currency, sa.func.count(), *sums)
        query = query.group_by(GROUPS[by], USAGE.c.currency).order_by(GROUPS[by], USAGE.c.currency)
        query = query if owner is None else query.where(USAGE.c.owner == owner)
        query = query if since is None else query.where(USAGE.c.at >= since.timestamp())
        query = query if until is None else query.where(USAGE.c.at < until.timestamp())
        with self.engine.connect().execution_options(reads=True) as connection, connection.begin():
            return tuple(Total(*row) for row in connection.execute(query))

    def _priced(self, usage: Usage) -> dict[str, object]:
        milliseconds = round(usage.seconds * 1000)
        cost = self.prices.cost_micros(
            usage.model,
            prompt=usage.prompt_tokens,
            completion=usage.completion_tokens,
            cached=usage.cached_tokens,
            training=usage.training_tokens,
            milliseconds=milliseconds,
        )
        values: dict[str, object] = {name: value for name, value in vars(usage).items() if name != "seconds"}
        at = {"at": self._wall(), "currency": self.prices.currency}
        return values | at | {"milliseconds": milliseconds, "cost_micros": cost}
