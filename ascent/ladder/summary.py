"""The paragraph at the top of a report: what happened, for a reader who reads nothing else."""

from __future__ import annotations

from typing import Any

from ascent.ladder.words import duration, interval_words, percent, signed

Json = dict[str, Any]


def summarise(facts: Json) -> list[str]:
    """Return the sentences of the summary, in reading order."""
    sentences = [_stage(stage) for stage in facts["stages"]]
    crowned = next((stage for stage in facts["stages"] if stage["champion"]), None)
    return [sentence for sentence in [_opening(facts), *sentences, _ending(facts, crowned), _bill(facts)] if sentence]


def _opening(facts: Json) -> str:
    measured = [stage for stage in facts["stages"] if stage["measured_on"]]
    if not measured:
        return "No model has been measured yet."
    rows = measured[0]["measured_on"]["rows"]
    asked, primary = len(facts["stages"]), facts["use_case"]["primary"]
    share = f"{len(measured)} of {asked} stages"
    if len(measured) == asked:
        share = "The only stage" if asked == 1 else f"All {asked} stages"
    verb = "was" if len(measured) == 1 else "were"
    return f"{share} {verb} measured on {rows:,} held-out items by {primary}."


def _stage(stage: Json) -> str:
    before, after, estimate = stage["before"], stage["after"], stage["estimate"]
    name = f"{stage['title']} ({stage['name']})"
    if estimate is None or after is None:
        if after:
            return f"{name} could not be measured, {after['decision']}: {_lower(after['reasons'][0])}"
        if before and before["decision"] != "GO":
            return f"{name} was not begun, {before['decision']}: {_lower(before['reasons'][0])}"
        return f"{name} has no measurement; its status is {stage['status']!r}."
    value = f"{percent(estimate['value'])} ({interval_words(estimate['low'], estimate['high'])})"
    if stage["against"] is None:
        return f"{name} gets {value} right."
    change = after["changes"][0] if after["changes"] else None
    moved = (
        f"{signed(change['difference'])}, {len(change['fixed'])} fixed and {len(change['broken'])} broken"
        if change
        else "not compared"
    )
    if after["decision"] == "GO":
        return f"{name} reaches {value}, {moved}, and became champion."
    stays = f"{stage['against']} stays champion"
    return f"{name} reaches {value}, {moved}, and was not promoted ({after['decision']}); {stays}."


def _ending(facts: Json, champion: Json | None) -> str:
    if champion is None or champion["estimate"] is None:
        return "There is no champion."
    estimate, target = champion["estimate"], facts["use_case"]["target"]
    best = f"The champion is {champion['name']} at {percent(estimate['value'])}"
    if estimate["low"] >= target:
        return f"{best}; its whole interval lies at or above the target of {percent(target)}, which is met."
    if estimate["value"] >= target:
        return (
            f"{best}; that is above the target of {percent(target)}, but the interval reaches down to "
            f"{percent(estimate['low'])}, so the target is not yet met with confidence."
        )
    return f"{best}; the target of {percent(target)} is not met."


def _bill(facts: Json) -> str:
    run = facts["run"]
    if not run["seconds"]:
        return ""
    cost = f" and {run['cost']:.2f} {run['currency']} of machine time" if run["cost"] else ""
    return f"The climb took {duration(run['seconds'])}{cost}."


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
