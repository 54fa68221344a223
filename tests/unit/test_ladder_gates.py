"""The gates: hand-computed cases, and properties that hold for any measurement."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder_runs import report_of
from scipy.stats import binomtest

from ascent.ladder.gates import (
    Evidence,
    Inventory,
    Probe,
    Spend,
    VerifierCheck,
    after_stage,
    before_stage,
)
from ascent.ladder.usecase import StageSpec, UseCase
from ascent.records import Decision, Report, Verdict

GO, STOP, COLLECT, NO_GO = Decision.GO, Decision.STOP, Decision.COLLECT, Decision.NO_GO
FEW = settings(max_examples=60, deadline=None)


def spec(**changes: Any) -> UseCase:
    """A medium-risk use case with one guard; gates accept 20 items."""
    values: dict[str, Any] = {
        "name": "case",
        "task": "task",
        "model": "base",
        "program": Path("program.py"),
        "data": {"test": "test.jsonl"},
        "metrics": {
            "primary": {"name": "right", "target": 0.9},
            "guards": [{"name": "harm", "direction": "lower", "margin": 0.1}],
        },
        "reward": "reward",
        "stages": ["prompt", "sft", "dpo", "dapo"],
        "gates": {"minimum_items": 20},
        "risk": "medium",
    }
    return UseCase.model_validate({**values, **changes})


def paired(
    both: int, fixed: int, broken: int, neither: int, *, harm: tuple[int, int] = (0, 0), unscored: int = 0
) -> tuple[Report, Report]:
    """Two reports with these outcomes; `harm` counts items whose guard rose from 0 to 1, and fell."""
    outcomes = [(1, 1)] * both + [(0, 1)] * fixed + [(1, 0)] * broken + [(0, 0)] * neither
    return reports(outcomes, [(0, 1)] * harm[0] + [(1, 0)] * harm[1], unscored)


def reports(
    outcomes: list[tuple[int, int]], harms: list[tuple[int, int]] | None = None, unscored: int = 0
) -> tuple[Report, Report]:
    ids = [f"i{number:04d}" for number in range(len(outcomes))]
    guards = (harms or []) + [(0, 0)] * (len(ids) - len(harms or []))
    made = []
    for side, stage in enumerate(("sft", "dpo")):
        right: dict[str, float | None] = {item: float(pair[side]) for item, pair in zip(ids, outcomes, strict=True)}
        for item in ids[:unscored] if side else ():
            right[item] = None
        harm = {item: float(pair[side]) for item, pair in zip(ids, guards, strict=True)}
        made.append(report_of({"right": right, "harm": harm}, stage=stage, model=f"m-{stage}"))
    return made[0], made[1]


def judged(*counts: int, **more: Any) -> Verdict:
    return after_stage(*paired(*counts, **more), spec())


class TestAfterStage:
    def test_nine_fixed_one_broken_is_promoted(self) -> None:
        """Exact McNemar, 9 against 1: p = 2 (C(10,0) + C(10,1)) / 2^10 = 22/1024 = 0.0215."""
        verdict = judged(60, 9, 1, 30)
        assert verdict.decision is GO and verdict.champion == "m-dpo"
        assert verdict.evidence["p_value"] == pytest.approx(22 / 1024)
        assert (verdict.evidence["fixed"], verdict.evidence["broken"]) == (9, 1)
        assert verdict.changes[0].fixed == tuple(f"i{n:04d}" for n in range(60, 69))
        assert "9 items fixed, 1 broken" in verdict.reasons[0] and "+8.0 points" in verdict.reasons[0]

    def test_eight_fixed_two_broken_is_not(self) -> None:
        """8 against 2: p = 2 (1 + 10 + 45) / 1024 = 112/1024 = 0.109; a gain of 6 points stays unproven."""
        verdict = judged(60, 8, 2, 30)
        assert verdict.decision is COLLECT and verdict.champion == "m-sft"
        assert verdict.evidence["p_value"] == pytest.approx(112 / 1024)

    def test_how_many_items_would_settle_it(self) -> None:
        """Connor 1987 with q = 0.10 and d = 0.06 at alpha 0.05, power 0.8.

        n = ((1.95996 sqrt(0.1) + 0.84162 sqrt(0.1 - 0.0036)) / 0.06)^2 = (0.61980 + 0.26131)^2 / 0.0036 = 215.65, so
        216 items, 116 more than the 100 there are.
        """
        verdict = judged(60, 8, 2, 30)
        assert verdict.collect == 116 and verdict.evidence["items_needed"] == 216
        assert "collect 116 more" in verdict.reasons[0]

    def test_fifteen_fixed_five_broken(self) -> None:
        """15 against 5: p = 2 sum_{i<=5} C(20, i) / 2^20 = 2 * 21700 / 1048576 = 0.0414: below 0.05 only."""
        champion, challenger = paired(100, 15, 5, 80)
        medium, strict = spec(), spec(gates={"minimum_items": 20, "alpha": 0.01})
        assert after_stage(champion, challenger, medium).decision is GO
        verdict = after_stage(champion, challenger, strict)
        assert verdict.decision is COLLECT
        assert verdict.evidence["p_value"] == pytest.approx(43400 / 1048576)

    @pytest.mark.parametrize(("fixed", "broken", "words"), [(5, 5, "No improvement"), (1, 12, "It got worse")])
    def test_no_gain_stops(self, fixed: int, broken: int, words: str) -> None:
        verdict = judged(60, fixed, broken, 30)
        assert verdict.decision is STOP and verdict.champion == "m-sft"
        assert verdict.reasons[0].startswith(words) and f"{broken} broken" in verdict.reasons[0]

    def test_a_gain_known_to_be_small_stops_instead_of_asking_for_items(self) -> None:
        verdict = judged(900, 6, 4, 90)
        assert verdict.decision is STOP
        assert verdict.changes[0].high < 0.05
        assert "worth having" in verdict.reasons[0]

    def test_a_violated_guard_outranks_any_gain(self) -> None:
        verdict = judged(20, 60, 0, 20, harm=(12, 0))
        assert verdict.decision is NO_GO and verdict.champion == "m-sft"
        assert verdict.reasons[0].startswith("Guard violated") and "+12.0 points" in verdict.reasons[0]

    def test_an_unproven_guard_asks_for_items(self) -> None:
        """6 harmed and 0 helped of 100, margin 10 points: a loss of 6 points is seen and 10 cannot be excluded."""
        verdict = judged(20, 60, 0, 20, harm=(6, 0))
        assert verdict.decision is COLLECT and verdict.collect > 0
        assert verdict.reasons[0].startswith("Guard unproven")

    def test_no_harm_among_few_items_is_no_proof(self) -> None:
        """Tango's statistic without a discordant pair is -sqrt(n d / (1 - d)): n = 24, d = 0.1: -1.633, p = 0.051."""
        verdict = judged(0, 24, 0, 0)
        assert verdict.decision is COLLECT
        assert verdict.evidence["guard_harm"]["p_value"] == pytest.approx(0.0512, abs=2e-4)
        assert judged(0, 25, 0, 0).decision is GO  # -1.667, p = 0.048

    def test_holm_makes_several_guards_harder_to_pass(self) -> None:
        """Two guards without a discordant pair among 30: raw p = Phi(-1.826) = 0.0339, Holm doubles it."""
        case = spec(
            metrics={
                "primary": {"name": "right", "target": 0.9},
                "guards": [
                    {"name": "harm", "direction": "lower", "margin": 0.1},
                    {"name": "kind", "direction": "higher", "margin": 0.1},
                ],
            }
        )
        ids = [f"i{n}" for n in range(30)]
        zeros, ones = dict.fromkeys(ids, 0.0), dict.fromkeys(ids, 1.0)
        before = report_of({"right": zeros, "harm": zeros, "kind": ones}, stage="sft", model="a")
        after = report_of({"right": ones, "harm": zeros, "kind": ones}, stage="dpo", model="b")
        verdict = after_stage(before, after, case)
        assert verdict.decision is COLLECT
        assert verdict.evidence["guard_kind"]["p_value"] == pytest.approx(2 * 0.0339, abs=2e-4)
        assert after_stage(before, after, spec()).decision is GO

    def test_too_few_items_for_the_risk(self) -> None:
        champion, challenger = paired(0, 60, 0, 40)
        verdict = after_stage(champion, challenger, spec(gates={"minimum_items": 130}))
        assert (verdict.decision, verdict.collect) == (COLLECT, 30)

    def test_unscored_items_are_not_measured(self) -> None:
        """6 of 100 unscored is above the limit of 5 %, 5 of 100 is not."""
        assert judged(20, 60, 0, 20, unscored=5).decision is GO
        verdict = judged(20, 60, 0, 20, unscored=6)
        assert verdict.decision is NO_GO
        assert "6 of 100 items" in verdict.reasons[0] and "6.0 %" in verdict.reasons[0]

    def test_different_test_data(self) -> None:
        champion, challenger = paired(20, 60, 0, 20)
        other = challenger.model_copy(update={"data": challenger.data.model_copy(update={"sha256": "f" * 64})})
        verdict = after_stage(champion, other, spec())
        assert verdict.decision is NO_GO and "different test data" in verdict.reasons[0]

    def test_a_metric_that_is_missing(self) -> None:
        champion, challenger = paired(20, 60, 0, 20)
        bare = challenger.model_copy(update={"metrics": {"right": challenger.metrics["right"]}})
        verdict = after_stage(champion, bare, spec())
        assert verdict.decision is NO_GO and "no graded item for harm" in verdict.reasons[0]

    def test_the_first_model_becomes_champion(self) -> None:
        first, _ = paired(5, 0, 0, 95)
        verdict = after_stage(None, first, spec())
        assert (verdict.decision, verdict.champion, verdict.changes) == (GO, "m-sft", ())
        assert "first model measured" in verdict.reasons[0]

    def test_items_of_one_group_are_not_independent(self) -> None:
        """12 fixed items that all belong to one drug are one observation, not twelve."""
        champion, challenger = paired(40, 12, 0, 48)
        groups = {f"i{n:04d}": "one drug" if 40 <= n < 52 else f"drug {n}" for n in range(100)}
        alone = after_stage(champion, challenger, spec())
        champion, challenger = (report.model_copy(update={"groups": groups}) for report in (champion, challenger))
        together = after_stage(champion, challenger, spec())
        assert alone.decision is GO and together.decision is not GO

    def test_scores_that_are_not_zero_or_one(self) -> None:
        rng = random.Random(3)
        ids = [f"i{n}" for n in range(120)]
        low = {item: rng.uniform(0.2, 0.6) for item in ids}
        high = {item: value + rng.uniform(0.0, 0.2) for item, value in low.items()}
        zeros = dict.fromkeys(ids, 0.0)
        before = report_of({"right": low, "harm": zeros}, stage="sft", model="a")
        after = report_of({"right": high, "harm": zeros}, stage="dpo", model="b")
        assert after_stage(before, after, spec()).decision is GO
        assert after_stage(after, before, spec()).decision is STOP


outcome = st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1)])
better = st.sampled_from([(0, 0), (0, 1), (0, 1), (1, 1), (1, 0)])
items = st.lists(st.one_of(outcome, better), min_size=15, max_size=90)
guards = st.lists(st.sampled_from([(0, 0)] * 8 + [(0, 1), (1, 0), (1, 1)]), min_size=90, max_size=90)


class TestProperties:
    @FEW
    @given(items, guards, st.randoms(use_true_random=False))
    def test_the_order_of_items_does_not_matter(
        self, outcomes: list[tuple[int, int]], harms: list[tuple[int, int]], rng: random.Random
    ) -> None:
        champion, challenger = reports(outcomes, harms[: len(outcomes)])
        mixed = [report.model_copy(update={"items": shuffled(report.items, rng)}) for report in (champion, challenger)]
        assert after_stage(*mixed, spec()) == after_stage(champion, challenger, spec())

    @FEW
    @given(items, guards, st.sampled_from(["low", "medium", "high"]))
    def test_go_means_significant_and_unharmed(
        self, outcomes: list[tuple[int, int]], harms: list[tuple[int, int]], risk: str
    ) -> None:
        case = spec(risk=risk)
        verdict = after_stage(*reports(outcomes, harms[: len(outcomes)]), case)
        fixed, broken = outcomes.count((0, 1)), outcomes.count((1, 0))
        p = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
        rise = sum(after - before for before, after in harms[: len(outcomes)]) / len(outcomes)
        if p >= case.thresholds.alpha or fixed <= broken or len(outcomes) < 20 or rise >= 0.1:
            assert verdict.decision is not GO
        if verdict.decision is GO:
            assert verdict.changes[0].low > 0 and verdict.champion == "m-dpo"
        else:
            assert verdict.champion == "m-sft"
        assert (verdict.collect > 0) == (verdict.decision is COLLECT)
        assert verdict.reasons and verdict.evidence

    @FEW
    @given(items, st.integers(1, 10))
    def test_breaking_more_items_never_leads_to_go(self, outcomes: list[tuple[int, int]], more: int) -> None:
        if after_stage(*reports(outcomes), spec()).decision is GO:
            return
        worse = list(outcomes)
        for index, pair in enumerate(worse):
            if more and pair[1] == 1:
                worse[index], more = (pair[0], 0), more - 1
        assert after_stage(*reports(worse), spec()).decision is not GO

    @FEW
    @given(items, guards, st.integers(1, 10))
    def test_more_harm_never_leads_to_go(
        self, outcomes: list[tuple[int, int]], harms: list[tuple[int, int]], more: int
    ) -> None:
        harms = harms[: len(outcomes)]
        if after_stage(*reports(outcomes, harms), spec()).decision is GO:
            return
        for index, pair in enumerate(harms):
            if more and pair[1] == 0:
                harms[index], more = (pair[0], 1), more - 1
        assert after_stage(*reports(outcomes, harms), spec()).decision is not GO

    @FEW
    @given(items, guards)
    def test_both_directions_are_never_improvements(
        self, outcomes: list[tuple[int, int]], harms: list[tuple[int, int]]
    ) -> None:
        champion, challenger = reports(outcomes, harms[: len(outcomes)])
        there = after_stage(champion, challenger, spec()).decision
        back = after_stage(challenger, champion, spec()).decision
        assert not (there is GO and back is GO)


def shuffled(values: tuple[Any, ...], rng: random.Random) -> tuple[Any, ...]:
    mixed = list(values)
    rng.shuffle(mixed)
    return tuple(mixed)


def evidence(stage: str, right: int = 60, n: int = 100, case: UseCase | None = None, **changes: Any) -> Evidence:
    """Everything speaks for the stage; the champion answers `right` of `n`."""
    ids = [f"i{number}" for number in range(n)]
    values = {item: float(number < right) for number, item in enumerate(ids)}
    case = case or spec(gates={"minimum_items": 20, "worthwhile_gain": 0.2})
    base = Evidence(
        stage=StageSpec(row=stage, name=stage),
        spec=case,
        champion=report_of({"right": values, "harm": dict.fromkeys(ids, 0.0)}, stage="sft"),
        inventory=Inventory(labels=500, pairs=1000, prompts=100, test_items=n),
        verifier=VerifierCheck(100, 99),
        probe=Probe(groups=50, informative=20, k=8, pass_1=0.6, pass_k=0.8),
    )
    return replace(base, **changes)


class TestBeforeStage:
    @pytest.mark.parametrize("stage", ["prompt", "sft", "dpo", "grpo", "dapo"])
    def test_everything_in_order(self, stage: str) -> None:
        verdict = before_stage(evidence(stage))
        assert verdict.decision is GO and verdict.collect == 0 and verdict.reasons

    @pytest.mark.parametrize(
        ("stage", "field", "have", "missing"),
        [("sft", "labels", 180, 320), ("dpo", "pairs", 999, 1), ("dapo", "prompts", 40, 60)],
    )
    def test_the_techniques_minimum(self, stage: str, field: str, have: int, missing: int) -> None:
        full = evidence(stage)
        verdict = before_stage(replace(full, inventory=replace(full.inventory, **{field: have})))
        assert (verdict.decision, verdict.collect) == (COLLECT, missing)
        assert f"collect {missing:,} more" in verdict.reasons[0]

    def test_trajectories_stand_in_for_prompts(self) -> None:
        inventory = Inventory(trajectories=10_000, test_items=100)
        assert before_stage(evidence("dapo", inventory=inventory)).decision is GO

    def test_labelling_is_priced(self) -> None:
        """320 labels of 1.5 minutes at 60 an hour: 8 hours, 480."""
        case = spec(
            costs={"person_per_hour": 60, "minutes_per_label": 1.5, "currency": "EUR"}, gates={"minimum_items": 20}
        )
        verdict = before_stage(evidence("sft", case=case, inventory=Inventory(labels=180, test_items=1000)))
        assert "about 8.0 hours of labelling, 480 EUR" in verdict.reasons[0]

    def test_target_met_with_confidence(self) -> None:
        """190 of 200: Wilson's lower bound is 91.0 %, above the target of 90 %; 184 of 200 has 87.4 %."""
        verdict = before_stage(evidence("dpo", right=190, n=200))
        assert verdict.decision is STOP and "91.0 to 97.3" in verdict.reasons[0]
        assert before_stage(evidence("dpo", right=184, n=200)).decision is GO

    def test_a_champion_without_a_grade_has_not_met_the_target(self) -> None:
        nothing = report_of({"right": dict.fromkeys("abc"), "harm": dict.fromkeys("abc", 0.0)}, stage="prompt")
        assert before_stage(evidence("sft", champion=nothing)).decision is GO
        ungraded = report_of({"right": dict.fromkeys("abc"), "harm": dict.fromkeys("abc")}, stage="prompt")
        assert after_stage(None, ungraded, spec()).decision is NO_GO

    def test_continue_past_the_target_when_asked(self) -> None:
        case = spec(gates={"minimum_items": 20, "worthwhile_gain": 0.2, "continue_past_target": True})
        assert before_stage(evidence("dpo", right=190, n=200, case=case)).decision is GO

    def test_a_guard_over_its_limit_keeps_the_target_open(self) -> None:
        metrics = {
            "primary": {"name": "right", "target": 0.9},
            "guards": [{"name": "harm", "direction": "lower", "margin": 0.1, "limit": 0.01}],
        }
        case = spec(metrics=metrics, gates={"minimum_items": 20, "worthwhile_gain": 0.2})
        verdict = before_stage(evidence("dpo", right=190, n=200, case=case))
        assert verdict.decision is GO  # no harm in 200 items still allows up to 1.9 %
        assert "harm is at 0.0 %" in verdict.reasons[0]

    def test_dead_groups(self) -> None:
        probe = Probe(groups=48, informative=2, k=8, pass_1=0.97, pass_k=0.99)
        verdict = before_stage(evidence("dapo", probe=probe))
        assert verdict.decision is STOP
        assert "2 of 48 prompts" in verdict.reasons[0] and "4.2 %" in verdict.reasons[0]
        assert "already right" in verdict.reasons[0]
        wrong = before_stage(evidence("dapo", probe=replace(probe, pass_1=0.01, pass_k=0.03)))
        assert "Most answers are wrong" in wrong.reasons[0]

    def test_head_room(self) -> None:
        probe = Probe(groups=48, informative=20, k=8, pass_1=0.80, pass_k=0.81)
        verdict = before_stage(evidence("grpo", probe=probe))
        assert verdict.decision is STOP and "only 1.0 points" in verdict.reasons[0]

    def test_the_verifier(self) -> None:
        assert before_stage(evidence("dapo", verifier=None)).decision is NO_GO
        assert before_stage(evidence("dapo", verifier=VerifierCheck(0, 0))).decision is NO_GO
        verdict = before_stage(evidence("dapo", verifier=VerifierCheck(100, 80)))
        assert verdict.decision is NO_GO and "80 of 100" in verdict.reasons[0]
        unnamed = before_stage(evidence("dapo", case=spec(reward=None)))
        assert unnamed.decision is NO_GO and "reward:" in unnamed.reasons[0]
        assert before_stage(evidence("dapo", verifier=None, planning=True)).decision is GO
        assert before_stage(evidence("sft", verifier=None)).decision is GO

    def test_the_budget(self) -> None:
        case = spec(budget={"minutes": 15, "cost": 1}, gates={"minimum_items": 20, "worthwhile_gain": 0.2})
        fits = evidence("sft", case=case, spent=Spend(500, 0.2), forecast=Spend(400, 0.3))
        assert before_stage(fits).decision is GO
        slow = before_stage(replace(fits, forecast=Spend(401, 0.3)))
        assert slow.decision is NO_GO and "15.0 of 15" in slow.reasons[0]
        assert before_stage(replace(fits, forecast=Spend(400, 0.81))).decision is NO_GO

    def test_power(self) -> None:
        """Gain 5 points, discordance 10 %, alpha 0.05, power 0.8: 312 items, as in the usual table."""
        warned = before_stage(evidence("dpo", right=170, n=200, case=spec()))
        assert warned.decision is GO and warned.evidence["test_items_needed"] == 312
        assert any(reason.startswith("Warning: 200 test items") for reason in warned.reasons)
        case = spec(gates={"minimum_items": 20, "underpowered": "collect"})
        verdict = before_stage(evidence("dpo", right=170, n=200, case=case))
        assert (verdict.decision, verdict.collect) == (COLLECT, 112)
        assert before_stage(evidence("dpo", right=265, n=312, case=case)).decision is GO

    def test_no_stage_begins_that_could_not_be_promoted(self) -> None:
        verdict = before_stage(evidence("sft", case=spec(gates={"minimum_items": 300})))
        assert (verdict.decision, verdict.evidence["test_items"]) == (COLLECT, 100)
        assert verdict.collect >= 200

    def test_without_a_test_item_nothing_is_measured(self) -> None:
        verdict = before_stage(evidence("prompt", inventory=Inventory()))
        assert (verdict.decision, verdict.collect) == (COLLECT, 20)

    @FEW
    @given(
        stage=st.sampled_from(["sft", "dpo", "dapo"]),
        have=st.integers(0, 12_000),
        more=st.integers(0, 5_000),
        seconds=st.floats(0, 2000),
        informative=st.integers(0, 50),
    )
    def test_more_data_never_turns_go_away_and_more_spending_never_brings_it(
        self, stage: str, have: int, more: int, seconds: float, informative: int
    ) -> None:
        case = spec(budget={"minutes": 15}, gates={"minimum_items": 20, "worthwhile_gain": 0.2})
        inventory = Inventory(labels=have, pairs=have, prompts=have, test_items=100)
        richer = Inventory(labels=have + more, pairs=have + more, prompts=have + more, test_items=100)
        probe = Probe(groups=50, informative=informative, k=8, pass_1=0.6, pass_k=0.8)
        base = evidence(stage, case=case, inventory=inventory, probe=probe, spent=Spend(seconds))
        decision = before_stage(base).decision
        if decision is GO:
            assert before_stage(replace(base, inventory=richer)).decision is GO
        else:
            assert before_stage(replace(base, spent=Spend(seconds + 100))).decision is not GO


def test_gates_load_neither_torch_nor_numpy() -> None:
    heavy = ("torch", "numpy", "scipy", "jinja2")
    code = f"import sys, ascent.ladder.gates; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
