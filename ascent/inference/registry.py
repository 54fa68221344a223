"""The model registry: which versions of a model there are, how each came about, which one is champion, and why.

A version points to a model of the store and never changes. Names belong to an owner. What is measured of a version is
added to it as evidence, and what people decide is added to the name's history; neither is ever rewritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from ascent.inference.registry_tables import EVIDENCE, HISTORY, HOLDS, METADATA, NAMES, ROUTES, VERSIONS, sa
from ascent.inference.store import Store
from ascent.inference.versions import Choice, Event, Evidence, Kind, Lineage, Version
from ascent.observe.database import make_tables
from ascent.records import Report, Verdict, digest
from ascent.records.errors import BadInput, UnknownName

SOURCE = "registry:"
"""Begins the card's source of a model that was put into the store for the registry, and goes with its last version."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}")


class Registry:
    """Versions in a database, their files in the store. Safe to share between threads."""

    def __init__(self, engine: sa.Engine, store: Store, *, wall: Callable[[], float] = time.time) -> None:
        """Open the registry on a database of `open_database`, making its tables where they are missing."""
        self.engine, self.store, self._wall = engine, store, wall
        make_tables(engine, METADATA)

    def add(
        self,
        name: str,
        model: str,
        owner: str,
        *,
        lineage: Lineage,
        parent: str | None = None,
        base: str | None = None,
        job: str | None = None,
        kind: Kind = "custom",
    ) -> Version:
        """Add the next version of a name. The same owner and job again return the version that is there.

        Raises:
            BadInput: the name is not usable.
            UnknownName: the parent is no version of this owner.
        """
        if not _NAME.fullmatch(name):
            raise BadInput(f"{name!r} cannot name a model; use up to 128 letters, digits, '.', '_' and '-'")
        with self._changing(owner, name) as connection:
            if job is not None:
                made = sa.and_(VERSIONS.c.owner == owner, VERSIONS.c.job == job)
                if (row := connection.execute(sa.select(VERSIONS).where(made)).one_or_none()) is not None:
                    return _version(row)
            if parent is not None:
                _find(connection, parent, owner)
            place = sa.and_(NAMES.c.owner == owner, NAMES.c.name == name)
            number = connection.execute(sa.select(NAMES.c.last).where(place)).scalar_one() + 1
            connection.execute(sa.update(NAMES).where(place).values(last=number))
            values = {
                "id": secrets.token_hex(6),
                "owner": owner,
                "name": name,
                "number": number,
                "kind": kind,
                "model": model,
                "base": base,
                "parent": parent,
                "lineage": lineage.model_dump(mode="json"),
                "job": job,
                "created": self._wall(),
            }
            connection.execute(sa.insert(VERSIONS).values(**values))
            self._note(connection, owner, name, "added", owner, version=values["id"], model=model, parent=parent)
            return _version(_find(connection, values["id"], owner))

    def get(self, id: str, owner: str | None = None) -> Version:
        """Return a version by its id; with an `owner`, only one of theirs. Raises UnknownName."""
        with self._reading() as connection:
            return _version(_find(connection, id, owner))

    def find(self, text: str, owner: str, kind: Kind | None = None) -> Version:
        """Return the version that `ID`, `NAME` (its latest), `NAME@NUMBER` or `NAME:ALIAS` means.

        Raises:
            UnknownName: it means none of this owner's.
        """
        name, colon, alias = text.partition(":")
        if colon:
            return self.choose(name, alias, owner).version
        mine = self.versions(owner=owner, kind=kind)
        name, at, number = text.partition("@")
        named = [version for version in mine if version.name == name]
        if at:
            named = [version for version in named if str(version.number) == number]
        found = next((version for version in mine if version.id == text), None) or (named[-1] if named else None)
        if found is None:
            raise UnknownName("model", text, {version.name for version in mine})
        return found

    def versions(self, name: str | None = None, owner: str | None = None, *, kind: Kind | None = None) -> list[Version]:
        """Return versions, oldest first: of a name, an owner, a kind, or all."""
        query = sa.select(VERSIONS).order_by(VERSIONS.c.created, VERSIONS.c.number)
        for column, value in ((VERSIONS.c.name, name), (VERSIONS.c.owner, owner), (VERSIONS.c.kind, kind)):
            query = query if value is None else query.where(column == value)
        with self._reading() as connection:
            return [_version(row) for row in connection.execute(query)]

    def ancestry(self, id: str) -> list[Version]:
        """Return a version and what it was trained from, the newest first; a deleted ancestor ends the list."""
        found = [self.get(id)]
        with contextlib.suppress(UnknownName):
            while (parent := found[-1].parent) is not None:
                found.append(self.get(parent))
        return found

    def models(self) -> set[str]:
        """Return the store ids that versions point to: they belong to owners and are nobody else's to see."""
        with self._reading() as connection:
            return set(connection.scalars(sa.select(VERSIONS.c.model)))

    def record(self, id: str, found: Report | Verdict, by: str) -> None:
        """Add a report or a verdict to a version; the same one again changes nothing. Raises UnknownName."""
        kind = "report" if isinstance(found, Report) else "verdict"
        with self._of(id) as (connection, row):
            self._add_evidence(connection, row.id, kind, found.to_json(), by)

    def override(self, id: str, reason: str, by: str) -> None:
        """Let a version be promoted and deployed without a GO verdict; who answers for it and why is recorded.

        Raises:
            BadInput: no reason is given.
            UnknownName: there is no such version.
        """
        if not reason.strip():
            raise BadInput("an override needs a reason that a later reader understands; give one")
        with self._of(id) as (connection, row):
            if self._add_evidence(connection, row.id, "override", json.dumps({"reason": reason}), by):
                self._note(connection, row.owner, row.name, "override", by, version=row.id, reason=reason)

    def evidence(self, id: str) -> Evidence:
        """Return what is known of a version."""
        with self._reading() as connection:
            return _evidence(connection, id)

    def require_permission(self, version: Version) -> str:
        """Return why a version may be deployed. Raises BadInput when nothing speaks for it."""
        evidence = self.evidence(version.id)
        if (permission := evidence.permission) is not None:
            return permission
        raise BadInput(_unproven(version, evidence))

    def alias(self, name: str, alias: str, owner: str) -> Version | None:
        """Return where an alias points: of a split, to the version with the largest share. None when it is unset."""
        weights = self.routes(name, owner).get(alias, ({}, None))[0]
        return self.get(max(weights, key=lambda id: weights[id]), owner) if weights else None

    def routes(self, name: str, owner: str) -> dict[str, tuple[dict[str, float], str | None]]:
        """Return alias → (share by version id, shadow version id) of a name."""
        query = sa.select(ROUTES).where(ROUTES.c.owner == owner, ROUTES.c.name == name).order_by(ROUTES.c.alias)
        with self._reading() as connection:
            return {row.alias: (dict(row.weights), row.shadow) for row in connection.execute(query)}

    def promote(
        self,
        name: str,
        alias: str,
        version: str,
        *,
        owner: str,
        by: str,
        verdict: Verdict | None = None,
        override: str | None = None,
    ) -> Version:
        """Point an alias at a version of the name, in place of whatever it pointed to or split between.

        Args:
            name: such as `directions`.
            alias: such as `champion`.
            version: its id.
            owner: whose name it is.
            by: who decides.
            verdict: of the gate after the version's stage; by default the latest one recorded for it.
            override: why it is promoted without a GO; recorded with `by`.

        Raises:
            BadInput: the alias cannot be used, or the version has neither a GO verdict nor an override.
            UnknownName: it is no version of this name.
        """
        _check_alias(alias)
        with self._changing(owner, name) as connection:
            row = _find(connection, version, owner, name)
            if verdict is not None:
                self._add_evidence(connection, row.id, "verdict", verdict.to_json(), by)
            if override is not None and override.strip():
                self._add_evidence(connection, row.id, "override", json.dumps({"reason": override}), by)
            evidence = _evidence(connection, row.id)
            if (permission := evidence.permission) is None:
                raise BadInput(_unproven(_version(row), evidence))
            before = connection.execute(sa.select(ROUTES.c.weights).where(*_route(owner, name, alias))).scalar()
            self._set_route(connection, owner, name, alias, {row.id: 1.0}, None)
            self._note(
                connection, owner, name, "promoted", by, version=row.id, alias=alias, reason=permission, before=before
            )
            return _version(row)

    def route(
        self,
        name: str,
        alias: str,
        *,
        owner: str,
        by: str,
        weights: Mapping[str, float] | None = None,
        shadow: str | None = None,
    ) -> None:
        """Split an alias between versions (A/B), and let a shadow see the requests without answering.

        Args:
            name: whose alias it is.
            alias: such as `champion`.
            owner: whose name it is.
            by: who decides.
            weights: version id → share, in any unit; None leaves the alias as it points.
            shadow: version id; None ends the shadow.

        Raises:
            BadInput: a share is not positive, there is nothing to split, or a version that is to answer has neither a
                GO verdict nor an override.
            UnknownName: one is no version of this name.
        """
        _check_alias(alias)
        with self._changing(owner, name) as connection:
            if weights is None:
                weights = connection.execute(sa.select(ROUTES.c.weights).where(*_route(owner, name, alias))).scalar()
            if not weights or min(weights.values()) <= 0:
                raise BadInput(f"{name}:{alias} needs versions with shares above zero, got {dict(weights or {})}")
            for id in weights:
                row = _find(connection, id, owner, name)
                if (evidence := _evidence(connection, id)).permission is None:
                    raise BadInput(_unproven(_version(row), evidence))
            if shadow is not None:
                _find(connection, shadow, owner, name)
            total = sum(weights.values())
            shares = {id: weight / total for id, weight in weights.items()}
            self._set_route(connection, owner, name, alias, shares, shadow)
            self._note(connection, owner, name, "routed", by, alias=alias, weights=shares, shadow=shadow)

    def choose(self, name: str, alias: str, owner: str, key: str | None = None) -> Choice:
        """Return who answers a request to `name:alias`.

        The same key always meets the same version as long as the shares stay; when the share of the newest one grows,
        keys only ever move to it. Without a key the dice decide.

        Raises:
            UnknownName: the name has no such alias.
        """
        routes = self.routes(name, owner)
        if alias not in routes:
            raise UnknownName("alias", f"{name}:{alias}", [f"{name}:{known}" for known in routes])
        weights, shadow = routes[alias]
        versions = sorted((self.get(id, owner) for id in weights), key=lambda version: version.number)
        point = random.random() if key is None else _point(owner, name, alias, key)
        edge, chosen = 0.0, versions[-1]
        for version in versions:
            edge += weights[version.id]
            if point < edge:
                chosen = version
                break
        return Choice(chosen, self.get(shadow, owner) if shadow is not None else None)

    def history(self, name: str, owner: str) -> list[Event]:
        """Return all that was ever decided about a name, oldest first."""
        query = sa.select(HISTORY).where(HISTORY.c.owner == owner, HISTORY.c.name == name).order_by(HISTORY.c.number)
        with self._reading() as connection:
            return [
                Event(row.event, row.version, row.alias, row.by, row.reason, row.details, _date(row.at))
                for row in connection.execute(query)
            ]

    def hold(self, id: str, holder: str) -> None:
        """Keep a version from being deleted until `release`. Raises UnknownName."""
        with self._of(id) as (connection, row):
            known = sa.select(HOLDS).where(HOLDS.c.version == row.id, HOLDS.c.holder == holder)
            if connection.execute(known).one_or_none() is None:
                connection.execute(sa.insert(HOLDS).values(version=row.id, holder=holder))

    def release(self, id: str, holder: str) -> None:
        """End a hold; one that does not exist is ended already."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(HOLDS).where(HOLDS.c.version == id, HOLDS.c.holder == holder))

    def holders(self, id: str) -> list[str]:
        """Return what holds a version."""
        with self._reading() as connection:
            return list(connection.scalars(sa.select(HOLDS.c.holder).where(HOLDS.c.version == id)))

    def held(self, holder: str) -> list[str]:
        """Return the versions that a holder holds."""
        with self._reading() as connection:
            return list(connection.scalars(sa.select(HOLDS.c.version).where(HOLDS.c.holder == holder)))

    def delete(self, id: str, owner: str, by: str) -> None:
        """Delete a version and, when nothing else needs them, its files; its history stays.

        Raises:
            BadInput: it is deployed, or an alias points at it.
            UnknownName: it is no version of this owner.
        """
        version = self.get(id, owner)
        with self._changing(owner, version.name) as connection:
            row = _find(connection, id, owner)
            if holders := list(connection.scalars(sa.select(HOLDS.c.holder).where(HOLDS.c.version == id))):
                raise BadInput(f"version {row.name}@{row.number} is in use by {', '.join(holders)}; end that first")
            pointing = [
                route.alias
                for route in connection.execute(
                    sa.select(ROUTES).where(ROUTES.c.owner == owner, ROUTES.c.name == row.name)
                )
                if id in route.weights or route.shadow == id
            ]
            if pointing:
                aliases = ", ".join(f"{row.name}:{alias}" for alias in pointing)
                raise BadInput(f"{aliases} points at version {row.name}@{row.number}; promote another one first")
            connection.execute(sa.delete(VERSIONS).where(VERSIONS.c.id == id))
            self._note(connection, owner, row.name, "deleted", by, version=id, model=row.model, number=row.number)
        self._remove_files(version.model)

    def _remove_files(self, model: str) -> None:
        """Remove a model of the registry's own from the store, unless a version or an adapter still needs it."""
        with self.store.lock("store"):
            cards = {card.id: card for card in self.store.list()}
            needed = self.models() | {card.parent for card in cards.values()}
            if model in needed or model not in cards or not cards[model].source.startswith(SOURCE):
                return
            going = self.store.models / f".{model}.{secrets.token_hex(4)}.tmp"  # what `add` clears after a crash
            os.replace(self.store.models / model, going)
        shutil.rmtree(going, ignore_errors=True)

    def _set_route(
        self,
        connection: sa.Connection,
        owner: str,
        name: str,
        alias: str,
        weights: Mapping[str, float],
        shadow: str | None,
    ) -> None:
        connection.execute(sa.delete(ROUTES).where(*_route(owner, name, alias)))
        values = {"owner": owner, "name": name, "alias": alias, "weights": dict(weights), "shadow": shadow}
        connection.execute(sa.insert(ROUTES).values(**values))

    def _add_evidence(self, connection: sa.Connection, id: str, kind: str, content: str, by: str) -> bool:
        mark = digest([content, by] if kind == "override" else content)
        same = sa.and_(EVIDENCE.c.version == id, EVIDENCE.c.kind == kind, EVIDENCE.c.digest == mark)
        if connection.execute(sa.select(EVIDENCE.c.number).where(same)).one_or_none() is not None:
            return False
        values = {"version": id, "kind": kind, "digest": mark, "content": content, "by": by, "at": self._wall()}
        connection.execute(sa.insert(EVIDENCE).values(**values))
        return True

    def _note(
        self,
        connection: sa.Connection,
        owner: str,
        name: str,
        event: str,
        by: str,
        *,
        version: str | None = None,
        alias: str | None = None,
        reason: str = "",
        **details: Any,
    ) -> None:
        values = {"owner": owner, "name": name, "event": event, "version": version, "alias": alias, "by": by}
        connection.execute(sa.insert(HISTORY).values(**values, reason=reason, details=details, at=self._wall()))

    @contextlib.contextmanager
    def _changing(self, owner: str, name: str) -> Iterator[sa.Connection]:
        """A transaction that no other change of the same name overlaps."""
        place = sa.and_(NAMES.c.owner == owner, NAMES.c.name == name)
        with contextlib.suppress(sa.exc.IntegrityError), self.engine.begin() as connection:
            if connection.execute(sa.select(NAMES).where(place)).one_or_none() is None:
                connection.execute(sa.insert(NAMES).values(owner=owner, name=name, last=0))
        with self.engine.begin() as connection:
            connection.execute(sa.select(NAMES).where(place).with_for_update())
            yield connection

    @contextlib.contextmanager
    def _of(self, id: str) -> Iterator[tuple[sa.Connection, sa.Row[Any]]]:
        version = self.get(id)
        with self._changing(version.owner, version.name) as connection:
            yield connection, _find(connection, id, None)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self.engine.connect().execution_options(reads=True) as connection, connection.begin():
            yield connection


def _find(connection: sa.Connection, id: str, owner: str | None, name: str | None = None) -> sa.Row[Any]:
    row = connection.execute(sa.select(VERSIONS).where(VERSIONS.c.id == id)).one_or_none()
    if row is not None and owner in (None, row.owner) and name in (None, row.name):
        return row
    mine = sa.select(VERSIONS.c.id).where(VERSIONS.c.owner == owner)
    mine = mine if name is None else mine.where(VERSIONS.c.name == name)
    raise UnknownName(f"version of {name}" if name else "model version", id, connection.scalars(mine))


def _evidence(connection: sa.Connection, id: str) -> Evidence:
    rows = connection.execute(sa.select(EVIDENCE).where(EVIDENCE.c.version == id).order_by(EVIDENCE.c.number)).all()
    return Evidence(
        tuple(Report.from_json(row.content) for row in rows if row.kind == "report"),
        tuple(Verdict.from_json(row.content) for row in rows if row.kind == "verdict"),
        tuple((json.loads(row.content)["reason"], row.by) for row in rows if row.kind == "override"),
    )


def _unproven(version: Version, evidence: Evidence) -> str:
    said = "has no verdict"
    if evidence.verdicts:
        last = evidence.verdicts[-1]
        said = f"has the verdict {last.decision.value} ({last.reasons[0] if last.reasons else 'no reason given'})"
    return (
        f"version {version.name}@{version.number} ({version.id}) {said}, so nothing shows that it is better than what "
        "it would replace; measure it against its base on held-out data (a validation file of the job, or an "
        "evaluation job of both), or override with a reason, which is recorded with your name"
    )


def _check_alias(alias: str) -> None:
    if not _ALIAS.fullmatch(alias):
        raise BadInput(f"{alias!r} is no alias; use lower-case letters, digits, '_' and '-', such as champion")


def _route(owner: str, name: str, alias: str) -> tuple[sa.ColumnElement[bool], ...]:
    return ROUTES.c.owner == owner, ROUTES.c.name == name, ROUTES.c.alias == alias


def _point(*parts: str) -> float:
    """Where a key lies in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:6]) / 2**48


def _version(row: sa.Row[Any]) -> Version:
    return Version(
        id=row.id,
        owner=row.owner,
        name=row.name,
        number=row.number,
        kind=row.kind,
        model=row.model,
        base=row.base,
        parent=row.parent,
        lineage=Lineage.model_validate(row.lineage),
        job=row.job,
        created=_date(row.created),
    )


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
