"""`ascent embed`: tune an embedder for retrieval, and measure one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from ascent.cli.console import say, table


@click.command("embed")
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the run goes.")
@click.option("--queries", type=click.Path(path_type=Path), help="Queries to measure on, before and after.")
@click.option("--judgements", type=click.Path(path_type=Path), help="Which documents answer them.")
def command(recipe_file: Path, out: Path, queries: Path | None, judgements: Path | None) -> None:
    """Tune an embedder as the YAML file RECIPE says.

    OUT/model gets the embedder in sentence-transformers layout with its card, embedding.json. A run that was cut off is
    continued. With --queries and --judgements, retrieval from the recipe's corpus is measured before and after.
    """
    from ascent.cli.engines import model_folder
    from ascent.cli.train import step_report
    from ascent.customize.embeddings.data import load_corpus, load_pairs, load_retrieval_set
    from ascent.customize.embeddings.tune import load_embedding_recipe, tune
    from ascent.inference.store import Store
    from ascent.records.errors import BadInput

    recipe = load_embedding_recipe(recipe_file)
    pairs = load_pairs(recipe.data)
    corpus = load_corpus(recipe.corpus) if recipe.corpus else None
    test = None
    if queries or judgements:
        if not (queries and judgements and recipe.corpus):
            raise BadInput("measuring needs --queries, --judgements and a `corpus` in the recipe; give all three")
        test = load_retrieval_set(queries, recipe.corpus, judgements)
    with contextlib.ExitStack() as stack:
        start = model_folder(recipe.model, Store())
        card = tune(recipe, start, pairs, out, corpus=corpus, test=test, report=step_report("embed", stack))
    say(f"trained {card.run.steps} steps in {card.run.seconds:.0f} s; model: {out / 'model'}")
    if card.changes:
        rows = [
            (
                c.metric,
                f"{c.champion:.3f}",
                f"{c.challenger:.3f}",
                f"{c.difference:+.3f}",
                f"{c.low:+.3f} to {c.high:+.3f}",
            )
            for c in card.changes
        ]
        table(("metric", "before", "after", "change", "95 % interval"), rows)
