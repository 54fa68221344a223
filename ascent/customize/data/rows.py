"""One raw row, read field by field: an accessor returns a value, or notes what is wrong and returns None."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Collection
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ascent.customize.data.problems import Problems
from ascent.customize.data.read import FIELDS, RawRow, kind_of
from ascent.records import Role
from ascent.records.errors import nearest

_ROLES = get_args(Role)
_TYPO_CUTOFF = 0.8


class Row:
    """A raw row and the place to note its problems."""

    def __init__(self, raw: RawRow, problems: Problems) -> None:
        self.line, self.values, self._problems = raw.line, raw.values, problems
        self.sound = True

    def problem(self, field: str | None, message: str) -> None:
        """Note a problem of this row."""
        self.sound = False
        self._problems.add(self.line, field, message)

    def has(self, field: str) -> bool:
        """Whether the row gives this field a value other than null."""
        return self.values.get(field) is not None

    def check_names(self) -> None:
        """Refuse a field that looks misspelt. Other unknown fields are the user's notes; let them be."""
        absent = FIELDS.difference(self.values, {"id"})  # `pid` and `uid` are near `id` and mean something else
        for name in sorted(self.values.keys() - FIELDS):
            if meant := _likely_meant(name, absent):
                self.problem(name, f"unknown field; did you mean {meant!r}? Rename it")

    def label(self, field: str) -> str | None:
        """Return `id` or `group`: text, or a whole number taken as text."""
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            self.problem(field, f"must be text or a whole number, is {kind_of(value)}")
            return None
        if not str(value).strip():
            self.problem(field, "is empty; give it a value or leave the field out")
            return None
        return str(value)

    def text(self, field: str, purpose: str) -> str | None:
        """Return a required, non-blank text."""
        value = self.values.get(field)
        if value is None:
            self.problem(field, f"is missing; add {purpose}")
        elif not isinstance(value, str):
            how = "; write it as the JSON text that the model is to produce" if isinstance(value, dict | list) else ""
            self.problem(field, f"must be text, is {kind_of(value)}{how}")
        elif not value.strip():
            self.problem(field, f"is empty, so there is nothing to learn from it; add {purpose} or delete the row")
        else:
            return value
        return None

    def number(self, field: str) -> float | None:
        """Return an optional finite number; None when it is absent or wrong."""
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problem(field, f"must be a number, is {kind_of(value)}")
            return None
        return float(value)

    def truth(self, field: str, purpose: str) -> bool | None:
        """Return a required true or false; 1 and 0 are taken as such."""
        value = self.values.get(field)
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        if value is None:
            self.problem(field, f"is missing; add {purpose}")
        else:
            self.problem(field, f"must be true or false, is {kind_of(value)}")
        return None

    def mapping(self, field: str) -> dict[str, Any] | None:
        """Return an object field that is present; None when it is absent or wrong."""
        value = self.values.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            example = json.dumps({field: {"prompt" if field == "input" else "answer": value}}, ensure_ascii=False)
            self.problem(field, f"must be an object, is {kind_of(value)}; write for example {_short(example)}")
            return None
        return value

    def prompt(self, *, answer_inside: bool = False) -> tuple[dict[str, Any], str | None] | None:
        """Return the row's input and, if `answer_inside` and the messages end with one, the answer.

        A row with `messages` has the input `{"messages": [...]}`: the conversation up to where the model
        speaks.
        """
        if self.has("input") and self.has("messages"):
            self.problem("messages", "the row has both 'input' and 'messages'; keep one of them")
        elif self.has("messages"):
            return self._conversation(answer_inside)
        elif self.has("input"):
            value = self.mapping("input")
            if value:
                return value, None
            if value is not None:
                self.problem("input", "is an empty object; put the facts of the item into it")
        elif isinstance(self.values.get("prompt"), str):
            self.problem(
                "input",
                'is missing; write {"input": {"prompt": "..."}} instead of {"prompt": "..."}, or, in a table, call the '
                "column input.prompt",
            )
        else:
            self.problem(
                "input",
                "is missing, and so is 'messages'; a row needs one of them (in a table, columns such as input.prompt)",
            )
        return None

    def _conversation(self, answer_inside: bool) -> tuple[dict[str, Any], str | None] | None:
        turns = self._turns()
        if turns is None:
            return None
        answer = None
        if answer_inside and turns[-1]["role"] == "assistant":
            answer, turns = turns[-1]["content"], turns[:-1]
        if not turns or turns[-1]["role"] not in ("user", "tool"):
            who = "the final assistant turn must follow" if answer is not None else "the messages must end with"
            self.problem("messages", f"{who} a user or tool turn, to which the model answers")
            return None
        return {"messages": turns}, answer

    def _turns(self) -> list[dict[str, str]] | None:
        value = self.values["messages"]
        if not isinstance(value, list) or not value:
            self.problem("messages", f"must be a list of at least one turn, is {kind_of(value)}")
            return None
        before = self.sound
        self.sound = True
        for index, turn in enumerate(value):
            self._check_turn(f"messages[{index}]", index, turn)
        fine, self.sound = self.sound, before and self.sound
        return [{"role": turn["role"], "content": turn["content"]} for turn in value] if fine else None

    def _check_turn(self, field: str, index: int, turn: Any) -> None:
        if not isinstance(turn, dict):
            self.problem(field, f'must be an object {{"role", "content"}}, is {kind_of(turn)}')
            return
        role, content = turn.get("role"), turn.get("content")
        for name in turn.keys() - {"role", "content"}:
            if turn[name] is not None:
                self.problem(
                    f"{field}.{name}",
                    "only 'role' and 'content' are understood; delete it or put it into content",
                )
        if role not in _ROLES:
            near = nearest(role, _ROLES) if isinstance(role, str) else ""
            self.problem(f"{field}.role", f"must be one of {', '.join(_ROLES)}, is {role!r}{near}")
        elif role == "system" and index > 0:
            self.problem(f"{field}.role", "a system turn is only possible as the first; move it there")
        if not isinstance(content, str):
            self.problem(f"{field}.content", f"must be text, is {kind_of(content)}")
        elif not content.strip() and role != "system":
            self.problem(f"{field}.content", "is empty; write the turn or delete it")

    def expected(self, schema: type[BaseModel] | None, *, required: bool) -> dict[str, Any] | None:
        """Return the labels, checked against `schema` field by field; they may be left out, not be wrong."""
        value = self.mapping("expected")
        if value is None:
            if required and not self.has("expected"):
                self.problem(
                    "expected",
                    'is missing; add the answer, for example {"expected": {"answer": "..."}}',
                )
            return None
        if required and not value:
            self.problem("expected", "is an empty object; list at least one label")
        if schema is not None:
            self._check_labels(value, schema)
        return value

    def _check_labels(self, labels: dict[str, Any], schema: type[BaseModel]) -> None:
        known: Collection[str] = {field.alias or name for name, field in schema.model_fields.items()}
        unknown = labels.keys() - known if schema.model_config.get("extra") != "allow" else set()
        for name in sorted(unknown):
            self.problem(
                f"expected.{name}",
                f"a label outside the schema{nearest(name, known)}; known labels: {', '.join(sorted(known))}",
            )
        try:
            text = json.dumps({name: value for name, value in labels.items() if name not in unknown})
            schema.model_validate_json(text, strict=True)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                if fault["type"] == "missing" and len(fault["loc"]) == 1:
                    continue
                place = ".".join(str(part) for part in ("expected", *fault["loc"]))
                self.problem(place, f"outside the schema: {fault['msg']}, is {_short(json.dumps(fault['input']))}")


@functools.cache
def _likely_meant(name: str, absent: frozenset[str]) -> str | None:
    match = difflib.get_close_matches(name, sorted(absent), n=1, cutoff=_TYPO_CUTOFF)
    return match[0] if match else None


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
