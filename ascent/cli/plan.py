"""`ascent plan`: what a recipe will take, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ascent.cli.console import facts, megabytes, say, table

if TYPE_CHECKING:
    from ascent.customize.plan import Plan


@click.command("plan")
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--price", type=click.FloatRange(min=0), help="What this machine costs per hour, in any currency.")
@click.option("--calibrate", is_flag=True, help="Measure this machine's speed again.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(recipe_file: Path, price: float | None, calibrate: bool, as_json: bool) -> None:
    """Predict the steps, tokens, memory, time and cost of the YAML file RECIPE on this machine.

    Nothing is trained. The machine's speed is measured for a second at the first call and kept in the model store.
    """
    from ascent.cli.engines import model_folder
    from ascent.customize.feed import load_feed, make_training_data
    from ascent.customize.plan import machine_rates, plan
    from ascent.customize.recipes import load_recipe
    from ascent.inference.store import Store

    store = Store()
    recipe = load_recipe(recipe_file)
    data = make_training_data(recipe, *load_feed(recipe))  # a teacher is not asked: planning needs its prompts only
    start = model_folder(recipe.model, store)
    found = plan(recipe, start, data, rates=machine_rates(store, again=calibrate), price_per_hour=price, store=store)
    if as_json:
        say(found.to_json(indent=1))
    else:
        show(found)


def show(found: Plan) -> None:
    """Print a plan: what is counted, then the parts of the time and of the memory, then what was assumed."""
    counted = "counted" if found.exact else "estimated"
    pairs: list[tuple[str, object]] = [
        ("algorithm", found.algorithm),
        ("start model", found.base),
        ("steps", f"{found.steps:,}"),
        ("sequences", f"{found.sequences:,}"),
        ("tokens", f"{found.tokens:,} ({counted}), {found.tokens_per_step:,.0f} a step"),
        ("time", f"{duration(found.total_seconds)}"),
        ("peak memory", megabytes(found.peak_bytes)),
    ]
    if found.cost is not None:
        pairs.append(("cost", f"{found.cost:,.2f} at {found.price_per_hour:g} an hour"))
    facts(pairs)
    say()
    parts = [(part, duration(seconds), seconds / found.total_seconds) for part, seconds in found.seconds.items()]
    table(("time of", "takes", "share"), [(part, text, f"{share:.0%}") for part, text, share in parts if share])
    say()
    sizes = [(part, count, count / found.peak_bytes) for part, count in found.memory.items()]
    table(("memory of", "holds", "share"), [(part, megabytes(count), f"{share:.0%}") for part, count, share in sizes])
    say()
    for line in found.assumptions:
        say(f"- {line}")


def duration(seconds: float) -> str:
    """Return seconds as `3.2 s`, `4 min 5 s` or `1 h 2 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
