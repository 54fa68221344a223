"""The error tree: an error that crosses to another process arrives as what it was."""

from __future__ import annotations

import pickle

import pytest

from ascent.records import errors
from ascent.records.errors import AscentError, BadData, Busy, MissingExtra, UnknownName

OWN_ARGUMENTS = (Busy, MissingExtra, UnknownName)
MADE = [
    BadData("a value is missing", file="train.jsonl", line=3, field="input"),
    UnknownName("row", "grop", ["grpo", "sft"], hint="; see docs/techniques.md"),
    MissingExtra("vision", "reading images"),
    Busy("32 requests are waiting", retry_after_s=1.5),
    *(
        kind("what, why, what to do")
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, AscentError) and kind not in OWN_ARGUMENTS
    ),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: AscentError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    assert back.exit_code == error.exit_code
