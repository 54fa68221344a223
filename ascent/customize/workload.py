"""What a run feeds on: tokens, and the shapes of micro-batches, drawn and folded as `train` does."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ascent.customize.arithmetic import Packed
from ascent.customize.batch import TrainSequence, micro_batches
from ascent.customize.order import items_at
from ascent.customize.recipes import OnlineRecipe, PreferenceRecipe, Recipe
from ascent.customize.sequences import (
    answer_sequences,
    check_context,
    conversation_sequences,
    document_sequences,
    pair_sequences,
)
from ascent.customize.train import TrainingData
from ascent.inference.chat import Renderer
from ascent.inference.sampler import shared_prefix
from ascent.records.errors import BadInput

SAMPLE = 2000
"""Rows that are rendered; of more, as many are drawn at random, and the rest is taken to be like them."""
SIMULATED = 200
"""Steps whose micro-batches are laid out one by one; a longer run is taken to go on like them."""
UNWRITTEN = 1 << 30
"""The first token id of answers that are not written yet: past any vocabulary, so that they share only their prompt."""


@dataclass(frozen=True)
class Workload:
    """What the steps feed on; `prompts` and the length of the prefix that they share only online.

    `batches` are the micro-batches of the first steps. `scored` are those of all rendered rows where a reference scores
    them before the first step; each rendered row stands for `rows_each` rows of the data.
    """

    steps: int
    batches: Sequence[Sequence[Packed]]
    sequences: int
    tokens: int
    exact: bool
    scored: Sequence[Packed] = ()
    rows_each: float = 1.0
    prompts: tuple[int, ...] = ()
    shared: int = 0


def workload_of(recipe: Recipe, data: TrainingData, renderer: Renderer, context: int) -> Workload:
    """Count tokens and lay out micro-batches.

    Raises:
        BadInput: there is nothing to train on, or a row is longer than the context.
    """
    row: Any = recipe.row
    feed: list[Sequence[Any]] = [data.conversations, data.documents, data.preferences, data.feedback, data.tasks]
    total = sum(map(len, feed))
    if total == 0:
        raise BadInput(f"there is nothing to train {recipe.algorithm} on; the data hold no usable row")
    dice = random.Random(recipe.seed)
    texts, documents, pairs, answers, tasks = (
        rows if total <= SAMPLE or not rows else dice.sample(rows, math.ceil(len(rows) * SAMPLE / total))
        for rows in feed
    )
    if isinstance(recipe, OnlineRecipe):
        return _online(recipe, [renderer.prompt_ids(task.messages) for task in tasks], context)
    units: list[Sequence[TrainSequence]]
    if isinstance(recipe, PreferenceRecipe):
        units = [*pair_sequences(pairs, renderer), *answer_sequences(answers, renderer)]
    else:
        sequences = conversation_sequences(texts, renderer, recipe.reasoning)
        if row.corpus:
            sequences += document_sequences(documents, renderer, min(context, recipe.token_budget))
        if recipe.teacher is not None:
            fresh, asked = itertools.count(UNWRITTEN), [renderer.prompt_ids(task.messages) for task in tasks]
            limit, samples = recipe.teacher.max_tokens, recipe.teacher.samples
            sequences += [_unwritten(prompt, limit, fresh) for prompt in asked for _ in range(samples)]
        units = [(sequence,) for sequence in sequences]
    check_context(units, context)
    whole, count = total <= SAMPLE, len(units) if total <= SAMPLE else round(len(units) * total / SAMPLE)
    batch = recipe.batch_size
    steps = max(1, math.ceil(recipe.epochs * count / batch))
    lengths = [sum(len(seq.token_ids) for seq in unit) for unit in units]
    epochs, rest = divmod(steps * batch, len(units))
    last = sum(lengths[i] for i in items_at(epochs * len(units), rest, len(units), recipe.seed))
    batches = []
    for step in range(min(steps, SIMULATED)):
        drawn = [units[i] for i in items_at(step * batch, batch, len(units), recipe.seed)]
        cross = row.kind == "preference" and row.pairing == "cross"
        batches.append(_packed([list(itertools.chain(*drawn))] if cross else drawn, recipe.token_budget))
    scored = [[seq] for unit in units for seq in unit] if row.kind == "preference" and row.reference else []
    return Workload(
        steps,
        batches,
        sequences=steps * batch * len(units[0]),
        tokens=epochs * sum(lengths) + last,
        exact=whole and not tasks,
        scored=_packed(scored, recipe.token_budget),
        rows_each=count / len(units),
    )


def _packed(units: Sequence[Sequence[TrainSequence]], token_budget: int) -> list[Packed]:
    """The shapes of the micro-batches that the trainer makes of these units."""
    return [Packed.of(batch) for batch in micro_batches(units, token_budget)]


def _unwritten(prompt: Sequence[int], tokens: int, fresh: Iterator[int]) -> TrainSequence:
    """A prompt with an answer that is as long as it may get, of tokens that no other sequence has."""
    answer = itertools.islice(fresh, tokens)
    return TrainSequence((*prompt, *answer), (*[False] * len(prompt), *[True] * tokens))


def _online(recipe: OnlineRecipe, prompts: Sequence[Sequence[int]], context: int) -> Workload:
    """The workload of sampled answers, each as long as it may get."""
    lengths, longest = tuple(len(prompt) for prompt in prompts), answer_tokens(recipe)
    if max(lengths) + longest > context:
        raise BadInput(
            f"a prompt of {max(lengths)} tokens and an answer of up to {longest} exceed the context of {context}; "
            f"shorten the prompt or lower max_tokens"
        )
    fresh = itertools.count(UNWRITTEN)
    batches, tokens, sequences = [], 0, 0
    for step in range(min(recipe.steps, SIMULATED)):
        first = step // recipe.minibatches * recipe.prompts_per_step
        drawn = items_at(first, recipe.prompts_per_step, len(lengths), recipe.seed)
        group = [_unwritten(prompts[i], longest, fresh) for i in drawn for _ in range(recipe.group_size)]
        mine = group[step % recipe.minibatches :: recipe.minibatches]
        batches.append(_packed([[seq] for seq in mine], recipe.token_budget))
        tokens, sequences = tokens + sum(len(seq.token_ids) for seq in mine), sequences + len(mine)
    share = recipe.steps / len(batches)
    return Workload(
        recipe.steps,
        batches,
        sequences=round(sequences * share),
        tokens=round(tokens * share),
        exact=False,
        prompts=lengths,
        shared=shared_prefix(prompts),
    )


def answer_tokens(recipe: OnlineRecipe) -> int:
    """Return the tokens that the policy may write in one episode."""
    return recipe.max_tokens * (recipe.harness.max_turns if recipe.harness else 1)
