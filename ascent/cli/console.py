"""What commands print: rich tables on a terminal, aligned plain text anywhere else."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

import click

GAP = "  "


def say(text: str = "") -> None:
    """Print a line to standard output."""
    click.echo(text)


def note(text: str) -> None:
    """Print a line to standard error, so that it stays out of what a pipe reads."""
    click.echo(text, err=True)


def facts(pairs: Sequence[tuple[str, object]]) -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        say(f"{name:<{width}}{GAP}{value}")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; in a pipe or file every row is one line."""
    if sys.stdout.isatty():
        _rich_table(headers, rows)
        return
    lines = [[head.upper() for head in headers], *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(headers))]
    for line in lines:
        say(GAP.join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    import rich.box
    import rich.console
    import rich.table
    from rich.text import Text

    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for head in headers:
        shown.add_column(head, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    rich.console.Console(width=shutil.get_terminal_size().columns).print(shown)


def megabytes(count: int) -> str:
    """Return a size in decimal megabytes, or a dash when it is not known."""
    return f"{count / 1e6:,.0f} MB" if count else "-"
