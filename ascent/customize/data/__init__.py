"""Data: files to checked records, and what happens to them before training: dedupe, leakage, split, mix."""

from ascent.customize.data.check import (
    Deduped,
    Leak,
    check_leakage,
    check_lengths,
    dedupe,
    grams,
    leakage,
    normalise,
    numbers_in,
    question,
)
from ascent.customize.data.load import (
    DataRow,
    Demonstration,
    Loaded,
    Text,
    expected_schema,
    load_demonstrations,
    load_feedback,
    load_preferences,
    load_tasks,
    load_texts,
    messages_for,
)
from ascent.customize.data.mix import mix
from ascent.customize.data.read import describe
from ascent.customize.data.split import split_by_group

__all__ = [
    "DataRow",
    "Deduped",
    "Demonstration",
    "Leak",
    "Loaded",
    "Text",
    "check_leakage",
    "check_lengths",
    "dedupe",
    "describe",
    "expected_schema",
    "grams",
    "leakage",
    "load_demonstrations",
    "load_feedback",
    "load_preferences",
    "load_tasks",
    "load_texts",
    "messages_for",
    "mix",
    "normalise",
    "numbers_in",
    "question",
    "split_by_group",
]
