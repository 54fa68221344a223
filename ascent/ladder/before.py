"""The gate before a stage: is it worth its cost now?"""

from __future__ import annotations

from collections.abc import Callable

from ascent.ladder.evidence import Evidence, Finding, label_cost, verdict_of
from ascent.ladder.words import estimate_words, interval_words, percent, points
from ascent.records import Decision, Verdict

TECHNIQUES = {
    "prompt": "prompting",
    "sft": "supervised fine-tuning",
    "dpo": "preference optimisation",
    "online": "reinforcement learning",
}


def before_stage(evidence: Evidence) -> Verdict:
    """Decide whether a stage is worth its cost now.

    The first objection decides, in this order: the target is already met (STOP), the verifier is missing or
    unreliable (NO-GO), the budget does not allow it (NO-GO), sampled groups carry too little signal (STOP),
    training data falls short of the technique's minimum (COLLECT), the test set is too small to see a
    worthwhile gain (COLLECT).
    """
    checks: tuple[Callable[[Evidence], Finding | None], ...] = (
        _target_met,
        _verifier,
        _budget,
        _headroom,
        _training_data,
        _test_data,
    )
    findings = [finding for check in checks if (finding := check(evidence)) is not None]
    champion = evidence.champion.model if evidence.champion else ""
    return verdict_of(evidence.stage.name, "before", findings, champion)


def _target_met(evidence: Evidence) -> Finding | None:
    spec, champion = evidence.spec, evidence.champion
    primary = spec.metrics.primary
    estimate = champion.metrics.get(primary.name) if champion else None
    if champion is None or estimate is None or estimate.n == 0:
        return None
    numbers = {
        "champion": champion.stage,
        "primary": estimate.value,
        "primary_low": estimate.low,
        "primary_high": estimate.high,
        "target": primary.target,
    }
    measured = f"{champion.stage} reaches {estimate_words(estimate)} on {primary.name}"
    if estimate.low < primary.target:
        return Finding(
            f"The target is not yet met with confidence: {measured}; the whole interval would have to reach "
            f"{percent(primary.target)}.",
            numbers=numbers,
        )
    for guard in spec.metrics.guards:
        limited = champion.metrics.get(guard.name)
        if guard.limit is None or limited is None:
            continue
        inside = limited.high <= guard.limit if guard.direction == "lower" else limited.low >= guard.limit
        if not inside:
            return Finding(
                f"The target of {percent(primary.target)} is met ({measured}), but {guard.name} is at "
                f"{estimate_words(limited)} and must keep to {percent(guard.limit)} with its whole interval.",
                numbers=numbers,
            )
    reason = f"The target of {percent(primary.target)} is met with confidence: {measured}."
    if spec.gates.continue_past_target:
        return Finding(f"{reason} The use case asks to continue past it.", numbers=numbers)
    return Finding(f"{reason} A further stage would cost more than the use case asks for.", Decision.STOP, 0, numbers)


def _verifier(evidence: Evidence) -> Finding | None:
    from ascent.evaluate.statistics import wilson  # numpy and scipy load on use

    if evidence.stage.kind != "online":
        return None
    spec, check = evidence.spec, evidence.verifier
    if spec.reward is None:
        return Finding(
            "No reward is named, and reinforcement learning learns only from a verifier. Name a grader of "
            "the program under 'reward:'.",
            Decision.NO_GO,
        )
    needed = spec.thresholds.verifier_agreement
    if check is None and evidence.planning:
        return Finding(f"The reward {spec.reward!r} is still to be checked against known answers; the climb does so.")
    if check is None or check.items == 0:
        return Finding(
            f"The reward {spec.reward!r} has not been checked against known answers; give the training "
            "prompts expected answers so that it can be.",
            Decision.NO_GO,
        )
    rate = check.agreed / check.items
    low, high = wilson(check.agreed, check.items)
    numbers = {"verifier_items": check.items, "verifier_agreed": check.agreed, "verifier_needed": needed}
    sides = f"The reward {spec.reward!r} sided with the reference in {check.agreed} of {check.items} checks "
    sides += f"({percent(rate)}, {interval_words(low, high)})"
    if rate < needed:
        return Finding(
            f"{sides}; {percent(needed)} is required, because a model learns a verifier's mistakes. Correct "
            "the grader.",
            Decision.NO_GO,
            0,
            numbers,
        )
    return Finding(f"{sides}; {percent(needed)} is required.", numbers=numbers)


def _budget(evidence: Evidence) -> Finding | None:
    budget, spent, forecast = evidence.spec.budget, evidence.spent, evidence.forecast
    if budget.minutes is None and budget.cost is None:
        return None
    currency = evidence.spec.costs.currency
    minutes, cost = (spent.seconds + forecast.seconds) / 60, spent.cost + forecast.cost
    numbers = {
        "spent_seconds": spent.seconds,
        "spent_cost": spent.cost,
        "forecast_seconds": forecast.seconds,
        "forecast_cost": forecast.cost,
        "budget_minutes": budget.minutes,
        "budget_cost": budget.cost,
    }
    parts, over = [], False
    if budget.minutes is not None:
        over = minutes > budget.minutes
        parts.append(
            f"{spent.seconds / 60:.1f} minutes are spent and this stage is forecast at "
            f"{forecast.seconds / 60:.1f}, together {minutes:.1f} of {budget.minutes:g}"
        )
    if budget.cost is not None:
        over = over or cost > budget.cost
        parts.append(f"{cost:.2f} of {budget.cost:g} {currency} would be spent")
    reason = "; ".join(parts)
    if over:
        return Finding(
            f"The budget does not allow this stage: {reason}. Raise 'budget:', or lower the stage's steps.",
            Decision.NO_GO,
            0,
            numbers,
        )
    return Finding(f"The budget allows this stage: {reason}.", numbers=numbers)


def _headroom(evidence: Evidence) -> Finding | None:
    from ascent.evaluate.statistics import wilson  # numpy and scipy load on use

    probe, limits = evidence.probe, evidence.spec.thresholds
    if evidence.stage.kind != "online":
        return None
    if probe is None or probe.groups == 0:
        return Finding("What reinforcement could gain has not been measured yet; the climb samples it first.")
    fraction, gap = probe.informative / probe.groups, probe.pass_k - probe.pass_1
    low, high = wilson(probe.informative, probe.groups)
    numbers = {
        "groups": probe.groups,
        "informative_groups": probe.informative,
        "informative_fraction": fraction,
        "k": probe.k,
        "pass_1": probe.pass_1,
        "pass_k": probe.pass_k,
    }
    mixed = (
        f"{probe.informative} of {probe.groups} prompts, each sampled {probe.k} times, gave answers with "
        f"different rewards ({percent(fraction)}, {interval_words(low, high)})"
    )
    passes = f"pass@1 is {percent(probe.pass_1)} and pass@{probe.k} {percent(probe.pass_k)}"
    if fraction < limits.min_informative:
        remedy = (
            "Most answers are already right: write harder prompts, or end the ladder here."
            if probe.pass_1 >= 0.5
            else "Most answers are wrong: train on more labelled examples, or begin with easier prompts."
        )
        return Finding(
            f"Dead groups: only {mixed}, and {percent(limits.min_informative)} is required, since a group "
            f"whose answers all score alike teaches nothing; {passes}. {remedy}",
            Decision.STOP,
            0,
            numbers,
        )
    if gap < limits.min_headroom:
        return Finding(
            f"Too little head-room: {passes}, so sampling finds right answers beyond the usual one for only "
            f"{points(gap)}, below the {points(limits.min_headroom)} required. Better data will gain more "
            "than reinforcement.",
            Decision.STOP,
            0,
            numbers,
        )
    return Finding(f"There is something to reinforce: {mixed}; {passes}.", numbers=numbers)


def _training_data(evidence: Evidence) -> Finding | None:
    have, priors, kind = evidence.inventory, evidence.spec.priors, evidence.stage.kind
    if kind == "prompt":
        return None
    if kind == "online":
        if have.trajectories >= priors.rl.trajectories > 0:
            return Finding(
                f"{have.trajectories:,} trajectories are on hand; {priors.rl.trajectories:,} suffice.",
                numbers={"trajectories": have.trajectories, "minimum": priors.rl.trajectories},
            )
        return _minimum(evidence, have.prompts, priors.rl.prompts[0], "prompts for the verifier", "prompts")
    if kind == "sft":
        return _minimum(evidence, have.labels, priors.sft.labels[0], "labelled examples", "labels")
    return _minimum(evidence, have.pairs, priors.dpo.pairs[0], "distinct preference pairs", "pairs")


def _minimum(evidence: Evidence, have: int, minimum: int, noun: str, key: str) -> Finding:
    numbers = {key: have, "minimum": minimum}
    technique = TECHNIQUES[evidence.stage.kind]
    if have >= minimum:
        return Finding(f"{have:,} {noun} are on hand; the minimum for {technique} is {minimum:,}.", numbers=numbers)
    missing = minimum - have
    return Finding(
        f"{have:,} {noun} are on hand and the minimum for {technique} is {minimum:,}: collect {missing:,} "
        f"more{label_cost(evidence.spec, missing)}.",
        Decision.COLLECT,
        missing,
        numbers,
    )


def _test_data(evidence: Evidence) -> Finding | None:
    from ascent.evaluate.power import paired_items_needed  # numpy and scipy load on use

    spec, have = evidence.spec, evidence.inventory.test_items
    limits = spec.thresholds
    if have == 0:
        return Finding(
            f"There is no test item, so nothing can be measured: collect {limits.minimum_items:,}.",
            Decision.COLLECT,
            limits.minimum_items,
            {"test_items": 0, "test_items_needed": limits.minimum_items},
        )
    if evidence.stage.kind == "prompt":
        return Finding(f"{have:,} test items are on hand.", numbers={"test_items": have})
    gain = _gain_to_detect(evidence)
    # Of three items whose outcome changes one is assumed to break: discordance is twice the net gain.
    powered = paired_items_needed(gain, min(1.0, 2 * gain), limits.power, limits.alpha)
    needed = max(limits.minimum_items, powered)
    numbers = {"test_items": have, "test_items_needed": needed, "gain_to_detect": gain}
    plan = f"a gain of {points(gain)} with {percent(limits.power, 0)} power at alpha {limits.alpha:g}"
    if have >= needed:
        return Finding(f"{have:,} test items can show {plan} ({powered:,} needed).", numbers=numbers)
    missing = needed - have
    if have < limits.minimum_items or limits.underpowered == "collect":
        why = (
            f"no promotion rests on fewer than {limits.minimum_items:,} at risk {spec.risk!r}"
            if have < limits.minimum_items
            else f"showing {plan} takes {powered:,}"
        )
        return Finding(
            f"{have:,} test items are too few: {why}. Collect {missing:,} more{label_cost(spec, missing)}.",
            Decision.COLLECT,
            missing,
            numbers,
        )
    return Finding(
        f"Warning: {have:,} test items may miss {plan}, which takes {powered:,}; a smaller gain will look like none.",
        numbers=numbers,
    )


def _gain_to_detect(evidence: Evidence) -> float:
    """Return the smallest gain worth noticing: the use case's own, or half of what the target still lacks."""
    spec, champion = evidence.spec, evidence.champion
    estimate = champion.metrics.get(spec.metrics.primary.name) if champion else None
    missing = spec.metrics.primary.target - estimate.value if estimate and estimate.n else 0.0
    return min(0.5, max(spec.thresholds.worthwhile_gain, missing / 2))
