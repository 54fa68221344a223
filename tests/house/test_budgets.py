"""Budgets on size, configuration, cycles and broad handlers. Raise one only with a record in docs/decisions."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import math
from collections import Counter

import grimp
import pytest
from house.source import Source, functions, sources
from pydantic import BaseModel

FILE_LINES, FUNCTION_LINES, FUNCTION_LINES_P95, FIELDS = 500, 100, 60, 20

BROAD = {
    "ascent/cli/main.py::run": "the one place that words every failure for the command line",
    "ascent/customize/data/read.py::_csv": "pandas, pyarrow and datasets each have their own error tree",
    "ascent/customize/data/read.py::_parquet": "pyarrow and datasets each have their own error tree",
    "ascent/evaluate/program.py::Program.load": "runs the user's file, which may raise anything",
    "ascent/evaluate/program.py::Program.prepare": "runs the user's function",
    "ascent/evaluate/sandbox.py::run": "runs model-written code; what it raises is its result",
    "ascent/evaluate/worker.py::_grade": "runs the user's function; what it raises is an unscored record",
    "ascent/evaluate/worker.py::_call": "runs the user's grader; what it raises is an unscored record",
    "ascent/serve/openai/app.py::OpenAIApp._answer": "answers a request; a defect is logged and answered as a 500",
    "ascent/serve/services/bedrock/deployer.py::Deployer._deploy": "loading weights fails in ways of its own; the "
    "deployment must end as Failed",
    "ascent/serve/kinds/places.py::_reaching": "every fsspec store has its own error tree",
    "ascent/serve/wire/app.py::AwsApp._answer": "runs a handler; a defect is logged and answered as a 500",
    "ascent/serve/wire/app.py::AwsApp._stream": "runs a handler's stream; a defect ends it with an error frame",
}
"""Named boundaries, and why everything must be caught there. An entry without use fails too."""


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.path)
def test_files_and_functions_are_short(source: Source) -> None:
    lines = source.text.count("\n")
    assert lines <= FILE_LINES, f"{source.path} has {lines} lines, at most {FILE_LINES} are allowed; split it"
    long = {name: size(node) for name, node in functions(source.tree) if size(node) > FUNCTION_LINES}
    assert not long, f"{source.path}: functions longer than {FUNCTION_LINES} lines: {long}"


def test_most_functions_are_shorter_still() -> None:
    sizes = sorted(size(node) for source in sources() for _, node in functions(source.tree))
    at = sizes[math.ceil(0.95 * len(sizes)) - 1]
    assert at <= FUNCTION_LINES_P95, f"the 95th percentile of function lengths is {at} lines"


def test_no_config_has_too_many_fields() -> None:
    counts = {
        f"{name}.{kind.__name__}": count
        for name, kind in classes()
        if (count := sum(not field.startswith("_") for field in fields(kind))) > FIELDS
    }
    assert not counts, f"more than {FIELDS} public fields: {counts}; split the class or derive some"


def test_no_import_cycles() -> None:
    graph = grimp.build_graph("ascent", exclude_type_checking_imports=True)
    edges = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(error.args[1])}")


def test_everything_is_caught_only_at_named_boundaries() -> None:
    found: Counter[str] = Counter()
    for source in sources():
        for name, node in functions(source.tree):
            own = [handler for handler in handlers(node) if is_broad(handler)]
            if own:
                found[f"{source.path}::{name}"] = len(own)
    assert set(found) <= set(BROAD), f"catch named exceptions in {sorted(set(found) - set(BROAD))}"
    assert set(found) >= set(BROAD), f"no longer needed, remove from the list: {sorted(set(BROAD) - set(found))}"


def size(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def classes() -> list[tuple[str, type]]:
    found = []
    for source in sources():
        if "/starter/" in source.path:
            continue
        module = importlib.import_module(source.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and (issubclass(value, BaseModel) or dataclasses.is_dataclass(value)):
                found.append((module.__name__, value))
    return found


def fields(kind: type) -> list[str]:
    if issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [field.name for field in dataclasses.fields(kind)]


def handlers(node: ast.AST) -> list[ast.ExceptHandler]:
    """Handlers of a function itself, without those of functions inside it."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(child, ast.ExceptHandler):
            found.append(child)
        found += handlers(child)
    return found


def is_broad(handler: ast.ExceptHandler) -> bool:
    """A handler for everything that does not raise it on: cleaning up and re-raising is no catching."""
    names = (
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"Exception"}
    )
    if not names & {"Exception", "BaseException"}:
        return False
    return not (isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None)
