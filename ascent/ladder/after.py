"""The gate after a stage: does its model replace the champion?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

from ascent.ladder.evidence import Finding, label_cost, verdict_of
from ascent.ladder.guards import GuardCheck, check_guards, compared
from ascent.ladder.usecase import UseCase
from ascent.ladder.words import amount, estimate_words, interval_words, p_words, percent, points, signed
from ascent.records import Change, Decision, Report, Verdict


def after_stage(champion: Report | None, challenger: Report, spec: UseCase) -> Verdict:
    """Decide whether a stage's model replaces the champion.

    GO: it does. STOP: no gain worth having was found; the champion stays. COLLECT(n): a gain is possible but
    unproven; n more test items would settle it, and the champion stays. NO-GO: a guard was violated or the
    measurement is not sound; the champion stays. The first model measured has nobody to beat and becomes
    champion if it was measured soundly.
    """
    findings = _measured(champion, challenger, spec)
    changes: list[Change] = []
    if champion is not None and not any(finding.objection for finding in findings):
        before, after = _in_order(champion), _in_order(challenger)
        primary = compared(before, after, spec.metrics.primary.name)
        guards = check_guards(before, after, spec)
        changes = [primary, *(guard.change for guard in guards)]
        findings += _guard_findings(guards, violated=True)
        findings.append(_improvement(primary, spec))
        findings.append(_enough_items(primary, spec))
        findings += _guard_findings(guards, violated=False)
    verdict = verdict_of(challenger.stage, "after", findings, champion.model if champion else "")
    promoted = verdict.decision is Decision.GO
    return verdict.model_copy(
        update={
            "champion": challenger.model if promoted else verdict.champion,
            "changes": tuple(changes),
        }
    )


def _measured(champion: Report | None, challenger: Report, spec: UseCase) -> list[Finding]:
    """Check that the reports may be compared at all."""
    if champion is not None and champion.data.sha256 != challenger.data.sha256:
        return [
            Finding(
                f"{champion.stage} and {challenger.stage} were measured on different test data "
                f"({champion.data.sha256[:12]} and {challenger.data.sha256[:12]}), so they cannot be "
                "compared. Measure both on the same file.",
                Decision.NO_GO,
                0,
                {"champion_data": champion.data.sha256, "challenger_data": challenger.data.sha256},
            )
        ]
    limit, gating = spec.thresholds.max_unscored, spec.metrics.gating
    found: list[Finding] = []
    for report in [challenger] if champion is None else [challenger, champion]:
        for name in gating:
            estimate = report.metrics.get(name)
            if estimate is None or estimate.n == 0:
                found.append(Finding(f"Not measured: {report.stage} has no graded item for {name}.", Decision.NO_GO))
                continue
            rate = estimate.unscored / (estimate.n + estimate.unscored)
            if rate > limit:
                found.append(
                    Finding(
                        f"Not measured: {name} could not be graded on {estimate.unscored} of "
                        f"{estimate.n + estimate.unscored} items of {report.stage} ({percent(rate)}; at most "
                        f"{percent(limit)} is accepted). Mend the grader or its time limit.",
                        Decision.NO_GO,
                        0,
                        {f"unscored_{name}": rate, "max_unscored": limit},
                    )
                )
    if champion is not None and not found:
        found += _shared_items(champion, challenger, gating)
    if champion is None and not found:
        primary = challenger.metrics[spec.metrics.primary.name]
        found.append(
            Finding(
                f"{challenger.stage} is the first model measured and reaches {estimate_words(primary)} on "
                f"{spec.metrics.primary.name}; later stages must beat it.",
                numbers={"primary": primary.value, "primary_low": primary.low, "primary_high": primary.high},
            )
        )
    return found


def _shared_items(champion: Report, challenger: Report, gating: Sequence[str]) -> list[Finding]:
    return [
        Finding(
            f"Not measured: no item has a grade for {name} in both {champion.stage} and {challenger.stage}, "
            "so there is nothing to compare. Measure both on the same items.",
            Decision.NO_GO,
        )
        for name in gating
        if not champion.values(name).keys() & challenger.values(name).keys()
    ]


def _improvement(change: Change, spec: UseCase) -> Finding:
    limits = spec.thresholds
    fixed, broken = len(change.fixed), len(change.broken)
    numbers = {
        "n": change.n,
        "champion": change.champion,
        "challenger": change.challenger,
        "difference": change.difference,
        "low": change.low,
        "high": change.high,
        "p_value": change.p_value,
        "fixed": fixed,
        "broken": broken,
        "alpha": limits.alpha,
    }
    told = (
        f"{change.metric} went from {percent(change.champion)} to {percent(change.challenger)} on the same "
        f"{change.n:,} items: {amount(fixed, 'item')} fixed, {broken:,} broken, {signed(change.difference)} "
        f"({interval_words(change.low, change.high, in_points=True)}, {p_words(change)})"
    )
    if change.difference > 0 and change.low > 0 and change.p_value < limits.alpha:
        return Finding(f"A significant improvement: {told}. {_odds(limits.alpha)}", numbers=numbers)
    if change.difference <= 0:
        worse = change.p_value < limits.alpha and change.difference < 0
        verdict = "It got worse" if worse else "No improvement"
        return Finding(f"{verdict}: {told}. The champion stays.", Decision.STOP, 0, numbers)
    if change.high < limits.worthwhile_gain:
        return Finding(
            f"No improvement worth having: {told}. Even the interval's upper end is below the "
            f"{points(limits.worthwhile_gain)} that count as worthwhile, so more test items would not help. "
            "The champion stays.",
            Decision.STOP,
            0,
            numbers,
        )
    needed = _items_to_settle(change, spec)
    missing = max(1, needed - change.n)
    numbers["items_needed"] = change.n + missing
    return Finding(
        f"Unproven: {told}; p must be below {limits.alpha:g}. Settling a gain of this size "
        f"takes about {change.n + missing:,} test items: collect {missing:,} "
        f"more{label_cost(spec, missing)}. The champion stays.",
        Decision.COLLECT,
        missing,
        numbers,
    )


def _odds(alpha: float) -> str:
    return f"Chance alone would show this in fewer than 1 of {1 / alpha:.0f} such comparisons."


def _items_to_settle(change: Change, spec: UseCase) -> int:
    from ascent.evaluate.power import paired_items_needed  # numpy and scipy load on use

    limits = spec.thresholds
    discordance = (len(change.fixed) + len(change.broken)) / change.n
    if change.test.startswith("mcnemar") and discordance > change.difference:
        return int(paired_items_needed(change.difference, discordance, limits.power, limits.alpha))
    normal = NormalDist()
    spread = (change.high - change.low) / (2 * normal.inv_cdf(0.975))
    wanted = normal.inv_cdf(1 - limits.alpha / 2) + normal.inv_cdf(limits.power)
    return int(change.n * (wanted * spread / change.difference) ** 2) + 1


def _enough_items(change: Change, spec: UseCase) -> Finding:
    minimum = spec.thresholds.minimum_items
    if change.n >= minimum:
        return Finding(
            f"The comparison rests on {change.n:,} items; risk {spec.risk!r} asks for {minimum:,} or more.",
            numbers={"minimum_items": minimum},
        )
    missing = minimum - change.n
    return Finding(
        f"The comparison rests on only {change.n:,} items and risk {spec.risk!r} asks for {minimum:,}: "
        f"collect {missing:,} more test items{label_cost(spec, missing)}.",
        Decision.COLLECT,
        missing,
        {"minimum_items": minimum},
    )


def _guard_findings(guards: Sequence[GuardCheck], *, violated: bool) -> list[Finding]:
    """Return the sentences of the guards that are violated, or of those that are not."""
    found = []
    for check in guards:
        if check.violated is not violated:
            continue
        objection = Decision.NO_GO if violated else None if check.passed else Decision.COLLECT
        numbers = {f"guard_{check.change.metric}": check.numbers()}
        found.append(Finding(check.sentence(), objection, check.collect, numbers))
    return found


def _in_order(report: Report) -> Report:
    """Return the report with its items sorted, so that seeded resampling does not depend on their order."""
    return report.model_copy(
        update={"items": tuple(sorted(report.items, key=lambda item: (item.task_id, item.sample)))}
    )
