"""`ascent search`: try values of a recipe's fields, and keep the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ascent.cli.console import note, say, table

if TYPE_CHECKING:
    from ascent.customize.search import SearchResult
    from ascent.customize.space import SearchSpec
    from ascent.customize.yamlfile import YamlFile


@click.command("search")
@click.argument("spec_file", metavar="SPEC", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the search goes; by default runs/<spec> beside the file.",
)
@click.option("--resume", is_flag=True, help="Go on with the search in that folder; finished trials stay.")
def command(spec_file: Path, out: Path | None, resume: bool) -> None:
    """Search the fields of a recipe as the YAML file SPEC says.

    \b
    recipe: sft.yaml
    space:
      optim.lr: {log: [1e-5, 1e-3]}
      lora.rank: {choice: [8, 16, 32]}
      batch_size: {int: [4, 32]}
    objective: {metric: accuracy, data: validation.jsonl, usecase: .}
    trials: 20

    Each trial is a run in OUT/trials; OUT/best.yaml is the best recipe. Ctrl-C stops, --resume goes on.
    """  # noqa: D301
    from ascent.cli.engines import model_folder
    from ascent.cli.train import training_data
    from ascent.customize.search import BEST, Hands, search
    from ascent.customize.space import load_search
    from ascent.inference.store import Store

    source, recipe = load_search(spec_file)
    folder = out or spec_file.parent / "runs" / spec_file.stem
    hands = Hands(training_data, lambda model: model_folder(model, Store()), measure_of(source))
    result = search(source, recipe, folder, hands, resume=resume, say=note)
    show(result, source.value)
    if result.best is None:
        say("no trial was finished with a value; see the reasons above")
        return
    say(f"best recipe: {folder / BEST}")
    say(f"its model:   {folder / 'trials' / f'{result.best.number:03}' / 'model'}")
    say(f"train it:    ascent train {folder / BEST}")


def measure_of(source: YamlFile[SearchSpec]) -> Callable[[Path], float] | None:
    """Return what measures a trained model on the search's validation data; None for a training metric.

    Raises:
        BadRecipe: the metric is not the use case's, or the data is the use case's test data, whole or in part.
    """
    objective = source.value.objective
    if objective.data is None or objective.usecase is None:
        return None
    from ascent.customize.data import leakage
    from ascent.evaluate.program import Program
    from ascent.ladder.measure import mark_tuned, measure
    from ascent.ladder.usecase import load_usecase
    from ascent.ladder.workspace import generate_data, tasks_of
    from ascent.records.errors import nearest
    from ascent.records.files import sha256_file

    folder, data = source.path.parent / objective.usecase, source.path.parent / objective.data
    usecase = load_usecase(folder)
    generate_data(usecase)
    names = usecase.metrics.names
    if objective.metric not in names:
        raise source.error(
            f"{usecase.name} does not measure {objective.metric!r}{nearest(objective.metric, names)}; "
            f"its metrics: {', '.join(names)}",
            "objective",
            "metric",
        )
    test = usecase.path(usecase.data.test)
    advice = "what is searched on is no test any more; give other validation rows"
    if data.is_file() and sha256_file(data) == sha256_file(test):
        raise source.error(f"{objective.data} is the use case's test data; {advice}", "objective", "data")
    program = Program.load(usecase.path(usecase.program))
    shared = leakage(tasks_of(usecase, program, data), tasks_of(usecase, program, test), threshold=1.0)
    if shared:
        raise source.error(
            f"{objective.data} holds {len(shared)} rows of the use case's test data, such as {shared[0].train_id!r}; "
            f"{advice}",
            "objective",
            "data",
        )

    def value(model: Path) -> float:
        mark_tuned(model, usecase, "search", source.path.stem)
        return measure(folder, str(model), data, stage="search").metrics[objective.metric].value

    return value


def show(result: SearchResult, spec: SearchSpec) -> None:
    """Print the finished trials, the best one marked."""
    from ascent.customize.search import show as short

    names = list(spec.space)
    rows = [
        (
            f"{trial.number}{' *' if trial is result.best else ''}",
            *(short(trial.params[name]) for name in names),
            "-" if trial.value is None else short(trial.value),
            str(trial.steps),
            f"{trial.seconds:.0f}",
            trial.reason,
        )
        for trial in result.trials
    ]
    table(("trial", *names, spec.objective.metric, "steps", "seconds", "note"), rows)
