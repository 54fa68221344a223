"""Noise of real systems: misspellings, lost spaces, changed case, lost punctuation. Numbers are never touched."""

from __future__ import annotations

import re
from random import Random

_MISSPELLABLE = re.compile(r"^[a-z]{6,}$")


def add_noise(text: str, rng: Random, level: float) -> str:
    """Return the text with noise; `level` 0 leaves it, 1 is heavy."""
    words = text.split(" ")
    for index, word in enumerate(words):
        if _MISSPELLABLE.match(word) and "instr" not in word and rng.random() < 0.05 * level:
            words[index] = misspell(word, rng)
    text = " ".join(words)
    if rng.random() < 0.05 * level:
        text = re.sub(r"\b(\d+) (mg|ml|tablets?|tabs?|days)\b", r"\1\2", text, count=1)
    draw = rng.random()
    if draw < 0.12:
        return text.upper()
    if draw < 0.3:
        return text[:1].upper() + text[1:]
    if draw < 0.4:
        return re.sub(r"[,;:()]", " ", text)
    return text


def misspell(word: str, rng: Random) -> str:
    """Return the word with one letter dropped, doubled, swapped with its neighbour, or replaced."""
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + word[at] + word[at:]
    if kind == 2:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + rng.choice("aeiourstn") + word[at + 1 :]
