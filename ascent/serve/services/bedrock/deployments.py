"""Custom model deployments: a version becomes callable, once something speaks for it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ascent.inference.versions import Version
from ascent.jobs.tables import sa
from ascent.records.errors import BadInput, UnknownName
from ascent.serve.services.bedrock.resources import (
    MESSAGE_CHARS,
    OVERRIDE,
    Request,
    Resources,
    between,
    check_tags,
    last_part,
    model_arn,
    paged,
    present,
    seen_by,
)
from ascent.serve.wire.arns import arn

if TYPE_CHECKING:
    from ascent.serve.wire.authenticate import Caller


class Deployments(Resources):
    """CreateCustomModelDeployment and its kin; `Deployer` does the work.

    A version without a GO verdict is deployed only under the tag `ascent:override=REASON`, on the deployment or on the
    model; the registry records the reason with the caller's name.
    """

    def create_custom_model_deployment(self, request: Request, caller: Caller) -> Request:
        """Begin to deploy a version; it is callable by the deployment's ARN or name once it is Active."""
        version = self._version(request["modelArn"], caller, None)
        tags = {tag["key"]: tag["value"] for tag in request.get("tags", ())}
        check_tags(tags)
        self._permit(version, tags, caller)
        row = self.deployer.create(
            request["modelDeploymentName"],
            version,
            caller.owner,
            description=request.get("description"),
            token=request.get("clientRequestToken"),
        )
        self._tag(f"deployment/{row.id}", request.get("tags", ()))
        return {"customModelDeploymentArn": _arn(row.id, caller)}

    def get_custom_model_deployment(self, request: Request, caller: Caller) -> Request:
        """Say how a deployment stands."""
        row = self._deployment(request["customModelDeploymentIdentifier"], caller)
        update = None
        if row.update is not None:
            update = {"modelArn": self._arn_of(row.next, caller), "updateStatus": row.update}
        return present(
            customModelDeploymentArn=_arn(row.id, caller),
            modelDeploymentName=row.name,
            modelArn=self._arn_of(row.version, caller),
            createdAt=_date(row.created),
            status=row.status,
            description=row.description,
            updateDetails=update,
            failureMessage=row.message[:MESSAGE_CHARS] if row.message else None,
            lastUpdatedAt=_date(row.updated),
        )

    def list_custom_model_deployments(self, request: Request, caller: Caller) -> Request:
        """List deployments, the newest first."""
        wanted = request.get("modelArnEquals")
        rows = [
            row
            for row in self.deployer.list(seen_by(caller))
            if between(_date(row.created), request, "created")
            and request.get("nameContains", "") in row.name
            and request.get("statusEquals", row.status) == row.status
            and (wanted is None or last_part(wanted) == row.version)
        ]
        found, token = paged(rows, request, key=lambda row: (row.created, row.id))
        summaries = [
            present(
                customModelDeploymentArn=_arn(row.id, caller),
                customModelDeploymentName=row.name,
                modelArn=self._arn_of(row.version, caller),
                createdAt=_date(row.created),
                status=row.status,
                lastUpdatedAt=_date(row.updated),
                failureMessage=row.message[:MESSAGE_CHARS] if row.message else None,
            )
            for row in found
        ]
        return present(modelDeploymentSummaries=summaries, nextToken=token)

    def update_custom_model_deployment(self, request: Request, caller: Caller) -> Request:
        """Begin to let a deployment answer with another version; no request is dropped in between."""
        row = self._deployment(request["customModelDeploymentIdentifier"], caller)
        version = self._version(request["modelArn"], caller, None)
        self._permit(version, self._tags(f"deployment/{row.id}"), caller)
        self.deployer.update(row.id, version)
        return {"customModelDeploymentArn": _arn(row.id, caller)}

    def delete_custom_model_deployment(self, request: Request, caller: Caller) -> Request:
        """Take a deployment away; running answers end as if nothing had happened."""
        row = self._deployment(request["customModelDeploymentIdentifier"], caller)
        self.deployer.delete(row.id)
        with self._registry.engine.begin() as connection:
            self._untag(connection, f"deployment/{row.id}", self._tags(f"deployment/{row.id}"))
        return {}

    def _deployment(self, identifier: str, caller: Caller) -> sa.Row[Any]:
        return self.deployer.get(last_part(identifier), seen_by(caller))

    def _permit(self, version: Version, tags: dict[str, str], caller: Caller) -> None:
        """Check that something speaks for a version: a GO verdict, or an override, which is recorded.

        Raises:
            BadInput: nothing does.
        """
        if self._registry.evidence(version.id).permission is not None:
            return
        own = self._tags(f"model/{version.job or version.id}")
        reason = tags.get(OVERRIDE) or own.get(OVERRIDE)
        if reason:
            self._registry.override(version.id, reason, caller.name)
            return
        try:
            self._registry.require_permission(version)
        except BadInput as error:
            raise BadInput(f"{error}. Here that is the tag {OVERRIDE}=REASON of the deployment or the model") from error

    def _arn_of(self, version: str, caller: Caller) -> str:
        try:
            return model_arn(self._registry.get(version), caller.region)
        except UnknownName:
            return arn("bedrock", "custom-model", f"imported/{version}", caller.region)


def _arn(id: str, caller: Caller) -> str:
    return arn("bedrock", "custom-model-deployment", id, caller.region)


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
