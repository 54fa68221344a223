"""`ascent compare`: two measured models on the same items, pair by pair."""

from __future__ import annotations

from pathlib import Path

import click

from ascent.cli.console import say, table

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("compare")
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@click.option("--metric", "metrics", multiple=True, help="Compare only this metric; may be given several times.")
def command(before: Path, after: Path, metrics: tuple[str, ...]) -> None:
    """Compare two reports that `ascent eval --json` wrote of the same data: AFTER less BEFORE, on items both scored.

    Fixed are the items whose value rose, broken those whose value fell. Intervals are at 95 %, and p is that of the
    paired test named last, for one comparison: of many metrics looked at some differ by chance.
    """
    from ascent.cli.eval import read_report
    from ascent.evaluate.statistics import compare

    first, second = read_report(before), read_report(after)
    shared = [name for name in first.metrics if name in second.metrics and first.metrics[name].n]
    rows = []
    for name in metrics or shared:
        change = compare(first, second, name)
        rows.append(
            (
                name,
                f"{change.champion:.3f}",
                f"{change.challenger:.3f}",
                f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f})",
                f"{change.p_value:.4f}",
                f"{len(change.fixed)} / {len(change.broken)}",
                str(change.n),
                change.test,
            )
        )
    say(f"{first.model} ({first.stage}) → {second.model} ({second.stage})")
    table(("metric", "before", "after", "change (95 %)", "p", "fixed / broken", "items", "test"), rows)
