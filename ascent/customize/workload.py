"""What a run feeds on, by lengths alone: tokens, targets and micro-batches, in the order that `train` draws them in."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ascent.customize.arithmetic import Packed, pack
from ascent.customize.batch import TrainSequence
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
SIMULATED = 500
"""Steps whose micro-batches are laid out one by one; a longer run is taken to go on like them."""
Units = list[tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Workload:
    """What the steps feed on. Each unit is a sequence, or a pair, as (tokens, targets); `prompts` only online."""

    steps: int
    batches: Sequence[Sequence[Packed]]
    """Micro-batches of the first steps."""
    sequences: int
    tokens: int
    exact: bool
    units: Units
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
            asked = [renderer.prompt_ids(task.messages) for task in tasks for _ in range(recipe.teacher.samples)]
            sequences += [_unwritten(prompt, recipe.teacher.max_tokens) for prompt in asked]
        units = [(sequence,) for sequence in sequences]
    check_context(units, context)
    sizes: Units = [tuple((len(seq.token_ids), seq.targets) for seq in unit) for unit in units]
    whole, count = total <= SAMPLE, len(units) if total <= SAMPLE else round(len(units) * total / SAMPLE)
    batch = recipe.batch_size
    steps = max(1, math.ceil(recipe.epochs * count / batch))
    lengths = [sum(tokens for tokens, _ in unit) for unit in sizes]
    epochs, rest = divmod(steps * batch, len(sizes))
    last = sum(lengths[i] for i in items_at(epochs * len(sizes), rest, len(sizes), recipe.seed))
    batches = []
    for step in range(min(steps, SIMULATED)):
        drawn = [sizes[i] for i in items_at(step * batch, batch, len(sizes), recipe.seed)]
        cross = row.kind == "preference" and row.pairing == "cross"
        batches.append(pack([sum(drawn, ())] if cross else drawn, recipe.token_budget))
    sequences_drawn = steps * batch * len(sizes[0])
    return Workload(steps, batches, sequences_drawn, epochs * sum(lengths) + last, whole and not tasks, sizes)


def _unwritten(prompt: Sequence[int], tokens: int) -> TrainSequence:
    """A prompt with an answer that is as long as it may get."""
    return TrainSequence((*prompt, *[0] * tokens), (*[False] * len(prompt), *[True] * tokens))


def _online(recipe: OnlineRecipe, prompts: Sequence[Sequence[int]], context: int) -> Workload:
    """The workload of sampled answers, each as long as it may get."""
    lengths, longest = tuple(len(prompt) for prompt in prompts), answer_tokens(recipe)
    if max(lengths) + longest > context:
        raise BadInput(
            f"a prompt of {max(lengths)} tokens and an answer of up to {longest} exceed the context of {context}; "
            f"shorten the prompt or lower max_tokens"
        )
    batches, tokens, sequences = [], 0, 0
    for step in range(min(recipe.steps, SIMULATED)):
        first = step // recipe.minibatches * recipe.prompts_per_step
        drawn = items_at(first, recipe.prompts_per_step, len(lengths), recipe.seed)
        group = [((lengths[i] + longest, longest),) for i in drawn for _ in range(recipe.group_size)]
        mine = group[step % recipe.minibatches :: recipe.minibatches]
        batches.append(pack(mine, recipe.token_budget))
        tokens, sequences = tokens + sum(unit[0][0] for unit in mine), sequences + len(mine)
    share = recipe.steps / len(batches)
    shared = shared_prefix(prompts)
    return Workload(recipe.steps, batches, round(sequences * share), round(tokens * share), False, [], lengths, shared)


def answer_tokens(recipe: OnlineRecipe) -> int:
    """Return the tokens that the policy may write in one episode."""
    return recipe.max_tokens * (recipe.harness.max_turns if recipe.harness else 1)
