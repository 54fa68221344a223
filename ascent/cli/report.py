"""`ascent report`: the report of a run, written again."""

from __future__ import annotations

from pathlib import Path

import click

from ascent.cli.console import say


@click.command("report")
@click.argument("run_folder", metavar="RUN_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
def command(run_folder: Path) -> None:
    """Write report.html and report.json of a run again from what it measured.

    RUN_DIR is the folder of one run, DIR/runs/<run id>. Nothing is measured and no model is loaded.
    """
    from ascent.ladder.report import build_report

    for file in build_report(run_folder):
        say(str(file))
