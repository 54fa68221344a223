"""The service `bedrock`: all its operations on one object, written by resource in the modules beside this one."""

from __future__ import annotations

from ascent.serve.services.bedrock.customization import Customization
from ascent.serve.services.bedrock.deployments import Deployments
from ascent.serve.services.bedrock.evaluation import Evaluation
from ascent.serve.services.bedrock.foundation import Foundation
from ascent.serve.services.bedrock.invocation import Invocation
from ascent.serve.services.bedrock.models import ImportedModels
from ascent.serve.services.bedrock.tags import Tags


class Bedrock(Foundation, Customization, Deployments, ImportedModels, Invocation, Evaluation, Tags):
    """`Bedrock(queue, registry, models, store, ledger, folder)`; see `Resources` for the arguments."""

    service = "bedrock"
