"""Evaluation jobs: models measured with built-in graders or a use case's. The job is `ascent.serve.kinds.evaluate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ascent.jobs.specs import ENDED, Job
from ascent.records.errors import BadInput, UnknownName
from ascent.serve.services.bedrock.limits import answering_limits
from ascent.serve.services.bedrock.resources import (
    STATES,
    Request,
    Resources,
    failure,
    job_arn,
    last_part,
    modified,
    present,
    refuse,
)
from ascent.serve.wire.errors import ServiceError

if TYPE_CHECKING:
    from ascent.serve.wire.authenticate import Caller

KIND = "evaluation"
BUILTIN_MARK = "Builtin."
MAX_TOKENS = 128


class Evaluation(Resources):
    """CreateEvaluationJob and its kin. With two models the second is compared with the first."""

    def create_evaluation_job(self, request: Request, caller: Caller) -> Request:
        """Put a measurement in line.

        `metricNames` are built-in graders (`exact`, or `Builtin.exact`), graders of one use case (`USECASE.GRADER`), or
        a use case as a whole (`USECASE.usecase`), with its own metrics and gate; with an evaluator model, what it is to
        judge by (`Builtin.Correctness`).
        """
        refuse(request, "customerEncryptionKeyId")
        automated = request["evaluationConfig"].get("automated")
        if not automated or automated.get("customMetricConfig"):
            raise ServiceError(
                "ValidationException",
                "evaluationConfig.automated with datasetMetricConfigs is what is measured here; people's ratings are "
                "not asked for through this API, nor metrics of a request's own",
            )
        judge = self._judge(automated.get("evaluatorModelConfig"), caller)
        models = [self._candidate(part, caller) for part in request["inferenceConfig"].get("models", ())]
        if not models:
            raise ServiceError("ValidationException", "inferenceConfig.models is missing; name one or two models")
        payload = {
            "datasets": [
                self._dataset(number, part, judged=judge is not None)
                for number, part in enumerate(automated["datasetMetricConfigs"], 1)
            ],
            "models": models,
            "judge": judge,
            "output": self._checked(request["outputDataConfig"]["s3Uri"]),
        }
        limits = answering_limits([model["model"] for model in models], self._store, beside=judge)
        job = self._submit(KIND, request, caller, payload, limits)
        self._tag(f"{KIND}/{job.id}", request.get("jobTags", ()))
        return {"jobArn": job_arn(job)}

    def get_evaluation_job(self, request: Request, caller: Caller) -> Request:
        """Say how a measurement stands."""
        job = self._job(KIND, request["jobIdentifier"], caller)
        asked = job.payload["request"]
        message = failure(job)
        return present(
            jobName=job.name,
            status=STATES[job.status],
            jobArn=job_arn(job),
            jobDescription=asked.get("jobDescription"),
            roleArn=asked["roleArn"],
            jobType="Automated",
            applicationType=asked.get("applicationType"),
            evaluationConfig=asked["evaluationConfig"],
            inferenceConfig=asked["inferenceConfig"],
            outputDataConfig=asked["outputDataConfig"],
            creationTime=job.created,
            lastModifiedTime=modified(job),
            failureMessages=[message] if message else None,
        )

    def list_evaluation_jobs(self, request: Request, caller: Caller) -> Request:
        """List measurements, the newest first."""
        jobs, token = self._jobs(KIND, request, caller, lambda job: STATES[job.status])
        return present(jobSummaries=[_summary(job) for job in jobs], nextToken=token)

    def stop_evaluation_job(self, request: Request, caller: Caller) -> Request:
        """Stop a measurement."""
        self._stop(KIND, request["jobIdentifier"], caller)
        return {}

    def batch_delete_evaluation_job(self, request: Request, caller: Caller) -> Request:
        """Remove measurements that have ended, with their data; reports in the registry and in the store stay."""
        gone, errors = [], []
        for identifier in request["jobIdentifiers"]:
            try:
                job = self._job(KIND, identifier, caller)
                if job.status not in ENDED:
                    raise ServiceError("ConflictException", f"the job {job.name!r} is {job.status}; stop it first")
                self._queue.delete(job.id, job.owner)
            except ServiceError as error:
                errors.append({"jobIdentifier": identifier, "code": error.code, "message": error.message})
                continue
            self._untag_all(f"{KIND}/{job.id}")
            gone.append({"jobIdentifier": job_arn(job), "jobStatus": "Deleting"})
        return {"errors": errors, "evaluationJobs": gone}

    def _candidate(self, config: Request, caller: Caller) -> dict[str, Any]:
        asked = config.get("bedrockModel")
        if asked is None:
            raise ServiceError("ValidationException", "inferenceConfig.models: give bedrockModel.modelIdentifier")
        start = self._start(asked["modelIdentifier"], caller)
        try:
            params = json.loads(asked.get("inferenceParams") or "{}")
            settings = params.get("inferenceConfig", params)
            limit = int(settings.get("maxTokens") or settings.get("max_tokens") or MAX_TOKENS)
        except (ValueError, AttributeError, TypeError) as error:
            raise BadInput(f'inferenceParams is no JSON object such as {{"maxTokens": 64}} ({error})') from error
        name = asked["modelIdentifier"]
        return {"model": start.model, "version": start.parent, "name": name, "max_tokens": limit}

    def _judge(self, config: Request | None, caller: Caller) -> str | None:
        """Return the model that judges: one of the store, or `remote:URL#MODEL` of a deployment."""
        if not config:
            return None
        asked = config["bedrockEvaluatorModels"][0]["modelIdentifier"]
        deployed = self._models.deployment(last_part(asked), caller)
        if deployed is not None and deployed.kind == "remote":
            return deployed.target.model
        return self._start(self._answering(asked, caller), caller).model

    def _dataset(self, number: int, config: Request, *, judged: bool) -> dict[str, Any]:
        dataset = config["dataset"]
        uri = dataset.get("datasetLocation", {}).get("s3Uri")
        if not uri:
            raise ServiceError("ValidationException", "datasetLocation.s3Uri, the address of the rows, is missing")
        names = config["metricNames"]
        metrics, use_case = (_criteria(names), None) if judged else self._metrics(names)
        name = f"{number}-{dataset['name']}"  # unique, and no name of a folder above
        return {"name": name, "uri": self._checked(uri), "metrics": metrics, "use_case": use_case}

    def _metrics(self, names: list[str]) -> tuple[list[str], str | None]:
        """Return graders and the folder of the use case that has them; no graders: the use case's own metrics."""
        from ascent.evaluate.graders import BUILTIN

        plain = [name.removeprefix(BUILTIN_MARK) for name in names]
        parts = [name.rpartition(".") for name in plain]
        cases = {case for case, _, _ in parts if case}
        if len(cases) > 1 or (cases and any(not case for case, _, _ in parts)):
            raise BadInput(f"metricNames {', '.join(names)}: the metrics of a data set are built in or of one use case")
        if cases:
            folder = self._use_case(next(iter(cases)))
            return ([] if plain == [f"{next(iter(cases))}.usecase"] else [grader for _, _, grader in parts]), folder
        for name in plain:
            if name not in BUILTIN:
                raise UnknownName("metric", name, BUILTIN, hint="; or name one of a use case as USECASE.GRADER")
        return plain, None


def _criteria(names: list[str]) -> list[str]:
    """Return what a judge is asked. Raises UnknownName."""
    from ascent.evaluate.criteria import CRITERIA

    plain = [name.removeprefix(BUILTIN_MARK) for name in names]
    for name in plain:
        if name not in CRITERIA:
            raise UnknownName("metric of a judge", name, CRITERIA)
    return plain


def _summary(job: Job) -> Request:
    automated = job.payload["request"]["evaluationConfig"]["automated"]
    judges = automated.get("evaluatorModelConfig", {}).get("bedrockEvaluatorModels", ())
    return present(
        jobArn=job_arn(job),
        jobName=job.name,
        status=STATES[job.status],
        creationTime=job.created,
        jobType="Automated",
        evaluationTaskTypes=[part["taskType"] for part in automated["datasetMetricConfigs"]],
        modelIdentifiers=[model["name"] for model in job.payload["models"]],
        evaluatorModelIdentifiers=[judge["modelIdentifier"] for judge in judges] or None,
    )
