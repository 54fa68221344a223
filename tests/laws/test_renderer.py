"""Laws of the chat renderer: the mask shows what the assistant said, and the ids are the tokenizer's own."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ascent.customize.sequences import conversation_sequences, pair_sequences
from ascent.inference.chat import Renderer
from ascent.records import Message, Preference

SAID = ["Take 1 tablet.", "", "  spaced out ", "naïve\n\ncafé 🙂", "a" * 90]
ASKED = ["hi", "Take one tablet by mouth", "line one\nline two", "déjà vu?"]


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def renderer(request: pytest.FixtureRequest, tiny_model: Path) -> Renderer:
    if request.param == "tiny":
        return Renderer(tiny_model)
    return Renderer(request.getfixturevalue("smollm2"))


def conversation(turns: int, system: str | None, asked: list[str], said: list[str]) -> tuple[Message, ...]:
    found = [] if system is None else [Message(role="system", content=system)]
    for index in range(turns):
        found.append(Message(role="user", content=asked[index % len(asked)]))
        found.append(Message(role="assistant", content=said[index % len(said)]))
    return tuple(found)


def masked_runs(ids: tuple[int, ...], mask: tuple[bool, ...]) -> list[list[int]]:
    """The stretches of tokens whose mask is set."""
    groups = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in group] for kept, group in groups if kept]


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_mask_decodes_to_what_was_said_with_one_end_token_a_turn(renderer: Renderer, turns: int, system) -> None:
    for said in itertools.permutations(SAID, min(turns, 2)):
        messages = conversation(turns, system, ASKED, list(said))
        found = renderer.render(messages)
        runs = masked_runs(found.token_ids, found.loss_mask)
        assert len(runs) == turns
        for run, message in zip(runs, (m for m in messages if m.role == "assistant"), strict=True):
            assert sum(token in renderer.end_ids for token in run) == 1
            assert run[-1] in renderer.end_ids
            assert renderer.decode(run) == message.content
        assert not found.loss_mask[0]


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_ids_are_those_of_the_tokenizers_own_template(renderer: Renderer, system) -> None:
    theirs = AutoTokenizer.from_pretrained(str(renderer.folder), local_files_only=True)
    for turns in (1, 2, 3):
        messages = conversation(turns, system, ASKED, SAID[:1] + SAID[3:])
        plain = [{"role": m.role, "content": m.content} for m in messages]
        whole = theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
        ours = list(renderer.render(messages).token_ids)
        assert whole[: len(ours)] == ours
        assert not theirs.decode(whole[len(ours) :]).strip()
        prompt = theirs.apply_chat_template(plain[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert renderer.prompt_ids(messages[:-1]) == prompt
        assert ours[: len(prompt)] == prompt


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
    said=st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
)
def test_any_text_keeps_the_law(renderer: Renderer, asked: str, said: str) -> None:
    messages = (Message(role="user", content=asked), Message(role="assistant", content=said))
    found = renderer.render(messages)
    (run,) = masked_runs(found.token_ids, found.loss_mask)
    prompt = renderer.prompt_ids(messages[:1])
    assert list(found.token_ids[: len(prompt)]) == prompt
    assert found.loss_mask == (False,) * len(prompt) + (True,) * (len(found.token_ids) - len(prompt))
    assert [token in renderer.end_ids for token in run] == [False] * (len(run) - 1) + [True]
    if renderer.decode(renderer.tokenizer.encode(said)) == said:  # SmolLM2's vocabulary lacks some rare bytes
        assert renderer.decode(run) == said


def test_pairs_train_on_the_last_turn_only(renderer: Renderer) -> None:
    messages = (*conversation(1, None, ASKED, SAID), Message(role="user", content="again"))
    pair = Preference(id="1", messages=messages, chosen="yes sir", rejected="no")
    ((chosen, rejected),) = pair_sequences([pair], renderer)
    prompt = tuple(renderer.prompt_ids(messages))
    for seq, text in ((chosen, "yes sir"), (rejected, "no")):
        assert seq.token_ids[: len(prompt)] == prompt
        (run,) = masked_runs(seq.token_ids, seq.loss_mask)
        assert renderer.decode(run) == text
        assert seq.loss_mask.index(True) == len(prompt)


def test_demonstrations_train_on_every_assistant_turn(renderer: Renderer) -> None:
    (seq,) = conversation_sequences([conversation(2, "Be brief.", ASKED, ["one", "two"])], renderer)
    assert [renderer.decode(run) for run in masked_runs(seq.token_ids, seq.loss_mask)] == ["one", "two"]
