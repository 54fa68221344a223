"""A run's checkpoint as a model: the start model of the run with the checkpoint's tensors, whole and in the store."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ascent.customize.recipes import Recipe, recipe_class
from ascent.customize.run import CHECKPOINT
from ascent.customize.train import policy_of, save_model
from ascent.customize.trainer import STATE, Trainer, read_state
from ascent.inference.convert import inspect_folder
from ascent.inference.store import CARD, Store
from ascent.records import ModelCard, digest
from ascent.records.errors import BadInput


def checkpoint_of(name: str) -> Path | None:
    """Return the checkpoint that `name` means, a checkpoint's folder or that of an unfinished run; None for others."""
    place = Path(name).expanduser()
    return next((folder for folder in (place, place / CHECKPOINT) if (folder / STATE).is_file()), None)


def refuse_run(name: str) -> None:
    """Say what to give instead of a run without a checkpoint; do nothing where `name` is no run.

    Raises:
        BadInput: `name` is the folder, or the checkpoint, of a run that is finished or has no checkpoint yet.
    """
    place = Path(name).expanduser()
    run = place.parent if place.name == CHECKPOINT else place
    if (run / "run.json").is_file() and (run / "model").is_dir():
        raise BadInput(f"{run} is a finished run, which keeps no checkpoint; give its model: {run / 'model'}")
    if (run / "metrics.jsonl").is_file():
        raise BadInput(
            f"{run / CHECKPOINT} does not exist, because the run has not come to its first checkpoint; go on with it "
            f"by ascent train RECIPE --resume, or lower checkpoint_every"
        )


def checkpoint_model(checkpoint: Path, store: Store) -> Path:
    """Return the stored model of a checkpoint, made at the first call and found again at later ones.

    Its name is the run's with the step, its content what the run would have saved had it ended there.

    Raises:
        Corrupt: the checkpoint is not whole, or does not fit the model that its run started from.
        BadInput: the run was an embedder's or an older Ascent's, or the model that it started from is gone.
        NoSpace: the disk is full; the store is as it was.
    """
    state = read_state(checkpoint)
    made = {card.source: card.id for card in store.list()}.get(_source(state))
    if made is not None:
        return store.models / made
    recipe, start = _origin(checkpoint, state["extra"].get("origin"))
    trainer = Trainer(policy_of(recipe, start), recipe.optim.optim, state["step"])
    with torch.random.fork_rng(devices=[]):
        state = trainer.restore(checkpoint)
    work = f"checkpoint-{digest(state)[:12]}"
    with store.lock(work):
        folder = store.root / f".{work}"
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
        try:
            save_model(trainer.policy, start, folder, recipe.model)
            return store.add(folder, _card(checkpoint, state, folder, start), consume=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _source(state: dict[str, Any]) -> str:
    return f"step {state['step']} of {state['extra']['identity']}@{digest(state)}"


def _origin(checkpoint: Path, origin: dict[str, Any] | None) -> tuple[Recipe, Path]:
    """Return the recipe of a checkpoint's run and the folder of its start model."""
    if origin is None:
        raise BadInput(
            f"{checkpoint} does not say what it was trained from, as that of an embedder or of an older Ascent; finish "
            f"its run and give the model that it ends with"
        )
    try:
        recipe = recipe_class(origin["recipe"]["algorithm"]).model_validate(origin["recipe"])
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise BadInput(f"{checkpoint}: the recipe of its run cannot be read by this Ascent ({reason})") from error
    start = Path(origin["start"])
    if not (start / "config.json").is_file():
        raise BadInput(
            f"{checkpoint} was trained from {start}, which is no model folder now; put that model back there"
        )
    return recipe, start


def _card(checkpoint: Path, state: dict[str, Any], folder: Path, start: Path) -> ModelCard:
    """Return the card of the model in `folder`: what it is, and which model, run and step it comes from."""
    facts = inspect_folder(folder)
    parent = ModelCard.from_json((start / CARD).read_bytes()) if (start / CARD).is_file() else None
    run = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.resolve().parent.name).strip("-._") or "run"
    return ModelCard(
        id=f"{run}-step-{state['step']}",
        family=parent.family if parent else facts.family,
        source=_source(state),
        licence=parent.licence if parent else "unknown",
        sha256="",
        kind="merged",
        parent=parent.id if parent else None,
        parameters=facts.parameters,
        dtype=facts.dtype,
        context=facts.context,
        run=state["extra"]["identity"],
    )
