"""Cost curves: how time and memory of our step grow with one size at a time, beside our own model of cost.

The model is `ascent.customize.plan`, asked for the same step with its slowdown factor taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workloads import BETA, Workload

if TYPE_CHECKING:
    from bench import Suite

OURS = "ascent"
ENOUGH_S = 15.0
"""A point is repeated until this much time has been measured, at most three times."""


@dataclass(frozen=True)
class Curve:
    """One size, its values, and the work at each."""

    title: str
    unit: str
    values: tuple[int, ...]
    work: Callable[[int], Workload]


def _training(tokens: int, rank: int = 16) -> Workload:
    return Workload("tokens", "", "sft", (), lengths=(256,) * (tokens // 256), rank=rank)


def _online(prompt: int, group: int) -> Workload:
    return Workload("online", "", "grpo", (), prompts=4, prompt_tokens=prompt, group=group, new_tokens=48, beta=BETA)


CURVES = {
    "tokens": Curve(
        "training step over packed tokens", "tokens", tuple(1024 << i for i in range(7)), lambda n: _training(n)
    ),
    "group": Curve(
        "GRPO step, 4 prompts of 360 tokens", "samples a prompt", (2, 4, 8, 16, 32), lambda n: _online(360, n)
    ),
    "prompt": Curve(
        "GRPO step, 4 prompts × 8 samples",
        "tokens of a prompt",
        tuple(64 << i for i in range(7)),
        lambda n: _online(n, 8),
    ),
    "rank": Curve(
        "training step over 4,096 tokens", "rank of the adapter", (4, 8, 16, 32, 64), lambda n: _training(4096, n)
    ),
}


def measure(suite: Suite, curve: Curve, rates: dict[str, Any], *, small: bool = False) -> dict[str, Any]:
    """Measure a curve's points, each in a process of its own, and predict them."""
    points = []
    for value in curve.values[:2] if small else curve.values:
        work = curve.work(value)
        found = suite.run(OURS, work, 3, enough=ENOUGH_S)
        model = suite.run(OURS, work, 1, kind="predict", of=work.kind, rates=rates["machine"], warmup=0)
        point: dict[str, Any] = {"x": value, **{name: found.get(name) for name in ("seconds", "peak_mb", "failed")}}
        points.append(point | {"model": model.get("facts"), "model_failed": model.get("failed")})
    return {"title": curve.title, "unit": curve.unit, "points": points}


def line(curve: dict[str, Any]) -> str:
    """A curve in a line: x: measured / model."""
    return ", ".join(
        f"{p['x']}: {min(p['seconds']):.2f} / {(p['model'] or {}).get('seconds', float('nan')):.2f} s"
        if p["seconds"]
        else f"{p['x']}: {p['failed']}"
        for p in curve["points"]
    )
