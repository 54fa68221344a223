"""`ascent mirror`: a finished run on an MLflow server."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("mirror")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "address", required=True, help="The tracking server, such as http://127.0.0.1:5000.")
@click.option("--experiment", default="ascent", show_default=True, help="The MLflow experiment.")
@click.option("--no-models", is_flag=True, help="Copy numbers and reports only.")
def command(run: Path, address: str, experiment: str, no_models: bool) -> None:
    """Copy RUN, the folder of a climb or of a training run, to an MLflow server.

    The folder stays as it is. Runs that were copied before are left as they are.
    """
    from ascent.cli.console import say
    from ascent.ladder.mirror import mirror

    ids = mirror(run, address, experiment, models=not no_models)
    say(f"{len(ids)} MLflow run{'s' if len(ids) > 1 else ''} in experiment {experiment!r}: {', '.join(ids)}")
