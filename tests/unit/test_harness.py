"""Environments that hang, crash, flood or lie cost their own episode: it is counted, refilled, and never waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from ascent.customize.agentic.harness import Attempts
from ascent.customize.agentic.multiturn import MultiTurn, harness_of
from ascent.customize.rollout import rollout
from ascent.evaluate.pool import GraderPool
from ascent.inference.engine import Completion, Prompt, Sampling
from ascent.inference.engines.scripted import ScriptedEngine
from ascent.records import Episode, FinishReason, Message, Task
from ascent.records.errors import BadInput

LIMIT_S = 1.5
PROGRAM = """
import os, random, signal, subprocess, sys, time
from pathlib import Path
from ascent.customize.agentic.environment import Step
from ascent.records import Message

def say(text):
    return Message(role="tool", content=text)

class Echo:
    def reset(self, task):
        self.do, self.turns = task.input.get("do"), 0
        if self.do == "hang in reset":
            time.sleep(60)
        if self.do == "raise in reset":
            raise KeyError("bed")
        return task.messages

    def step(self, text):
        self.turns += 1
        match self.do:
            case "hang":
                subprocess.Popen(["sleep", "60"])
                time.sleep(60)
            case "spin":
                while True: pass
            case "exit": os._exit(3)
            case "sys.exit": sys.exit(0)
            case "kill": os.kill(os.getpid(), signal.SIGKILL)
            case "raise": raise ZeroDivisionError("broken")
            case "flood": return Step((say("x" * 1_000_000),))
            case "memory": return Step((say(str(len(bytearray(3 << 30)))),))
            case "no step": return "fine"
            case "silent": return Step()
            case "no message": return Step(("hi",))
            case "write":
                for number in range(3, 64):
                    try: os.write(number, b"gibberish")
                    except OSError: pass
            case "print": os.write(1, b"x" * 3_000_000)
            case "kill all": os.kill(os.getppid(), signal.SIGKILL)
            case "never": return Step((say("go on"),))
            case "lonely": return Step((say(" ".join(n for n in ("torch", "numpy", "scipy") if n in sys.modules)),))
            case "dice": return Step((say(f"{random.random()} {os.getpid()}"),), done=self.turns == 2)
            case str(path) if path.startswith("/"):
                if not Path(path).exists():
                    Path(path).touch()
                    os._exit(9)
        if self.turns == 3:
            return Step(done=True, score=self.turns / 4)
        return Step((say(f"heard {text}"),))

def grade(task, episode):
    return float(len(episode.messages))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def harness(program: Path) -> Iterator[MultiTurn]:
    with MultiTurn(program, "Echo", step_seconds=LIMIT_S, refills=1) as harness:
        yield harness


ENGINE = ScriptedEngine(lambda prompt: f"turn {len(prompt.messages)}")


def task(name: str, do: str | None = None) -> Task:
    return Task(id=name, input={"do": do}, messages=(Message(role="user", content=f"q{name}"),))


def run(harness: MultiTurn, *todo: str | None, n: int = 1) -> list[Attempts]:
    return harness.run(ENGINE, [task(str(i), do) for i, do in enumerate(todo)], Sampling(n=n))


def assert_whole(episode: Episode) -> None:
    said = [(message.role, message.content) for message in episode.messages]
    assert said == [
        ("user", f"q{episode.task_id}"),
        ("assistant", "turn 1"),
        ("tool", "heard turn 1"),
        ("assistant", "turn 3"),
        ("tool", "heard turn 3"),
    ]
    assert (episode.text, episode.finish, episode.error) == ("turn 5", FinishReason.stop, None)
    score = episode.score("environment")
    assert score is not None and score.value == 0.75


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("hang", f"did not answer within {LIMIT_S} s"),
        ("hang in reset", f"did not answer within {LIMIT_S} s"),
        ("exit", "process ended with exit status 3"),
        ("kill", "process was killed by SIGKILL"),
        ("sys.exit", "the environment failed: SystemExit: 0 (program.py:"),
        ("raise", "the environment failed: ZeroDivisionError: broken (program.py:"),
        ("raise in reset", "the environment failed: KeyError: 'bed' (program.py:"),
        ("flood", "said more than 65536 bytes"),
        ("memory", "the environment failed: MemoryError"),
        ("no step", "must return a Step, not a str"),
        ("silent", "must say something to the model, or end the episode"),
        ("no message", "messages must be Message records"),
        ("write", "wrote into its channel"),
    ],
)
def test_a_lost_episode_says_why_and_spares_the_others(harness: MultiTurn, do: str, reason: str) -> None:
    before, found, after = run(harness, None, do, None)
    assert (found.lost, found.refilled) == (2, 0), "once, and once again"
    (episode,) = found.episodes
    assert episode.finish is FinishReason.error
    assert reason in str(episode.error)
    for other in (before, after):
        assert (other.lost, other.refilled) == (0, 0)
        assert_whole(other.episodes[0])


def test_hanging_environments_are_waited_for_together_and_leave_nothing_behind(harness: MultiTurn) -> None:
    me = psutil.Process()
    others = set(me.children(recursive=True))
    started = time.monotonic()
    groups = run(harness, *["spin", "hang"] * 4, None, n=1)
    took = time.monotonic() - started
    assert [group.lost for group in groups] == [2] * 8 + [0]
    assert took < 8 * LIMIT_S, f"eight that hang, twice each, took {took:.1f} s; one after the other it is 16 limits"
    left = [child for child in set(me.children(recursive=True)) - others if child.status() != psutil.STATUS_ZOMBIE]
    assert not left
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "60"]]


def test_a_lost_episode_is_refilled(harness: MultiTurn, tmp_path: Path) -> None:
    groups = run(harness, str(tmp_path / "first"), None, n=2)
    assert sum(group.lost for group in groups) == sum(group.refilled for group in groups) >= 1
    for group in groups:
        for episode in group.episodes:
            assert_whole(episode)


def test_a_killed_mother_process_is_replaced(harness: MultiTurn) -> None:
    groups = run(harness, "kill all", None)
    assert all(group.lost <= 2 for group in groups)
    assert_whole(run(harness, None)[0].episodes[0])


def test_what_an_environment_prints_goes_nowhere(harness: MultiTurn, capfd: pytest.CaptureFixture[str]) -> None:
    assert_whole(run(harness, "print")[0].episodes[0])
    assert capfd.readouterr().out == ""


def test_turns_are_bounded(program: Path) -> None:
    with MultiTurn(program, "Echo", max_turns=2) as harness:
        (group,) = run(harness, "never")
    (episode,) = group.episodes
    assert (episode.finish, episode.error, group.lost) == (FinishReason.length, None, 0)
    assert [message.role for message in episode.messages] == ["user", "assistant", "tool"]
    assert episode.text == "turn 3"


def test_environments_run_apart_from_the_trainer(harness: MultiTurn) -> None:
    (group,) = run(harness, "lonely")
    assert group.episodes[0].messages[2].content == "", "neither torch, NumPy nor SciPy is loaded"


def test_samples_of_a_task_meet_the_same_world_in_processes_of_their_own(harness: MultiTurn) -> None:
    def rolls(seed: int) -> list[list[str]]:
        found = harness.run(ENGINE, [task("a", "dice"), task("b", "dice")], Sampling(n=3, seed=seed))
        return [[episode.messages[2].content for episode in group.episodes] for group in found]

    first = rolls(1)
    assert len({text.split()[1] for group in first for text in group}) == 6
    numbers = [[text.split()[0] for text in group] for group in first]
    assert len(set(numbers[0])) == len(set(numbers[1])) == 1
    assert numbers[0][0] != numbers[1][0]
    assert [[text.split()[0] for text in group] for group in rolls(1)] == numbers
    assert [[text.split()[0] for text in group] for group in rolls(2)] != numbers


class Unreliable:
    """An engine that fails each task's first attempt."""

    model = "unreliable"

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_done=None) -> list[list[Completion]]:
        found = []
        for prompt in prompts:
            first = prompt.messages[0].content not in self.seen
            self.seen.add(prompt.messages[0].content)
            failed = Completion("", finish=FinishReason.error, error="no answer from the server")
            found.append([failed if first else Completion(f"turn {len(prompt.messages)}")])
        return found


def test_what_the_engine_loses_is_refilled_too(harness: MultiTurn) -> None:
    heard: list[int] = []
    groups = harness.run(Unreliable(), [task("a"), task("b")], Sampling(), heard.append)
    assert [group.lost for group in groups] + [group.refilled for group in groups] == [1] * 3 + [1]
    assert sum(heard) == 2


def test_rollouts_count_what_was_lost_and_reward_only_the_rest(program: Path, harness: MultiTurn) -> None:
    with GraderPool(program, ["grade"]) as pool:
        tasks = [task("0"), task("1", "exit"), task("2")]
        groups = rollout(ENGINE, tasks, pool, Sampling(n=2), "grade", harness=harness)
        own = rollout(ENGINE, tasks[:1], pool, Sampling(), "environment", harness=harness)
        single = rollout(ENGINE, tasks[:1], pool, Sampling(n=2), "grade")
    assert [group.rewards for group in (groups[0], groups[2])] == [(5.0, 5.0)] * 2
    assert [reward == reward for reward in groups[1].rewards] == [False, False]
    assert [(group.lost, group.refilled) for group in groups] == [(0, 0), (4, 0), (0, 0)]
    assert own[0].rewards == (0.75,)
    assert (single[0].rewards, single[0].lost) == ((1.0, 1.0), 0)
    assert single[0].episodes[0].text == "turn 1"


def test_mistakes_of_the_recipe_are_told_at_once(program: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown environment 'Ecko'; did you mean 'Echo'"):
        harness_of(program, "Ecko", 4, 2.0)
    (tmp_path / "broken.py").write_text("x = 1 / 0\n")
    with pytest.raises(BadInput, match=r"ZeroDivisionError.*broken.py:1"):
        harness_of(tmp_path / "broken.py", "Echo")
    (tmp_path / "ends.py").write_text("import os; os._exit(1)\n")
    with pytest.raises(BadInput, match="ends the process that loads it"):
        harness_of(tmp_path / "ends.py", "Echo")
    with pytest.raises(BadInput, match="max_turns and at_once are at least 1"):
        harness_of(program, "Echo", 0)
    with pytest.raises(BadInput, match="positive limit"):
        harness_of(program, "Echo", 1, 0.0)
