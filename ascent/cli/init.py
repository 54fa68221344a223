"""`ascent init`: a small use case of the user's own."""

from __future__ import annotations

from pathlib import Path

import click

from ascent.cli.console import say


@click.command("init")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", help="What the use case is called; by default, what DIR is called.")
def command(folder: Path, name: str | None) -> None:
    """Write a small use case of your own into DIR, ready to climb.

    It routes messages to a shop's support desk into a queue with an urgency. Its README says which files to replace by
    your own. DIR must be empty or absent.
    """
    from ascent.ladder.scaffold import scaffold

    files = scaffold(folder, name)
    say(f"wrote {len(files)} files into {folder}:")
    for file in files:
        say(f"  {file}")
    say()
    say("look at them, then climb:")
    say(f"  ascent advise {folder}")
    say(f"  ascent climb {folder}")
