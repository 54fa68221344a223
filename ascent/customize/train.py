"""One training run: a recipe, a start model and data become a trained model folder and its card."""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from ascent.customize.batch import TrainSequence
from ascent.customize.loops.online import OnlineSettings, train_online
from ascent.customize.loops.preference import Pair, train_preference
from ascent.customize.loops.supervised import train_supervised
from ascent.customize.objectives.rows import OnlineRow, PreferenceRow, Row, SupervisedRow, row_named
from ascent.customize.policy import DTYPES, Policy
from ascent.customize.recipes import DpoRecipe, OnlineRecipe, Recipe, SftRecipe
from ascent.customize.run import StepReport, TrainingRun
from ascent.customize.trainer import Trainer
from ascent.evaluate.pool import GraderPool
from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.engines.torch import TorchEngine
from ascent.records import DataSource, Message, Preference, RunCard, Task, digest
from ascent.records.errors import BadInput
from ascent.records.files import folder_atomic, recover_folder, write_atomic

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
)
Announce = Callable[[dict[str, object]], None]


@dataclass(frozen=True)
class TrainingData:
    """What the recipe's row feeds on; exactly one of the three is used."""

    conversations: Sequence[tuple[Message, ...]] = ()
    preferences: Sequence[Preference] = ()
    tasks: Sequence[Task] = ()
    sources: tuple[DataSource, ...] = field(default=())


def train(
    recipe: Recipe,
    start: Path,
    data: TrainingData,
    folder: Path,
    *,
    report: StepReport | None = None,
    announce: Announce | None = None,
) -> RunCard:
    """Train and write `folder/model` (merged weights, adapter, tokenizer) and `folder/run.json`.

    A finished run is not repeated: its card is read back. An unfinished one goes on from its checkpoint.

    Raises:
        BadInput: there is nothing to train on, a row is longer than the context, or the folder holds a run of another
            recipe or of other data.
        Interrupted: Ctrl-C; the state is in the checkpoint.
    """
    finished = folder / "run.json"
    identity = run_id(recipe, data.sources)
    if finished.exists():
        card = RunCard.from_json(finished.read_bytes())
        if card.id != identity:
            raise BadInput(
                f"{folder} holds the finished run {card.id}, not {identity}; give another folder, or empty it"
            )
        return card
    torch.manual_seed(recipe.seed)
    renderer = Renderer(start)
    row = _row_of(recipe)
    boundary = recipe.minibatches if isinstance(recipe, OnlineRecipe) else 1
    run = TrainingRun(
        folder,
        checkpoint_every=recipe.checkpoint_every,
        boundary=boundary,
        identity=identity,
        report=report,
    )
    if isinstance(recipe, OnlineRecipe):
        trainer = _start(recipe, start, recipe.steps, announce, {"prompts": len(data.tasks)})
        _online(recipe, row, trainer, data.tasks, start, renderer, run)
    elif isinstance(recipe, DpoRecipe):
        pairs = pair_sequences(data.preferences, renderer)
        _check_lengths(pairs, trainer_context(start))
        trainer = _start(recipe, start, _steps(recipe, len(pairs)), announce, {"pairs": len(pairs)})
        assert isinstance(row, PreferenceRow)
        train_preference(
            trainer,
            row,
            pairs,
            run,
            batch_size=recipe.batch_size,
            token_budget=recipe.token_budget,
            seed=recipe.seed,
        )
    else:
        sequences = conversation_sequences(data.conversations, renderer)
        _check_lengths([[seq] for seq in sequences], trainer_context(start))
        tokens = sum(len(seq.token_ids) for seq in sequences)
        facts = {"demonstrations": len(sequences), "tokens per epoch": tokens}
        trainer = _start(recipe, start, _steps(recipe, len(sequences)), announce, facts)
        assert isinstance(row, SupervisedRow)
        train_supervised(
            trainer,
            row,
            sequences,
            run,
            batch_size=recipe.batch_size,
            token_budget=recipe.token_budget,
            seed=recipe.seed,
        )
    if announce and "ended" in run.state:
        announce({"ended early": run.state["ended"]})
    save_model(trainer.policy, start, folder / "model", recipe.model)
    card = _card(recipe, data.sources, run, trainer)
    write_atomic(finished, card.to_json(indent=1))
    shutil.rmtree(run.checkpoint, ignore_errors=True)
    return card


def run_id(recipe: Recipe, sources: Sequence[DataSource]) -> str:
    """Name a run by its recipe and the bytes of its data; where the files lie does not matter."""
    content = recipe.model_dump(mode="json", exclude={"data", "prompts", "program"})
    content["model"] = Path(recipe.model).name
    parts = recipe.prompts if isinstance(recipe, OnlineRecipe) else recipe.data
    content["weights"] = [part.weight for part in parts]
    return f"{recipe.algorithm}-{digest([content, [source.sha256 for source in sources]])[:12]}"


def conversation_sequences(conversations: Sequence[tuple[Message, ...]], renderer: Renderer) -> list[TrainSequence]:
    """Render demonstrations; the loss falls on what the assistant said."""
    rendered = [renderer.render(messages) for messages in conversations]
    return [TrainSequence(r.token_ids, r.loss_mask) for r in rendered]


def pair_sequences(preferences: Sequence[Preference], renderer: Renderer) -> list[Pair]:
    """Render pairs; the loss falls on the last assistant turn of each."""
    pairs = []
    for preference in preferences:
        prompt = tuple(renderer.prompt_ids(preference.messages))
        sides = []
        for answer in (preference.chosen, preference.rejected):
            whole = renderer.render((*preference.messages, Message(role="assistant", content=answer)))
            mask = tuple(kept and at >= len(prompt) for at, kept in enumerate(whole.loss_mask))
            sides.append(TrainSequence(whole.token_ids, mask))
        pairs.append((sides[0], sides[1]))
    return pairs


def save_model(policy: Policy, start: Path, folder: Path, base: str) -> None:
    """Write merged weights, tokenizer and configuration, and the adapter in PEFT format beside them."""
    recover_folder(folder)
    with folder_atomic(folder) as scratch:
        for pattern in SIDE_FILES:
            for file in start.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        policy.save(scratch, base)


def trainer_context(start: Path) -> int:
    """The start model's context in tokens."""
    from ascent.inference.decoder import DecoderConfig

    return DecoderConfig.from_folder(start).context


def _online(
    recipe: OnlineRecipe,
    row: Row,
    trainer: Trainer,
    tasks: Sequence[Task],
    start: Path,
    renderer: Renderer,
    run: TrainingRun,
) -> None:
    assert isinstance(row, OnlineRow)
    settings = OnlineSettings(
        prompts=recipe.prompts_per_step,
        group=recipe.group_size,
        minibatches=recipe.minibatches,
        max_tokens=recipe.max_tokens,
        temperature=recipe.temperature,
        refills=recipe.refills,
        overlong_cache=max(1, recipe.max_tokens // 4),
        reward=recipe.reward,
    )
    if not tasks:
        raise BadInput("there are no prompts to train on; give `prompts` a file with at least one row")
    engine = TorchEngine(load_decoder(start, DTYPES[recipe.precision]), renderer, f"{recipe.model}+{row.name}")
    with GraderPool(recipe.program, [recipe.reward]) as pool:
        train_online(
            trainer,
            row,
            tasks,
            engine,
            pool,
            run,
            settings,
            token_budget=recipe.token_budget,
            seed=recipe.seed,
        )


def _row_of(recipe: Recipe) -> Row:
    """The row with the recipe's own values on its axes."""
    row = row_named(recipe.algorithm)
    if isinstance(recipe, DpoRecipe) and isinstance(row, PreferenceRow):
        return replace(row, beta=recipe.beta, label_smoothing=recipe.label_smoothing, nll=recipe.nll)
    if isinstance(recipe, OnlineRecipe) and isinstance(row, OnlineRow) and recipe.kl is not None:
        return replace(row, kl=recipe.kl)
    return row


def _start(recipe: Recipe, start: Path, steps: int, announce: Announce | None, facts: dict[str, int]) -> Trainer:
    adapter = recipe.lora.config if recipe.lora else None
    policy = Policy.load(start, recipe.precision, adapter, recipe.seed)
    trainer = Trainer(policy, recipe.optim.optim, steps)
    if announce:
        announce(
            {
                "algorithm": recipe.algorithm,
                "start model": recipe.model,
                **facts,
                "steps": steps,
                "trainable parameters": sum(p.numel() for p in policy.parameters),
                "threads": torch.get_num_threads(),
            }
        )
    return trainer


def _steps(recipe: SftRecipe | DpoRecipe, rows: int) -> int:
    if rows == 0:
        raise BadInput(f"there is nothing to train {recipe.algorithm} on; the data hold no usable row")
    return max(1, math.ceil(recipe.epochs * rows / recipe.batch_size))


def _check_lengths(rows: Sequence[Sequence[TrainSequence]], context: int) -> None:
    for index, row in enumerate(rows, 1):
        longest = max(len(seq.token_ids) for seq in row)
        if longest > context:
            raise BadInput(f"row {index} has {longest} tokens, the model's context is {context}; shorten or drop it")


def _card(recipe: Recipe, sources: tuple[DataSource, ...], run: TrainingRun, trainer: Trainer) -> RunCard:
    return RunCard(
        id=run.identity,
        row=recipe.algorithm,
        recipe=recipe.model_dump(mode="json"),
        base=recipe.model,
        seed=recipe.seed,
        data=sources,
        steps=trainer.step,
        tokens=run.tokens,
        seconds=round(run.seconds, 2),
        peak_rss_mb=round(peak_rss_mb(), 1),
        versions=package_versions(),
        machine=machine(),
        final={name: value for name, value in run.last.items() if math.isfinite(value)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def package_versions() -> dict[str, str]:
    """Versions of what decides a run's arithmetic."""
    packages = ("ascent-posttrain", "torch", "transformers", "safetensors")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def machine() -> dict[str, object]:
    """What the run ran on."""
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
