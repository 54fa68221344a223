"""Batch inference jobs. The job itself is `ascent.serve.kinds.batch_inference`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascent.jobs.specs import Job, Limits
from ascent.serve.services.bedrock.limits import answering_limits
from ascent.serve.services.bedrock.resources import (
    MESSAGE_CHARS,
    Request,
    Resources,
    job_arn,
    modified,
    present,
    refuse,
)

if TYPE_CHECKING:
    from ascent.serve.wire.authenticate import Caller

KIND = "invocation"
COUNTS = ("totalRecordCount", "processedRecordCount", "successRecordCount", "errorRecordCount")


class Invocation(Resources):
    """CreateModelInvocationJob and its kin."""

    def create_model_invocation_job(self, request: Request, caller: Caller) -> Request:
        """Put a batch of records in line for a model: a base model, a version or a deployment."""
        refuse(request, "vpcConfig")
        start = self._start(self._answering(request["modelId"], caller), caller)
        given = request["inputDataConfig"].get("s3InputDataConfig", {})
        asked = request["outputDataConfig"].get("s3OutputDataConfig", {})
        refuse(asked, "s3EncryptionKeyId")
        payload = {
            "model": start.model,
            "shown_as": request["modelId"],
            "input": self._checked(given.get("s3Uri", "")),
            "output": self._checked(asked.get("s3Uri", "")),
            "converse": request.get("modelInvocationType") == "Converse",
        }
        limits = answering_limits([start.model], self._store)
        seconds = request["timeoutDurationInHours"] * 3600.0 if "timeoutDurationInHours" in request else None
        job = self._submit(KIND, request, caller, payload, Limits(limits.memory_mb, seconds, limits.attempts))
        self._tag(f"{KIND}/{job.id}", request.get("tags", ()))
        return {"jobArn": job_arn(job)}

    def get_model_invocation_job(self, request: Request, caller: Caller) -> Request:
        """Say how a batch stands, with its counts."""
        return _described(self._job(KIND, request["jobIdentifier"], caller))

    def list_model_invocation_jobs(self, request: Request, caller: Caller) -> Request:
        """List batches, the newest first."""
        jobs, token = self._jobs(KIND, request, caller, _state, "submitTime")
        return present(invocationJobSummaries=[_described(job) for job in jobs], nextToken=token)

    def stop_model_invocation_job(self, request: Request, caller: Caller) -> Request:
        """Stop a batch; what is answered is kept with the job."""
        self._stop(KIND, request["jobIdentifier"], caller)
        return {}


def _state(job: Job) -> str:
    if job.status == "running":
        return "Validating" if job.phase in ("", "validating") else "InProgress"
    states = {"queued": "Submitted", "stopping": "Stopping", "stopped": "Stopped", "failed": "Failed"}
    return states.get(job.status, "Completed")


def _described(job: Job) -> dict[str, Any]:
    asked = job.payload["request"]
    counts = {name: job.result[name] for name in COUNTS} if job.result else {}
    if not counts and job.phase == "answering" and job.total:
        counts = {"totalRecordCount": job.total, "processedRecordCount": job.done}
    return present(
        jobArn=job_arn(job),
        jobName=job.name,
        modelId=asked["modelId"],
        clientRequestToken=asked.get("clientRequestToken"),
        roleArn=asked["roleArn"],
        status=_state(job),
        message=job.message[:MESSAGE_CHARS] if job.message else None,
        submitTime=job.created,
        lastModifiedTime=modified(job),
        endTime=job.ended,
        inputDataConfig=asked["inputDataConfig"],
        outputDataConfig=asked["outputDataConfig"],
        timeoutDurationInHours=asked.get("timeoutDurationInHours"),
        modelInvocationType=asked.get("modelInvocationType"),
        **counts,
    )
