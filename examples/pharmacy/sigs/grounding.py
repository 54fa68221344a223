# ruff: noqa: E501, SIM905
"""The guard against invention: a slot counts only if its numbers and words occur in the normalised text."""

from __future__ import annotations

import difflib
import re

from .lexicon import ROUTE_PATTERNS, read_route

_TOKEN = re.compile(r"\d+(?:\.\d+)?(?:/\d+)?|[a-z][a-z'-]*")
_BARE = re.compile(r"[\d./]+(?: to [\d./]+)?")
_FREE = frozenset(
    "a an and to the of or in at per each every day daily yes times time for with on needed as up".split()
)
_PLACE_WORDS = frozenset("by in into the your to on via route".split())
# Words that say the same about time; a model that writes one for another has not invented anything.
_SAME = [
    {"once", "1", "daily", "single"}, {"twice", "2"}, {"thrice", "3"}, {"weekly", "week"}, {"monthly", "month"}, {"nightly", "night", "bedtime", "bed"},
    {"max", "exceed", "more", "limit", "most"}, {"tablet", "tab"}, {"hourly", "hour"}, {"before", "prior"}, {"under", "beneath"}, {"morning", "am"}, {"evening", "pm"},
]  # fmt: skip
PRN_EVIDENCE = re.compile(
    r"\bas needed\b|\bneeded\b|\bif\b|\bwhen\b|\bwhenever\b|\bonset\b|\bfirst sign\b|\bneed\b|\bbreakthrough\b"
)


def tokens(text: str) -> set[str]:
    """Return the numbers and the words (without plural s) of a text."""
    return {stem(token) for token in _TOKEN.findall(text.lower())}


def stem(token: str) -> str:
    """Return a word without its plural ending; numbers without superfluous zeros."""
    if token[0].isdigit():
        return token.rstrip("0").rstrip(".") if "." in token else token
    return token[:-1] if token.endswith("s") and len(token) > 3 and not token.endswith("ss") else token


def is_grounded(label: str, value: str, text: str) -> bool:
    """Say whether a slot value is supported by the normalised text."""
    present = tokens(text)
    if label == "route":
        route = read_route(value)
        if route is not None and ROUTE_PATTERNS[route].search(text):
            return True
        return all(
            _supported(token, present) for token in map(stem, _TOKEN.findall(value)) if token not in _PLACE_WORDS
        )
    if label == "dose" and _BARE.fullmatch(value) and value in text:
        return bool(re.search(rf"(?<![\d./]){re.escape(value)}(?![\d./])(?! (?:times?|x|hours?|days?|weeks?)\b)", text))
    if label == "prn":
        return bool(PRN_EVIDENCE.search(text))
    return all(_supported(token, present) for token in map(stem, _TOKEN.findall(value.lower())))


def _supported(token: str, present: set[str]) -> bool:
    if token in present:
        return True
    if token[0].isdigit():
        return token == "1" and bool(present & {"a", "an", "once"})
    if token in _FREE or any(token in group and group & present for group in _SAME):
        return True
    words = [word for word in present if word[0] == token[0] and abs(len(word) - len(token)) <= 2]
    return len(token) >= 5 and any(difflib.SequenceMatcher(None, token, word).ratio() >= 0.8 for word in words)
