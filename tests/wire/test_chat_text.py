from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascent.inference.calls import Call
from ascent.inference.chat import Renderer
from ascent.serve.chat.syntax import HERMES, LLAMA, MISTRAL, CallReader, arguments_of, syntax_of
from ascent.serve.chat.text import BROKEN, Detokeniser, Stopper, Thinking
from ascent.serve.chat.types import ToolSpec

WEATHER = ToolSpec(
    "weather", "", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
)
CHUNKS = st.lists(st.integers(1, 5), min_size=1, max_size=40)


def pieces(text: str, sizes: list[int]) -> list[str]:
    """Cut a text into pieces of these sizes, the rest as one."""
    found, at = [], 0
    for size in sizes:
        found.append(text[at : at + size])
        at += size
    return [*found, text[at:]]


@pytest.fixture(scope="module")
def renderer(tiny_model) -> Renderer:
    return Renderer(tiny_model)


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer of Llama 2's kind: a mark for spaces, bytes as tokens, the first space stripped."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁Hello", "▁wor", "ld", "▁", "é", ",", "▁the", "s"]
    vocab = [(f"<0x{byte:02X}>", -10.0) for byte in range(256)] + [(word, -1.0) for word in words]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *vocab], 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=120))
def test_pieces_join_to_the_text_of_all_tokens(renderer, ids):
    special = renderer._special
    detokeniser = Detokeniser(renderer.decode, special, {})
    joined = "".join(map(detokeniser.feed, ids)) + detokeniser.flush()
    assert joined == renderer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text("Hello world, thes é漢🦜\n", max_size=60))
def test_pieces_join_for_a_tokenizer_with_marked_spaces(sentencepiece, text):
    ids = sentencepiece.encode(text, add_special_tokens=False).ids
    detokeniser = Detokeniser(lambda tokens: sentencepiece.decode(list(tokens)), set(), {})
    joined = "".join(map(detokeniser.feed, ids)) + detokeniser.flush()
    assert joined == sentencepiece.decode(ids)


def test_characters_split_over_tokens_come_whole(renderer):
    text = "👩‍👧 naïve 漢字 🦜!"
    ids = renderer.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # this vocabulary has none of these characters whole
    detokeniser = Detokeniser(renderer.decode, renderer._special, {})
    found = [detokeniser.feed(token) for token in ids]
    assert "".join(found) == text
    assert not any(BROKEN in piece for piece in found)


def test_a_kept_special_token_writes_itself(renderer):
    end = next(iter(renderer.end_ids))
    ids = renderer.tokenizer.encode("a b", add_special_tokens=False)
    detokeniser = Detokeniser(renderer.decode, renderer._special, {end: "[CALL]"})
    assert "".join(map(detokeniser.feed, [*ids, end, *ids])) == "a b[CALL]a b"


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=500, deadline=None)
@given(st.text("abc", max_size=30), STOPS, CHUNKS)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, sizes):
    stopper, said, seen, expected = Stopper(tuple(stops)), "", "", None
    for piece in pieces(text, sizes):
        said += stopper.feed(piece)
        seen += piece
        if expected is None:
            places = [seen.find(stop) for stop in stops if stop in seen]
            expected = seen[: min(places)] if places else None
        assert (stopper.found is not None) == (expected is not None)
        if stopper.found is not None:
            assert said == expected and seen.startswith(expected + stopper.found)
            return
        assert seen.startswith(said)
    assert said + stopper.flush() == text


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["<think>", " <think>\n", ""]), st.text("a <>/think\n", max_size=20), CHUNKS)
def test_reasoning_is_told_apart_however_the_text_is_cut(opening, thought, sizes):
    text = f"{opening}{thought}</think>\n\nThe answer <think>is</think>."
    whole, cut = Thinking(), Thinking()
    expected = [whole.feed(text), whole.flush()]
    found = [cut.feed(piece) for piece in pieces(text, sizes)] + [cut.flush()]
    for side in (0, 1):
        assert "".join(pair[side] for pair in found) == "".join(pair[side] for pair in expected)
    if opening and "</think>" not in thought:
        assert "".join(pair[0] for pair in found) == thought.strip()
        assert "".join(pair[1] for pair in found) == "The answer <think>is</think>."


def test_reasoning_that_the_prompt_opened():
    thinking = Thinking(open=True)
    assert [thinking.feed("So, 2"), thinking.feed("+2.\n</thi"), thinking.feed("nk>\n4")] == [
        ("So, 2", ""),
        ("+2.", ""),
        ("", "4"),
    ]


ARGUMENTS = {"city": 'Zürich </x> {"a": [1]}', "days": 3}
WRITTEN = {
    "hermes": f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': ARGUMENTS})}\n</tool_call>",
    "hermes, twice": "\n".join(
        f"<tool_call>{json.dumps({'name': 'weather', 'arguments': {'days': day}})}</tool_call>" for day in (1, 2)
    ),
    "hermes, not closed": f"<tool_call>{json.dumps({'name': 'weather', 'arguments': ARGUMENTS})}",
    "plain": "call: weather(Bern, 2)\n",
    "llama": json.dumps({"name": "weather", "parameters": ARGUMENTS}),
    "llama, marked": "<|python_tag|>" + json.dumps({"name": "weather", "parameters": ARGUMENTS}),
    "llama, twice": "; ".join(json.dumps({"name": "weather", "parameters": {"days": day}}) for day in (1, 2)),
    "mistral": "[TOOL_CALLS]" + json.dumps([{"name": "weather", "arguments": ARGUMENTS}]),
    "mistral, later": "[TOOL_CALLS]weather[ARGS]" + json.dumps(ARGUMENTS),
    "mistral, later, twice": '[TOOL_CALLS]weather[ARGS]{"days": 1}[TOOL_CALLS]weather[ARGS]{"days": 2}',
}
SYNTAX = {"hermes": HERMES, "plain": HERMES, "llama": LLAMA, "mistral": MISTRAL}


def read(syntax, text: str, sizes: list[int]) -> tuple[str, list[tuple[str, dict]]]:
    reader = CallReader(syntax, [WEATHER])
    parts = [part for piece in pieces(text, sizes) for part in reader.feed(piece)] + reader.flush()
    calls = [(part.name, arguments_of(part, [WEATHER])) for part in parts if isinstance(part, Call)]
    return "".join(part for part in parts if isinstance(part, str)), calls


@pytest.mark.parametrize("case", WRITTEN)
@settings(max_examples=40, deadline=None)
@given(sizes=CHUNKS)
def test_calls_are_read_however_the_text_is_cut(case, sizes):
    text, calls = read(SYNTAX[case.partition(",")[0]], WRITTEN[case], sizes)
    expected = [{"days": 1}, {"days": 2}] if "twice" in case else [ARGUMENTS]
    expected = [{"city": "Bern", "days": 2}] if case == "plain" else expected
    assert (text, calls) == ("", [("weather", one) for one in expected])


@pytest.mark.parametrize("case", ["hermes", "plain", "mistral"])
@settings(max_examples=40, deadline=None)
@given(sizes=CHUNKS)
def test_text_before_a_call_is_kept(case, sizes):
    text, calls = read(SYNTAX[case], f"I will look.\n{WRITTEN[case]}", sizes)
    assert text.rstrip() == "I will look." and len(calls) == 1


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (HERMES, "<tool_call>{name: weather}</tool_call> then"),
        (HERMES, '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "argu'),
        (HERMES, "I call: weather(Bern)"),
        (HERMES, "call: unknown(Bern)\nso be it"),
        (LLAMA, '{"name": "other", "parameters": {}}'),
        (LLAMA, '{"temperature": 21}'),
        (LLAMA, '<|python_tag|>print("x")'),
        (MISTRAL, "[TOOL_CALLS]no json"),
        (MISTRAL, "[TOOL_CALLS]weather[ARGS][1]"),
    ],
)
@settings(max_examples=30, deadline=None)
@given(sizes=CHUNKS)
def test_what_is_no_call_comes_back_as_text(syntax, text, sizes):
    assert read(syntax, text, sizes) == (text, [])


def test_the_template_tells_the_syntax():
    assert syntax_of("{{ '<tool_call>' }}") is HERMES
    assert syntax_of("{{ '<|python_tag|>' }}") is LLAMA
    assert syntax_of("{{ '[TOOL_CALLS]' }}") is MISTRAL
    assert syntax_of("{{ messages }}") is HERMES
