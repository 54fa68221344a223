"""The base of all records: frozen, versioned, JSON in and out."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ascent.records.errors import Corrupt

Json = dict[str, Any]


class Record(BaseModel):
    """A frozen value that crosses rooms or rests on disk.

    Every record carries `schema_version`, written as a field, so that a file from a newer Ascent is refused with a
    clear message instead of being half-understood.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="constants")

    VERSION: ClassVar[int] = 1
    schema_version: int = 1

    @model_validator(mode="after")
    def _version_is_known(self) -> Self:
        if self.schema_version > type(self).VERSION:
            raise ValueError(
                f"{type(self).__name__} has schema version {self.schema_version}, this Ascent reads up to "
                f"{type(self).VERSION}; upgrade Ascent to read this file"
            )
        return self

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the record as JSON text with a stable key order."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse a record. Raises `Corrupt` with the first failing field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise Corrupt(f"not a valid {cls.__name__}: field {field!r}: {first['msg']}") from error


def digest(value: object) -> str:
    """Return the sha256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
