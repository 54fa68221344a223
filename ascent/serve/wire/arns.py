"""ARNs of this server's resources: `arn:aws:{service}:{region}:000000000000:{kind}/{id}`."""

from __future__ import annotations

import re

from ascent.serve.wire.errors import ServiceError

ACCOUNT = "000000000000"
_ARN = re.compile(r"arn:[^:]*:[^:]*:[^:]*:[^:]*:[^:/]+/(.+)", re.DOTALL)


def arn(service: str, kind: str, id: str, region: str) -> str:
    """Return the ARN of a resource; `id` may hold slashes."""
    return f"arn:aws:{service}:{region}:{ACCOUNT}:{kind}/{id}"


def id_of(arn_or_id: str) -> str:
    """Return the id inside an ARN, all after its kind; what is no ARN is an id already.

    Raises:
        ServiceError: ValidationException; it begins as an ARN and does not end as one.
    """
    if not arn_or_id.startswith("arn:"):
        return arn_or_id
    if (match := _ARN.fullmatch(arn_or_id)) is None:
        raise ServiceError(
            "ValidationException",
            f"{arn_or_id[:100]!r} is no ARN of a resource; give the id, or arn:aws:SERVICE:REGION:{ACCOUNT}:KIND/ID",
        )
    return match.group(1)
