"""Where the marks of a chart go: pure geometry, drawn as SVG by the report's template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

CURVES: dict[str, tuple[str, str]] = {
    "loss": ("Loss", "what the optimizer lowers"),
    "nll": ("Negative log-likelihood", "nats per target token"),
    "reward": ("Reward", "mean over all samples"),
    "accuracy": ("Pair accuracy", "pairs whose chosen answer scores higher"),
    "margin": ("Preference margin", "chosen minus rejected"),
    "kl": ("KL", "nats per token from the reference"),
    "mismatch_kl": ("Policy shift", "KL in nats per token from the sampling policy"),
    "entropy": ("Entropy", "nats per token"),
    "clip_fraction": ("Clip fraction", "tokens at the clip bound"),
    "informative_groups": ("Informative groups", "groups with differing rewards"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "completion_tokens": ("Answer length", "tokens"),
}
"""Training metrics that are drawn, in this order, with title and unit. Others stay in report.json."""


def interval_plot(stages: Sequence[Json], target: float) -> Json:
    """Return the geometry of the accuracy plot: one row per measured stage, with interval and claimed band.

    Positions are percentages of the plot's width, so that the plot may be any width while its text keeps its size.
    """
    rows = [stage for stage in stages if stage["estimate"]]
    low, high = scale([*(stage["estimate"][key] for stage in rows for key in ("low", "high")), target])
    fraction = (low, high) == (0.0, 1.0)

    def x(value: float) -> float:
        return round(100 * (min(max(value, low), high) - low) / (high - low), 2)

    return {
        "target": x(target),
        "ticks": [(x(tick), label(tick, fraction)) for tick in ticks(low, high)],
        "fraction": fraction,
        "rows": [
            {
                "name": stage["name"],
                "title": stage["title"],
                "champion": stage["champion"],
                "value": x(stage["estimate"]["value"]),
                "low": x(stage["estimate"]["low"]),
                "high": x(stage["estimate"]["high"]),
                "band": [x(edge) for edge in stage["claimed"]["band"]] if fraction else None,
                "claimed": stage["claimed"]["band"] if fraction else None,
                "estimate": stage["estimate"],
            }
            for stage in rows
        ],
    }


def curve_plots(curves: dict[str, list[list[float]]]) -> list[Json]:
    """Return the geometry of the known learning curves that have at least two points."""
    known = {name: curves[name] for name in CURVES if len(curves.get(name, ())) > 1}
    if known.get("nll") == known.get("loss"):
        known.pop("nll", None)  # plain supervised training: the loss is the negative log-likelihood
    return [
        {"name": name, "title": CURVES[name][0], "unit": CURVES[name][1], **curve(points)}
        for name, points in known.items()
    ]


def curve(points: Sequence[Sequence[float]]) -> Json:
    """Return one curve as SVG paths in a 240 by 96 box, with the labels of its axes.

    `path` joins the points; `trend` is their centred mean over a tenth of the run, when there are enough of them.
    """
    width, height, pad = 240.0, 96.0, 6.0
    steps, values = [point[0] for point in points], [point[1] for point in points]
    low, high = min(values), max(values)
    span, length = (high - low) or 1.0, (steps[-1] - steps[0]) or 1.0

    def path(levels: Sequence[float]) -> str:
        marks = [
            f"{(step - steps[0]) / length * width:.1f} "
            f"{height / 2 if high == low else height - pad - (level - low) / span * (height - 2 * pad):.1f}"
            for step, level in zip(steps, levels, strict=True)
        ]
        return "M" + " L".join(marks)

    reach = len(values) // 20
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return {
        "path": path(values),
        "trend": path([sum(window) / len(window) for window in windows]) if reach else None,
        "first": short(values[0]),
        "last": short(values[-1]),
        "low": short(low),
        "high": short(high),
        "from": f"{steps[0]:g}",
        "to": f"{steps[-1]:g}",
    }


def scale(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of an axis: 0 to 1 for fractions, otherwise a little more than the values."""
    if all(0 <= value <= 1 for value in values):
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = 0.08 * ((high - low) or 1.0)
    return low - pad, high + pad


def ticks(low: float, high: float) -> list[float]:
    """Return four to nine round values inside a range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float, fraction: bool) -> str:
    """Return a tick's text."""
    return f"{100 * value:.0f} %" if fraction else f"{value:g}"


def short(value: float) -> str:
    """Return a number in at most seven characters or so, with three significant digits."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
