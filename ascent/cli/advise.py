"""`ascent advise`: which stage is justified next."""

from __future__ import annotations

from pathlib import Path

import click

from ascent.cli.console import note, say


@click.command("advise")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
def command(folder: Path) -> None:
    """Say which stage of the use case in DIR is justified next, and why.

    Loads and checks the use case with all its data, reads what the latest run measured, and asks the gates. Nothing is
    trained, sampled or measured.
    """
    from ascent.ladder.advise import advice_text, advise
    from ascent.ladder.measure import latest_run
    from ascent.ladder.runs import read_climb, read_stage_report
    from ascent.ladder.workspace import open_workspace

    workspace = open_workspace(folder)
    reports = []
    if (run := latest_run(folder)) is not None:
        note(f"measurements: {run}")
        found = [read_stage_report(run, stage) for stage in read_climb(run).stages]
        reports = [report for report in found if report is not None]
    verdicts = advise(workspace.usecase, workspace.inventory(), reports)
    say(advice_text(workspace.usecase, verdicts, reports).rstrip())
