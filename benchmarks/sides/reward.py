"""The reward of all sides: a program file for ours, a plain function for the others."""

from __future__ import annotations

from typing import Any


def share_of_vowels(text: str) -> float:
    """Vowels per character: deterministic, and different for almost any two texts."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def vowels(task: Any, episode: Any) -> float:
    """Our grader."""
    return share_of_vowels(episode.text)
