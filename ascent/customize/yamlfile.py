"""YAML files that people write: read into a pydantic model, with every mistake named by file, line and key.

Scalars follow the YAML 1.2 core schema, because YAML 1.1 turns `no` into false, `12:30` into 750 and leaves
`1e-5` a string. Keys may not repeat. A mistake raises `BadRecipe`; several mistakes are listed in one error,
so that one edit can mend them all.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ascent.records.errors import BadRecipe, nearest

M = TypeVar("M", bound=BaseModel)
Loc = tuple[int | str, ...]
SHOWN_MISTAKES = 8


@dataclass(frozen=True)
class YamlFile(Generic[M]):
    """A loaded file: its value, and where in the text each key stood."""

    path: Path
    value: M
    root: yaml.Node

    def line(self, *loc: int | str) -> int:
        """Return the 1-based line of a key such as `("metrics", "guards", 0)`, or of its parent."""
        return _find(self.root, loc)[0]

    def error(self, message: str, *loc: int | str) -> BadRecipe:
        """Return a `BadRecipe` that points at the key `loc` of this file."""
        return BadRecipe(message, file=self.path, line=self.line(*loc), field=_dotted(loc) or None)


def load_yaml(path: Path, model: type[M]) -> M:
    """Read `path` as a `model`.

    Raises:
        BadRecipe: the file is missing, empty, not UTF-8, not YAML, repeats a key, or does not fit the model.
        The
            message names file, line and key, and the nearest valid key for an unknown one.
    """
    return read_yaml(path, model).value


def read_yaml(path: Path, model: type[M]) -> YamlFile[M]:
    """Read `path` as a `model` and keep the lines of its keys. Raises as `load_yaml`."""
    root = _compose(path, model)
    _refuse_repeated_keys(path, root)
    loader = _CoreLoader("")
    try:
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise BadRecipe(
            f"the file must hold keys and values at the top level, not {_kind(data)}; "
            f"its keys are: {', '.join(_key_names(model))}",
            file=path,
            line=1,
        )
    try:
        return YamlFile(path, model.model_validate(data), root)
    except ValidationError as error:
        raise _explain(path, root, model, error) from error


class _CoreLoader(yaml.SafeLoader):
    """A safe loader with the scalars of the YAML 1.2 core schema."""


_CoreLoader.yaml_implicit_resolvers = {}  # without those of YAML 1.1, which the base class would lend
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Read 010 as ten, where YAML 1.1 means octal."""
    return int(loader.construct_scalar(node))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _decimal)


def _compose(path: Path, model: type[BaseModel]) -> yaml.Node:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BadRecipe("no such file; check the path", file=path) from None
    except IsADirectoryError:
        raise BadRecipe("this is a folder; give the YAML file inside it", file=path) from None
    except OSError as error:
        raise BadRecipe(f"cannot be read ({error.strerror}); check the permissions", file=path) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadRecipe(
            f"byte 0x{raw[error.start]:02x} is not UTF-8 text; save the file as UTF-8", file=path, line=line
        ) from error
    try:
        root = yaml.compose(text, _CoreLoader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadRecipe(
            f"character U+{ord(text[error.position]):04X} may not stand in YAML; delete it",
            file=path,
            line=line,
        ) from error
    if root is None:
        needed = [name for name, field in model.model_fields.items() if field.is_required()]
        raise BadRecipe(f"the file is empty; it needs at least: {', '.join(needed) or 'one key'}", file=path, line=1)
    return root


def _syntax_error(path: Path, error: yaml.MarkedYAMLError) -> BadRecipe:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or "not valid YAML"
    if "'\\t'" in problem:
        problem = "a tab indents this line; YAML allows spaces only"
    elif "single document" in (error.context or ""):
        problem = "a second document starts here ('---'); keep one document per file"
    elif error.context:
        problem = f"{problem} ({error.context})"
    return BadRecipe(f"not valid YAML: {problem}", file=path, line=mark.line + 1 if mark else None)


def _refuse_repeated_keys(path: Path, root: yaml.Node) -> None:
    for node in _nodes(root):
        if not isinstance(node, yaml.MappingNode):
            continue
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise BadRecipe(
                    f"the key {key.value!r} stands here and in line {first[key.value]}; keep one of them",
                    file=path,
                    line=line,
                    field=key.value,
                )
            first[key.value] = line


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias may point back
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in reversed(node.value) for part in reversed(pair))
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(reversed(node.value))


def _explain(path: Path, root: yaml.Node, model: type[BaseModel], error: ValidationError) -> BadRecipe:
    """Turn pydantic's list of errors into one message, in the order of the lines."""
    found: list[tuple[int, str, str]] = []
    unmeant: list[tuple[int, str, str]] = []
    for detail in error.errors(include_url=False):
        line, shown, node, whole = _find(root, detail["loc"])
        if detail["type"] == "missing":
            shown = (*shown, detail["loc"][-1])
        entry = (line, _dotted(shown), _message(detail, _keys_at(model, detail)))
        kept = unmeant if _is_other_branch(detail, node, whole) else found
        if entry not in kept:
            kept.append(entry)
    found = sorted(found or unmeant, key=lambda entry: entry[0])
    line, field, message = found[0]
    for other_line, other_field, other in found[1:SHOWN_MISTAKES]:
        message += f"\n{path}:{other_line}" + (f" [{other_field}]" if other_field else "") + f": {other}"
    if len(found) > SHOWN_MISTAKES:
        message += f"\nand {len(found) - SHOWN_MISTAKES} more"
    return BadRecipe(message, file=path, line=line, field=field or None)


def _message(detail: ErrorDetails, keys: Sequence[str]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    name = str(detail["loc"][-1]) if detail["loc"] else ""
    if kind == "extra_forbidden":
        return f"unknown key {name!r}{nearest(name, keys)}; valid keys here: {', '.join(keys) or 'none'}"
    if kind == "missing":
        return f"the key {name!r} is required and missing; add it"
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        expected = str(context.get("expected") or context.get("expected_tags", ""))
        given = str(context.get("tag", detail["input"]))
        guess = nearest(given, re.findall(r"'([^']*)'", expected))
        return f"{given!r} is not valid here{guess}; expected {expected}"
    if kind == "union_tag_not_found":
        return f"the key {context.get('discriminator', 'that names the kind')} is required and missing; add it"
    if kind in ("value_error", "assertion_error"):
        return detail["msg"].partition(", ")[2]
    if kind == "model_type":
        return f"a mapping with the keys {', '.join(keys)} belongs here, not {_kind(detail['input'])}"
    given = repr(detail["input"])
    given = given if len(given) <= 60 else given[:57] + "..."
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, not {given} ({_kind(detail['input'])})"


def _is_other_branch(detail: ErrorDetails, node: yaml.Node, whole: bool) -> bool:
    """True for the complaint of a union's branch that the author did not mean (text for a mapping)."""
    kind = detail["type"]
    wants_scalar = kind.endswith("_type") and kind not in ("model_type", "dict_type", "model_attributes_type")
    return isinstance(node, yaml.MappingNode) and wants_scalar and not whole


def _find(root: yaml.Node, loc: Sequence[int | str]) -> tuple[int, Loc, yaml.Node, bool]:
    """Follow `loc` through the nodes; parts that are no key (the tag of a union's branch) are stepped over.

    Returns the line, the location without the stepped-over parts, the node reached, and whether the last part
    of `loc` was a key or an index.
    """
    node, line, shown, stepped = root, root.start_mark.line + 1, list[int | str](), True
    for part in loc:
        stepped = False
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if getattr(pair[0], "value", None) == str(part)), None)
            if pair is not None:
                line, node, stepped = pair[0].start_mark.line + 1, pair[1], True
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node, stepped = node.value[part], True
            line = node.start_mark.line + 1
        if stepped:
            shown.append(part)
    return line, tuple(shown), node, stepped


def _keys_at(model: type[BaseModel], detail: ErrorDetails) -> list[str]:
    """Return the valid keys of the model that was expected at, or holds, the last part of the location."""
    loc = detail["loc"] if detail["type"] == "model_type" else detail["loc"][:-1]
    at: list[Any] = [model]
    for part in loc:
        at = (
            [step for kind in at for step in _step(kind, part)] or [kind for kind in at if _is_tagged(kind, part)] or at
        )
    return sorted({key for kind in at if _is_model(kind) for key in _key_names(kind)})


def _step(kind: Any, part: int | str) -> list[Any]:
    """Return the types one step below `kind`: a field's, an element's, or a mapping's value."""
    if _is_model(kind):
        field = next((f for name, f in kind.model_fields.items() if part in (name, f.alias)), None)
        return list(_members(field)) if field is not None else []
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(part, int) and origin in (list, tuple, set, frozenset, Sequence, typing.Sequence):
        return [member for argument in arguments if argument is not Ellipsis for member in _members(argument)]
    if origin is dict and len(arguments) == 2:
        return list(_members(arguments[1]))
    return []


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the plain types inside Annotated, unions and fields."""
    if isinstance(annotation, FieldInfo):
        annotation = annotation.annotation
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _members(argument)
    else:
        yield annotation


def _is_tagged(kind: Any, tag: int | str) -> bool:
    """True when `tag` names this branch of a union: the class's name or one of its literal discriminators."""
    if not _is_model(kind):
        return False
    literals = (
        value
        for field in kind.model_fields.values()
        if typing.get_origin(field.annotation) is typing.Literal
        for value in typing.get_args(field.annotation)
    )
    return tag == kind.__name__ or tag in literals


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _key_names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _dotted(loc: Iterable[int | str]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _kind(value: object) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
             dict: "a mapping", type(None): "nothing"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
