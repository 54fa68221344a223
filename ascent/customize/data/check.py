"""What must hold between rows and across files: lengths, duplicates, and no test row in the training data.

Two questions are *exactly* alike when they have the same words, numbers and symbols after Unicode NFKC, case
folding and removal of sentence punctuation. They are *near* alike when they state the same numbers and their
character 5-grams have a Jaccard similarity of at least the threshold. The numbers come first because of
prescriptions: "take 1 tablet every 8 hours" and "take 2 tablets every 8 hours" share nearly all their
characters and are different questions, so texts whose numbers differ (digits, English number words, and "no"
and "not") are never near alike, however long.

Raw inputs are compared, never prompts: system text, few-shot examples and the boilerplate of `prepare` are
shared by all rows and would make everything look alike.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal

from ascent.customize.data.load import DataRow, Demonstration, Loaded, T
from ascent.customize.data.problems import Problems
from ascent.records import Preference, Task, digest
from ascent.records.errors import BadInput

THRESHOLD = 0.9
_GRAM = 5
# Scripts written without spaces: one token per character, or a whole sentence would be one word.
_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN = re.compile(rf"\d+(?:[.,/:]\d+)*|[{_WIDE}]|[^\W\d{_WIDE}]+|[^\w\s]")
# Symbols that Unicode files under punctuation although they carry meaning.
_MEANT = frozenset("%#&*@/\\_-")
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_OTHERS = (
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million half quarter once twice thrice "
    "single double triple first second third fourth fifth no not never without"
)
_DECISIVE = {word: str(value) for value, word in enumerate(_UNITS.split())} | {word: word for word in _OTHERS.split()}


@dataclass(frozen=True)
class Leak:
    """A training row and the test row that it gives away. `similarity` is 1 for an exact repetition."""

    train_id: str
    test_id: str
    kind: Literal["exact", "near"]
    similarity: float


@dataclass(frozen=True)
class Deduped(Generic[T]):
    """Rows without repetitions.

    `removed` are pairs (id kept, id removed). `conflicts` are pairs of ids, both kept, that ask the same
    question and answer it differently: a labelling mistake, or a question with several right answers.
    """

    rows: tuple[T, ...]
    removed: tuple[tuple[str, str], ...]
    conflicts: tuple[tuple[str, str], ...]


def question(row: DataRow) -> str:
    """Return the text by which rows are compared: the values of the raw input, or else the user turns.

    Names of input fields do not count, so `{"sig": "x"}` in one file equals `{"prompt": "x"}` in another.
    """
    turns = row.input.get("messages")
    if len(row.input) == 1 and isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return "\n".join(str(turn.get("content")) for turn in turns if turn.get("role") != "system")
    if row.input:
        return "\n".join(_leaves(row.input))
    return "\n".join(turn.content for turn in row.messages if turn.role == "user")


def answer(row: DataRow) -> str:
    """Return what a row teaches, to tell repetition from contradiction. Empty for an unlabelled task."""
    if isinstance(row, Demonstration):
        return row.messages[-1].content.strip()
    if isinstance(row, Preference):
        return f"{row.chosen.strip()}\n{row.rejected.strip()}"
    return digest(row.expected) if isinstance(row, Task) and row.expected else ""


def normalise(text: str) -> str:
    """Return the form in which texts are compared: tokens with single spaces, no sentence punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    tokens = []
    for token in _TOKEN.findall(folded):
        category = unicodedata.category(token[0])
        if category == "Pd":
            tokens.append("-")
        elif not category.startswith("P") or token in _MEANT:
            tokens.append(token)
    return " ".join(tokens) or " ".join(folded.split())


def numbers_in(normalised: str) -> tuple[str, ...]:
    """Return, in order, the words of a normalised text that decide its meaning: numbers and negations."""
    return tuple(
        _DECISIVE.get(token, token) for token in normalised.split(" ") if token in _DECISIVE or token[:1].isdigit()
    )


def grams(normalised: str) -> frozenset[str]:
    """Return the set of character 5-grams of a normalised text; a shorter text is its own only gram."""
    return frozenset(normalised[i : i + _GRAM] for i in range(max(1, len(normalised) - _GRAM + 1)))


def dedupe(rows: Iterable[T]) -> Deduped[T]:
    """Drop rows that repeat an earlier row's question (after `normalise`) and answer; keep the first.

    The same question with another answer is kept and listed under `conflicts`.
    """
    kept: list[T] = []
    removed: list[tuple[str, str]] = []
    conflicts: list[tuple[str, str]] = []
    seen: dict[str, dict[str, str]] = {}
    for row in rows:
        answers = seen.setdefault(normalise(question(row)), {})
        said = answer(row)
        if said in answers:
            removed.append((answers[said], row.id))
            continue
        if answers:
            conflicts.append((next(iter(answers.values())), row.id))
        answers[said] = row.id
        kept.append(row)
    return Deduped(tuple(kept), tuple(removed), tuple(conflicts))


def leakage(
    train: Iterable[DataRow], test: Iterable[DataRow], threshold: float = THRESHOLD, *, numbers: bool = True
) -> list[Leak]:
    """Find the training rows that give a test row away: for each, the test row it resembles most.

    Dropping every training row that is returned leaves no leak. The search is exact, not sampled: candidates
    come from an inverted index over each text's rarest grams, so many of them that no pair at the threshold
    can be missed (prefix filtering, as in AllPairs: a pair with Jaccard similarity t shares one of the |x| -
    ceil(t |x|) + 1 rarest grams of each side), and every candidate is then compared in full.

    Args:
        train: rows that a model learns from, of any kind.
        test: rows that it is measured on.
        threshold: the Jaccard similarity of character 5-grams from which two questions count as near alike.
        numbers: whether texts with different numbers are different questions, whatever their similarity.

    Returns:
        Leaks in the order of `train`.
    """
    if not 0 < threshold <= 1:
        raise BadInput(f"the threshold of near-duplicates is a similarity above 0 and at most 1, got {threshold}")
    exact: dict[str, str] = {}
    for row in test:
        exact.setdefault(normalise(question(row)), row.id)
    learned = [(row.id, normalise(question(row))) for row in train]
    near = _nearest_texts({text for _, text in learned if text not in exact}, list(exact), threshold, numbers)
    leaks = []
    for name, text in learned:
        if text in exact:
            leaks.append(Leak(name, exact[text], "exact", 1.0))
        elif text in near:
            twin, similarity = near[text]
            leaks.append(Leak(name, exact[twin], "near", similarity))
    return leaks


def check_leakage(train: Loaded[Any], test: Loaded[Any], threshold: float = THRESHOLD, *, numbers: bool = True) -> None:
    """Refuse training data that holds test questions; see `leakage`.

    Raises:
        BadData: names the training file and the first line to delete, and lists the first twenty pairs.
    """
    problems = Problems(train.source.path)
    for leak in leakage(train, test, threshold, numbers=numbers):
        alike = "repeats" if leak.kind == "exact" else f"is {leak.similarity:.0%} alike to"
        twin = f"the test row {leak.test_id!r} on line {test.lines[leak.test_id]} of {test.source.path}"
        problems.add(
            train.lines[leak.train_id],
            "input",
            f"row {leak.train_id!r} {alike} {twin}, so the score would measure memory; "
            "delete it here, or split again by group",
        )
    problems.raise_any()


def check_lengths(rows: Loaded[T], length: Callable[[T], int], limit: int) -> list[int]:
    """Refuse rows that do not fit the model's context.

    Args:
        rows: a loaded file.
        length: the number of tokens of a row once it is rendered.
        limit: the number of tokens that a row may have.

    Returns:
        The length of every row, in tokens.

    Raises:
        BadData: names the first row that is too long, and lists the first twenty.
    """
    problems = Problems(rows.source.path)
    lengths = [length(row) for row in rows]
    for row, tokens in zip(rows, lengths, strict=True):
        if tokens > limit:
            problems.add(
                rows.lines[row.id],
                None,
                f"row {row.id!r} has {tokens} tokens, but the limit is {limit}; shorten it by "
                f"{tokens - limit} tokens, delete it, or use a model or setting with a longer context",
            )
    problems.raise_any()
    return lengths


def _leaves(value: Any) -> Iterator[str]:
    """Yield the scalars of a JSON value as text, objects in the order of their keys."""
    if isinstance(value, dict):
        for name in sorted(value):
            yield from _leaves(value[name])
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield str(value)


def _nearest_texts(
    texts: set[str], targets: Sequence[str], threshold: float, numbers: bool
) -> dict[str, tuple[str, float]]:
    """Return text -> (the most similar target, similarity) for texts that have one at the threshold."""
    target_grams = [grams(target) for target in targets]
    ordered = sorted(texts)
    text_grams = [grams(text) for text in ordered]
    frequency = Counter(gram for found in (*target_grams, *text_grams) for gram in found)

    def prefix(found: frozenset[str]) -> list[str]:
        shared = math.ceil(threshold * len(found) - 1e-9)
        return sorted(found, key=lambda gram: (frequency[gram], gram))[: len(found) - shared + 1]

    def kind(text: str) -> tuple[str, ...]:
        return numbers_in(text) if numbers else ()

    index: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for position, (target, found) in enumerate(zip(targets, target_grams, strict=True)):
        for gram in prefix(found):
            index.setdefault((kind(target), gram), []).append(position)
    best: dict[str, tuple[str, float]] = {}
    for text, found in zip(ordered, text_grams, strict=True):
        decisive = kind(text)
        candidates = {position for gram in prefix(found) for position in index.get((decisive, gram), ())}
        for position in sorted(candidates):
            other = target_grams[position]
            common = len(found & other)
            similarity = common / (len(found) + len(other) - common)
            if similarity >= threshold and similarity > best.get(text, ("", 0.0))[1]:
                best[text] = (targets[position], similarity)
    return best
