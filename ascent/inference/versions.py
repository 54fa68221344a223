"""What the registry holds: versions, how they came about, what speaks for them, and what was decided."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from ascent.records import DataSource, Decision, Record, Report, Verdict

Kind = Literal["custom", "imported"]


class Lineage(Record):
    """How a version came about: enough to repeat it. `method` is a recipe's row, or `import`."""

    method: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    data: tuple[DataSource, ...] = ()
    code: str = ""
    """The version of Ascent."""
    run: str = ""
    """The training run's id."""
    details: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """One version of a name.

    Attributes:
        id: twelve characters, unique in the registry.
        number: 1 for a name's first version; a deleted one's is not given again.
        model: the id in the store.
        base: the stored model at the root of its lineage, if it is not `model` itself.
        parent: the version that it was trained from.
        job: what made it; no job makes a second one.
    """

    id: str
    owner: str
    name: str
    number: int
    kind: Kind
    model: str
    base: str | None
    parent: str | None
    lineage: Lineage
    job: str | None
    created: datetime


@dataclass(frozen=True)
class Evidence:
    """What is known of a version, oldest first; overrides are (reason, who)."""

    reports: tuple[Report, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def permission(self) -> str | None:
        """Why the version may be promoted and deployed: its latest verdict is GO, or somebody answers for it."""
        if self.verdicts and self.verdicts[-1].decision is Decision.GO:
            return f"verdict GO: {self.verdicts[-1].reasons[0] if self.verdicts[-1].reasons else 'no reason given'}"
        return f"override by {self.overrides[-1][1]}: {self.overrides[-1][0]}" if self.overrides else None


@dataclass(frozen=True)
class Event:
    """One line of a name's history: added, promoted, routed, override or deleted."""

    event: str
    version: str | None
    alias: str | None
    by: str
    reason: str
    details: dict[str, Any]
    at: datetime


@dataclass(frozen=True)
class Choice:
    """The version that answers a request, and the one that is to see it too without answering."""

    version: Version
    shadow: Version | None = None
