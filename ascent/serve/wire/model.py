"""botocore's service models as the wire's contract: shapes and operations, compiled when an operation is first used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal

from ascent.records.errors import MissingExtra, UnknownName

SERVICES = ("bedrock-runtime", "bedrock", "sagemaker-runtime", "bedrock-agentcore", "bedrock-agentcore-control")
"""What one port routes, by botocore's names. No two of their operations share method and path."""

Kind = Literal["structure", "list", "map", "string", "integer", "number", "boolean", "blob", "timestamp", "document"]
Repeats = Literal["always", "briefly", "never"]
_KINDS: dict[str, Kind] = {"long": "integer", "float": "number", "double": "number", "character": "string"}
_BITS = {"integer": 31, "long": 63}

_MODELS = "models and jobs of this server have plain names, org/model names and short ARNs"
_DATA = "data may lie at file:// or at any fsspec address"
RELAXED: dict[str, str] = {
    "s3Uri": _DATA,
    "uri": _DATA,
    **dict.fromkeys(
        (
            *("modelId", "modelIdentifier", "baseModelIdentifier", "teacherModelIdentifier", "desiredModelId"),
            *("modelArn", "modelArnEquals", "baseModelArnEquals", "foundationModelArnEquals", "sourceModelArn"),
            *("jobIdentifier", "jobIdentifiers", "jobArn", "customModelDeploymentIdentifier", "resourceARN"),
        ),
        _MODELS,
    ),
    "roleArn": "no role is assumed, so any text will do",
    "lambdaArn": "a grader of a use case is named instead of a function of AWS Lambda",
}
"""Members whose pattern does not hold here, and why. Length limits stay; control characters are still refused."""
_RELAXED_PATTERN = r"[^\x00-\x1f\x7f]*"

REWRITTEN = {
    # the same language, read without backtracking: the hyphen is in the class already
    r"(-*[a-zA-Z0-9\+\-\.])": r"[a-zA-Z0-9+.\-]",
    # a JSON web token with its dots unescaped, so each of the parts could end anywhere; who reads it checks it anyway
    "[A-Za-z0-9-_=]+.[A-Za-z0-9-_=]+.[A-Za-z0-9-_=]+": "[!-~]+",
}
"""Parts of patterns that would take exponential or cubic time, and what is read instead."""

_TOKENS = ("clientToken", "clientRequestToken")
_ASKING = ("Apply", "Converse", "Evaluate", "Invoke", "Retrieve", "Search")
"""First words of operations that compute an answer and create nothing."""


@dataclass(eq=False, slots=True)
class Shape:
    """A type of the model with its constraints; lengths are in characters, bytes or entries.

    `item` is what a list or map holds, `key` what a map's keys are, `payload` the member that is the whole body.
    A `stream` is a union of events, or a blob that is sent as it comes.
    """

    name: str
    kind: Kind
    low: float | None = None
    high: float | None = None
    pattern: re.Pattern[str] | None = None
    enum: frozenset[str] | None = None
    required: tuple[str, ...] = ()
    members: dict[str, Member] = field(default_factory=dict)
    item: Shape | None = None
    key: Shape | None = None
    payload: str | None = None
    timestamp: str | None = None
    union: bool = False
    stream: bool = False


@dataclass(eq=False, slots=True)
class Member:
    """A member of a structure: its name, its name on the wire, where it travels (empty: the body), and its type."""

    name: str
    wire: str
    shape: Shape
    location: str = ""
    event_payload: bool = False
    json: bool = False


@dataclass(eq=False, frozen=True)
class ErrorKind:
    """A modelled error: its code, its HTTP status, and its members."""

    code: str
    status: int
    members: Mapping[str, Member]


class Operation:
    """One operation of a service. Its shapes are compiled when they are first looked at.

    Attributes:
        service, name: botocore's name of the service, and the operation's.
        action: `service:Name`, which scopes match.
        signing: the service name inside a signature.
        bearer: whether the model allows bearer keys.
        repeats: whether the same signature may come again: `always` (it only reads), `briefly` (it computes an
            answer, and equal questions within a second have equal signatures), `never`.
    """

    def __init__(self, model: Any, service: Service) -> None:
        self._model, self._service = model, service
        self.service: str = service.name
        self.name: str = model.name
        self.action = f"{self.service}:{self.name}"
        self.method: str = model.http["method"]
        self.uri: str = model.http["requestUri"]
        self.status = int(model.http.get("responseCode", 200))
        self.signing, self.bearer = service.signing, service.bearer
        self.takes_events: bool = model.has_event_stream_input
        self.error_codes: tuple[str, ...] = tuple(shape.name for shape in model.error_shapes)

    @cached_property
    def repeats(self) -> Repeats:
        """Whether the same signature may come again."""
        if self._service.raw["operations"][self.name].get("readonly") or self.method in ("GET", "HEAD"):
            return "always"
        return "briefly" if self.name.startswith(_ASKING) and self.token is None else "never"

    @cached_property
    def input(self) -> Shape | None:
        """The shape of the request."""
        shape = self._model.input_shape
        return None if shape is None else self._service.shape(shape)

    @cached_property
    def output(self) -> Shape | None:
        """The shape of the response."""
        shape = self._model.output_shape
        return None if shape is None else self._service.shape(shape)

    @cached_property
    def stream(self) -> Member | None:
        """The member of the response that is a stream of events or of bytes."""
        if self.output is None or self.output.payload is None:
            return None
        member = self.output.members[self.output.payload]
        return member if member.shape.stream or member.shape.kind == "blob" else None

    @cached_property
    def token(self) -> str | None:
        """The member that makes repeated requests one, if the model marks one."""
        shape = self._model.input_shape
        members = {} if shape is None else shape.members
        marked = (name for name in _TOKENS if name in members and members[name].metadata.get("idempotencyToken"))
        return next(marked, None)

    def error(self, code: str) -> ErrorKind | None:
        """Return the modelled error of that code, if the service has one."""
        return self._service.errors.get(code)


class Service:
    """One service's model."""

    def __init__(self, name: str, raw: Mapping[str, Any]) -> None:
        from botocore import xform_name
        from botocore.model import ServiceModel

        model = ServiceModel(raw, name)
        self.name, self.raw = name, raw
        self.signing: str = model.signing_name
        self.bearer = "smithy.api#httpBearerAuth" in raw["metadata"].get("auth", ())
        self._shapes: dict[str, Shape] = {}
        self.operations = {
            str(xform_name(each)): Operation(model.operation_model(each), self) for each in model.operation_names
        }
        self.errors = {shape.name: self._error(shape) for shape in model.error_shapes}

    def shape(self, shape: Any) -> Shape:
        """Compile one of botocore's shapes and what it refers to, each once."""
        if (known := self._shapes.get(shape.name)) is not None:
            return known
        facts, serial = shape.metadata, shape.serialization
        kind: Any = "document" if facts.get("document") else _KINDS.get(shape.type_name, shape.type_name)
        found = self._shapes[shape.name] = Shape(
            name=shape.name,
            kind=kind,
            low=facts.get("min"),
            high=facts.get("max"),
            pattern=compiled(facts.get("pattern")),
            enum=frozenset(facts["enum"]) if facts.get("enum") else None,
            required=tuple(facts.get("required", ())),
            payload=serial.get("payload"),
            timestamp=serial.get("timestampFormat"),
            union=bool(facts.get("union")),
            stream=bool(serial.get("eventstream") or serial.get("streaming")),
        )
        if (bits := _BITS.get(shape.type_name)) is not None:  # what a client of another language can hold
            found.low = -(2**bits) if found.low is None else found.low
            found.high = 2**bits - 1 if found.high is None else found.high
        if kind == "structure":
            found.members |= {name: self._member(name, member) for name, member in shape.members.items()}
        elif kind == "list":
            found.item = self.shape(shape.member)
        elif kind == "map":
            found.key, found.item = self.shape(shape.key), self.shape(shape.value)
        return found

    def _member(self, name: str, member: Any) -> Member:
        serial, shape = member.serialization, self.shape(member)
        if serial.get("timestampFormat") != shape.timestamp:
            shape = replace(shape, timestamp=serial["timestampFormat"])
        if name in RELAXED:
            shape = _relaxed(shape)
        wire, location = serial.get("name", name), serial.get("location", "")
        return Member(name, wire, shape, location, bool(serial.get("eventpayload")), bool(serial.get("jsonvalue")))

    def _error(self, shape: Any) -> ErrorKind:
        status = shape.metadata.get("error", {}).get("httpStatusCode")
        members = {name: self._member(name, member) for name, member in shape.members.items()}
        return ErrorKind(shape.name, int(status or (500 if shape.metadata.get("fault") else 400)), members)


@cache
def load_service(name: str) -> Service:
    """Return a service's model from the installed botocore.

    Raises:
        MissingExtra: botocore is not installed.
        UnknownName: botocore has no service of that name.
    """
    try:
        from botocore.exceptions import UnknownServiceError
        from botocore.loaders import Loader
    except ImportError as error:
        raise MissingExtra("serve", "the AWS API") from error
    try:
        return Service(name, Loader().load_service_model(name, "service-2"))
    except UnknownServiceError as error:
        raise UnknownName("AWS service", name, SERVICES) from error


@cache
def compiled(pattern: str | None) -> re.Pattern[str] | None:
    r"""Return a pattern of the model, or None where there is none or where it is written as only Java's `\p{…}` is."""
    if pattern is None:
        return None
    for part, same in REWRITTEN.items():
        pattern = pattern.replace(part, same)
    try:
        return re.compile(pattern.replace(r"\z", r"\Z"))
    except re.error:
        return None


def _relaxed(shape: Shape) -> Shape:
    """Return a copy without its pattern, or a list of such."""
    if shape.item is not None:
        return replace(shape, item=_relaxed(shape.item))
    return shape if shape.pattern is None else replace(shape, pattern=re.compile(_RELAXED_PATTERN))
