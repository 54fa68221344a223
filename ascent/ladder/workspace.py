"""A use case made ready to climb: program loaded, data generated, loaded and checked, prompts built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ascent.customize.data import (
    Demonstration,
    Loaded,
    check_leakage,
    check_lengths,
    dedupe,
    load_demonstrations,
    load_preferences,
    load_tasks,
)
from ascent.evaluate.graders import BUILTIN
from ascent.evaluate.program import Program
from ascent.ladder.evidence import Inventory
from ascent.ladder.usecase import UseCase, load_usecase
from ascent.records import DataSource, Message, Preference, Task
from ascent.records.errors import BadInput

if TYPE_CHECKING:
    from ascent.inference.chat import Renderer


@dataclass(frozen=True)
class Workspace:
    """A use case with its data in memory. `None` stands for a data set that the use case does not have.

    Tuned models see the short prompt (`tuned_*`), the prompted baseline the long one with its examples.
    """

    usecase: UseCase
    program: Program
    shots: tuple[Demonstration, ...]
    test_prompted: Loaded[Task]
    test_tuned: Loaded[Task]
    train: Loaded[Demonstration] | None
    labelled: Loaded[Task] | None
    validation: Loaded[Task] | None
    prompts: Loaded[Task] | None
    preferences: Loaded[Preference] | None

    @property
    def program_path(self) -> Path:
        """Where the program lies."""
        return self.usecase.path(self.usecase.program)

    @property
    def graders(self) -> list[str]:
        """All metrics to compute."""
        return list(self.usecase.metrics.names)

    def inventory(self) -> Inventory:
        """Count the data on hand."""
        return Inventory(
            labels=len(self.train) if self.train else 0,
            pairs=len(self.preferences) if self.preferences else 0,
            prompts=len(self.prompts) if self.prompts else 0,
            test_items=len(self.test_tuned),
        )

    def sources(self) -> tuple[DataSource, ...]:
        """Every data file in use, with paths relative to the use case."""
        loaded = (self.test_tuned, self.train, self.validation, self.prompts, self.preferences)
        return tuple(self.relative(data.source) for data in loaded if data is not None)

    def relative(self, source: DataSource) -> DataSource:
        """Name a data file relative to the use case's folder, so that a run folder can move with it."""
        path = Path(source.path)
        if path.is_absolute() and path.is_relative_to(self.usecase.folder.resolve()):
            path = path.relative_to(self.usecase.folder.resolve())
        elif path.is_relative_to(self.usecase.folder):
            path = path.relative_to(self.usecase.folder)
        return source.model_copy(update={"path": path.as_posix()})


def open_workspace(folder: Path) -> Workspace:
    """Load, generate and check everything a climb needs.

    Raises:
        BadRecipe: `usecase.yaml` is malformed or names graders that do not exist.
        BadData: a data file is malformed, or a training row repeats a test row.
    """
    usecase = load_usecase(folder)
    program = Program.load(usecase.path(usecase.program))
    usecase.check_program([*program.grader_names, *BUILTIN])
    generate_data(usecase)
    shots = _shots(usecase, program)
    test = usecase.path(usecase.data.test)
    test_tuned = tasks_of(usecase, program, test)
    system, files = usecase.prompt.system, usecase.data
    train = usecase.path(files.train) if files.train else None
    validation = usecase.path(files.validation) if files.validation else None
    prompts = usecase.path(files.prompts) if files.prompts else None
    preferences = usecase.path(files.preferences) if files.preferences else None
    workspace = Workspace(
        usecase=usecase,
        program=program,
        shots=shots,
        test_prompted=tasks_of(usecase, program, test, prompted=True, shots=shots),
        test_tuned=test_tuned,
        train=_distinct(load_demonstrations(train, program=program, system=system)) if train else None,
        labelled=load_tasks(train, program=program, system=system) if train else None,
        validation=tasks_of(usecase, program, validation) if validation else None,
        prompts=load_tasks(prompts, program=program, system=system) if prompts else None,
        preferences=load_preferences(preferences, program=program, system=system) if preferences else None,
    )
    for data in (workspace.train, workspace.validation, workspace.prompts, workspace.preferences):
        if data is not None:
            check_leakage(data, test_tuned)
    return workspace


def _distinct(loaded: Loaded[Demonstration]) -> Loaded[Demonstration]:
    """Drop repeated rows: the same question with the same answer teaches nothing twice."""
    return replace(loaded, rows=dedupe(loaded).rows)


def check_context(workspace: Workspace, model: Path) -> None:
    """Refuse rows that, with their answer, exceed the context of the model in `model`.

    Raises:
        BadData: names the file and the line of each such row.
    """
    from ascent.inference.chat import Renderer
    from ascent.inference.decoder import DecoderConfig

    renderer, context = Renderer(model), DecoderConfig.from_folder(model).context
    room = context - workspace.usecase.sampling.max_tokens
    for tasks in (workspace.test_prompted, workspace.prompts):
        if tasks is not None:
            check_lengths(tasks, lambda task: len(renderer.prompt_ids(task.messages)), room)
    if workspace.train is not None:
        check_lengths(workspace.train, lambda row: len(renderer.render(row.messages).token_ids), context)
    if workspace.preferences is not None:
        check_lengths(workspace.preferences, lambda pair: _longer_side(pair, renderer), context)


def _longer_side(pair: Preference, renderer: Renderer) -> int:
    sides = ((*pair.messages, Message(role="assistant", content=text)) for text in (pair.chosen, pair.rejected))
    return max(len(renderer.render(messages).token_ids) for messages in sides)


def tasks_of(
    usecase: UseCase,
    program: Program,
    path: Path,
    *,
    prompted: bool = False,
    shots: Sequence[Demonstration] = (),
) -> Loaded[Task]:
    """Load tasks with the short prompt, or with the long one of the prompted baseline."""
    spec = usecase.prompt
    return load_tasks(
        path,
        program=program,
        system=spec.system,
        instructions=spec.instructions if prompted else "",
        examples=shots if prompted else (),
    )


def open_tasks(folder: Path, data: Path, *, prompted: bool) -> tuple[UseCase, Loaded[Task]]:
    """Load a use case and one data file of it, for measuring a model outside a climb."""
    usecase = load_usecase(folder)
    program = Program.load(usecase.path(usecase.program))
    usecase.check_program([*program.grader_names, *BUILTIN])
    if usecase.prompt.examples is not None and not usecase.path(usecase.prompt.examples).is_file():
        generate_data(usecase)
    shots = _shots(usecase, program) if prompted else ()
    return usecase, tasks_of(usecase, program, data, prompted=prompted, shots=shots)


def generate_data(usecase: UseCase) -> None:
    """Run the use case's generator when a data file it promises is absent.

    Raises:
        BadInput: the generator fails or leaves a promised file out.
    """
    named = [*(file for _, file in usecase.data if file is not None), usecase.prompt.examples]
    missing = [file for file in named if file is not None and not usecase.path(file).is_file()]
    if not missing or usecase.generator is None:
        return
    path = usecase.path(usecase.generator.file)
    module = Program.load(path).module
    generate = getattr(module, "generate", None)
    if not callable(generate):
        raise BadInput(f"{path} defines no generate(folder, seed); a generator writes the data files through it")
    generate(usecase.path(missing[0]).parent, usecase.generator.seed)
    left = [str(file) for file in missing if not usecase.path(file).is_file()]
    if left:
        raise BadInput(f"{path}: generate() ran and did not write {', '.join(left)}; data files go into `folder`")


def _shots(usecase: UseCase, program: Program) -> tuple[Demonstration, ...]:
    if usecase.prompt.examples is None:
        return ()
    return load_demonstrations(usecase.path(usecase.prompt.examples), program=program).rows
