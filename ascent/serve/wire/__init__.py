"""AWS' wire: botocore's service models as the contract for routing, decoding, validation, encoding and signatures."""

from ascent.serve.wire.app import AwsApp
from ascent.serve.wire.arns import ACCOUNT, arn, id_of
from ascent.serve.wire.authenticate import Authenticator, Caller
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.incoming import Limits
from ascent.serve.wire.pages import page
from ascent.serve.wire.services import served_operations

__all__ = [
    "ACCOUNT",
    "Authenticator",
    "AwsApp",
    "Caller",
    "Limits",
    "ServiceError",
    "arn",
    "id_of",
    "page",
    "served_operations",
]
