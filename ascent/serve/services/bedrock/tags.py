"""Tags of jobs, models and deployments; what something has cost so far is a tag that the server sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascent.serve.services.bedrock.resources import Request, Resources, last_part, seen_by
from ascent.serve.wire.errors import ServiceError

if TYPE_CHECKING:
    from ascent.serve.wire.authenticate import Caller

JOBS = {
    "model-customization-job": "customize",
    "model-import-job": "import",
    "model-invocation-job": "invocation",
    "evaluation-job": "evaluation",
}
MOST = 50
COST, TOKENS = "ascent:cost", "ascent:tokens"


class Tags(Resources):
    """TagResource, UntagResource and ListTagsForResource."""

    def tag_resource(self, request: Request, caller: Caller) -> Request:
        """Set tags of a resource."""
        resource, _ = self._resource(request["resourceARN"], caller)
        known = {*self._tags(resource), *(tag["key"] for tag in request["tags"])}
        if len(known) > MOST:
            raise ServiceError(
                "TooManyTagsException",
                f"{len(known)} tags and {MOST} are allowed; remove some first",
                resourceName=request["resourceARN"],
            )
        self._tag(resource, request["tags"])
        return {}

    def untag_resource(self, request: Request, caller: Caller) -> Request:
        """Remove tags of a resource; what is not there is removed already."""
        resource, _ = self._resource(request["resourceARN"], caller)
        with self._registry.engine.begin() as connection:
            self._untag(connection, resource, request["tagKeys"])
        return {}

    def list_tags_for_resource(self, request: Request, caller: Caller) -> Request:
        """List a resource's tags, and what it has cost and used so far (`ascent:cost`, `ascent:tokens`)."""
        resource, spent = self._resource(request["resourceARN"], caller)
        tags = self._tags(resource) | spent
        return {"tags": [{"key": key, "value": value} for key, value in tags.items()]}

    def _resource(self, text: str, caller: Caller) -> tuple[str, dict[str, str]]:
        """Return the key of a resource's tags, and its cost as tags.

        Raises:
            ServiceError: ResourceNotFoundException; the caller has no such resource.
        """
        kind = text.rpartition(":")[2].partition("/")[0]
        if kind in JOBS:
            job = self._job(JOBS[kind], text, caller)
            return f"{job.kind}/{job.id}", self._spent("job", [job.id], job.owner)
        if kind == "custom-model-deployment":
            row = self.deployer.get(last_part(text), seen_by(caller))
            return f"deployment/{row.id}", self._spent("deployment", [row.id, row.name], row.owner)
        if kind in ("custom-model", "imported-model"):
            version = self._version(text, caller, None)
            return f"model/{version.job or version.id}", {}
        raise ServiceError(
            "ResourceNotFoundException", f"{text!r} is no job, model or deployment; give its ARN", resourceName=text
        )

    def _spent(self, by: Any, names: list[str], owner: str) -> dict[str, str]:
        totals = [total for total in self._ledger.totals(owner, by=by) if total.name in names]
        if not totals:
            return {}
        tokens = sum(t.prompt_tokens + t.completion_tokens + t.training_tokens for t in totals)
        cost = sum(t.cost_micros for t in totals) / 1e6
        return {COST: f"{cost:.6f} {totals[0].currency}", TOKENS: str(tokens)}
