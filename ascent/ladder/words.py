"""Numbers as a sceptical reader wants them: with unit, interval and size."""

from __future__ import annotations

from ascent.records import Change, Estimate


def percent(value: float, digits: int = 1) -> str:
    """Return a fraction as a percentage: `0.8125` is "81.2 %"."""
    return f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """Return a difference of fractions in percentage points, without sign."""
    return f"{100 * value:.1f} points"


def signed(value: float) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return f"{100 * value:+.1f} points"


def amount(count: int, noun: str) -> str:
    """Return a count with its noun: "1 item", "1,200 items"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def interval_words(low: float, high: float, *, in_points: bool = False) -> str:
    """Return a 95 % interval of a fraction, or of a difference of fractions."""
    if in_points:
        return f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    return f"95 % interval {100 * low:.1f} to {100 * high:.1f}"


def estimate_words(estimate: Estimate) -> str:
    """Return a measured fraction with its interval and the items behind it."""
    return f"{percent(estimate.value)} ({interval_words(estimate.low, estimate.high)}, n = {estimate.n:,})"


def span(low: float, high: float) -> str:
    """Return an interval of a fraction: "75.5 to 83.4 %"."""
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def p_words(change: Change) -> str:
    """Return the test's name and its p-value."""
    names = {"mcnemar-exact": "exact McNemar", "cluster-sign-flip": "clustered sign-flip test"}
    name = names.get(change.test, change.test.replace("-", " "))
    return f"{name} p < 0.001" if change.p_value < 0.001 else f"{name} p = {change.p_value:.3f}"


def duration(seconds: float) -> str:
    """Return a duration as a person would say it: "48 s", "6 min 12 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
