"""Service classes: which operations of the models are served, and by which method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from ascent.records.errors import BadInput, nearest
from ascent.serve.wire.model import load_service

Handler = Callable[[dict[str, Any], Any], Any]


def handlers_of(service: object) -> dict[str, Handler]:
    """Return a service's handlers by `service:Operation`.

    A service has an attribute `service`, botocore's name of it; its public methods are the operations that it serves,
    named as boto3 names them.

    Raises:
        BadInput: a public method is no operation, or one that plain HTTP cannot carry.
        UnknownName: botocore has no such service.
    """
    model = load_service(str(getattr(service, "service", "")))
    found = {}
    kind = service if isinstance(service, type) else type(service)
    for name, _ in inspect.getmembers(kind, inspect.isfunction):
        if name.startswith("_"):
            continue
        operation = model.operations.get(name)
        where = f"{kind.__name__}.{name}"
        if operation is None:
            raise BadInput(
                f"{where} is no operation of {model.name}{nearest(name, model.operations)}; "
                "begin the names of helpers with an underscore"
            )
        if operation.takes_events:
            raise BadInput(
                f"{where}: a request that is a stream of events needs HTTP/2, which this server does not speak"
            )
        found[operation.action] = getattr(service, name)
    return found


def served_operations(services: Iterable[object]) -> list[tuple[str, str, str]]:
    """Return (service, operation, what its handler says of itself in a line) of all that is served, sorted."""
    rows = []
    for service in services:
        for action, handler in handlers_of(service).items():
            name, _, operation = action.partition(":")
            rows.append((name, operation, (inspect.getdoc(handler) or "").partition("\n")[0]))
    return sorted(rows)
