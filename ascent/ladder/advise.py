"""Advice before anything runs: which rung is justified next, by the data on hand and the reports so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ascent.ladder.before import TECHNIQUES
from ascent.ladder.evidence import Evidence, Inventory
from ascent.ladder.gates import after_stage, before_stage
from ascent.ladder.usecase import StageSpec, UseCase
from ascent.ladder.words import estimate_words, percent
from ascent.records import Decision, Report, Verdict

BESIDE = (
    "rules after the model that flag or halt what must not pass",
    "fine-tuning the embedding model, where answers rest on retrieved text",
    "a light classifier on features that the model extracts, where the answer is a class",
)
"""Steps beside the ladder: the reference article's own results came from these and from supervised fine-tuning."""

WEAKEST = 3


def advise(usecase: UseCase, inventory: Inventory, reports: Sequence[Report]) -> list[Verdict]:
    """Return the gate's verdict for every stage of the use case that has no report yet, in the ladder's order.

    Args:
        usecase: what is to be climbed.
        inventory: the data on hand.
        reports: the latest report of each measured stage, in any order; reports of unknown stages are ignored.
    """
    champion, measured = champion_of(usecase, reports), {report.stage for report in reports}
    return [_advice(usecase, stage, inventory, champion) for stage in usecase.stages if stage.name not in measured]


def champion_of(usecase: UseCase, reports: Sequence[Report]) -> Report | None:
    """Return the report that survives the gates when the stages are replayed in the ladder's order."""
    by_stage = {report.stage: report for report in reports}
    champion: Report | None = None
    for stage in usecase.stages:
        challenger = by_stage.get(stage.name)
        if challenger and after_stage(champion, challenger, usecase).decision is Decision.GO:
            champion = challenger
    return champion


def advice_text(usecase: UseCase, verdicts: Sequence[Verdict], reports: Sequence[Report]) -> str:
    """Return the advice as plain text for a terminal."""
    champion, primary = champion_of(usecase, reports), usecase.metrics.primary
    lines = [f"{usecase.name}: {primary.name} of {percent(primary.target)} wanted, risk {usecase.risk}"]
    if champion is None:
        lines.append("Nothing has been measured yet.")
    else:
        lines.append(f"The champion is {champion.stage} at {estimate_words(champion.metrics[primary.name])}.")
        lines += _weakest(usecase, champion)
    following = next((verdict for verdict in verdicts if verdict.decision is Decision.GO), None)
    if following is not None:
        stage = usecase.stage(following.stage)
        technique = TECHNIQUES[stage.kind] if stage else following.stage
        lines.append(f"Justified next: {following.stage} ({technique}).")
    elif verdicts:
        lines.append("No further stage is justified now. Beside the ladder, consider:")
        lines += [f"  - {step}" for step in BESIDE]
    else:
        lines.append("Every stage of this use case has been measured.")
    for verdict in verdicts:
        more = f" {verdict.collect:,} more" if verdict.decision is Decision.COLLECT else ""
        lines += [
            "",
            f"{verdict.stage}: {verdict.decision.value}{more}",
            *(f"  {reason}" for reason in verdict.reasons),
        ]
    return "\n".join(lines) + "\n"


def _advice(usecase: UseCase, stage: StageSpec, inventory: Inventory, champion: Report | None) -> Verdict:
    from_samples = stage.kind == "dpo" and inventory.pairs == 0 and usecase.reward is not None
    if from_samples:
        inventory = replace(inventory, pairs=inventory.prompts)
    verdict = before_stage(Evidence(stage, usecase, champion, inventory, planning=True))
    if not from_samples:
        return verdict
    note = (
        "No preference pairs are on hand: they would be made of the champion's own samples, the best against the "
        f"worst by {usecase.reward!r}, at most one for each of the {inventory.prompts:,} prompts."
    )
    return verdict.model_copy(update={"reasons": (*verdict.reasons, note)})


def _weakest(usecase: UseCase, champion: Report) -> list[str]:
    shown = [champion.metrics[name] for name in usecase.metrics.report if name in champion.metrics]
    shown = sorted((estimate for estimate in shown if estimate.n), key=lambda estimate: estimate.value)[:WEAKEST]
    if not shown:
        return []
    return ["Its weakest parts: " + "; ".join(f"{part.name} {estimate_words(part)}" for part in shown) + "."]
