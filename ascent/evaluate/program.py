"""A use case's own Python file: how to ask, how to read the answer, how to grade it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ascent.evaluate.graders import Grader, parse_json
from ascent.records.errors import BadInput, UnknownName


class Program:
    """The functions of one file, all of them optional.

    - `prepare(input: dict) -> str`: the user turn. Without it: `input["prompt"]`, or the input as JSON.
    - `finish(text: str, input: dict) -> Any`: the structured output. Without it: the text parsed as JSON, or
      the text itself. With a third parameter it also hears whether the answer is `doubtful`, see `Episode`.
    - graders: every public function whose parameters are called `task` and `episode`.

    The file may import its siblings by plain name at its top, as a script would.
    """

    def __init__(self, path: Path | None = None, module: ModuleType | None = None) -> None:
        """Wrap a loaded module; with no arguments, a program that only has the defaults."""
        self.path, self.module = path, module
        self._prepare = _function(path, module, "prepare", 1)
        self._finish = _function(path, module, "finish", 2, 3)
        self._hears_doubt = self._finish is not None and len(_parameters(self._finish) or ()) == 3
        self._graders: dict[str, Grader] = {}
        for name, value in vars(module).items() if module else ():
            if not name.startswith("_") and inspect.isroutine(value) and _parameters(value) == ["task", "episode"]:
                self._graders[name] = value

    @classmethod
    def load(cls, path: Path | str) -> Program:
        """Run the file and collect its functions.

        Raises:
            BadInput: the file is missing, or failed while it ran; the message has the line.
        """
        path = Path(path).resolve()
        if not path.is_file():
            raise BadInput(f"there is no program file {path}; write one, or leave `program` out of the use case")
        name = f"ascent_program_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise BadInput(f"{path} is not a Python file; a program's name ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pydantic look their module up while the file runs
        try:
            with _siblings_importable(path.parent):
                spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise BadInput(f"the program does not load: {describe_error(error, path)}; fix that line") from error
        return cls(path, module)

    @property
    def grader_names(self) -> list[str]:
        """Names of the graders in the file, sorted."""
        return sorted(self._graders)

    def grader(self, name: str) -> Grader:
        """Return a grader of the file. Raises `UnknownName` with the nearest name."""
        if name not in self._graders:
            raise UnknownName("grader", name, self._graders)
        return self._graders[name]

    def prepare(self, input: dict[str, Any]) -> str:
        """Return the user turn for one input.

        Raises:
            BadInput: the program's `prepare` raised or returned something other than text.
        """
        if self._prepare is None:
            prompt = input.get("prompt")
            return prompt if isinstance(prompt, str) else json.dumps(input, ensure_ascii=False, default=str)
        try:
            text = self._prepare(input)
        except Exception as error:
            fields = ", ".join(map(str, input)) or "none"
            raise BadInput(
                f"prepare() failed: {describe_error(error, self.path)}; the input's fields are: {fields}"
            ) from error
        if not isinstance(text, str):
            raise BadInput(f"{self.path}: prepare() returned a {type(text).__name__}; it must return a string")
        return text

    def finish(self, text: str, input: dict[str, Any], doubtful: bool = False) -> Any:
        """Return the structured output of a text. What the program's own `finish` raises passes through."""
        if self._finish is not None:
            return self._finish(text, input, doubtful) if self._hears_doubt else self._finish(text, input)
        try:
            return parse_json(text)
        except ValueError:
            return text


def describe_error(error: BaseException, path: Path | None) -> str:
    """Return `KeyError: 'dose' (program.py:41)`: the error and the program's last line on the way to it."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{text} ({Path(error.filename).name}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and Path(frame.filename) == path] or frames
    return f"{text} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else text


def _function(path: Path | None, module: ModuleType | None, name: str, *arguments: int) -> Any:
    value = getattr(module, name, None)
    if value is None:
        return None
    names = _parameters(value) if callable(value) else None
    if names is None or len(names) not in arguments:
        wanted = "prepare(input)" if name == "prepare" else "finish(text, input) or finish(text, input, doubtful)"
        raise BadInput(f"{path}: {name!r} must be a function {wanted}")
    return value


def _parameters(value: Any) -> list[str] | None:
    try:
        return list(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        return None


@contextlib.contextmanager
def _siblings_importable(folder: Path) -> Iterator[None]:
    """Let the file import its siblings, and forget them afterwards.

    Another use case may have files of the same name.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            inside = file is not None and Path(file).resolve().is_relative_to(folder)
            if inside and "site-packages" not in str(file) and not name.startswith("ascent_program_"):
                del sys.modules[name]
