"""One training run: a recipe, a start model and data become a trained model folder and its card."""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel

from ascent.customize.loops.online import OnlineSettings, train_online
from ascent.customize.loops.preference import Unit, embed_prompts, train_preference
from ascent.customize.loops.supervised import train_supervised
from ascent.customize.objectives.rows import OnlineRow, PreferenceRow, SupervisedRow
from ascent.customize.policy import DTYPES, HeadKind, Policy, Teacher
from ascent.customize.recipes import OnlineRecipe, PreferenceRecipe, Recipe, SupervisedRecipe
from ascent.customize.rewards import open_rewards
from ascent.customize.run import StepReport, TrainingRun
from ascent.customize.sequences import (
    answer_sequences,
    check_context,
    conversation_sequences,
    document_sequences,
    pair_sequences,
)
from ascent.customize.trainer import Trainer
from ascent.inference.chat import Renderer
from ascent.inference.decoder import DecoderConfig, load_decoder
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.head import Distance
from ascent.inference.store import Store
from ascent.records import DataSource, Feedback, Message, Preference, RunCard, Task, digest
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
    """What the recipe's row feeds on: texts (conversations, documents), pairs, single judged answers, or tasks."""

    conversations: Sequence[tuple[Message, ...]] = ()
    documents: Sequence[str] = ()
    preferences: Sequence[Preference] = ()
    feedback: Sequence[Feedback] = ()
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
    keep_every: int | None = None,
) -> RunCard:
    """Train and write `folder/model` (merged weights, adapter, tokenizer) and `folder/run.json`.

    A finished run is not repeated: its card is read back. An unfinished one goes on from its checkpoint. The model of
    every `keep_every` steps is kept as `folder/steps/<step>/model`, without any effect on the run.

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
    run = TrainingRun(
        folder,
        checkpoint_every=recipe.checkpoint_every,
        boundary=recipe.minibatches if isinstance(recipe, OnlineRecipe) else 1,
        identity=identity,
        origin={"recipe": recipe.model_dump(mode="json"), "start": str(start.absolute())},
        keep_every=keep_every,
        keep=lambda trainer, place: save_model(trainer.policy, start, place, recipe.model),
        report=report,
    )
    job = _Job(recipe, start, Renderer(start), run, announce or (lambda facts: None))
    if isinstance(recipe, SupervisedRecipe):
        trainer = job.supervised(recipe, data)
    elif isinstance(recipe, PreferenceRecipe):
        trainer = job.preference(recipe, data)
    else:
        trainer = job.online(recipe, data)
    if announce and "ended" in run.state:
        announce({"ended early": run.state["ended"]})
    card = run_card(recipe.algorithm, recipe, recipe.model, recipe.seed, data.sources, run, trainer.step)
    if not run.writes:
        return card
    save_model(trainer.policy, start, folder / "model", recipe.model)
    write_atomic(finished, card.to_json(indent=1))
    shutil.rmtree(run.checkpoint, ignore_errors=True)
    return card


@dataclass(frozen=True)
class _Job:
    """One run of one recipe: it makes sequences, a trainer, and calls the loop of the row's kind."""

    recipe: Recipe
    start: Path
    renderer: Renderer
    run: TrainingRun
    announce: Announce

    def supervised(self, recipe: SupervisedRecipe, data: TrainingData) -> Trainer:
        """Train on texts."""
        row = recipe.row
        assert isinstance(row, SupervisedRow)
        sequences = conversation_sequences(data.conversations, self.renderer, recipe.reasoning)
        if row.corpus:
            window = min(self._context(), recipe.token_budget)
            sequences += document_sequences(data.documents, self.renderer, window)
        check_context([[seq] for seq in sequences], self._context())
        distance = None if row.divergence == "none" else Distance(row.divergence, row.beta)
        teacher = None
        if distance is not None:
            if recipe.teacher is None:
                raise BadInput(
                    f"row {row.name}, axis divergence: {row.divergence} needs a teacher; give teacher: {{model: …}}"
                )
            teacher = self._teacher(recipe.teacher.model, distance)
        tokens = sum(len(seq.token_ids) for seq in sequences)
        facts = {"sequences": len(sequences), "tokens per epoch": tokens}
        trainer = self._trainer(_steps(recipe, len(sequences)), facts, teacher=teacher)
        train_supervised(
            trainer,
            row,
            sequences,
            self.run,
            batch_size=recipe.batch_size,
            token_budget=recipe.token_budget,
            seed=recipe.seed,
        )
        return trainer

    def preference(self, recipe: PreferenceRecipe, data: TrainingData) -> Trainer:
        """Train on pairs or on single judged answers."""
        row = recipe.row
        assert isinstance(row, PreferenceRow)
        _check_preference_data(row, recipe, data)
        units: Sequence[Unit] = (
            answer_sequences(data.feedback, self.renderer)
            if row.pairing == "unpaired"
            else pair_sequences(data.preferences, self.renderer)
        )
        check_context(units, self._context())
        trainer = self._trainer(_steps(recipe, len(units)), {"units": len(units)})
        if row.pairing == "cross":
            embed_prompts(trainer.policy, units, recipe.token_budget, _embedding(recipe, data.preferences))
        train_preference(
            trainer,
            row,
            units,
            self.run,
            batch_size=recipe.batch_size,
            token_budget=recipe.token_budget,
            seed=recipe.seed,
        )
        return trainer

    def online(self, recipe: OnlineRecipe, data: TrainingData) -> Trainer:
        """Train on samples."""
        row = recipe.row
        assert isinstance(row, OnlineRow)
        if not data.tasks:
            raise BadInput("there are no prompts to train on; give `prompts` a file with at least one row")
        settings = OnlineSettings(
            prompts=recipe.prompts_per_step,
            group=recipe.group_size,
            minibatches=recipe.minibatches,
            max_tokens=recipe.max_tokens,
            max_turns=1 if recipe.harness is None else recipe.harness.max_turns,
            temperature=recipe.temperature,
            overlong_cache=max(1, recipe.max_tokens // 4),
            gold=recipe.reward.gold,
        )
        teacher = self._teacher(recipe.reward.teacher, None) if recipe.reward.teacher is not None else None
        trainer = self._trainer(recipe.steps, {"prompts": len(data.tasks)}, teacher=teacher)
        sampler = load_decoder(self.start, DTYPES[recipe.precision])
        engine = TorchEngine(sampler, self.renderer, f"{recipe.model}+{row.name}")
        with open_rewards(recipe, self.renderer, self.run.folder, self.announce) as rewards:
            train_online(
                trainer,
                row,
                data.tasks,
                engine,
                rewards.sampler(engine),
                self.run,
                settings,
                token_budget=recipe.token_budget,
                seed=recipe.seed,
            )
        return trainer

    def _trainer(self, steps: int, facts: dict[str, int], *, teacher: Teacher | None = None) -> Trainer:
        recipe = self.recipe
        policy = policy_of(recipe, self.start, teacher)
        self.announce(
            {
                "algorithm": recipe.algorithm,
                "start model": recipe.model,
                **facts,
                "steps": steps,
                "trainable parameters": sum(p.numel() for p in policy.parameters),
                "threads": torch.get_num_threads(),
            }
        )
        return Trainer(policy, recipe.optim.optim, steps)

    def _teacher(self, name: str, distance: Distance | None) -> Teacher:
        return Teacher(load_decoder(Store().resolve(name), DTYPES[self.recipe.precision]), distance)

    def _context(self) -> int:
        return DecoderConfig.from_folder(self.start).context


def policy_of(recipe: Recipe, start: Path, teacher: Teacher | None = None) -> Policy:
    """Load the recipe's policy as it is before the first step: the start model with its adapter and head."""
    row = recipe.row
    head: HeadKind | None = None
    if isinstance(row, PreferenceRow) and row.score == "head":
        head = "reward"
    elif isinstance(row, OnlineRow) and row.critic:
        head = "value"
    adapter = recipe.lora.config if recipe.lora else None
    return Policy.load(start, recipe.precision, adapter, recipe.seed, head=head, teacher=teacher)


def _embedding(recipe: PreferenceRecipe, preferences: Sequence[Preference]) -> torch.Tensor | None:
    """Embed what the users asked with the recipe's sentence embedder, if it names one."""
    if recipe.embedder is None:
        return None
    from ascent.customize.embeddings.embedder import Embedder

    embedder = Embedder.load(Store().resolve(recipe.embedder))
    asked = ["\n".join(m.content for m in pair.messages if m.role == "user") for pair in preferences]
    return torch.from_numpy(embedder.encode(asked))


def _check_preference_data(row: PreferenceRow, recipe: PreferenceRecipe, data: TrainingData) -> None:
    """Refuse data that the row cannot learn from.

    Raises:
        BadInput: names the row, the axis and the remedy.
    """
    place = f"row {row.name}, axis pairing: {row.pairing}"
    if row.pairing == "unpaired":
        good = sum(item.good for item in data.feedback)
        if data.feedback and good in (0, len(data.feedback)):
            kind = "good" if good else "bad"
            raise BadInput(
                f"{place}: all {len(data.feedback)} answers are {kind}, so there is nothing to tell apart; add "
                f"answers of the "
                "other kind, or use sft for good answers alone"
            )
        if row.anchor == "kl" and recipe.batch_size < 2:
            raise BadInput(
                f"row {row.name}, axis anchor: kl compares the answers of a batch; set batch_size to at least 2"
            )
    elif data.feedback and not data.preferences:
        raise BadInput(
            f"{place} needs a chosen and a rejected answer to each prompt; use kto or apo_zero for single answers"
        )
    if row.scored:
        missing = [p.id for p in data.preferences if p.chosen_score is None or p.rejected_score is None]
        if missing:
            raise BadInput(
                f"row {row.name}, axis link: {row.link} fits given rewards, and pair {missing[0]!r} has none "
                f"({len(missing)} in "
                "all); add chosen_score and rejected_score, or use dpo"
            )


def run_id(recipe: Recipe, sources: Sequence[DataSource]) -> str:
    """Name a run by its recipe and the bytes of its data; where the files lie does not matter."""
    content = recipe.model_dump(mode="json", exclude={"data", "prompts", "program"})
    content["model"] = Path(recipe.model).name
    parts = recipe.prompts if isinstance(recipe, OnlineRecipe) else recipe.data
    content["weights"] = [part.weight for part in parts]
    return f"{recipe.algorithm}-{digest([content, [source.sha256 for source in sources]])[:12]}"


def save_model(policy: Policy, start: Path, folder: Path, base: str) -> None:
    """Write merged weights, tokenizer and configuration, and the adapter in PEFT format beside them."""
    recover_folder(folder)
    with folder_atomic(folder) as scratch:
        for pattern in SIDE_FILES:
            for file in start.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        policy.save(scratch, base)


def _steps(recipe: SupervisedRecipe | PreferenceRecipe, rows: int) -> int:
    if rows == 0:
        raise BadInput(f"there is nothing to train {recipe.algorithm} on; the data hold no usable row")
    return max(1, math.ceil(recipe.epochs * rows / recipe.batch_size))


def run_card(
    row: str,
    recipe: BaseModel,
    base: str,
    seed: int,
    sources: tuple[DataSource, ...],
    run: TrainingRun,
    steps: int,
) -> RunCard:
    """Say how a finished run came about, on this machine, now."""
    return RunCard(
        id=run.identity,
        row=row,
        recipe=recipe.model_dump(mode="json"),
        base=base,
        seed=seed,
        data=sources,
        steps=steps,
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
