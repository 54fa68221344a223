"""How a server runs: from defaults, a YAML file, the environment and the command line, the later before the earlier."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ascent.customize.yamlfile import load_yaml
from ascent.jobs.specs import Quota
from ascent.records.errors import BadInput, nearest

PREFIX = "ASCENT_SERVER_"
PORT = 8484


_FROZEN = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Deployed(BaseModel):
    """A model that the server offers from its start."""

    model_config = _FROZEN

    name: str = Field(min_length=1)
    """What callers name."""
    model: str = Field(min_length=1)
    """A model or adapter of the store, a folder, or `remote:URL#MODEL`."""


class EngineLimits(BaseModel):
    """What one base model, with all its adapters, may take."""

    model_config = _FROZEN

    rows: int = Field(default=32, ge=1, le=1024)
    """Answers generated together."""
    waiting: int = Field(default=256, ge=0)
    """Requests that wait for a place among them; more are answered with 429 and Retry-After."""
    cache_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose keys and values are held, of running requests and for prompts that come again; 2 GiB worth, or a
    quarter of the free memory where that is less, when left out."""
    seconds: float = Field(default=600.0, gt=0)
    """The longest that a request may take, waiting included."""


class JobLimits(BaseModel):
    """What jobs may take together."""

    model_config = _FROZEN

    slots: int | None = Field(default=None, ge=0)
    """Jobs at a time; what the machine bears when left out, and none here when 0."""
    memory_mb: int | None = Field(default=None, ge=1)
    """Memory of all of them; most of the machine's when left out."""
    keep_days: float = Field(default=30.0, ge=0)
    """How long the files of an ended job are kept."""
    running_each: int | None = Field(default=None, ge=1)
    """Jobs of one owner that run at a time."""
    queued_each: int | None = Field(default=None, ge=1)
    """Jobs of one owner that wait; more are refused."""
    stored_mb_each: int | None = Field(default=None, ge=1)
    """What the files of one owner's jobs may take; beyond it no job is accepted."""
    environment: tuple[str, ...] = ()
    """Names of variables that jobs are given too, such as `AWS_ACCESS_KEY_ID` and `AWS_ENDPOINT_URL` of a store."""


class ServerConfig(BaseModel):
    """The whole configuration of `ascent serve`."""

    model_config = _FROZEN

    host: str = "127.0.0.1"
    """Where to listen; loopback unless keys exist, and TLS or `plain_http` is given."""
    port: int = Field(default=PORT, ge=0, le=65535)
    """The port; 0 takes a free one."""
    home: Path | None = None
    """The folder of database, keys and jobs; `$ASCENT_HOME/server` when left out."""
    database: str | None = None
    """An SQLAlchemy address, such as `postgresql+psycopg://…`, instead of the SQLite file in `home`."""
    tls_cert: Path | None = None
    """A certificate in PEM; with it and its key the server speaks HTTPS."""
    tls_key: Path | None = None
    """The certificate's key."""
    plain_http: bool = False
    """Allow another address than loopback without TLS, as behind a proxy that ends it."""
    models: tuple[Deployed, ...] = ()
    """Deployed from the start."""
    engine: EngineLimits = EngineLimits()
    """Limits of each base model."""
    jobs: JobLimits = JobLimits()
    """Limits of customization, import, batch and evaluation jobs."""
    data: tuple[str, ...] | None = None
    """Where callers' data and results may lie: folders, and addresses such as `s3://bucket/folder`. Left out: anywhere
    if only this machine reaches the server, else nowhere."""
    prices: Path | None = None
    """A price list; without one everything is metered and costs nothing."""
    max_body_mb: int = Field(default=64, ge=1, le=2048)
    """Larger requests are refused with 413."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long running requests may go on after SIGTERM."""
    log_format: Literal["json", "text"] = "json"
    """One JSON object a line, or lines for people."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServerConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or neither")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def quota_of(config: ServerConfig) -> Quota:
    """Return what one owner may have of the queue."""
    jobs = config.jobs
    return Quota(running=jobs.running_each, queued=jobs.queued_each, stored_mb=jobs.stored_mb_each)


def load_config(
    file: Path | None = None, given: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> ServerConfig:
    """Return the configuration from `file`, `ASCENT_SERVER_…` variables and what was `given` on the command line.

    A variable is named after its field, nested ones with two underscores: `ASCENT_SERVER_PORT`,
    `ASCENT_SERVER_JOBS__SLOTS`. Lists are written as JSON: `ASCENT_SERVER_DATA='["/srv/data"]'`.

    Raises:
        BadRecipe: the file is malformed; with line and key.
        BadInput: a variable or an option is unknown or does not fit.
    """
    base = load_yaml(file, ServerConfig).model_dump(exclude_unset=True) if file is not None else {}
    found = _merged(_merged(base, _from_environment(os.environ if environment is None else environment)), given or {})
    try:
        return ServerConfig.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the configuration"
        raise BadInput(f"{field}: {first['msg']}; see docs/serving.md for every field") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in environment.items():
        if not name.startswith(PREFIX):
            continue
        first, *rest = name.removeprefix(PREFIX).lower().split("__")
        if first not in ServerConfig.model_fields or len(rest) > 1 or (rest and first not in ("engine", "jobs")):
            raise BadInput(
                f"the variable {name} names no field of the server{nearest(first, ServerConfig.model_fields)}"
            )
        target = found.setdefault(first, {}) if rest else found
        target[rest[0] if rest else first] = _list_or_text(name, value)
    return found


def _list_or_text(name: str, value: str) -> Any:
    if not value.startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadInput(f'the variable {name} is no list in JSON ({error}); write ["one", "two"]') from error


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one tree of fields over another."""
    found = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if both else value
    return found
