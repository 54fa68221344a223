"""Tools: typed functions that a model calls in writing; `ascent.inference.calls` reads the calls from its text."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ascent.inference.calls import Call as Call
from ascent.inference.calls import parse_calls as parse_calls
from ascent.records.errors import BadInput, nearest


@dataclass(frozen=True)
class Tool:
    """A function a model may call. `arguments` validates what it wrote and has the JSON schema of the parameters."""

    name: str
    description: str
    function: Callable[..., object]
    arguments: type[BaseModel]

    @property
    def signature(self) -> str:
        """`name(first, second)`, the spelling of the plain form."""
        return f"{self.name}({', '.join(self.arguments.model_fields)})"


class Tools:
    """The tools of an environment, by name.

    A tool refuses its arguments by raising `ValueError` or `LookupError`; the model reads the message. Whatever else it
    raises is a defect of the environment and loses the episode.
    """

    def __init__(self, *functions: Callable[..., object]) -> None:
        """Register the functions, see `register`."""
        self._tools: dict[str, Tool] = {}
        for function in functions:
            self.register(function)

    def register(self, function: Callable[..., object]) -> Callable[..., object]:
        """Add a function, also as a decorator. Name, description and types are those of the function.

        Raises:
            BadInput: a parameter has no type, or takes any number of arguments.
        """
        name = function.__name__
        types = typing.get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in types or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise BadInput(f"tool {name}: give parameter {parameter.name!r} a type, and write out every parameter")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (types[parameter.name], default)
        config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
        arguments = create_model(name, __config__=config, **fields)
        self._tools[name] = Tool(name, inspect.getdoc(function) or "", function, arguments)
        return function

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def schemas(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates and the OpenAI protocol take them: name, description, JSON schema."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.arguments.model_json_schema(),
                },
            }
            for tool in self
        ]

    def run(self, call: Call) -> str:
        """Return what the tool answers, as text (JSON where it is no string), or `error: …` for the model to read."""
        if call.error is not None:
            return f"error: {call.error}"
        tool = self._tools.get(call.name)
        if tool is None:
            return f"error: there is no tool {call.name!r}{nearest(call.name, self._tools)}"
        given = dict(zip(tool.arguments.model_fields, call.positional, strict=False)) | dict(call.named)
        if len(given) < len(call.positional) + len(call.named):
            return f"error: too many arguments, or one of them twice; the tool is {tool.signature}"
        try:
            arguments = tool.arguments.model_validate(given)
            answer = tool.function(**{name: getattr(arguments, name) for name in tool.arguments.model_fields})
        except ValidationError as error:
            first = error.errors()[0]
            return f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}; the tool is {tool.signature}"
        except (ValueError, LookupError) as error:
            return f"error: {error.args[0] if error.args else type(error).__name__}"
        return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)
