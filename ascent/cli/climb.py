"""`ascent climb`: a use case up the ladder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ascent.cli.console import say, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ascent.records import Verdict


@click.command("climb")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seed", default=0, show_default=True, help="Seeds adapter initialisation, data order and sampling.")
@click.option("--resume", is_flag=True, help="Go on with the latest run of this seed.")
@click.option("--strict", is_flag=True, help="Exit with 1 when any gate said no.")
@click.pass_context
def command(ctx: click.Context, folder: Path, seed: int, resume: bool, strict: bool) -> None:
    """Take the use case in DIR up the ladder, stage by stage.

    Every stage must be justified before it starts and is measured on the held-out items before it counts. A stage that
    does not help is reported as such, and the champion stays. The run, with its report, is written to DIR/runs.
    """
    from ascent.ladder.climb import climb

    result = climb(folder, seed=seed, resume=resume, say=say)
    say()
    table(("stage", "before", "after"), gates(result.verdicts))
    say()
    say(f"champion: {result.champion}")
    say(f"report:   {result.report_html}")
    say(f"measure it on other data: ascent eval {folder} --model champion --data FILE.jsonl --json OUT.json")
    say(f"talk to it:               ascent chat {result.champion_folder.name}")
    if strict and result.stopped:
        ctx.exit(1)


def gates(verdicts: Sequence[Verdict]) -> list[tuple[str, str, str]]:
    """Return (stage, answer of the gate before it, answer of the gate after it), in the order of the stages."""
    rows: dict[str, dict[str, str]] = {}
    for verdict in verdicts:
        extra = f" {verdict.collect:,}" if verdict.collect else ""
        rows.setdefault(verdict.stage, {})[verdict.phase] = f"{verdict.decision.value}{extra}"
    return [(stage, row.get("before", "-"), row.get("after", "-")) for stage, row in rows.items()]
