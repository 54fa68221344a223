r"""Guardrails by rule: words, regular expressions and patterns of personal data, each blocked or made anonymous.

A guardrail is a YAML file `guardrails/<id>.yaml` in the server's folder:

    owner: pharmacy             # left out, every caller may use it
    versions:
      "1":
        words: [competitor]
        pii: {EMAIL: ANONYMIZE, CREDIT_DEBIT_CARD_NUMBER: BLOCK}
        regexes: [{name: order, pattern: 'ORD-\d{6}', action: ANONYMIZE}]
        blocked_input: I cannot talk about that.

`DRAFT` is a version like every other. A file that changes is read again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ascent.customize.yamlfile import load_yaml
from ascent.records.errors import UnknownName

Action = Literal["BLOCK", "ANONYMIZE"]
Entity = Literal["EMAIL", "PHONE", "CREDIT_DEBIT_CARD_NUMBER", "US_SOCIAL_SECURITY_NUMBER", "URL", "IP_ADDRESS"]
_DONE = {"BLOCK": "BLOCKED", "ANONYMIZE": "ANONYMIZED"}
_ID = re.compile(r"[a-z0-9]{1,64}")
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
# In this order: what is a web address is no e-mail address, and a card number no telephone number.
PATTERNS: dict[str, re.Pattern[str]] = {
    "URL": re.compile(r"\b(?:https?|ftp)://[^\s<>\"']+|\bwww\.[\w-]+(?:\.[\w-]+)+(?:/[^\s<>\"']*)?", re.I),
    "EMAIL": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+"),
    "CREDIT_DEBIT_CARD_NUMBER": re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])"),
    "US_SOCIAL_SECURITY_NUMBER": re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"),
    "IP_ADDRESS": re.compile(
        rf"(?<![\d.]){_OCTET}(?:\.{_OCTET}){{3}}(?![\d.]*\d)|(?<![\w:])(?:[0-9A-Fa-f]{{1,4}}:){{7}}[0-9A-Fa-f]{{1,4}}(?![\w:])"
    ),
    "PHONE": re.compile(r"(?<![\w.-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,4}(?![\w-])"),
}
_PHONE_DIGITS = range(7, 16)  # E.164 allows fifteen


class Pattern(BaseModel):
    """A regular expression of one's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    pattern: str = Field(min_length=1)
    action: Action = "BLOCK"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, text: str) -> str:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return text


class Rules(BaseModel):
    """One version of a guardrail; what is blocked is answered with `blocked_input` or `blocked_output`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: tuple[str, ...] = ()
    regexes: tuple[Pattern, ...] = ()
    pii: dict[Entity, Action] = {}
    blocked_input: str = "This request is not allowed here."
    blocked_output: str = "The answer was withheld."


class Guardrail(BaseModel):
    """A guardrail's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str | None = None
    versions: dict[str, Rules] = Field(min_length=1)


@dataclass(frozen=True)
class Match:
    """A rule that a text met: where, and what becomes of it. `kind` is word, pii or regex, `name` the rule."""

    kind: str
    name: str
    start: int
    end: int
    action: Action


@dataclass
class Assessment:
    """What a guardrail says of texts: `texts` are what may go on, `blocked` whether nothing may."""

    rules: Rules
    texts: list[str] = field(default_factory=list)
    found: list[tuple[Match, str]] = field(default_factory=list)

    @property
    def blocked(self) -> bool:
        """Whether a rule that blocks was met."""
        return any(match.action == "BLOCK" for match, _ in self.found)

    @property
    def intervened(self) -> bool:
        """Whether any rule was met."""
        return bool(self.found)

    def as_member(self) -> dict[str, Any]:
        """Return the assessment as `GuardrailAssessment` has it, with the policies that were met."""
        rows: dict[str, list[dict[str, Any]]] = {"word": [], "pii": [], "regex": []}
        patterns = {rule.name: rule.pattern for rule in self.rules.regexes}
        for match, text in self.found:
            row: dict[str, Any] = {"match": text, "action": _DONE[match.action], "detected": True}
            if match.kind == "pii":
                row["type"] = match.name
            elif match.kind == "regex":
                row |= {"name": match.name, "regex": patterns[match.name]}
            rows[match.kind].append(row)
        found: dict[str, Any] = {}
        if rows["word"]:
            found["wordPolicy"] = {"customWords": rows["word"], "managedWordLists": []}
        if rows["pii"] or rows["regex"]:
            found["sensitiveInformationPolicy"] = {"piiEntities": rows["pii"], "regexes": rows["regex"]}
        return found


class Guardrails:
    """The guardrails in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, tuple[int, Guardrail]] = {}

    def rules(self, id: str, version: str, owner: str) -> Rules:
        """Return a version's rules.

        Raises:
            UnknownName: there is no such guardrail or version that `owner` may use.
            BadRecipe: its file is malformed.
        """
        path = self.folder / f"{id}.yaml"
        if not _ID.fullmatch(id) or not path.is_file():
            raise UnknownName(
                "guardrail", id, self._names(owner), hint=f"; a guardrail is a file in {self.folder.name}/"
            )
        guardrail = self._load(path)
        if guardrail.owner not in (None, owner):
            raise UnknownName("guardrail", id, self._names(owner))
        if version not in guardrail.versions:
            raise UnknownName("version of a guardrail", version, guardrail.versions)
        return guardrail.versions[version]

    def _load(self, path: Path) -> Guardrail:
        changed = path.stat().st_mtime_ns
        known = self._read.get(path)
        if known is None or known[0] != changed:
            known = self._read[path] = (changed, load_yaml(path, Guardrail))
        return known[1]

    def _names(self, owner: str) -> list[str]:
        files = [path for path in self.folder.glob("*.yaml") if _ID.fullmatch(path.stem)]
        return [path.stem for path in files if self._load(path).owner in (None, owner)]


def assess(rules: Rules, texts: list[str]) -> Assessment:
    """Return what the rules say of texts."""
    result = Assessment(rules)
    for text in texts:
        kept, at = [], 0
        for match in _without_overlaps(_matches(rules, text)):
            result.found.append((match, text[match.start : match.end]))
            kept += [text[at : match.start], f"{{{match.name}}}"]
            at = match.end
        result.texts.append("".join([*kept, text[at:]]))
    return result


def _matches(rules: Rules, text: str) -> Iterator[Match]:
    for word in rules.words:
        for found in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I):
            yield Match("word", word, *found.span(), "BLOCK")
    for rule in rules.regexes:
        for found in re.finditer(rule.pattern, text):
            if found.group():
                yield Match("regex", rule.name, *found.span(), rule.action)
    for name, pattern in PATTERNS.items():
        if (action := rules.pii.get(name)) is not None:  # type: ignore[call-overload]
            for found in pattern.finditer(text):
                if _is(name, found.group()):
                    yield Match("pii", name, *found.span(), action)


def _is(name: str, text: str) -> bool:
    digits = [int(character) for character in text if character.isdecimal()]
    if name == "CREDIT_DEBIT_CARD_NUMBER":
        return luhn(digits)
    return name != "PHONE" or len(digits) in _PHONE_DIGITS


def luhn(digits: list[int]) -> bool:
    """Return whether a card number's check digit is right (ISO/IEC 7812-1, annex B)."""
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _without_overlaps(matches: Iterator[Match]) -> list[Match]:
    """The matches from left to right; of two that overlap the one that blocks stays, then the earlier rule's."""
    kept: list[Match] = []
    for match in sorted(matches, key=lambda match: match.action != "BLOCK"):
        if all(match.end <= other.start or match.start >= other.end for other in kept):
            kept.append(match)
    return sorted(kept, key=lambda match: match.start)
