"""Deployments brought up and taken down: rows in the database, models in the directory, one after the other.

A row is the truth. What is Creating or Active when the server starts is brought up again by `restore`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ascent.inference.registry import Registry
from ascent.jobs.tables import sa
from ascent.records.errors import AscentError, BadInput, UnknownName
from ascent.serve.services.bedrock.tables import DEPLOYMENTS

if TYPE_CHECKING:
    from ascent.inference.versions import Version
    from ascent.serve.models import Models
    from ascent.serve.wire.authenticate import Caller

LOG = logging.getLogger(__name__)


class Deployer:
    """The deployments of all owners. Weights are loaded in a thread of its own, one model at a time."""

    def __init__(self, registry: Registry, models: Models, *, wall: Callable[[], float] = time.time) -> None:
        self._registry, self._models, self._wall = registry, models, wall
        self._engine = registry.engine
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="deploy")

    def restore(self) -> Future[None]:
        """Begin to bring up what was up, or coming up, when the server ended. Call it once, before any request.

        The future is done when all of it is up or has failed.
        """
        ready = DEPLOYMENTS.c.status.in_(("Creating", "Active"))
        with self._engine.begin() as connection:
            rows = connection.execute(sa.select(DEPLOYMENTS).where(ready).order_by(DEPLOYMENTS.c.created)).all()
            connection.execute(sa.update(DEPLOYMENTS).where(ready).values(status="Creating"))
        for row in rows:
            self._loader.submit(self._revive, row.id)
        return self._loader.submit(lambda: None)

    def settle(self, timeout_s: float) -> None:
        """Wait until everything that was begun has come up or failed. Raises TimeoutError."""
        self._loader.submit(lambda: None).result(timeout_s)

    def close(self) -> None:
        """Stop loading."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def create(
        self, name: str, version: Version, owner: str, *, description: str | None = None, token: str | None = None
    ) -> sa.Row[Any]:
        """Enter a deployment and begin to bring it up. The same token again returns the same one.

        Raises:
            BadInput: the owner has another deployment of that name.
        """
        id, now = secrets.token_hex(6), self._wall()
        with self._engine.begin() as connection:
            mine = DEPLOYMENTS.c.owner == owner
            if token is not None:
                known = connection.execute(sa.select(DEPLOYMENTS).where(mine, DEPLOYMENTS.c.token == token)).first()
                if known is not None:
                    return known
            if connection.execute(sa.select(DEPLOYMENTS.c.id).where(mine, DEPLOYMENTS.c.name == name)).first():
                raise BadInput(f"you have a deployment {name!r} already; update it, or give the new one another name")
            connection.execute(
                sa.insert(DEPLOYMENTS).values(
                    id=id,
                    owner=owner,
                    name=name,
                    version=version.id,
                    description=description,
                    status="Creating",
                    token=token,
                    created=now,
                    updated=now,
                )
            )
        try:
            self._registry.hold(version.id, holder(id))
        except UnknownName:  # deleted in this moment
            self.delete(id)
            raise
        self._loader.submit(self._bring_up, id)
        return self.get(id, owner)

    def update(self, id: str, version: Version) -> None:
        """Begin to let a deployment answer with another version; until that is up, the old one does.

        Raises:
            BadInput: another update is under way.
            UnknownName: the version was deleted in this moment.
        """
        state = DEPLOYMENTS.c["update"]
        begin = sa.update(DEPLOYMENTS).where(DEPLOYMENTS.c.id == id, sa.or_(state.is_(None), state != "Updating"))
        with self._engine.begin() as connection:
            values = {"next": version.id, "update": "Updating", "updated": self._wall()}
            if connection.execute(begin.values(**values)).rowcount == 0:
                raise BadInput(f"the deployment {self._row(id).name!r} is being updated; wait until that has ended")
        try:
            self._registry.hold(version.id, holder(id))
        except UnknownName as error:
            self._set(id, update="UpdateFailed", message=str(error))
            raise
        self._loader.submit(self._exchange, id)

    def delete(self, id: str) -> None:
        """Take a deployment away; running answers end as if nothing had happened."""
        row = self._row(id)
        with self._engine.begin() as connection:
            connection.execute(sa.delete(DEPLOYMENTS).where(DEPLOYMENTS.c.id == id))
        with contextlib.suppress(UnknownName):
            self._models.undeploy(id, row.owner)
        for version in {row.version, row.next} - {None}:
            self._registry.release(version, holder(id))

    def forget(self, version: Version) -> None:
        """Take away what the first call of an imported model brought up."""
        with contextlib.suppress(UnknownName):
            self._models.undeploy(version.id, version.owner)

    def get(self, text: str, owner: str | None) -> sa.Row[Any]:
        """Return a deployment by id or name; with an `owner`, only one of theirs. Raises UnknownName."""
        rows = self.list(owner)
        found = [row for row in rows if row.id == text] or [row for row in rows if row.name == text]
        if not found:
            raise UnknownName("deployment", text, [row.name for row in rows])
        return found[0]

    def list(self, owner: str | None) -> list[sa.Row[Any]]:
        """Return an owner's deployments, or all."""
        query = sa.select(DEPLOYMENTS).order_by(DEPLOYMENTS.c.created)
        query = query if owner is None else query.where(DEPLOYMENTS.c.owner == owner)
        with self._engine.connect().execution_options(reads=True) as connection, connection.begin():
            return list(connection.execute(query).all())

    def route(self, name: str, caller: Caller) -> tuple[str, str | None] | None:
        """Return what answers a called id, and its shadow: for `Models(route=…)`.

        | called | answers |
        |---|---|
        | a deployment's name | that deployment |
        | `NAME:ALIAS`, `NAME:ALIAS#KEY` | that of the version which the registry chooses for KEY, or the access key |
        | an imported model's id or name | the model, loaded at the first call |

        Raises:
            BadInput: the version that should answer is not deployed.
        """
        owner = caller.owner
        if ":" in name and (routed := self._routed(name, caller)) is not None:
            return routed
        for row in self.list(owner):
            if name in (row.id, row.name):
                return row.id, None
        found = [v for v in self._registry.versions(owner=owner, kind="imported") if name in (v.id, v.name)]
        if not found:
            return None
        version = found[-1]
        with self._loading(version):
            loaded = version.id in {each.name for each in self._models.list(caller)}
            if not loaded and (trouble := self._deploy(version.id, version.id, owner)) is not None:
                raise BadInput(f"the imported model {version.name!r} cannot be served: {trouble}")
        return version.id, None

    def _routed(self, text: str, caller: Caller) -> tuple[str, str | None] | None:
        name, _, rest = text.partition(":")
        alias, _, key = rest.partition("#")
        if not self._registry.versions(name, caller.owner):
            return None
        choice = self._registry.choose(name, alias, caller.owner, key or caller.key_id)
        shadow = self._of_version(choice.shadow) if choice.shadow is not None else None
        if (answering := self._of_version(choice.version)) is None:
            version = choice.version
            raise BadInput(
                f"{name}:{alias} points at {version.name}@{version.number}, which is not deployed; create a deployment "
                f"of it, or promote one that is"
            )
        return answering, shadow

    def _of_version(self, version: Version) -> str | None:
        rows = [row for row in self.list(version.owner) if row.version == version.id and row.status == "Active"]
        return str(rows[-1].id) if rows else None

    @contextlib.contextmanager
    def _loading(self, version: Version) -> Iterator[None]:
        with self._registry.store.lock(f"deploy-{version.id}"):
            yield

    def _revive(self, id: str) -> None:
        """Bring up a deployment of the server's last run, with the update that was under way."""
        with contextlib.suppress(UnknownName):
            row = self._row(id)
            self._hold_only(row)
            self._bring_up(id)
            if row.update == "Updating":
                self._exchange(id)

    def _hold_only(self, row: sa.Row[Any]) -> None:
        """Hold the versions that a deployment needs and no others; the server may have ended in between."""
        needed = {row.version} | ({row.next} if row.update == "Updating" else set())
        for version in set(self._registry.held(holder(row.id))) - needed:
            self._registry.release(version, holder(row.id))
        for version in needed:
            with contextlib.suppress(UnknownName):
                self._registry.hold(version, holder(row.id))

    def _bring_up(self, id: str) -> None:
        with contextlib.suppress(UnknownName):  # deleted before its turn came
            row = self._row(id)
            trouble = self._deploy(id, row.version, row.owner)
            self._set(id, status="Failed" if trouble else "Active", message=trouble)
            self._drop_if_deleted(id, row.owner)

    def _exchange(self, id: str) -> None:
        with contextlib.suppress(UnknownName):
            row = self._row(id)
            if trouble := self._deploy(id, row.next, row.owner):
                self._set(id, update="UpdateFailed", message=trouble)
                return
            self._set(id, version=row.next, update="UpdateCompleted", status="Active", message=None)
            if row.version != row.next:
                self._registry.release(row.version, holder(id))
            self._drop_if_deleted(id, row.owner)

    def _deploy(self, name: str, version: str, owner: str) -> str | None:
        """Make a version callable under `name`; return what is wrong when that fails.

        Loading weights can fail in ways of its own; whatever it is, the deployment must not wait for ever.
        """
        from ascent.serve.models import Target

        try:
            self._models.deploy(name, Target(self._registry.get(version).model), owner)
        except AscentError as error:
            return str(error)
        except Exception as error:
            LOG.exception("deployment %s cannot be brought up", name)
            return f"{type(error).__name__}: {error}; the server's log says where"
        return None

    def _drop_if_deleted(self, id: str, owner: str) -> None:
        """Undo what a deletion could not see because it came while the weights were loading."""
        with contextlib.suppress(UnknownName):
            if not any(row.id == id for row in self.list(owner)):
                self._models.undeploy(id, owner)

    def _row(self, id: str) -> sa.Row[Any]:
        return self.get(id, None)

    def _set(self, id: str, **values: Any) -> None:
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(DEPLOYMENTS).where(DEPLOYMENTS.c.id == id).values(**values, updated=self._wall())
            )


def holder(id: str) -> str:
    """Return how a deployment signs in the registry as the holder of its version."""
    return f"custom-model-deployment/{id}"
