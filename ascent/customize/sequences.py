"""From records to training sequences: conversations, raw text, pairs, single answers; and what of them is learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from ascent.customize.batch import TrainSequence
from ascent.inference.chat import Renderer
from ascent.records import Feedback, Message, Preference
from ascent.records.errors import BadInput

Reasoning = Literal["train", "mask", "drop"]
THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
THOUGHT_END = "</think>"
Pair = tuple[TrainSequence, TrainSequence]


def conversation_sequences(
    conversations: Sequence[tuple[Message, ...]], renderer: Renderer, reasoning: Reasoning = "train"
) -> list[TrainSequence]:
    """Render demonstrations; the loss falls on what the assistant said.

    Reasoning (`<think>…</think>`) is dropped from all turns but the last, as chat templates do at serving, so that
    training sees what the model will see. That of the last turn is learnt, read without being learnt, or dropped.
    """
    sequences = []
    for messages in conversations:
        shown = [_without_thought(m) if m.role == "assistant" else m for m in messages[:-1]]
        last = messages[-1]
        final = _without_thought(last) if reasoning == "drop" else last
        rendered = renderer.render((*shown, final))
        mask = list(rendered.loss_mask)
        if reasoning == "mask" and THOUGHT.match(final.content):
            start = len(renderer.prompt_ids(shown))
            for place in range(start, _thought_end(rendered.token_ids, start, renderer)):
                mask[place] = False
        sequences.append(TrainSequence(rendered.token_ids, tuple(mask)))
    return sequences


def _without_thought(message: Message) -> Message:
    return message.model_copy(update={"content": THOUGHT.sub("", message.content)})


def _thought_end(ids: Sequence[int], start: int, renderer: Renderer) -> int:
    """The first position after the token that completes `</think>`."""
    for end in range(start + 1, len(ids) + 1):
        if THOUGHT_END in renderer.decode(ids[start:end]):
            return end
    return start


def document_sequences(texts: Sequence[str], renderer: Renderer, window: int) -> list[TrainSequence]:
    """Cut raw text into windows of at most `window` tokens, each document followed by an end token.

    Every token but a window's first is a target. Windows lie side by side in a batch and never see each other, so
    packing costs no attention across documents.

    Raises:
        BadInput: the window holds fewer than two tokens.
    """
    if window < 2:
        raise BadInput(f"a window of {window} tokens predicts nothing; give at least 2")
    end = renderer.tokenizer.eos_token_id
    if end is None:
        end = min(renderer.end_ids)
    sequences = []
    for text in texts:
        ids = [*renderer.tokenizer.encode(text, add_special_tokens=False), end]
        for begin in range(
            0, len(ids) - 1, window - 1
        ):  # neighbours share a token, so that every token is a target once
            part = tuple(ids[begin : begin + window])
            sequences.append(TrainSequence(part, (False, *[True] * (len(part) - 1))))
    return sequences


def pair_sequences(preferences: Sequence[Preference], renderer: Renderer) -> list[Pair]:
    """Render pairs; the loss falls on the last assistant turn of each. Given scores become the answers' rewards."""
    pairs = []
    for preference in preferences:
        chosen = _answered(preference.messages, preference.chosen, renderer)
        rejected = _answered(preference.messages, preference.rejected, renderer)
        chosen.reward, rejected.reward = preference.chosen_score or 0.0, preference.rejected_score or 0.0
        pairs.append((chosen, rejected))
    return pairs


def answer_sequences(feedback: Sequence[Feedback], renderer: Renderer) -> list[tuple[TrainSequence]]:
    """Render single answers; the reward is +1 for a good one and −1 for a bad one."""
    found = []
    for item in feedback:
        seq = _answered(item.messages, item.answer, renderer)
        seq.reward = 1.0 if item.good else -1.0
        found.append((seq,))
    return found


def _answered(messages: tuple[Message, ...], answer: str, renderer: Renderer) -> TrainSequence:
    prompt = len(renderer.prompt_ids(messages))
    whole = renderer.render((*messages, Message(role="assistant", content=answer)))
    mask = tuple(kept and at >= prompt for at, kept in enumerate(whole.loss_mask))
    return TrainSequence(whole.token_ids, mask)


def check_context(sequences: Sequence[Sequence[TrainSequence]], context: int) -> None:
    """Check that every row fits the context.

    Raises:
        BadInput: names the first row that does not.
    """
    for index, row in enumerate(sequences, 1):
        longest = max(len(seq.token_ids) for seq in row)
        if longest > context:
            raise BadInput(f"row {index} has {longest} tokens, the model's context is {context}; shorten or drop it")
