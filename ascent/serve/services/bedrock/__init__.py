"""The control plane of Bedrock: models, customization, deployments, import, batch inference, evaluation."""

from ascent.serve.services.bedrock.service import Bedrock

__all__ = ["Bedrock"]
