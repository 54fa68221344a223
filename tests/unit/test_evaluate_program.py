from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ascent.evaluate.program import Program
from ascent.records import Episode, Task
from ascent.records.errors import BadInput, UnknownName


def write(folder: Path, text: str, name: str = "program.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_functions_are_found_and_helpers_are_not(tmp_path: Path) -> None:
    write(tmp_path, "def shout(word): return word.upper()\n", "words.py")
    text = """
from __future__ import annotations
from dataclasses import dataclass
from words import shout

@dataclass
class Dose:
    amount: float

def prepare(input): return shout(input["q"])
def finish(text, input): return {"dose": Dose(2.0).amount, "q": input["q"], "text": text}
def dose(task, episode): return 1.0
def _hidden(task, episode): return 1.0
def helper(task, other): return 1.0
"""
    program = Program.load(write(tmp_path, text))
    assert program.prepare({"q": "how much"}) == "HOW MUCH"
    assert program.finish("x", {"q": 1}) == {"dose": 2.0, "q": 1, "text": "x"}
    assert program.grader_names == ["dose"]
    task, episode = Task(id="1"), Episode(task_id="1", model="m", messages=(), text="")
    assert program.grader("dose")(task, episode) == 1.0
    with pytest.raises(UnknownName, match="did you mean 'dose'"):
        program.grader("does")


def test_siblings_of_two_use_cases_do_not_mix(tmp_path: Path) -> None:
    programs = []
    for word in ("one", "two"):
        write(tmp_path / word, f"VALUE = {word!r}\n", "sibling_values.py")
        file = write(tmp_path / word, "import sibling_values\ndef prepare(input): return sibling_values.VALUE\n")
        programs.append(Program.load(file))
    assert [program.prepare({}) for program in programs] == ["one", "two"]
    assert "sibling_values" not in sys.modules
    assert str(tmp_path / "one") not in sys.path


def test_defaults() -> None:
    program = Program()
    assert program.prepare({"prompt": "hi", "x": 1}) == "hi"
    assert program.prepare({"x": "é"}) == '{"x": "é"}'
    assert program.finish(' {"a": 1} ', {}) == {"a": 1}
    for text in ("plain", "NaN", '"\\ud800"', "[" * 5000 + "]" * 5000, "1" * 5000):
        assert program.finish(text, {}) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef broken(:\n", r"SyntaxError.*program\.py:2"),
        ("x = 1\n\nimport no_such_module_here\n", r"ModuleNotFoundError.*program\.py:3"),
        ("prepare = 3\n", r"'prepare' must be a function prepare\(input\)"),
        ("def finish(text): return text\n", r"'finish' must be a function finish\(text, input\)"),
    ],
)
def test_a_file_that_does_not_load_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Program.load(write(tmp_path, text))


def test_missing_file_and_failing_prepare(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no program file"):
        Program.load(tmp_path / "none.py")
    program = Program.load(write(tmp_path, "def prepare(input):\n    return input['drug']\n"))
    with pytest.raises(BadInput, match=r"KeyError: 'drug' \(program.py:2\); the input's fields are: dose"):
        program.prepare({"dose": 1})
    program = Program.load(write(tmp_path, "def prepare(input):\n    return 3\n"))
    with pytest.raises(BadInput, match="returned a int"):
        program.prepare({})
