"""Custom models and imported models: what jobs registered, and what callers bring along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascent.inference.versions import Version
from ascent.jobs.specs import Job, Limits
from ascent.records.errors import BadInput, UnknownName
from ascent.serve.kinds.hyperparameters import DISTILLATION, FINE_TUNING, PRE_TRAINING, REINFORCEMENT
from ascent.serve.services.bedrock.customization import training_metrics, validation_metrics
from ascent.serve.services.bedrock.resources import (
    Request,
    Resources,
    between,
    failure,
    foundation_arn,
    job_arn,
    last_part,
    model_arn,
    modified,
    paged,
    present,
    refuse,
    seen_by,
)
from ascent.serve.wire.arns import ACCOUNT, arn
from ascent.serve.wire.errors import ServiceError

if TYPE_CHECKING:
    from ascent.serve.wire.authenticate import Caller

IMPORT = "import"
IMPORT_MB = 4096
"""A GGUF file is unpacked in memory; what needs more is tried again with more."""
IMPORT_STATES = {
    "queued": "InProgress",
    "running": "InProgress",
    "stopping": "InProgress",
    "completed": "Completed",
    "failed": "Failed",
    "stopped": "Failed",
}


class CustomModels(Resources):
    """Versions that customization jobs made, or that a caller brought with CreateCustomModel."""

    def create_custom_model(self, request: Request, caller: Caller) -> Request:
        """Bring a tuned model along; it is there once it has been fetched and checked."""
        refuse(request, "modelKmsKeyArn")
        if request.get("customModelDataSource"):
            raise ServiceError("ValidationException", "customModelDataSource is of SageMaker; give modelSourceConfig")
        uri = _source(request.get("modelSourceConfig"), "modelSourceConfig")
        job = self._import(request | {"jobName": request["modelName"]}, caller, uri, request["modelName"], "custom")
        self._tag(f"model/{job.id}", request.get("modelTags", ()))
        # the registry's id is not known yet: until then the job's stands for it
        return {"modelArn": arn("bedrock", "custom-model", f"imported/{job.id}", caller.region)}

    def get_custom_model(self, request: Request, caller: Caller) -> Request:
        """Describe a version: what it was trained from and on, and how it came out."""
        if (coming := self._coming(request["modelIdentifier"], caller)) is not None:
            return _on_its_way(coming)
        version = self._version(request["modelIdentifier"], caller)
        asked, result = self._asked(version)
        return present(
            modelArn=model_arn(version, caller.region),
            modelName=version.name,
            jobName=asked.get("jobName"),
            jobArn=self._job_arn(version),
            baseModelArn=foundation_arn(_base(version), caller.region),
            customizationType=_type(version),
            hyperParameters=asked.get("hyperParameters"),
            trainingDataConfig=asked.get("trainingDataConfig"),
            validationDataConfig=asked.get("validationDataConfig"),
            outputDataConfig=asked.get("outputDataConfig"),
            customizationConfig=asked.get("customizationConfig"),
            trainingMetrics=training_metrics(result),
            validationMetrics=validation_metrics(result),
            creationTime=version.created,
            modelStatus="Active",
        )

    def list_custom_models(self, request: Request, caller: Caller) -> Request:
        """List versions, the newest first."""
        wanted = request.get("baseModelArnEquals") or request.get("foundationModelArnEquals")
        versions = [
            version
            for version in self._registry.versions(owner=seen_by(caller), kind="custom")
            if between(version.created, request, "creationTime")
            and request.get("nameContains", "") in version.name
            and (wanted is None or last_part(wanted) == _base(version))
            and request.get("modelStatus", "Active") == "Active"
        ]
        found, token = paged(versions, request, key=lambda version: (version.created.timestamp(), version.id))
        summaries = [
            {
                "modelArn": model_arn(version, caller.region),
                "modelName": version.name,
                "creationTime": version.created,
                "baseModelArn": foundation_arn(_base(version), caller.region),
                "baseModelName": _base(version),
                "customizationType": _type(version),
                "ownerAccountId": ACCOUNT,
                "modelStatus": "Active",
            }
            for version in found
        ]
        return present(modelSummaries=summaries, nextToken=token)

    def delete_custom_model(self, request: Request, caller: Caller) -> Request:
        """Delete a version and, when nothing else needs them, its files."""
        self._delete(self._version(request["modelIdentifier"], caller), caller)
        return {}

    def _coming(self, identifier: str, caller: Caller) -> Job | None:
        """Return the job that an id means while it brings a custom model along; None once that is there."""
        try:
            job = self._queue.get(last_part(identifier), seen_by(caller))
        except UnknownName:
            return None
        brings = job.kind == IMPORT and job.payload["registered_as"] == "custom"
        return job if brings and job.result is None else None

    def _asked(self, version: Version) -> tuple[Request, dict[str, Any]]:
        """Return the request of the job that made a version, and its result."""
        try:
            job = self._queue.get(version.job or "", version.owner)
        except UnknownName:
            return {}, {}
        return job.payload["request"], job.result or {}

    def _job_arn(self, version: Version) -> str | None:
        try:
            return job_arn(self._queue.get(version.job or "", version.owner))
        except UnknownName:
            return None

    def _delete(self, version: Version, caller: Caller) -> None:
        try:
            self._registry.delete(version.id, version.owner, caller.name)
        except UnknownName:
            raise
        except BadInput as error:
            raise ServiceError("ConflictException", str(error)) from error

    def _import(self, request: Request, caller: Caller, uri: str, name: str, registered_as: str) -> Job:
        payload = {"name": name, "uri": self._checked(uri), "registered_as": registered_as}
        return self._submit(IMPORT, request, caller, payload, Limits(IMPORT_MB))


class ImportedModels(CustomModels):
    """Model import: safetensors folders, GGUF files and LoRA adapters, callable as soon as they are there."""

    def create_model_import_job(self, request: Request, caller: Caller) -> Request:
        """Put an import in line."""
        refuse(request, "vpcConfig", "importedModelKmsKeyId")
        uri = _source(request["modelDataSource"], "modelDataSource")
        job = self._import(request, caller, uri, request["importedModelName"], "imported")
        self._tag(f"{IMPORT}/{job.id}", request.get("jobTags", ()))
        self._tag(f"model/{job.id}", request.get("importedModelTags", ()))
        return {"jobArn": job_arn(job)}

    def get_model_import_job(self, request: Request, caller: Caller) -> Request:
        """Say how an import stands."""
        job = self._job(IMPORT, request["jobIdentifier"], caller)
        asked = job.payload["request"]
        return present(
            roleArn=asked.get("roleArn"),
            modelDataSource=asked.get("modelDataSource"),
            failureMessage=failure(job) or (job.message if job.status == "stopped" else None),
            **self._summary(job),
        )

    def list_model_import_jobs(self, request: Request, caller: Caller) -> Request:
        """List imports, the newest first."""
        jobs, token = self._jobs(IMPORT, request, caller, lambda job: IMPORT_STATES[job.status])
        return present(modelImportJobSummaries=[self._summary(job) for job in jobs], nextToken=token)

    def list_imported_models(self, request: Request, caller: Caller) -> Request:
        """List imported models, the newest first."""
        versions = [
            version
            for version in self._registry.versions(owner=seen_by(caller), kind="imported")
            if between(version.created, request, "creationTime") and request.get("nameContains", "") in version.name
        ]
        found, token = paged(versions, request, key=lambda version: (version.created.timestamp(), version.id))
        summaries = [
            {
                "modelArn": model_arn(version, caller.region),
                "modelName": version.name,
                "creationTime": version.created,
                "instructSupported": True,
                "modelArchitecture": self._store.card(version.model).family,
            }
            for version in found
        ]
        return present(modelSummaries=summaries, nextToken=token)

    def get_imported_model(self, request: Request, caller: Caller) -> Request:
        """Describe an imported model."""
        version = self._version(request["modelIdentifier"], caller, "imported")
        asked, _ = self._asked(version)
        return present(
            modelArn=model_arn(version, caller.region),
            modelName=version.name,
            jobName=asked.get("jobName"),
            jobArn=self._job_arn(version),
            modelDataSource=asked.get("modelDataSource"),
            creationTime=version.created,
            modelArchitecture=self._store.card(version.model).family,
            instructSupported=True,
        )

    def delete_imported_model(self, request: Request, caller: Caller) -> Request:
        """Delete an imported model and its files."""
        version = self._version(request["modelIdentifier"], caller, "imported")
        self._delete(version, caller)
        self.deployer.forget(version)
        return {}

    def _summary(self, job: Job) -> dict[str, Any]:
        made = job.result["version"] if job.result else None
        return present(
            jobArn=job_arn(job),
            jobName=job.name,
            importedModelName=job.payload["name"],
            importedModelArn=arn("bedrock", "imported-model", made, job.payload["region"]) if made else None,
            status=IMPORT_STATES[job.status],
            creationTime=job.created,
            lastModifiedTime=modified(job),
            endTime=job.ended,
        )


def _source(config: Request | None, member: str) -> str:
    uri = (config or {}).get("s3DataSource", {}).get("s3Uri")
    if not uri:
        raise ServiceError("ValidationException", f"{member}.s3DataSource.s3Uri, the address of the model, is missing")
    return str(uri)


def _on_its_way(job: Job) -> Request:
    """Describe a model whose import has not ended well yet."""
    return present(
        modelArn=arn("bedrock", "custom-model", f"imported/{job.id}", job.payload["region"]),
        modelName=job.payload["name"],
        creationTime=job.created,
        modelStatus="Failed" if job.status in ("failed", "stopped") else "Creating",
        failureMessage=failure(job),
    )


def _base(version: Version) -> str:
    """Return the name of a version's base model; what was imported whole is its own."""
    return (version.base or version.model).partition("@")[0]


def _type(version: Version) -> str:
    """Return the customization type by what trained a version."""
    from ascent.customize.objectives.rows import ROWS

    row: Any = ROWS.get(version.lineage.method)
    if row is None:
        return "IMPORTED"
    if row.kind == "online":
        return REINFORCEMENT
    if getattr(row, "corpus", False):
        return PRE_TRAINING
    taught = row.name == "distill_sequence" or (row.kind == "supervised" and row.teacher)
    return DISTILLATION if taught else FINE_TUNING
