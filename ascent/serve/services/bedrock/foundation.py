"""Base models: what the catalogue can fetch and what lies in the store, as foundation models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascent.records.errors import UnknownName
from ascent.serve.services.bedrock.resources import Request, Resources, foundation_arn, last_part

if TYPE_CHECKING:
    from ascent.serve.wire.authenticate import Caller

CUSTOMIZATIONS = ["FINE_TUNING", "CONTINUED_PRE_TRAINING", "DISTILLATION"]


class Foundation(Resources):
    """ListFoundationModels and GetFoundationModel."""

    def list_foundation_models(self, request: Request, caller: Caller) -> Request:
        """List base models: those of the store, and those that the catalogue can fetch."""
        found = []
        for summary in self._summaries(caller.region).values():
            asked = (
                (request.get("byProvider"), [summary["providerName"]]),
                (request.get("byCustomizationType"), summary["customizationsSupported"]),
                (request.get("byOutputModality"), summary["outputModalities"]),
                (request.get("byInferenceType"), summary["inferenceTypesSupported"]),
            )
            if all(wanted is None or wanted in values for wanted, values in asked):
                found.append(summary)
        return {"modelSummaries": found}

    def get_foundation_model(self, request: Request, caller: Caller) -> Request:
        """Describe one base model."""
        name, known = last_part(request["modelIdentifier"]), self._summaries(caller.region)
        if name not in known:
            raise UnknownName("foundation model", name, known)
        return {"modelDetails": known[name]}

    def _summaries(self, region: str) -> dict[str, dict[str, Any]]:
        bases = {name: (card.family, card.kind) for name, card in self._bases().items() if "@" not in name}
        catalogue = {name: (entry.family, entry.kind) for name, entry in self._store.catalogue().items()}
        known = {**catalogue, **bases}
        return {name: _summary(name, *known[name], region) for name in sorted(known)}


def _summary(name: str, family: str, kind: str, region: str) -> dict[str, Any]:
    embedder = kind == "embedder"
    return {
        "modelArn": foundation_arn(name, region),
        "modelId": name,
        "modelName": name,
        "providerName": family,
        "inputModalities": ["TEXT"],
        "outputModalities": ["EMBEDDING" if embedder else "TEXT"],
        "responseStreamingSupported": not embedder,
        "customizationsSupported": [] if embedder else CUSTOMIZATIONS,
        "inferenceTypesSupported": ["ON_DEMAND"],
        "modelLifecycle": {"status": "ACTIVE"},
    }
