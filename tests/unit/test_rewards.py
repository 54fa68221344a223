"""Where the reward comes from: a reward model, a judge with a gold set, an environment; what stops a hacked one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from laws.helpers import metrics, run_recipe, write_tiny_model

from ascent.customize import judging
from ascent.customize.batch import collate
from ascent.customize.judging import CHECK, open_judge
from ascent.customize.policy import HEAD, Policy
from ascent.customize.recipes import JudgeSpec
from ascent.customize.rewards import RewardModel
from ascent.customize.sequences import pair_sequences
from ascent.inference.chat import Renderer
from ascent.inference.engine import Prompt
from ascent.inference.engines.scripted import ScriptedEngine
from ascent.inference.lora import LoraConfig
from ascent.inference.tensors import read_tensors
from ascent.records import Episode, Message, Preference, Task, Unscored
from ascent.records.errors import BadInput

ASKED = (Message(role="user", content="Name tree 3 of 8."),)


@pytest.fixture(scope="module")
def reward_model(use_case: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reward") / "run"
    run_recipe(use_case, "reward_model", out, extra="{epochs: 10}")
    return out / "model"


def as_episode(answer: str, renderer: Renderer) -> tuple[Task, Episode]:
    pair = pair_sequences([Preference(id="p", messages=ASKED, chosen=answer, rejected="x")], renderer)[0]
    ids, mask = pair[0].token_ids, pair[0].loss_mask
    episode = Episode(
        task_id="t", model="m", messages=ASKED, text=answer, token_ids=ids, loss_mask=mask, logps=(0.0,) * len(ids)
    )
    return Task(id="t", messages=ASKED), episode


def test_a_reward_model_grades_as_it_was_trained(reward_model: Path, tiny_model: Path) -> None:
    """It prefers what it was shown as better, and its score is the head's value of the last token."""
    renderer = Renderer(tiny_model)
    model = RewardModel(reward_model, renderer, "fp32")
    pairs = [as_episode(answer, renderer) for answer in ("ash tree", "I do not know, 42!")]
    good, bad = (score.value for score in model.grade(pairs))
    assert good is not None
    assert bad is not None
    assert good > bad + 0.5
    policy = Policy.load(reward_model, "fp32", LoraConfig(4, 8.0), head="reward")
    assert policy.head is not None
    policy.head.load_state_dict(read_tensors(reward_model / HEAD))
    sequence = pair_sequences([Preference(id="p", messages=ASKED, chosen="ash tree", rejected="x")], renderer)[0][0]
    with torch.no_grad():
        alone = policy.measure(collate([sequence])).head.item()
    assert good == pytest.approx(alone, abs=1e-4)
    lost = Episode(task_id="t", model="m", messages=ASKED, text="", error="lost")
    (score,) = model.grade([(pairs[0][0], lost)])
    assert score.unscored is Unscored.no_output


def test_a_reward_model_of_another_kind_is_refused(
    reward_model: Path, use_case: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="no reward model; train one with algorithm: reward_model"):
        RewardModel(tiny_model, Renderer(tiny_model))
    from tokenizers import Tokenizer

    other = write_tiny_model(tmp_path / "other")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens(["<another>"])
    tokenizer.save(str(other / "tokenizer.json"))
    with pytest.raises(BadInput, match="another tokenizer"):
        RewardModel(reward_model, Renderer(other))


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_reinforcement_raises_what_a_reward_model_says(
    use_case: Path, reward_model: Path, tmp_path: Path, name: str
) -> None:
    sizes = "steps: 40, minibatches: 1, prompts_per_step: 4, group_size: 8"
    extra = f"{{{sizes}, reward: {{model: {reward_model}}}, optim: {{lr: 2e-2}}}}"
    run_recipe(use_case, name, tmp_path, extra=extra)
    rows = metrics(tmp_path)
    rewards = [float(str(row["reward"])) for row in rows]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_a_reward_that_rises_while_the_gold_grader_falls_ends_the_run(use_case: Path, tmp_path: Path) -> None:
    """The reward pays for letters, the gold grader wants none: a hacked reward, as a judge's would be."""
    program = tmp_path / "program.py"
    plain = "\n\ndef plain(task, episode):\n    return 1 - letters(task, episode)\n"
    program.write_text((use_case / "program.py").read_text() + plain)
    said: list[dict[str, object]] = []
    reward = "{grader: letters, gold: plain}"
    sizes = "steps: 60, minibatches: 1, prompts_per_step: 4, group_size: 8, optim: {lr: 1e-2}"
    extra = f"{{program: {program}, reward: {reward}, {sizes}}}"
    card = run_recipe(use_case, "grpo", tmp_path / "run", extra=extra, announce=said.append)
    assert card.steps < 60
    assert "ended early" in said[-1]
    assert all(row["gold"] == pytest.approx(1 - float(str(row["reward"]))) for row in metrics(tmp_path / "run"))
    fine = f"{{program: {program}, reward: {{grader: letters, gold: letters}}, {sizes.replace('60', '12')}}}"
    assert run_recipe(use_case, "grpo", tmp_path / "fine", extra=fine).steps == 12


def test_an_environment_is_a_recipe_field(use_case: Path, tmp_path: Path) -> None:
    """Two turns an episode, each answered by the environment, whose own score is the reward."""
    (tmp_path / "world.py").write_text(
        "from ascent.customize.agentic.environment import Step\nfrom ascent.records import Message\n\n\n"
        "class Letters:\n    def reset(self, task):\n        self.said = []\n        return task.messages\n\n"
        "    def step(self, text):\n        self.said.append(text)\n"
        "        share = sum(c.isalpha() for c in text) / max(1, len(text))\n"
        "        return Step((Message(role='tool', content='more'),), done=len(self.said) == 2, score=share)\n"
    )
    harness = f"{{program: {tmp_path / 'world.py'}, environment: Letters, max_turns: 2, step_seconds: 20}}"
    extra = f"{{harness: {harness}, reward: environment, steps: 3, minibatches: 1}}"
    run_recipe(use_case, "grpo", tmp_path / "run", extra=extra)
    for row in metrics(tmp_path / "run"):
        assert row["lost"] == row["refilled"] == 0
        assert not math.isnan(float(str(row["reward"])))
        assert float(str(row["completion_tokens"])) > 8, "more than one turn's limit of tokens"


# --------------------------------------------------------------------------------------------------------------- judge


def gold_file(folder: Path, agree: int) -> Path:
    """Forty answers, half good by a person; the scripted judge says good of those that hold `yes`."""
    rows = []
    for index in range(40):
        good = index % 2 == 0
        says_yes = good if index < agree else not good
        rows.append(
            {"input": {"prompt": f"q{index}"}, "answer": f"{'yes' if says_yes else 'no'} {index}", "good": good}
        )
    path = folder / "gold.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scripted_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A judge that follows one word of the answer, in place of a language model; returns its rubric."""

    def answer(prompt: Prompt) -> str:
        text = "\n".join(message.content for message in prompt.messages)
        return json.dumps({"right": {"reason": "r", "score": 5 if "yes " in text else 1}})

    monkeypatch.setattr(judging, "open_named", lambda name: ScriptedEngine(answer, model=name))
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text(yaml.safe_dump({"criteria": [{"name": "right", "description": "is right"}]}))
    return rubric


def test_a_judge_that_agrees_with_people_may_reward(scripted_judge: Path, tmp_path: Path) -> None:
    spec = JudgeSpec(model="j", rubric=scripted_judge, gold=gold_file(tmp_path, 40))
    judge, check = open_judge(spec, tmp_path)
    assert check is not None
    assert check.passed
    assert check.value == 1
    assert json.loads((tmp_path / CHECK).read_text())["judge_digest"] == judge.digest


def test_a_judge_that_does_not_agree_needs_a_reason(scripted_judge: Path, tmp_path: Path) -> None:
    """32 of 40 right is κ = 0.6, but its interval reaches far below the threshold of 0.6."""
    gold = gold_file(tmp_path, 32)
    with pytest.raises(BadInput, match="does not agree well enough with people"):
        open_judge(JudgeSpec(model="j", rubric=scripted_judge, gold=gold), tmp_path)
    assert not (tmp_path / CHECK).exists()
    _, check = open_judge(JudgeSpec(model="j", rubric=scripted_judge, gold=gold, override="pilot"), tmp_path)
    assert check is not None
    assert check.value == pytest.approx(0.6)
    assert check.override == "pilot"
    with pytest.raises(BadInput, match=r"judge\.gold"):
        open_judge(JudgeSpec(model="j", rubric=scripted_judge), tmp_path)
    assert open_judge(JudgeSpec(model="j", rubric=scripted_judge, override="pilot"), tmp_path)[1] is None
