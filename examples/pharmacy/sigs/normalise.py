# ruff: noqa: E501, RUF001
"""Pharmalexical normalisation: a prescriber's shorthand becomes readable lower-case English, numbers untouched.

Deterministic and safe by construction: no rule computes with a number. A number word becomes its digits, a Latin code
becomes the phrase it abbreviates, an immediate repetition is said once, and a misspelling is repaired only when it is
long, unknown and close to one word that decides a component. The passes repeat until nothing changes, so normalising
twice is the same as once.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from .lexicon import CODES, NUMBER_WORDS, REPAIRABLE, STRONG_CODES, VOCABULARY

Rule = tuple[re.Pattern[str], str]
PASSES = 8
_N = r"\d+(?:\.\d+)?(?: \d/\d)?|\d/\d"
_EYES = re.compile(r"\bdrops?\b|\bgtts?\b|\beyes?\b|ophth|\binstill\b")
_WORD = re.compile(r"[a-z][a-z'-]*[a-z]|[a-z]")


def _rules(table: list[tuple[str, str]]) -> list[Rule]:
    return [(re.compile(pattern), into) for pattern, into in table]


def _apply(text: str, rules: list[Rule]) -> str:
    for pattern, into in rules:
        text = pattern.sub(into, text)
    return text


_CHARACTERS = _rules(
    [
        (r"(?<=\d)½", " 1/2"), ("½", "1/2"), (r"(?<=\d)¼", " 1/4"), ("¼", "1/4"), (r"(?<=\d)¾", " 3/4"), ("¾", "3/4"),
        ("⅓", "1/3"), ("⅔", "2/3"), ("[–—−‐‑]", "-"), ("[×✕]", " x "), ("[µμ]g", "mcg"), ("c̄", "with"), ("[“”\"]", " "),
        ("[‘’`]", "'"),
    ]
)  # fmt: skip

# Punctuation carries little in directions that passed through several systems; a point is kept between sentences.
_PUNCTUATION = _rules(
    [
        (r"\b((?:[a-z]\.){2,})", "\0"),  # replaced by `_undot`; keeps its place in the order of rules
        (r"(?<=\d),(?=\d{3}\b)", ""), (r"(?<=[a-z])\(s\)", ""), (r"\bbid ?(?:-|to|or) ?tid\b", "2 to 3 times daily"), (r"\btid ?(?:-|to|or) ?qid\b", "3 to 4 times daily"), (r"\bqd ?(?:-|to|or) ?bid\b", "1 to 2 times daily"), (r"(?<=\d)(h|hrs?|d)(?=(?:prn|as|for|instr|while|with|x\d))", r"\1 "), (r"\bea\b", "each"), (r"\b(prn|bid|tid|qid|qhs|qd)/(?=[a-z])", r"\1 "), (r"(?<=[a-z])/(?=(?:prn|bid|tid|qid|qhs|qd)\b)", " "), (r"\bw/o\b", "without "), (r"\bw/(?=\s?[a-z])", "with "), (r"\bd/t\b", "due to"), (r"\ba/d\b", "as directed"),
        (r"\bn/v\b", "nausea/vomiting"),
        (r"\ba\.\s?m\.?(?![a-z])", "am"), (r"\bp\.\s?m\.?(?![a-z])", "pm"),
        (r"\bq\.\s?(?=\d)", "q "), (r"(?<![\w.])\.(?=\d)", "0."), (r"[()\[\]{}<>*_|\\~^]+", " "), (r"[,]+(?!\d)|(?<!\d),", " "), (r"[;!?]+", " . "),
        (r"(?<!\d):(?=.)|:(?!\d)", " "), (r"(?<=[a-z]{2})\.(?=[a-z])", " . "), (r"(?<!\d)\.+(?=\s|$)|\.+(?=\s|$)", " . "), (r"\.(?=[a-z])", " "),
        (r"\s@\s?|^@\s?", " at "), (r"\s?&\s?", " and "), (r"(?<=\s)\+(?=\s)", "and"), (r"--+", " . "), (r"=", " = "),
        (r"/(?:24\s?h(?:ou)?rs?)\b", " per 24 hours"), (r"(?<=[\da-z])\s?/\s?(day|d|week|wk|month|night|dose)\b", r" per \1"),
        (r"\b(\d+)-(1/2|1/4|3/4|1/3|2/3)\b", r"\1 \2"),
        (r"(?<![\d/.-])(\d+(?:\.\d+)?|\d/\d)\s*-\s*(\d+(?:\.\d+)?|\d/\d)(?![\d/-])", r"\1 to \2"),
        (r"(?<=[a-z])-(?=\d)", " "), (r"(?<=\d)-(?=[a-z])", " "), (r"(?<=\s)-+(?=\s)|^-+\s|\s-+$|(?<=\s)-(?=[\da-z])", " "), (r"(?<=[a-z])-(?=\s)", " "),
    ]
)  # fmt: skip

_NUMBERS = _rules(
    [
        (r"\bi(?= (?:tabs?|caps?|tablets?|capsules?|puffs?|gtts?|drops?)\b)", "1"),
        (r"\bii(?= (?:tabs?|caps?|tablets?|capsules?|puffs?|gtts?|drops?)\b)", "2"),
        (r"\biii(?= (?:tabs?|caps?|tablets?|capsules?|puffs?|gtts?|drops?)\b)", "3"),
        (r"\b(one|two|three|four)(?: and (?:a |one[- ])?| one[- ]| 1[- ])half\b", r"\1 1/2"),
        (r"\b(\d) and (?:a |1 |one[- ])?(?:half|1/2)\b", r"\1 1/2"),
        (r"\b(?:one|a|1)[- ]half(?: of)?(?: an?| 1| one)?(?= |$)", "1/2"), (r"\bhalf(?: of)?(?: an?| of an?| 1| one)?(?= (?:tab|cap|pill|tsp|teasp|table|dose|ml))", "1/2"),
        (r"\b(?:one|a|1)[- ]quarter(?: of)?(?: an?)?(?= |$)", "1/4"), (r"\bthree[- ]quarters?(?: of)?(?: an?)?(?= |$)", "3/4"),
        (r"\b(?:one|a|1)[- ]third(?: of)?(?: an?)?(?= |$)", "1/3"), (r"\btwo[- ]thirds?(?: of)?(?: an?)?(?= |$)", "2/3"),
        (r"(^|\b(?:take|give|takes|chew) )on(?= (?:tab|tabs|tablet|tablets|cap|caps|capsule|capsules|pill)\b)", r"\g<1>1"),
    ]
)  # fmt: skip

_HOURS = r"h(?:ou)?rs?|h|hr"
_UNIT_OF_TIME = rf"(?P<u>{_HOURS}|days?|d|weeks?|wks?|wk|w|min(?:ute)?s?|months?|mon|mos?)"
_INTERVAL = re.compile(
    rf"\b(?:q|every)\s*\.?\s*(?P<a>\d+(?:\.\d+)?)(?:\s*(?:-|to|or)\s*(?P<b>\d+(?:\.\d+)?))?\s*\.?\s*{_UNIT_OF_TIME}\b(?:\s*int(?:ervals?)?\b)?"
)
_BARE_INTERVAL = re.compile(
    r"\bq\s*(?P<a>[346812]|12|24)(?:\s*(?:-|to|or)\s*(?P<b>[46812]|12))?(?= (?:as|prn|for|x|while|\.)|\s*$)"
)
_FULL_UNIT = {"h": "hours", "d": "days", "w": "weeks", "mi": "minutes", "mo": "months"}

_TIMES = _rules(
    [
        (r"\bq\s?\.?\s?(?:am|morning)\b|\bqam\b", "every morning"), (r"\bq\s?\.?\s?(?:pm|evening)\b|\bqpm\b", "every evening"),
        (r"\bq\s?a\.?c\.?\b", "before meals"), (r"\bq\s?p\.?c\.?\b", "after meals"),
        (r"\bq\s?hs\b|\bq h s\b|\bqhs\b|\bhs\b", "at bedtime"), (r"\bqod\b|\bq\s?other\s?d(?:ay)?\b|\beod\b|\bq\s?o\s?d\b", "every other day"),
        (r"\bq\s?day\b|\bq\.?\s?d\b|\bqdaily\b|\bq daily\b|\beveryday\b", "every day"), (r"\bq\s?(?:night|nightly)\b|\bqn\b|\bevery nightly\b", "every night"),
        (r"\bq\s?(?:weekly|week|wk)\b|\bqw\b", "every week"), (r"\bq\s?(?:month|monthly|mo)\b", "every month"), (r"\bq\s?(?:hour|hr|h)\b|\bevery (?:hr|h)\b", "every hour"),
        (r"\bb\s?i\s?d\b|\bbid\b|\bbd\b", "twice daily"), (r"\bt\s?i\s?d\b|\btid\b|\btds\b", "3 times daily"), (r"\bq\s?i\s?d\b|\bqid\b|\bqds\b", "4 times daily"),
        (r"\b(?:ac|a c) (?:and|&|/|or)?\s?(?:hs|at bedtime)\b|\bachs\b|\bac/hs\b", "before meals and at bedtime"), (r"(?<!\d )\bac\b", "before meals"), (r"(?<!\d )\bpc\b", "after meals"),
        (r"\bwm\b", "with meals"), (r"\bbiw\b", "twice weekly"), (r"\btiw\b", "3 times weekly"), (r"\bmwf\b", "monday wednesday friday"),
        (r"\bnocte\b", "at night"), (r"\bmane\b", "in the morning"),
        (r"\b(every|each) (?:am|a m)\b", r"\1 morning"), (r"\b(every|each) (?:pm|p m)\b", r"\1 evening"), (r"\bin (?:the )?am\b", "in the morning"), (r"\bin (?:the )?pm\b", "in the evening"),
        (r"(?<![\d:i]) am and pm\b", " morning and evening"), (r"(?<!\d)(?<!\bi) (?:am)\b(?! \d)", " in the morning"), (r"(?<!\d) pm\b", " in the evening"), (r"\b(?:in the|every) in the\b", "in the"),
        (r"\bbed time\b", "bedtime"), (r"\bat hour of sleep\b|\bat hours of sleep\b", "at bedtime"), (r"\b(?:at|before|every) at bedtime\b", "at bedtime"),
        (r"\bhrs?\b", "hours"), (r"(?<=\d )h\b", "hours"), (r"\bwks?\b", "weeks"), (r"(?<=\d )mos?\b", "months"), (r"\bmins?\b", "minutes"), (r"(?<=\d )d(?:ys?)?\b(?! ?/)", "days"), (r"\byrs?\b", "years"),
        (r"\btimes? per\b", "times per"), (r"\bevery (\d+) hours (?:to|or) (?:every )?(\d+) hours\b", r"every \1 to \2 hours"), (r"\bper d\b", "per day"),
        (r"\b(\d+(?: to \d+)?)\s?x (?=daily|a day|per|day|weekly|a week|each|every|in )", r"\1 times "), (r"\b(\d+(?: to \d+)?) times (day|week|month)\b", r"\1 times a \2"),
        (rf"(?:(?<!\d )\btimes|\bfor x|\bx|(?<!\d )\bfor)\s?({_N})(?:\s?(?:-|to)\s?(\d+))? ?(days?|weeks?|months?|nights?|hours?|years?|doses?)\b", "\0"),
    ]
)  # fmt: skip
_SPAN = _TIMES.pop()[0]

_WORDS = _rules(
    [
        (r"\btk\b|\btke\b", "take"), (r"\bper os\b|\bp\.? ?o\b(?! box)|\bpo\b", "by mouth"), (r"\bby by mouth\b", "by mouth"), (r"\bmilligrams?\b|\bmgs\b|\bmgm\b", "mg"), (r"\bmillilit(?:er|re)s?\b|\bmls\b|\bcc\b", "ml"),
        (r"\bmicrograms?\b|\bmcgs\b|(?<=\d )ug\b", "mcg"), (r"\bgrams?\b|\bgms?\b|\bgrms?\b", "g"), (r"(?<=\d )(?:iu|u)\b", "units"), (r"(?<=\d )ounces?\b", "oz"),
        (r"\btabs\b", "tablets"), (r"\btab\b|\btabl\b", "tablet"), (r"\bcaps\b", "capsules"), (r"\bcap\b", "capsule"), (r"\bgtts\b", "drops"), (r"\bgtt\b", "drop"), (r"\bsupps\b", "suppositories"), (r"\bsupp\b", "suppository"),
        (r"\btsps?\b|\bteaspoon(?:s?ful|fuls|s)\b", "teaspoons"), (r"\btbsps?\b|\btablespoon(?:s?ful|fuls|s)\b", "tablespoons"), (r"(?<=\d )teaspoons\b", "teaspoons"),
        (r"\bprn\b|\bp r n\b", "as needed"), (r"\b(?:only )?(?:if|when|whenever|as) (?:needed|necessary|required|need)\b(?: only)?", "as needed"), (r"\bas need\b(?! for)", "as needed"),
        (r"\bud\b|\butd\b|\buad\b|\btud\b|\but dict\b|\bas dir\b|\bad lib\b", "as directed"), (r"\bstat\b", "immediately"), (r"\bdx\b", "diagnosis"),
        (r"(?<=\d )inh\b(?! (?:by|po|every|bid|q))|(?<=\d )inhs\b", "inhalations"), (r"\binh\b", "inhale"), (r"(?<=\d )nebs?\b", "nebules"), (r"\bnebs?\b", "nebulizer"),
        (r"\bsl\b", "under the tongue"), (r"\bim\b", "intramuscularly"), (r"(?<!\w)iv\b", "intravenously"), (r"\bsub ?q\b|\bsub ?cut\b|\bsq\b|\bsc\b", "subcutaneously"), (r"\bpr\b", "rectally"), (r"\bpv\b", "vaginally"),
        (r"\bung\b|\boint\b", "ointment"), (r"\btop\b(?! of)", "topically"), (r"\baa\b", "affected area"), (r"\bau\b", "both ears"), (r"\bpt\b", "patient"), (r"\binj\b", "inject"), (r"\bsusp\b", "suspension"), (r"\bsoln?\b", "solution"),
        (r"\b(?:for (?:a total of|the next)|duration(?: of)?|course of|over|during)(?= \d+ (?:(?:full|more|consecutive) )?(?:days?|weeks?|months?|nights?)\b)", "for"),
        (r"\bone-time dose\b|\b(?:one|1) time dose\b", "single dose"),
        (r"\bmdd\b", "max daily dose"), (r"\bmaximum\b|\bmaximal\b", "max"), (r"\bnte\b", "not to exceed"), (r"\bmax (?:dose|amount) (?:per|a) day\b", "max daily dose"), (r"\bmax (?:daily |a day )?(?:amount|dosage)\b", "max daily dose"),
        (r"\b(?:(?:do )?not (?:to )?(?:exceed|take more than)|(?:no|never) more than|at most|limit(?:ed)?(?: of| to)?|(?:up to )?(?:a |the )?max (?:total )?of|max total|total max)(?= \d[\d./]*(?! ?(?:to \d+ )?(?:seconds?|minutes?|hours?|days?|weeks?|months?|times?)\b))", "max"),
        (r"\bmax daily\b(?! dose)", "max daily dose"), (r"\bmax dose daily\b", "max daily dose"), (r"\bmax daily dose (?:is|of|=)\b", "max daily dose"),
        (r"\binstr\b", " . "), (r"\bint\b(?= (?:as|for|by|\.)|$)", " "), (r"\baffect area", "affected area"), (r"(?<=\d )or (?=\d)", "to "),
    ]
)  # fmt: skip
_EYE_WORDS = _rules([(r"\bod\b", "right eye"), (r"\bos\b", "left eye"), (r"\bou\b", "both eyes")])
_NO_EYE_WORDS = _rules([(r"\bod\b", "once daily")])
_EAR_WORDS = _rules([(r"\bad\b(?! lib)", "right ear")])


def normalise(text: str) -> str:
    """Return the direction in lower-case English with abbreviations written out and joined words separated."""
    text = unicodedata.normalize("NFC", text)
    for _ in range(PASSES):
        new = _once(text)
        if new == text:
            break
        text = new
    return text


def _once(text: str) -> str:
    text = unicodedata.normalize("NFKC", _apply(text.lower(), _CHARACTERS))
    text = re.sub(r"\b((?:[a-z]\.){2,})(?![a-z]{2})", lambda hit: hit[1].replace(".", "") + " ", f" {text} ")
    text = _squeeze(_apply(text, _PUNCTUATION[1:]))
    text = " ".join(_separate(token) for token in text.split())
    text = _numbers(_squeeze(text))
    text = _INTERVAL.sub(_full_interval, text)
    text = _BARE_INTERVAL.sub(_full_interval, text)
    text = _squeeze(_apply(text, _TIMES))
    text = _SPAN.sub(_full_span, text)
    text = re.sub(r"\bx 1(?= (?:now|only|\.)|$)", "for 1 dose", text)
    text = _apply(text, _WORDS)
    text = _apply(text, _EYE_WORDS if _EYES.search(text) else _NO_EYE_WORDS)
    if re.search(r"\bears?\b|\botic", text):
        text = _apply(text, _EAR_WORDS)
    text = " ".join(_repair(token) for token in text.split())
    return _squeeze(_repeats(text))


def _squeeze(text: str) -> str:
    text = re.sub(r"(?:\s*\.(?=\s|$))+", " . ", text)
    text = re.sub(r"\s+", " ", text).strip(" -")
    return re.sub(r"^(?:\. )+|(?: \.)+$|^\.$", "", text)


def _full_interval(hit: re.Match[str]) -> str:
    low, high = hit["a"], hit["b"]
    unit = hit.groupdict().get("u") or "h"
    full = _FULL_UNIT.get(unit[:2]) or _FULL_UNIT[unit[0]]
    return f"every {low} to {high} {full}" if high else f"every {low} {full}"


def _full_span(hit: re.Match[str]) -> str:
    upper = f" to {hit[2]}" if hit[2] else ""
    return f"for {hit[1]}{upper} {hit[3]}"


def _numbers(text: str) -> str:
    for word, digits in NUMBER_WORDS.items():
        if word in text:
            text = re.sub(
                rf"\b{word} ?{digits}\b(?![./\d])|(?<![\d./] )(?<![\d./])\b{digits} ?{word}\b(?![ -](?:half|third|quarter))",
                f" {digits} ",
                text,
            )
    text = _squeeze(text)
    text = re.sub(r"\b1/2 (?:one|a|1)[- ]half\b", "1/2", text)
    text = _apply(text, _NUMBERS)
    return re.sub(
        r"(?<![\w-])(?:" + "|".join(sorted(NUMBER_WORDS, key=len, reverse=True)) + r")(?![\w-])",
        lambda hit: NUMBER_WORDS[hit[0]],
        text,
    )


def _separate(token: str) -> str:
    """Cut a token at borders of digits and letters, and a joined word at the codes inside it."""
    if "/" in token and re.fullmatch(r"(?:(?:mon|tues?|wed|thu(?:rs?)?|fri|sat|sun|am|pm|ac|hs|pc)/)+[a-z]+", token):
        return token.replace("/", " ")
    token = re.sub(r"(?<=\d)(?!(?:st|nd|rd|th)\b)(?=[a-z])", " ", token)
    token = re.sub(r"^instr(?=[a-z])(?!uct|ument)", "instr ", token)
    token = re.sub(r"^([a-z]{2,})x(?=\d)", lambda hit: f"{hit[1]} x " if hit[1] in VOCABULARY else hit[0], token)
    token = re.sub(r"\b(x|mdd|max|qty|take|q|for|instr)(?=\d)", r"\1 ", token)
    token = re.sub(r"/day(?=[a-z])(?!s\b)", "/day ", token)
    parts = []
    for part in token.split():
        hit = re.fullmatch(r"([a-z]{3,})(\d[\d./]*)", part)
        if hit and (cut := _cut(hit[1])) and cut[-1] in VOCABULARY and hit[1] not in {"b", "omega"}:
            parts += [*cut, hit[2]]
        elif part.isalpha() and part not in VOCABULARY and (cut := _cut(part)):
            parts += cut
        else:
            parts.append(part)
    return " ".join(parts)


@lru_cache(maxsize=20_000)
def _cut(word: str) -> tuple[str, ...]:
    """Return the pieces of a joined word, or nothing. One unknown piece is allowed next to an unmistakable code."""
    if word in VOCABULARY:
        return (word,)
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}
    for end in range(1, len(word) + 1):
        for start in range(end):
            if start not in best:
                continue
            piece = word[start:end]
            cost = _cost(piece, first=start == 0)
            if cost is None or (start == 0 and end == len(word)):
                continue
            total = best[start][0] + cost
            if end not in best or total < best[end][0]:
                best[end] = (total, (*best[start][1], piece))
    if len(word) not in best:
        return ()
    pieces = best[len(word)][1]
    unknown = [piece for piece in pieces if piece not in VOCABULARY and piece != "instr"]
    strong = any(piece in STRONG_CODES for piece in pieces)
    if len(unknown) > 1 or (unknown and not strong):
        return ()
    if not strong and (
        any(len(piece) < 4 and piece not in {"for", "and", "by"} for piece in pieces) or len(pieces) > 3
    ):
        return ()
    return pieces


def _cost(piece: str, *, first: bool) -> float | None:
    if piece in STRONG_CODES:
        return 1.0
    if piece in CODES:
        return 1.2
    if piece in VOCABULARY:
        return 1.3 if len(piece) > 3 else 1.6 if len(piece) == 3 else 2.6 if len(piece) == 2 else None
    return 4.0 + 0.2 * len(piece) if len(piece) >= 4 else None


@lru_cache(maxsize=20_000)
def _repair(token: str) -> str:
    """Return the one deciding word that a long unknown token misspells, else the token."""
    if len(token) < 5 or not token.isalpha() or token in VOCABULARY:
        return token
    if token.endswith("s") and token[:-1] in VOCABULARY:
        return token
    allowed = 1 if len(token) < 8 else 2
    distances = {word: _distance(token, word, allowed) for word in REPAIRABLE if abs(len(word) - len(token)) <= allowed}
    best = min(distances.values(), default=9)
    hits = sorted(word for word, distance in distances.items() if distance == best)
    if best > allowed:
        return token
    if len(hits) == 1:
        return hits[0]
    return hits[0] if len(hits) == 2 and hits[0] + "s" == hits[1] else token


def _distance(left: str, right: str, limit: int) -> int:
    """Return the optimal-string-alignment distance, or `limit + 1` as soon as it is exceeded."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        new = [i]
        for j, b in enumerate(right, 1):
            cost = min(row[j] + 1, new[j - 1] + 1, row[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            new.append(cost)
        if min(new) > limit:
            return limit + 1
        before, row = row, new
    return row[-1]


def _repeats(text: str) -> str:
    """Say an immediate repetition of one to six words once, and two spellings of one frequency once."""
    text = _apply(text, _SAME)
    words = text.split()
    for size in range(6, 0, -1):
        at = 0
        while at + 2 * size <= len(words):
            block = words[at : at + size]
            if block == words[at + size : at + 2 * size] and _is_one_phrase(block):
                del words[at + size : at + 2 * size]
            else:
                at += 1
    return " ".join(words)


def _is_one_phrase(block: list[str]) -> bool:
    """Say whether a repeated block is a phrase of its own, not the end of one step and the number of the next."""
    if not any(_WORD.fullmatch(word) for word in block):
        return False
    return not block[-1][0].isdigit() or block[0][0].isdigit() or block[0] == "max"


_DAILY = r"(?:every day|daily|once daily|once a day|each day|once every day|1 times? daily|1 times? a day|once per day)"
_TWICE = r"(?:twice daily|twice a day|2 times daily|2 times a day|2 times per day|twice per day|twice every day)"
_THRICE = r"(?:3 times daily|3 times a day|3 times per day|3 times every day)"
_FOUR = r"(?:4 times daily|4 times a day|4 times per day|4 times every day)"
_SAME = _rules(
    [
        (rf"\b({_DAILY}) (?:{_DAILY})\b", r"\1"), (rf"\b({_TWICE}) (?:{_TWICE})\b", r"\1"), (rf"\b({_THRICE}) (?:{_THRICE})\b", r"\1"), (rf"\b({_FOUR}) (?:{_FOUR})\b", r"\1"),
        (r"\b(twice|two|2) 2 times\b", "2 times"), (r"\bonce 1 times?\b", "once"), (r"\btwice 2\b", "twice"), (r"\b(\d+) (\1)(?= (?:tablet|capsule|times?|puff|drop|spray|pill|hours|days|weeks))", r"\1"),
        (r"\bby mouth (?:orally|oral)\b|\b(?:orally|oral) by mouth\b", "by mouth"), (r"\bevery morning in the morning\b", "every morning"), (r"\bat bedtime (?:every|each) (?:night|bedtime)\b", "at bedtime"),
        (r"\bas needed as needed\b", "as needed"), (r"\bas needed (?:for )?as needed\b", "as needed"),
    ]
)  # fmt: skip
