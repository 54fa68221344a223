"""What all resources of the control plane share: owners, ARNs, jobs and their states, listings, tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ascent.inference.registry import SOURCE, Registry
from ascent.inference.store import Store
from ascent.inference.versions import Version
from ascent.jobs.queue import Queue
from ascent.jobs.specs import ENDED, Job, JobSpec, Limits, QuotaExceeded
from ascent.jobs.tables import sa
from ascent.observe.database import make_tables
from ascent.records import ModelCard
from ascent.records.errors import UnknownName, nearest
from ascent.serve.kinds.home import phases_of
from ascent.serve.kinds.places import Rules, check_place
from ascent.serve.services.bedrock.deployer import Deployer
from ascent.serve.services.bedrock.tables import METADATA, TAGS
from ascent.serve.wire.arns import arn, id_of
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.pages import page

if TYPE_CHECKING:
    from ascent.jobs.ledger import Ledger
    from ascent.serve.models import Models
    from ascent.serve.wire.authenticate import Caller

Request = dict[str, Any]
Item = TypeVar("Item")
OVERRIDE = "ascent:override"
"""The tag whose value says why a model may be deployed without a GO verdict."""
STATES = {
    "queued": "InProgress",
    "running": "InProgress",
    "stopping": "Stopping",
    "completed": "Completed",
    "failed": "Failed",
    "stopped": "Stopped",
}
"""What customization and evaluation jobs are called, by the queue's states."""
MESSAGE_CHARS = 2048
USE_CASES = "usecases"


@dataclass(frozen=True)
class Start:
    """A model that a job starts from or runs.

    Attributes:
        model: its id in the store, or its name in the catalogue.
        root: the base model's.
        parent: its version, if the registry has it.
    """

    model: str
    root: str
    parent: str | None = None

    @property
    def name(self) -> str:
        """The base's name without its checksum."""
        return self.root.partition("@")[0]


class Resources:
    """The state of the service. Its subclasses' public methods are operations of botocore's model.

    `deployer` holds the deployments: `Models` takes its `route`, and a server that starts calls its `restore`.
    """

    service = "bedrock"

    def __init__(
        self,
        queue: Queue,
        registry: Registry,
        models: Models,
        store: Store,
        ledger: Ledger,
        folder: Path,
        *,
        rules: Rules | None = None,
    ) -> None:
        """Take what the server is made of.

        Args:
            queue: where jobs go.
            registry: versions; its database also keeps deployments and tags.
            models: the directory that deployments are entered into.
            store: models on this machine.
            ledger: what jobs and deployments cost.
            folder: the server's own; callers' addresses never reach it, and `usecases/NAME` in it may be named in jobs.
            rules: which addresses callers may use; by default all but the server's folder.
        """
        self._queue, self._registry, self._models = queue, registry, models
        self._store, self._ledger, self._folder = store, ledger, Path(folder)
        self._rules = rules or Rules(closed=(str(self._folder.absolute()),))
        make_tables(registry.engine, METADATA)
        self.deployer = Deployer(registry, models)

    def _submit(self, kind: str, request: Request, caller: Caller, payload: Request, limits: Limits) -> Job:
        """Put a job in line; the request's token makes a repeated one the same job."""
        url = self._registry.engine.url
        payload = {
            **payload,
            "request": request,
            "region": caller.region,
            "rules": asdict(self._rules),
            "database": None if url.password else url.render_as_string(),
        }
        token = request.get("clientRequestToken")
        spec = JobSpec(kind, caller.owner, request["jobName"], payload, limits)
        try:
            return self._queue.submit(spec, token=f"{kind}:{token}" if token else None)
        except QuotaExceeded as error:
            raise ServiceError("ServiceQuotaExceededException", str(error)) from error

    def _job(self, kind: str, identifier: str, caller: Caller) -> Job:
        """Return a job by ARN, id or name: of several with that name, the newest."""
        id = last_part(identifier)
        try:
            job = self._queue.get(id, seen_by(caller))
        except UnknownName:
            named = [job for job in self._queue.list(seen_by(caller), kind=kind) if job.name == id]
            if not named:
                raise ServiceError("ResourceNotFoundException", f"there is no job {identifier!r} of yours") from None
            job = named[0]
        if job.kind != kind:
            raise ServiceError("ResourceNotFoundException", f"{identifier!r} is a job of another kind, {job.kind}")
        return job

    def _jobs(
        self, kind: str, request: Request, caller: Caller, state: Callable[[Job], str], created: str = "creationTime"
    ) -> tuple[list[Job], str | None]:
        """Return a page of a caller's jobs that pass the filters; `created` begins the names of those on time."""
        jobs = [
            job
            for job in self._queue.list(seen_by(caller), kind=kind, limit=100_000)
            if between(job.created, request, created)
            and request.get("nameContains", "") in job.name
            and request.get("statusEquals", state(job)) == state(job)
        ]
        return paged(jobs, request, key=lambda job: (job.created.timestamp(), job.id))

    def _stop(self, kind: str, identifier: str, caller: Caller) -> None:
        """Stop a job. Raises ConflictException when it has ended."""
        job = self._job(kind, identifier, caller)
        if job.status in ENDED:
            raise ServiceError("ConflictException", f"the job {job.name!r} is {job.status} already; nothing to stop")
        self._queue.cancel(job.id, job.owner)

    def _version(self, identifier: str, caller: Caller, kind: str | None = "custom") -> Version:
        """Return a version by ARN, id, `NAME`, `NAME@NUMBER` or `NAME:ALIAS`, or by the job that made it.

        Args:
            identifier: what the caller wrote.
            caller: whose it must be.
            kind: what it must be; None takes any.

        Raises:
            UnknownName, ServiceError: the caller has none such.
        """
        text = last_part(identifier)
        try:
            version = self._registry.get(text, seen_by(caller))
        except UnknownName:
            made = [each for each in self._registry.versions(owner=seen_by(caller)) if each.job == text]
            version = made[0] if made else self._registry.find(text, caller.owner)
        if kind is not None and version.kind != kind:
            raise ServiceError("ResourceNotFoundException", f"{identifier!r} is no {kind} model but {version.kind}")
        return version

    def _start(self, identifier: str, caller: Caller) -> Start:
        """Return the model that an identifier means: one of the caller's versions, or a base model.

        Raises:
            UnknownName: the caller may use none of that name.
        """
        if not identifier.startswith("arn:") or ":foundation-model/" not in identifier:
            try:
                version = self._version(identifier, caller, None)
                return Start(version.model, version.base or version.model, version.id)
            except UnknownName:
                pass
        name = last_part(identifier)
        bases = self._bases()
        if (card := bases.get(name)) is not None:
            return Start(card.id, card.id)
        if name in self._store.catalogue():
            return Start(name, name)
        mine = {version.name for version in self._registry.versions(owner=caller.owner)}
        raise UnknownName("model", name, {*bases, *self._store.catalogue(), *mine})

    def _answering(self, identifier: str, caller: Caller) -> str:
        """Return the version behind a deployment; any other identifier as it is."""
        if ":custom-model-deployment/" not in identifier:
            return identifier
        row = self.deployer.get(identifier.rsplit("/", 1)[-1], caller.owner)
        return str(row.version)

    def _bases(self) -> dict[str, ModelCard]:
        """Return the stored models that belong to nobody, by name and by id; of a name, the latest."""
        private = self._registry.models()
        found: dict[str, ModelCard] = {}
        for card in self._store.list():
            if card.id not in private and not card.source.startswith(SOURCE) and card.kind != "adapter":
                found[card.id] = found[card.id.partition("@")[0]] = card
        return found

    def _use_case(self, name: str) -> str:
        """Return the folder of a use case that the server's operator has installed. Raises UnknownName."""
        place = self._folder / USE_CASES
        known = sorted(folder.name for folder in place.iterdir()) if place.is_dir() else []
        if name not in known:
            raise UnknownName("use case", name, known, hint=f"; the operator puts them into {USE_CASES}/ of the server")
        return str(place / name)

    def _checked(self, uri: str) -> str:
        check_place(uri, self._rules)
        return uri

    def _tags(self, resource: str) -> dict[str, str]:
        with self._registry.engine.connect().execution_options(reads=True) as connection, connection.begin():
            rows = connection.execute(sa.select(TAGS).where(TAGS.c.resource == resource).order_by(TAGS.c.key)).all()
            return {row.key: row.value for row in rows}

    def _tag(self, resource: str, tags: Iterable[Mapping[str, str]]) -> None:
        """Set tags. Raises ValidationException for a key that the server sets itself."""
        given = {tag["key"]: tag["value"] for tag in tags}
        check_tags(given)
        with self._registry.engine.begin() as connection:
            self._untag(connection, resource, given)
            rows = [{"resource": resource, "key": key, "value": value} for key, value in given.items()]
            if rows:
                connection.execute(sa.insert(TAGS), rows)

    def _untag_all(self, resource: str) -> None:
        """Forget the tags of what is gone."""
        with self._registry.engine.begin() as connection:
            connection.execute(sa.delete(TAGS).where(TAGS.c.resource == resource))

    def _untag(self, connection: sa.Connection, resource: str, keys: Collection[str]) -> None:
        connection.execute(sa.delete(TAGS).where(TAGS.c.resource == resource, TAGS.c.key.in_(list(keys))))


def check_tags(given: Mapping[str, str]) -> None:
    """Refuse tag keys that the server sets itself. Raises ValidationException."""
    reserved = [key for key in given if key.startswith("ascent:") and key != OVERRIDE]
    if reserved:
        hint = nearest(reserved[0], [OVERRIDE])
        raise ServiceError("ValidationException", f"tag {reserved[0]!r}: keys with ascent: are the server's own{hint}")


def last_part(identifier: str) -> str:
    """Return the id at the end of an ARN; what is no ARN is returned as it is."""
    return id_of(identifier).rsplit("/", 1)[-1] if identifier.startswith("arn:") else identifier


def slug(name: str) -> str:
    """Return a name as the model part of an ARN: two to 63 of a-z, 0-9 and '-'."""
    return (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model")[:63].ljust(2, "-")


def foundation_arn(name: str, region: str) -> str:
    """Return a base model's ARN, which has no account."""
    return f"arn:aws:bedrock:{region}::foundation-model/{name}"


def model_arn(version: Version, region: str) -> str:
    """Return the ARN of a version."""
    if version.kind == "imported":
        return arn("bedrock", "imported-model", version.id, region)
    base = (version.base or "").partition("@")[0]
    return arn("bedrock", "custom-model", f"{f'ascent.{slug(base)}' if base else 'imported'}/{version.id}", region)


def job_arn(job: Job) -> str:
    """Return the ARN of a job."""
    kind = {
        "customize": "model-customization-job",
        "import": "model-import-job",
        "invocation": "model-invocation-job",
        "evaluation": "evaluation-job",
    }[job.kind]
    base = f"ascent.{slug(job.payload['root'].partition('@')[0])}/" if job.kind == "customize" else ""
    return arn("bedrock", kind, f"{base}{job.id}", job.payload["region"])


def modified(job: Job) -> datetime:
    """Return when a job last changed its state or phase."""
    return max(filter(None, (job.created, job.started, job.ended, *phases_of(job.folder).values())))


def failure(job: Job) -> str | None:
    """Return why a job failed, cut to what the model allows; None when it did not."""
    return job.message[:MESSAGE_CHARS] if job.status == "failed" and job.message else None


def present(**members: Any) -> dict[str, Any]:
    """Return the members that have a value."""
    return {name: value for name, value in members.items() if value is not None}


def refuse(request: Mapping[str, Any], *members: str) -> None:
    """Refuse members that ask for what a server of one's own does not have. Raises ValidationException."""
    asked = [name for name in members if request.get(name)]
    if asked:
        why = "this server uses no cloud networks and no keys of a cloud; leave it out"
        raise ServiceError("ValidationException", f"{', '.join(asked)}: {why}")


def seen_by(caller: Caller) -> str | None:
    """Return whose resources a caller sees: None for everybody's."""
    return None if caller.admin else caller.owner


def between(at: datetime, request: Request, member: str) -> bool:
    """Whether a time passes the filters `{member}After` and `{member}Before`."""
    after, before = request.get(f"{member}After"), request.get(f"{member}Before")
    return (after is None or at > after) and (before is None or at < before)


def paged(items: list[Item], request: Request, *, key: Callable[[Item], Any]) -> tuple[list[Item], str | None]:
    """Return one page by time, the newest first unless asked otherwise."""
    return page(items, request, key=key, reverse=request.get("sortOrder") != "Ascending")
