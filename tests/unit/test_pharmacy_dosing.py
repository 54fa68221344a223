"""The dosing environment: its rules by hand, its verifier against guesses, its tasks against leaks; a real model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ascent.customize.agentic.multiturn import MultiTurn, harness_of
from ascent.customize.batch import TrainSequence, micro_batches
from ascent.customize.objectives.losses import objective
from ascent.customize.objectives.rows import ROWS
from ascent.customize.objectives.weights import WEIGHTS
from ascent.customize.policy import Policy
from ascent.customize.rollout import Group, reward_of, rollout
from ascent.customize.trainer import Optim, Trainer
from ascent.evaluate.pool import GraderPool
from ascent.inference.chat import Renderer
from ascent.inference.engine import Sampling
from ascent.inference.engines.scripted import ScriptedEngine
from ascent.inference.engines.torch import TorchEngine
from ascent.inference.lora import LoraConfig
from ascent.records import Task

EXAMPLE = Path(__file__).parents[2] / "examples" / "pharmacy"
GRADERS = ["solved", "answered", "grounded", "reward"]


def load(name: str) -> ModuleType:
    """Load a file of the example with its siblings importable, and forget them afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location(f"pharmacy_{name}", EXAMPLE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path[:] = [path for path in sys.path if path != str(EXAMPLE)]
        for other in set(sys.modules) - before:
            if str(getattr(sys.modules[other], "__file__", "")).startswith(str(EXAMPLE)):
                del sys.modules[other]


@pytest.fixture(scope="module")
def dosing() -> ModuleType:
    return load("dosing")


@pytest.fixture(scope="module")
def tasks_file() -> ModuleType:
    return load("dosing_tasks")


@pytest.fixture(scope="module")
def harness() -> Iterator[MultiTurn]:
    with harness_of(EXAMPLE / "dosing.py", "Dosing", 4, 20) as harness:
        yield harness


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(EXAMPLE / "dosing.py", GRADERS, time_limit_s=20) as pool:
        yield pool


ORDER = {"drug": "ibuprofen", "mg_per_kg": 10, "weight": 72, "strength": 400, "clearance": 45, "takes": "warfarin"}
TASK = Task(id="1", input=ORDER, expected={"interaction": "severe", "tablets": 1.5, "action": "hold"})
ANSWER = "interaction: severe; tablets: 1.5; action: hold"


def test_the_rules_by_hand(dosing: ModuleType) -> None:
    """10 mg/kg × 72 kg = 720 mg; three quarters at a clearance of 45 are 540 mg, 1.35 tablets of 400, so 1.5."""
    assert dosing.dose(*(ORDER[n] for n in ("drug", "mg_per_kg", "weight", "strength", "clearance"))) == (
        "ibuprofen 540.0 mg at 75%: 1.5 tablets of 400 mg"
    )
    assert [dosing.share_of(x) for x in (120, 60, 59.9, 30, 29, 0)] == [1, 1, 0.75, 0.75, 0.5, 0.5]
    assert dosing.dose("lisinopril", 5, 100, 40, 90) == "lisinopril 80.0 mg at 100%: 2 tablets of 40 mg", (
        "daily maximum"
    )
    assert dosing.dose("lisinopril", 0.01, 50, 40, 90).endswith("0.5 tablets of 40 mg"), "never less than half a tablet"
    assert dosing.interaction("Ibuprofen", "warfarin") == dosing.interaction("warfarin", "ibuprofen")
    assert dosing.interaction("warfarin", "ibuprofen") == "ibuprofen + warfarin: severe (bleeding)"
    assert dosing.interaction("warfarin", "loratadine") == "loratadine + warfarin: none"
    for call, problem in (
        (lambda: dosing.interaction("warfarin", "aspirine"), "unknown drug aspirine"),
        (lambda: dosing.interaction("warfarin", "warfarin"), "two different drugs"),
        (lambda: dosing.dose("lisinopril", 1, 70, 7, 90), r"comes in 2.5, 5, 10, 20, 40 mg"),
        (lambda: dosing.dose("lisinopril", 1, 700, 40, 90), "weight 20 to 250"),
        (lambda: dosing.dose("nitroglycerin", 1, 70, 40, 90), "not given as tablets|comes in"),
    ):
        with pytest.raises((ValueError, LookupError), match=problem):
            call()


def play(turns: list[str], harness: MultiTurn, pool: GraderPool) -> dict[str, float | None]:
    engine = ScriptedEngine(lambda prompt: turns[sum(m.role == "assistant" for m in prompt.messages)])
    ((episode,),) = (group.episodes for group in rollout(engine, [TASK], pool, Sampling(), "reward", harness=harness))
    assert episode.error is None
    return {score.name: score.value for score in episode.scores}


def test_only_what_follows_from_the_tools_is_solved(harness: MultiTurn, pool: GraderPool) -> None:
    look = "call: interaction(ibuprofen, warfarin)"
    work = "call: dose(ibuprofen, 10, 72, 400, 45)"
    expected = {
        (look, work, ANSWER): (1, 1, 1, 1),
        (work, "call: interaction(warfarin, ibuprofen)", ANSWER): (1, 1, 1, 1),
        (f"{look}\n{work}", ANSWER): (1, 1, 1, 1),
        (look, "call: dose(ibuprofen, ten)", work, ANSWER): (1, 1, 1, 1),
        (ANSWER,): (0, 1, 0, 0),
        (look, ANSWER): (0, 1, 0.5, 0.2),
        ("call: interaction(ibuprofen, loratadine)", work, ANSWER): (0, 1, 0.5, 0.2),
        (look, "call: dose(ibuprofen, 10, 27, 400, 45)", ANSWER): (0, 1, 0.5, 0.2),
        (look, work, ANSWER.replace("1.5", "2")): (0, 0, 1, 0.4),
        (look, work, ANSWER.replace("hold", "give")): (0, 0, 1, 0.4),
        (look, work, f"I say {ANSWER}"): (0, 0, 1, 0.4),
        ("ibuprofen + warfarin: severe (bleeding)\nibuprofen 540.0 mg at 75%: 1.5 tablets of 400 mg",): (0, 0, 0, 0),
    }
    for turns, values in expected.items():
        found = play(list(turns), harness, pool)
        assert [found[name] for name in GRADERS] == pytest.approx(values), turns


def rows_as_tasks(rows: list[dict]) -> list[Task]:
    return [Task(**row) for row in rows]


def test_train_and_test_share_no_drug_and_every_kind_occurs(tasks_file: ModuleType, dosing: ModuleType) -> None:
    made = tasks_file.make(7)
    assert made == tasks_file.make(7) != tasks_file.make(8)
    drugs = {name: {row["input"][key] for row in rows for key in ("drug", "takes")} for name, rows in made.items()}
    assert not drugs["train"] & drugs["test"]
    assert min(map(len, drugs.values())) > 15
    for name, rows in made.items():
        assert len(rows) == tasks_file.SIZES[name]
        assert all(row["group"] == row["input"]["drug"] for row in rows)
        levels = [row["expected"]["interaction"] for row in rows]
        counts = [row["expected"]["tablets"] for row in rows]
        for level in ("none", "moderate", "severe"):
            assert 0.2 < levels.count(level) / len(rows) < 0.5
        assert max(counts.count(count) for count in set(counts)) < 0.3 * len(rows), "no count can be guessed"
        texts = [dosing.prepare(row["input"]) for row in rows]
        assert len(set(texts)) > 0.98 * len(texts)


def test_facts_speak_of_drugs_of_the_catalogue(dosing: ModuleType) -> None:
    names = {product.drug for product in dosing.products()}
    assert {drug for pair in dosing.interactions() for drug in pair} <= names
    assert all(len(pair) == 2 for pair in dosing.interactions())


def test_the_expert_solves_every_order(tasks_file: ModuleType, harness: MultiTurn, pool: GraderPool) -> None:
    engine = ScriptedEngine(lambda prompt: tasks_file.expert(prompt.messages))
    tasks = rows_as_tasks(tasks_file.make(3, {"train": 25, "test": 25})["test"])
    groups = rollout(engine, tasks, pool, Sampling(), "solved", harness=harness)
    assert [group.rewards for group in groups] == [(1.0,)] * 25


def demonstrations(tasks_file: ModuleType, renderer: Renderer, harness: MultiTurn, count: int) -> list[TrainSequence]:
    """Expert episodes as sequences: the tokens an episode of the policy would have, and the mask of its turns."""
    engine = ScriptedEngine(lambda prompt: tasks_file.expert(prompt.messages), renderer)
    tasks = rows_as_tasks(tasks_file.make(7, {"train": count, "test": 1})["train"])
    groups = harness.run(engine, tasks, Sampling(max_tokens=64))
    return [TrainSequence(group.episodes[0].token_ids, group.episodes[0].loss_mask) for group in groups]


def share(groups: list[Group], name: str) -> float:
    values = [reward_of(episode, name) for group in groups for episode in group.episodes]
    return sum(values) / len(values)


@pytest.mark.slow
def test_smollm2_learns_the_trade_from_demonstrations(
    tasks_file: ModuleType, harness: MultiTurn, pool: GraderPool, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy success on orders of unseen drugs: nothing before, most of them after 240 expert episodes."""
    tasks = rows_as_tasks(tasks_file.make(7, {"train": 1, "test": 40})["test"])
    engine = TorchEngine.load(smollm2, "smollm2-135m-instruct")
    greedy = Sampling(max_tokens=48, temperature=0)
    before = rollout(engine, tasks, pool, greedy, "solved", harness=harness)
    demos = demonstrations(tasks_file, engine.renderer, harness, 240)
    trainer = Trainer(Policy.load(smollm2, "bf16", LoraConfig(16, 32.0)), Optim(lr=2e-3), total_steps=20)
    losses = []
    for step in range(20):
        batch = demos[step * 12 : step * 12 + 12]
        for seq, weight in zip(batch, WEIGHTS["token_mean"]([seq.targets for seq in batch]), strict=True):
            seq.ce_weight = weight
        losses.append(trainer.update(micro_batches([[seq] for seq in batch], 4096), objective(ROWS["sft"]))["loss"])
    engine.synchronise(trainer.policy.decoder)
    after = rollout(engine, tasks, pool, greedy, "solved", harness=harness)
    with capsys.disabled():
        for name in GRADERS:
            sys.stdout.write(f"\n{name}: {share(before, name):.3f} before, {share(after, name):.3f} after")
        sys.stdout.write(f"\nloss {losses[0]:.3f} to {losses[-1]:.4f}; {sum(len(s.token_ids) for s in demos)} tokens\n")
    assert share(before, "solved") < 0.1
    assert share(after, "solved") > 0.5
