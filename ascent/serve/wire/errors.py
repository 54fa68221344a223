"""Errors of the wire: what a handler raises, and which modelled error it becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascent.records.errors import AscentError, BadInput, Busy, Unavailable, UnknownName

if TYPE_CHECKING:
    from ascent.serve.wire.model import ErrorKind, Operation

STATUS = {
    "AccessDeniedException": 403,
    "ConflictException": 409,
    "ExpiredTokenException": 403,
    "IncompleteSignatureException": 403,
    "InternalServerException": 500,
    "InvalidSignatureException": 403,
    "MissingAuthenticationTokenException": 403,
    "ModelErrorException": 424,
    "ModelTimeoutException": 408,
    "RequestTimeoutException": 408,
    "ResourceNotFoundException": 404,
    "ServiceQuotaExceededException": 400,
    "ServiceUnavailableException": 503,
    "ThrottlingException": 429,
    "UnknownOperationException": 404,
    "UnrecognizedClientException": 403,
}
"""HTTP status of codes that a service does not model; any other is 400."""

SAME = {
    "ConflictException": ("ConflictException", "ConcurrentModificationException", "ValidationException"),
    "InternalServerException": ("InternalServerException", "InternalFailure", "ServiceException"),
    "ModelErrorException": ("ModelErrorException", "ModelError", "RuntimeClientError"),
    "ModelStreamErrorException": ("ModelStreamErrorException", "ModelStreamError"),
    "ResourceNotFoundException": ("ResourceNotFoundException", "ValidationException", "ValidationError"),
    "ServiceUnavailableException": ("ServiceUnavailableException", "ServiceUnavailable"),
    "ThrottlingException": ("ThrottlingException", "ThrottledException"),
    "ValidationException": ("ValidationException", "ValidationError"),
}
"""What services call the same thing; the first that the operation models is sent, else the first of the service."""


class ServiceError(AscentError):
    """An error with an AWS code, sent as the modelled one where the operation or its service models it.

    Attributes:
        code: such as `ValidationException`; what the service calls the same thing is found by itself.
        message: what happened, why, and what to do.
        status: the HTTP status, if it is to differ from the modelled one.
        retry_after_s: sent as Retry-After.
        members: further members of the modelled error.
    """

    def __init__(
        self, code: str, message: str, *, status: int | None = None, retry_after_s: float | None = None, **members: Any
    ) -> None:
        self.code, self.status, self.retry_after_s, self.members = code, status, retry_after_s, members
        self.message = message
        super().__init__(message)


def as_service_error(error: AscentError) -> ServiceError:
    """Return what an error of the house is on the wire."""
    if isinstance(error, ServiceError):
        return error
    text = str(error)
    if isinstance(error, Busy):
        return ServiceError("ThrottlingException", text, status=429, retry_after_s=error.retry_after_s)
    if isinstance(error, UnknownName):
        return ServiceError("ResourceNotFoundException", text)
    if isinstance(error, BadInput):
        return ServiceError("ValidationException", text)
    if isinstance(error, Unavailable):
        return ServiceError("ServiceUnavailableException", text)
    return ServiceError("InternalServerException", text)


def modelled(code: str, operation: Operation | None) -> tuple[str, ErrorKind | None]:
    """Return the code that an operation sends for `code`, and its model; (code, None) where it models none."""
    if operation is None:
        return code, None
    candidates = SAME.get(code, (code,))
    known = [name for name in candidates if name in operation.error_codes]
    known += [name for name in candidates if operation.error(name) is not None]
    return (known[0], operation.error(known[0])) if known else (code, None)
