"""How much memory a job gets: predicted from the model's shapes before any data is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ascent.inference.engines.named import REMOTE
from ascent.inference.store import Store
from ascent.jobs.specs import Limits
from ascent.records import Message, Preference, Task
from ascent.records.errors import BadInput, Corrupt, UnknownName

if TYPE_CHECKING:
    from ascent.customize.recipes import Recipe
    from ascent.customize.train import TrainingData
    from ascent.inference.chat import Renderer
    from ascent.serve.services.bedrock.resources import Start

PROCESS_MB = 960
"""A job's process besides the model: training and measuring one of 100,000 parameters peaked at 841 MiB."""
MARGIN = 1.2
"""The plan's own peaks lay up to 9 % below what runs took."""
UNKNOWN_MB = 4096
"""For a model that the catalogue must fetch first."""
BYTES = 4
"""Per weight that is answered with: bf16, and again while it is loaded from another type."""


def training_limits(recipe: Recipe, start: Start, store: Store) -> Limits:
    """Return the limits of a customization job: the planned peak on rows that fill the recipe's token budget."""
    from ascent.customize.plan import plan
    from ascent.inference.chat import Renderer
    from ascent.inference.decoder import DecoderConfig

    try:
        folder = _whole(store, start.model)
        renderer, context = Renderer(folder), DecoderConfig.from_folder(folder).context
        found = plan(recipe, folder, _worst_rows(recipe, renderer, context), store=store)
    except (UnknownName, BadInput, Corrupt):  # the job will say it with the data at hand
        return Limits(UNKNOWN_MB)
    peak = sum(size for part, size in found.memory.items() if part != "process")
    return Limits(PROCESS_MB + int(MARGIN * peak / 2**20))


def answering_limits(models: list[str], store: Store, *, beside: str | None = None) -> Limits:
    """Return the limits of a job that lets models answer, one after the other, with another one loaded beside them."""
    try:
        sizes = [_weights(store, model) for model in models]
        more = 0 if beside is None or beside.startswith(REMOTE) else _weights(store, beside)
    except (UnknownName, BadInput):
        return Limits(UNKNOWN_MB)
    return Limits(PROCESS_MB + 512 + int((max(sizes) + more) / 2**20))


def _weights(store: Store, model: str) -> int:
    """Return the bytes that a model takes while it is loaded."""
    return store.card(_whole(store, model).name).parameters * BYTES


def _whole(store: Store, model: str) -> Path:
    """Return the folder of a stored model's whole weights: of an adapter, its base's."""
    from ascent.inference.export import adapter_base
    from ascent.inference.store import ADAPTER_MARK

    folder = store.resolve(model)
    return adapter_base(folder, store) if (folder / ADAPTER_MARK).is_file() else folder


def _worst_rows(recipe: Recipe, renderer: Renderer, context: int) -> TrainingData:
    """Return rows of the recipe's kind that fill a micro-batch, as long as the model can read."""
    from ascent.customize.feed import feed_of
    from ascent.customize.recipes import OnlineRecipe
    from ascent.customize.train import TrainingData

    feed = feed_of(recipe)
    room = min(context, recipe.token_budget) - int(getattr(recipe, "max_tokens", 0))
    per_word = len(renderer.tokenizer.encode(" a" * 32, add_special_tokens=False)) / 32
    asked = (Message(role="user", content="a"),)
    frame = len(renderer.prompt_ids(asked)) + 16
    words = " a" * max(1, int((room - frame) / per_word))
    if isinstance(recipe, OnlineRecipe):
        half = " a" * max(1, len(words) // 4)
        rows = [Task(id=str(at), messages=(Message(role="user", content=f"{at}{half}"),)) for at in range(4)]
        return TrainingData(tasks=rows)
    if feed == "preferences":
        half = words[: len(words) // 2]
        return TrainingData(preferences=[Preference(id="0", messages=asked, chosen=half, rejected=half + "b")])
    if feed == "feedback":
        from ascent.records import Feedback

        pair = [Feedback(id=str(good), messages=asked, answer=words, good=good) for good in (True, False)]
        return TrainingData(feedback=pair)
    talk = (*asked, Message(role="assistant", content=words))
    return TrainingData(conversations=[talk] * max(1, recipe.token_budget // context))
