"""`ascent doctor`: what this machine can do."""

from __future__ import annotations

import click

from ascent.cli.console import say

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor")
@click.option("--network", is_flag=True, help="Also ask the package index for the default model.")
@click.pass_context
def command(ctx: click.Context, network: bool) -> None:
    """Say what this machine can do, what is missing, and how to mend it.

    Every line is ok, warn or fail, with a remedy under it. Exits with 1 when a line says fail. Nothing leaves the
    machine without --network.
    """
    from ascent.inference.doctor import examine
    from ascent.inference.store import Store

    failed = False
    for check in examine(Store(), network=network):
        failed = failed or check.level == "fail"
        say(f"{click.style(f'{check.level:<4}', fg=COLOURS[check.level])}  {check.name:<12}{check.found}")
        if check.remedy:
            say(f"{'':6}{'':12}→ {check.remedy}")
    if failed:
        ctx.exit(1)
