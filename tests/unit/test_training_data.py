"""What rows learn from: reasoning, raw text, single answers, a teacher's answers; and data that do not fit a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from laws.helpers import run_recipe

from ascent.customize.data import load_feedback, load_preferences, load_texts
from ascent.customize.distill import teacher_answers
from ascent.customize.recipes import TeacherSpec
from ascent.customize.sequences import answer_sequences, conversation_sequences, document_sequences
from ascent.inference.chat import Renderer
from ascent.inference.engines.scripted import ScriptedEngine
from ascent.records import Feedback, Message, Task
from ascent.records.errors import BadData, BadInput


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    return Renderer(tiny_model)


def turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(texts))


THINKING = turns("a?", "<think>one two</think>\n\nfox", "b?", "<think>three four</think>\n\ndog")


def learnt(renderer: Renderer, reasoning: str) -> tuple[str, str]:
    """Everything the model reads, and what of it is learnt."""
    (seq,) = conversation_sequences([THINKING], renderer, reasoning)  # type: ignore[arg-type]
    kept = [token for token, mask in zip(seq.token_ids, seq.loss_mask, strict=True) if mask]
    return renderer.decode(seq.token_ids), renderer.decode(kept)


def test_reasoning_is_learnt_read_or_left_out_and_never_kept_in_earlier_turns(renderer: Renderer) -> None:
    read, target = learnt(renderer, "train")
    assert "one two" not in read
    assert target.split() == ["fox", "<think>three", "four</think>", "dog"] or "three four" in target
    read, target = learnt(renderer, "mask")
    assert "three four" in read
    assert "three" not in target
    assert "</think>" not in target
    assert "dog" in target
    assert "fox" in target
    read, target = learnt(renderer, "drop")
    assert "think" not in read
    assert "dog" in target


def test_a_masked_thought_ends_each_turn_with_its_end_token(renderer: Renderer) -> None:
    (seq,) = conversation_sequences([THINKING], renderer, "mask")
    kept = [token for token, mask in zip(seq.token_ids, seq.loss_mask, strict=True) if mask]
    assert sum(token in renderer.end_ids for token in kept) == 2


def test_every_token_of_a_document_is_a_target_once(renderer: Renderer) -> None:
    texts = ["The quick brown fox jumps over the lazy dog. " * 5, "Take one."]
    for window in (7, 30, 10_000):
        sequences = document_sequences(texts, renderer, window)
        assert max(len(seq.token_ids) for seq in sequences) <= window
        targets = [token for seq in sequences for token, kept in zip(seq.token_ids, seq.loss_mask, strict=True) if kept]
        wanted: list[int] = []
        for text in texts:
            wanted += [*renderer.tokenizer.encode(text, add_special_tokens=False), renderer.tokenizer.eos_token_id][1:]
        assert targets == wanted
    with pytest.raises(BadInput, match="window of 1"):
        document_sequences(texts, renderer, 1)


def test_single_answers_carry_their_sign(renderer: Renderer) -> None:
    items = [Feedback(id=str(i), messages=turns("a?"), answer="fox", good=good) for i, good in enumerate((True, False))]
    assert [unit[0].reward for unit in answer_sequences(items, renderer)] == [1.0, -1.0]


def written(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_loaders_name_line_and_field(tmp_path: Path) -> None:
    asked = {"input": {"prompt": "q"}}
    fine = written(tmp_path, [{**asked, "answer": "a", "good": True}, {**asked, "answer": "b", "good": 0}])
    assert [row.good for row in load_feedback(fine)] == [True, False]
    for row, field, words in (
        ({**asked, "answer": "a"}, "good", "missing"),
        ({**asked, "answer": "a", "good": "yes"}, "good", "true or false"),
        ({**asked, "answer": "", "good": True}, "answer", "empty"),
        ({**asked, "chosen": "a", "rejected": "b"}, "chosen", "half of a pair"),
    ):
        with pytest.raises(BadData) as caught:
            load_feedback(written(tmp_path, [row]))
        assert "rows.jsonl:1" in str(caught.value)
        assert field in str(caught.value)
        assert words in str(caught.value)
    scored = {**asked, "chosen": "a", "rejected": "b", "chosen_score": 2, "rejected_score": 0.5}
    (pair,) = load_preferences(written(tmp_path, [scored]))
    assert (pair.chosen_score, pair.rejected_score) == (2.0, 0.5)
    with pytest.raises(BadData, match="must be a number"):
        load_preferences(written(tmp_path, [{**scored, "chosen_score": "high"}]))
    document, shown = load_texts(written(tmp_path, [{"text": "Some text."}, {**asked, "target": "t"}]))
    assert (document.text, document.messages) == ("Some text.", ())
    assert (shown.text, shown.messages[-1].content) == ("", "t")
    with pytest.raises(BadData, match=r"rows\.jsonl:1"):
        load_texts(written(tmp_path, [{"text": "  "}]))


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("dpo", "{data: feedback.jsonl}", ["feedback.jsonl:1", "chosen"]),
        ("kto", "{data: pairs.jsonl}", ["pairs.jsonl:1", "half of a pair"]),
        ("kto", "{batch_size: 1}", ["row kto", "axis anchor", "batch_size"]),
        ("distill_forward", "{teacher: null}", ["row distill_forward", "axis divergence", "teacher"]),
        ("distill_sequence", "{teacher: null}", ["distill_sequence", "teacher"]),
    ],
)
def test_data_that_do_not_fit_a_row_are_refused(
    use_case: Path, tmp_path: Path, name: str, extra: str, words: list[str]
) -> None:
    with pytest.raises(BadInput) as caught:
        run_recipe(use_case, name, tmp_path / "run", extra=extra)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_answers_of_one_kind_and_pairs_without_scores_are_refused(use_case: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(
        "".join(json.dumps({"input": {"prompt": str(i)}, "answer": "a", "good": True}) + "\n" for i in range(4))
    )
    with pytest.raises(BadInput, match=r"row kto, axis pairing: unpaired: all 4 answers are good"):
        run_recipe(use_case, "kto", tmp_path / "kto", extra=f"{{data: {one}}}")
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"id": "p7", "input": {"prompt": "q"}, "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(BadInput, match=r"row rpo_reward, axis link: reward_squared .* pair 'p7' has none"):
        run_recipe(use_case, "rpo_reward", tmp_path / "rpo", extra=f"{{data: {bare}}}")


def test_a_teacher_of_another_vocabulary_is_refused(use_case: Path, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match="same tokenizer, or distil its texts"):
        run_recipe(use_case, "distill_forward", tmp_path / "run", extra=f"{{teacher: {{model: {tmp_path / 'other'}}}}}")


def test_a_teacher_teaches_by_its_best_answers(tmp_path: Path, use_case: Path) -> None:
    """Of three answers the one with most letters is kept, prompts without a good one go, repeats count once."""
    script = {"a?": ["12", "ab", "a1"], "b?": ["1", "2", "3"], "c?": ["xy", "xy", "xy"]}
    tasks = [Task(id=q, messages=turns(q)) for q in script]
    engine = ScriptedEngine(script)
    best = TeacherSpec(model="t", samples=3, reward="letters", minimum=0.6)
    kept = teacher_answers(engine, tasks, best, use_case / "program.py", 0)
    assert [(c[0].content, c[-1].content) for c in kept] == [("a?", "ab"), ("c?", "xy")]
    every = teacher_answers(engine, tasks, TeacherSpec(model="t", samples=3), None, 0)
    assert len(every) == 3 + 3 + 1
    with pytest.raises(BadInput, match="no answer to learn from"):
        teacher_answers(engine, tasks[1:2], best, use_case / "program.py", 0)
