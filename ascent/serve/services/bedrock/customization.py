"""Customization jobs: fine-tuning, continued pre-training, distillation and reinforcement fine-tuning."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ascent.jobs.specs import Job
from ascent.records.errors import BadInput, UnknownName
from ascent.serve.kinds.customize import PHASES
from ascent.serve.kinds.home import phases_of
from ascent.serve.kinds.hyperparameters import (
    DISTILLATION,
    FINE_TUNING,
    REINFORCEMENT,
    Settings,
    recipe_of,
    settings_of,
)
from ascent.serve.services.bedrock.limits import training_limits
from ascent.serve.services.bedrock.resources import (
    STATES,
    Request,
    Resources,
    failure,
    foundation_arn,
    job_arn,
    model_arn,
    modified,
    present,
    refuse,
)
from ascent.serve.wire.errors import ServiceError

if TYPE_CHECKING:
    from ascent.inference.versions import Version
    from ascent.serve.wire.authenticate import Caller

KIND = "customize"
DETAILS = (
    ("validationDetails", PHASES[0:1]),
    ("dataProcessingDetails", PHASES[0:1]),
    ("trainingDetails", PHASES[1:]),
)
"""AWS' names of the parts of a job, and our phases of each."""
RFT_NAMES = (
    "epochCount",
    "batchSize",
    "learningRate",
    "maxPromptLength",
    "trainingSamplePerPrompt",
    "inferenceMaxTokens",
)
"""Members of rftConfig.hyperParameters that are hyperparameters by the same name."""


class Customization(Resources):
    """CreateModelCustomizationJob and its kin. The job itself is `ascent.serve.kinds.customize`."""

    def create_model_customization_job(self, request: Request, caller: Caller) -> Request:
        """Check a request as far as that is possible without its data, and put the job in line."""
        refuse(request, "vpcConfig", "customModelKmsKeyId")
        kind = request.get("customizationType", FINE_TUNING)
        start = self._start(request["baseModelIdentifier"], caller)
        settings = settings_of(kind, _hyperparameters(request), start.model)
        payload: dict[str, Any] = {
            "name": request["customModelName"],
            "base": start.model,
            "root": start.root,
            "parent": start.parent,
            "priced_as": start.name,
            "settings": asdict(settings),
            "train": self._training_data(request),
            "validation": [
                self._checked(part["s3Uri"]) for part in request.get("validationDataConfig", {}).get("validators", ())
            ],
            "output": self._checked(request["outputDataConfig"]["s3Uri"]),
            "use_case": self._use_case(settings.use_case) if settings.use_case else None,
            "grader": None,
            "teacher": None,
        }
        more = self._reward(request, kind, payload) | self._teacher(request, kind, payload, settings, caller)
        field = "prompts" if kind == REINFORCEMENT else "data"
        recipe = recipe_of(settings, **{field: "train.jsonl"}, **more)
        job = self._submit(KIND, request, caller, payload, training_limits(recipe, start, self._store))
        self._tag(f"{KIND}/{job.id}", request.get("jobTags", ()))
        self._tag(f"model/{job.id}", request.get("customModelTags", ()))
        return {"jobArn": job_arn(job)}

    def get_model_customization_job(self, request: Request, caller: Caller) -> Request:
        """Say how a job stands, and once it has ended what came of it or why it failed."""
        job = self._job(KIND, request["jobIdentifier"], caller)
        asked, result = job.payload["request"], job.result or {}
        version = self._made(job)
        return present(
            jobArn=job_arn(job),
            jobName=job.name,
            outputModelName=asked["customModelName"],
            outputModelArn=model_arn(version, job.payload["region"]) if version else None,
            clientRequestToken=asked.get("clientRequestToken"),
            roleArn=asked["roleArn"],
            status=STATES[job.status],
            statusDetails=_details(job),
            failureMessage=failure(job),
            creationTime=job.created,
            lastModifiedTime=modified(job),
            endTime=job.ended,
            baseModelArn=foundation_arn(job.payload["priced_as"], job.payload["region"]),
            hyperParameters=asked.get("hyperParameters"),
            trainingDataConfig=asked["trainingDataConfig"],
            validationDataConfig=asked.get("validationDataConfig", {"validators": []}),
            outputDataConfig=asked["outputDataConfig"],
            customizationType=asked.get("customizationType", FINE_TUNING),
            trainingMetrics=training_metrics(result),
            validationMetrics=validation_metrics(result),
            customizationConfig=asked.get("customizationConfig"),
        )

    def list_model_customization_jobs(self, request: Request, caller: Caller) -> Request:
        """List jobs, the newest first."""
        jobs, token = self._jobs(KIND, request, caller, lambda job: STATES[job.status])
        summaries = []
        for job in jobs:
            version = self._made(job)
            summaries.append(
                present(
                    jobArn=job_arn(job),
                    baseModelArn=foundation_arn(job.payload["priced_as"], job.payload["region"]),
                    jobName=job.name,
                    status=STATES[job.status],
                    statusDetails=_details(job),
                    lastModifiedTime=modified(job),
                    creationTime=job.created,
                    endTime=job.ended,
                    customModelArn=model_arn(version, job.payload["region"]) if version else None,
                    customModelName=job.payload["request"]["customModelName"],
                    customizationType=job.payload["request"].get("customizationType", FINE_TUNING),
                )
            )
        return present(modelCustomizationJobSummaries=summaries, nextToken=token)

    def stop_model_customization_job(self, request: Request, caller: Caller) -> Request:
        """Stop a job; one that trains writes its checkpoint first."""
        self._stop(KIND, request["jobIdentifier"], caller)
        return {}

    def _made(self, job: Job) -> Version | None:
        """Return the version that a job made, unless it was deleted."""
        if job.status != "completed" or not job.result:
            return None
        try:
            return self._registry.get(job.result["version"], job.owner)
        except UnknownName:
            return None

    def _training_data(self, request: Request) -> str:
        config = request["trainingDataConfig"]
        if config.get("invocationLogsConfig"):
            raise ServiceError(
                "ValidationException", "invocationLogsConfig is not read here; give trainingDataConfig.s3Uri"
            )
        if not config.get("s3Uri"):
            raise ServiceError(
                "ValidationException", "trainingDataConfig.s3Uri is missing; it is the address of the data"
            )
        return self._checked(config["s3Uri"])

    def _reward(self, request: Request, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Put the grader of a reinforcement job into its payload; return the recipe's field."""
        config = request.get("customizationConfig", {}).get("rftConfig")
        if kind != REINFORCEMENT:
            if config:
                raise ServiceError("ValidationException", f"rftConfig is for {REINFORCEMENT}, not for {kind}")
            return {}
        lambda_arn = (config or {}).get("graderConfig", {}).get("lambdaGrader", {}).get("lambdaArn")
        if not lambda_arn:
            raise ServiceError(
                "ValidationException",
                "rftConfig.graderConfig.lambdaGrader.lambdaArn is missing; name a built-in grader such as exact, or "
                "arn:aws:lambda:us-east-1:000000000000:function:USECASE:GRADER",
            )
        payload["grader"], use_case = self._grader(lambda_arn)
        payload["use_case"] = use_case or payload["use_case"]
        return {"reward": {"grader": payload["grader"]}}

    def _grader(self, text: str) -> tuple[str, str | None]:
        """Return the grader that a function's ARN or name means, and its use case's folder.

        Raises:
            UnknownName: it is neither built in nor of a use case.
        """
        from ascent.evaluate.graders import BUILTIN

        name = text.partition(":function:")[2] or text
        use_case, colon, grader = name.rpartition(":")
        if colon:
            return grader, self._use_case(use_case)
        if name not in BUILTIN:
            hint = "; or name one of a use case as USECASE:GRADER"
            raise UnknownName("grader", name, BUILTIN, hint=hint)
        return name, None

    def _teacher(
        self, request: Request, kind: str, payload: dict[str, Any], settings: Settings, caller: Caller
    ) -> dict[str, Any]:
        """Put the teacher of a distillation job into its payload; return the recipe's field."""
        config = request.get("customizationConfig", {}).get("distillationConfig")
        if kind != DISTILLATION:
            if config:
                raise ServiceError(
                    "ValidationException", f"distillationConfig belongs to {DISTILLATION}, not to {kind}"
                )
            return {}
        if not config:
            why = (
                "distillationConfig.teacherModelConfig.teacherModelIdentifier is missing; name the model to learn from"
            )
            raise ServiceError("ValidationException", why)
        teacher = config["teacherModelConfig"]
        payload["teacher"] = self._start(teacher["teacherModelIdentifier"], caller).model
        fields = payload["settings"]["fields"].setdefault("teacher", {})
        if (longest := teacher.get("maxResponseLengthForInference")) is not None:
            fields["max_tokens"] = longest
        return {"teacher": {**fields, "model": payload["teacher"]}}


def training_metrics(result: dict[str, Any]) -> dict[str, Any] | None:
    """Return the last training loss of a job's result, in the API's form."""
    loss = result.get("training_loss")
    return None if loss is None else {"trainingLoss": loss}


def validation_metrics(result: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the loss on each validation file; a file that was graded instead has none."""
    losses = result.get("validation_losses") or []
    return [present(validationLoss=loss) for loss in losses] or None


def _hyperparameters(request: Request) -> dict[str, str]:
    """Return the hyperparameters of the request, those of rftConfig included."""
    found = dict(request.get("hyperParameters", {}))
    more = request.get("customizationConfig", {}).get("rftConfig", {}).get("hyperParameters", {})
    for name, value in more.items():
        if name not in RFT_NAMES:
            raise BadInput(f"rftConfig.hyperParameters.{name} has no meaning here; known are {', '.join(RFT_NAMES)}")
        if name in found:
            raise BadInput(f"{name} is given in hyperParameters and in rftConfig; keep one")
        found[name] = str(value)
    return found


def _details(job: Job) -> dict[str, Any]:
    """Return the state of each of AWS' parts of a job, with its times."""
    begun = phases_of(job.folder)
    return {name: _detail(job, phases, begun) for name, phases in DETAILS}


def _detail(job: Job, phases: tuple[str, ...], begun: dict[str, datetime]) -> dict[str, Any]:
    mine = [begun[phase] for phase in phases if phase in begun]
    later = [at for phase, at in begun.items() if PHASES.index(phase) > PHASES.index(phases[-1])]
    if not mine:
        return {"status": "NotStarted"}
    ended = min(later, default=None) or job.ended
    status = "Completed" if later or job.status == "completed" else STATES[job.status]
    return {"status": status, "creationTime": min(mine), "lastModifiedTime": ended or max(mine)}
