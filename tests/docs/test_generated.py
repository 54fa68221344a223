"""Generated pages are what the code says now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_fresh(generator: ModuleType) -> None:
    stale = [
        name
        for name, content in generator.pages().items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text(encoding="utf-8") != content
    ]
    assert not stale, f"run `make docs`: {', '.join(stale)} differ from the code"


def test_every_command_and_row_is_described(generator: ModuleType) -> None:
    from ascent.cli.main import COMMANDS
    from ascent.customize.objectives.rows import ROWS

    pages = generator.pages()
    assert all(f"## ascent {name}\n" in pages["cli.md"] for name in COMMANDS)
    assert all(f"| `{name}` |" in pages["techniques.md"] for name in ROWS)
