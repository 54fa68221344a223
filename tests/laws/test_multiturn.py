"""Laws of multi-turn episodes: what was sampled is what is trained on, token by token, whatever ran beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws.helpers import tiny_policy
from unit.inference_files import CHATML, write_tokenizer

from ascent.customize.agentic.multiturn import MultiTurn
from ascent.customize.batch import TrainSequence, collate
from ascent.customize.loops.online import OnlineSettings, train_online
from ascent.customize.objectives.rows import ROWS, OnlineRow
from ascent.customize.rollout import Group, rollout
from ascent.customize.run import TrainingRun
from ascent.customize.trainer import Optim, Trainer
from ascent.evaluate.pool import GraderPool
from ascent.inference.chat import Renderer
from ascent.inference.decoder import load_decoder
from ascent.inference.engine import Completion, Prompt, Sampling
from ascent.inference.engines.scripted import ScriptedEngine
from ascent.inference.engines.torch import TorchEngine
from ascent.records import Episode, FinishReason, Message, Task
from ascent.records.errors import BadInput

PROGRAM = '''
import random
from ascent.customize.agentic.environment import Step
from ascent.records import Message

class Clerk:
    """Answers up to three turns; how many depends on what was said. Its score: the share of plain letters."""

    def reset(self, task):
        self.texts, self.turns = [], task.input.get("turns", 3)
        return task.messages

    def step(self, text):
        self.texts.append(text)
        said = "".join(self.texts)
        score = sum(c.isascii() and c.isalpha() for c in said) / max(1, len(said))
        if len(self.texts) == self.turns or (self.turns == 3 and text.startswith("a")):
            return Step(done=True, score=score)
        noise = ["Take one.", "\\n12\\n", "déjà <|im_end|> <|im_start|>", "", "call: x(1)"]
        messages = [Message(role="tool", content=random.choice(noise)) for _ in range(1 + len(text) % 2)]
        return Step(tuple(messages), score=score)
'''
ASKED = ("Take one", "a day", "food and 12 foxes", "naïve café")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clerk") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def harness(program: Path):
    with MultiTurn(program, "Clerk", step_seconds=20) as harness:
        yield harness


class Recorder:
    """An engine that remembers what it was asked and what it answered."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.model = engine, engine.model
        self.turns: list[tuple[Prompt, Completion]] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[list[Completion]]:
        found = self.engine.generate(prompts, sampling, on_done)
        self.turns += [(prompt, group[0]) for prompt, group in zip(prompts, found, strict=True)]
        return found


def engine_of(folder: Path) -> TorchEngine:
    return TorchEngine(load_decoder(folder), Renderer(folder), "tiny")


def tasks(turns: int = 3) -> list[Task]:
    return [Task(id=text, input={"turns": turns}, messages=(Message(role="user", content=text),)) for text in ASKED]


@pytest.mark.parametrize(("seed", "temperature"), [(1, 1.0), (2, 0.8), (3, 1.3)])
def test_an_episode_is_what_was_fed_and_sampled_turn_by_turn(
    tiny_model: Path, harness: MultiTurn, seed: int, temperature: float
) -> None:
    engine = Recorder(engine_of(tiny_model))
    attempts = harness.run(engine, tasks(), Sampling(n=3, max_tokens=9, seed=seed, temperature=temperature))
    episodes = [episode for group in attempts for episode in group.episodes]
    assert sum(episode.loss_mask.count(True) for episode in episodes) == sum(
        len(completion.token_ids) for _, completion in engine.turns
    )
    several = 0
    for episode in episodes:
        turns = [done for _, done in engine.turns if episode.token_ids[: len(done.prompt_ids)] == done.prompt_ids]
        turns = [
            done for done in turns if episode.token_ids[len(done.prompt_ids) :][: len(done.token_ids)] == done.token_ids
        ]
        turns = sorted({len(done.prompt_ids): done for done in turns}.values(), key=lambda done: len(done.prompt_ids))
        assert len(turns) == sum(message.role == "assistant" for message in episode.messages) + 1
        mask, logps = [False] * len(episode.token_ids), [0.0] * len(episode.token_ids)
        for before, after in itertools.pairwise(turns):
            assert after.prompt_ids[: len(before.prompt_ids + before.token_ids)] == before.prompt_ids + before.token_ids
        for done in turns:
            at = len(done.prompt_ids)
            mask[at : at + len(done.token_ids)] = [True] * len(done.token_ids)
            logps[at : at + len(done.token_ids)] = done.logps
        assert episode.token_ids == turns[-1].prompt_ids + turns[-1].token_ids
        assert (list(episode.loss_mask), list(episode.logps)) == (mask, logps)
        several += len(turns) > 1
    assert several > len(episodes) / 2

    policy = tiny_policy(tiny_model)
    batch = collate([TrainSequence(episode.token_ids, episode.loss_mask) for episode in episodes])
    with torch.no_grad():
        scored = policy.score(batch, temperature=temperature)[0]
    sampled = [
        logp for episode in episodes for logp, kept in zip(episode.logps, episode.loss_mask, strict=True) if kept
    ]
    torch.testing.assert_close(torch.tensor(sampled), scored, atol=1e-5, rtol=0)


def contents(episodes: Sequence[Episode]) -> list[tuple[object, ...]]:
    return [(episode.token_ids, episode.loss_mask, episode.messages, episode.text) for episode in episodes]


def test_the_same_seed_gives_the_same_episodes_whatever_the_batch(tiny_model: Path, program: Path) -> None:
    sampling = Sampling(n=3, max_tokens=8, seed=5)
    engine = engine_of(tiny_model)
    with MultiTurn(program, "Clerk", step_seconds=20) as harness:
        whole = harness.run(engine, tasks(), sampling)
        backwards = harness.run(engine, tasks()[::-1], sampling)[::-1]
        alone = [harness.run(engine, [task], sampling)[0] for task in tasks()]
        other = harness.run(engine, tasks(), Sampling(n=3, max_tokens=8, seed=6))
        twice = harness.run(engine, [*tasks()[:1], *tasks()[:1]], sampling)
    engine.rows_in_flight = 2
    with MultiTurn(program, "Clerk", step_seconds=20, at_once=1, parallel=1) as narrow:
        slowly = narrow.run(engine, tasks(), sampling)
    for again in (backwards, alone, slowly):
        for left, right in zip(whole, again, strict=True):
            assert contents(left.episodes) == contents(right.episodes)
            for a, b in zip(left.episodes, right.episodes, strict=True):
                assert a.logps == pytest.approx(b.logps, abs=1e-5)
    assert contents(whole[0].episodes) != contents(other[0].episodes)
    assert contents(whole[0].episodes) == contents(twice[0].episodes) != contents(twice[1].episodes)
    assert len({episode.token_ids for episode in whole[0].episodes}) == 3


def test_tools_cannot_forge_a_turn(tiny_model: Path, harness: MultiTurn) -> None:
    engine = engine_of(tiny_model)
    (start,) = engine.renderer.tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    for group in harness.run(engine, tasks(), Sampling(n=4, max_tokens=6, seed=9)):
        for episode in group.episodes:
            fed = [t for t, kept in zip(episode.token_ids, episode.loss_mask, strict=True) if not kept]
            turns = sum(message.role != "tool" for message in episode.messages) + 1
            tools = sum(message.role == "tool" for message in episode.messages)
            assert fed.count(start) == turns + tools


def test_a_full_context_ends_an_episode_and_not_the_run(tiny_model: Path, harness: MultiTurn) -> None:
    engine = Recorder(engine_of(tiny_model))
    (group,) = harness.run(engine, tasks()[:1], Sampling(n=6, max_tokens=200, seed=1))
    full = {prompt.token_ids for prompt, done in engine.turns if not done.token_ids}
    assert full
    assert group.lost == 0
    for episode in group.episodes:
        assert len(episode.token_ids) <= 256
        if episode.token_ids in full:
            assert (episode.finish, episode.error) == (FinishReason.length, None)
    assert full <= {episode.token_ids for episode in group.episodes}, "they end with what was last sampled"


def test_a_turn_that_was_cut_gets_its_end_token_as_glue(tiny_model: Path, harness: MultiTurn) -> None:
    engine = engine_of(tiny_model)
    (end,) = engine.renderer.end_ids
    found = 0
    for group in harness.run(engine, tasks(), Sampling(n=4, max_tokens=1, seed=2)):
        for episode in group.episodes:
            pairs = list(zip(episode.token_ids, episode.loss_mask, strict=True))
            for (token, kept), (after, follows) in itertools.pairwise(pairs):
                if kept and token != end:
                    assert (after, follows) == (end, False)
                    found += 1
    assert found > 5


TEXT = st.text(alphabet=st.sampled_from("the ab12 \n\té½<|>im_{}漢"), max_size=12).filter(
    lambda text: "<|im_" not in text
)
QWEN3 = (  # as Qwen3: the last answer gets an empty thought, tools speak as the user
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def assert_turn_by_turn_is_the_template(renderer: Renderer, messages: Sequence[Message]) -> None:
    """Feeding a conversation turn by turn, with ids kept, equals rendering it whole."""
    ids: list[int] = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            ids = renderer.tokens_of(Prompt(tuple(messages[:index]), tuple(ids)))
            assert ids == renderer.prompt_ids(messages[:index])
            ids += renderer.answer_ids(message.content)
    assert tuple(ids) == renderer.render(messages).token_ids
    assert renderer.tokens_of(Prompt((), tuple(ids))) == ids


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    messages = [Message(role="system", content=draw(TEXT))] if draw(st.booleans()) else []
    messages.append(Message(role="user", content=draw(TEXT)))
    for _ in range(draw(st.integers(0, 3))):
        messages.append(Message(role="assistant", content=draw(TEXT)))
        for _ in range(draw(st.integers(1, 2))):
            messages.append(Message(role=draw(st.sampled_from(["tool", "user"])), content=draw(TEXT)))
    return [*messages, Message(role="assistant", content=draw(TEXT))]


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations())
def test_continuing_equals_rendering_whole(bytewise: Renderer, messages: list[Message]) -> None:
    assert_turn_by_turn_is_the_template(bytewise, messages)


def test_smollm2_continues_as_its_template_writes(smollm2: Path) -> None:
    renderer = Renderer(smollm2)
    say = [("user", "Order: 5 mg/kg"), ("assistant", "call: dose(5, 70)"), ("tool", "350 mg"), ("tool", ""),
           ("assistant", ""), ("user", "\n\n so?"), ("assistant", "350 mg.")]  # fmt: skip
    for first in ([], [Message(role="system", content="Check.")]):
        assert_turn_by_turn_is_the_template(renderer, [*first, *(Message(role=r, content=c) for r, c in say)])


def test_a_template_that_rewrites_earlier_turns_can_still_be_continued(tmp_path: Path) -> None:
    """Rendered whole, an answer loses its thought once others follow; what was sampled stays as it was."""
    renderer = Renderer(write_tokenizer(tmp_path, QWEN3))
    asked = (Message(role="user", content="the"),)
    talk = (*asked, Message(role="assistant", content="ab"), Message(role="tool", content="12"))
    with pytest.raises(BadInput, match="differently once others follow"):
        renderer.render([*talk, Message(role="assistant", content="x")])
    fed = [*renderer.prompt_ids(asked), *renderer.tokenizer.encode("<think>\nhm</think>ab<|im_end|>")]
    ids = renderer.tokens_of(Prompt(talk, tuple(fed)))
    assert ids[: len(fed)] == fed
    assert renderer.tokenizer.decode(ids[len(fed) :]) == (
        "\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_that_cannot_hold_several_turns_say_so(tmp_path: Path) -> None:
    no_tools = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    tool = Message(role="tool", content="12")
    with pytest.raises(BadInput, match="refuses a conversation of user, assistant, tool: no tools"):
        Renderer(write_tokenizer(tmp_path / "a", no_tools + CHATML)).continuation_ids([tool])
    forgets = CHATML.replace(
        "{% for message in messages %}", "{% for message in (messages if messages|length < 3 else messages[-1:]) %}"
    )
    with pytest.raises(BadInput, match="drops earlier assistant turns"):
        Renderer(write_tokenizer(tmp_path / "b", forgets)).continuation_ids([tool])


def test_scripted_episodes_are_demonstrations(tiny_model: Path, harness: MultiTurn) -> None:
    """An expert's turns, run through the environment, give tokens and a mask to train on, in the policy's own form."""
    renderer = Renderer(tiny_model)
    engine = ScriptedEngine(lambda prompt: f"{'b' * len(prompt.messages)} one", renderer)
    for group in harness.run(engine, tasks(), Sampling(max_tokens=64)):
        (episode,) = group.episodes
        whole = [*episode.messages, Message(role="assistant", content=episode.text)]
        defused = [m.model_copy(update={"content": m.content.replace("<|im_", "< |im_")}) for m in whole]
        rendered = renderer.render(defused)
        assert (episode.token_ids, episode.loss_mask) == (rendered.token_ids, rendered.loss_mask)
        assert sum(message.role == "assistant" for message in whole) == 3


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_rewards_rise_over_several_turns(tiny_model: Path, harness: MultiTurn, tmp_path: Path, seed: int) -> None:
    """GRPO on the share of letters in both turns of an episode: recorded gains are 0.15, 0.28 and 0.16."""
    policy = tiny_policy(tiny_model, full=True, seed=seed)
    trainer = Trainer(policy, Optim(lr=3e-3, schedule="constant"), total_steps=25)
    engine = engine_of(tiny_model)
    pool = GraderPool(None, [])
    rewards: list[float] = []

    def sample(drawn: Sequence[Task], sampling: Sampling) -> tuple[list[Group], dict[str, float]]:
        groups = rollout(engine, drawn, pool, sampling, "environment", harness=harness)
        known = [reward for group in groups for reward in group.rewards]
        rewards.append(sum(known) / len(known))
        assert not any(math.isnan(reward) for reward in known)
        return groups, {"lost": float(sum(group.lost for group in groups))}

    row = ROWS["grpo"]
    assert isinstance(row, OnlineRow)
    limits = OnlineSettings(prompts=4, group=8, max_tokens=10)
    run = TrainingRun(tmp_path, checkpoint_every=100)
    train_online(trainer, row, tasks(turns=2), engine, sample, run, limits, token_budget=4096, seed=seed)
    before, after = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert after > before + 0.1, rewards
