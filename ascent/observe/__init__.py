"""Observe: what a run says while it works. Numbers per step on disk, one live line on the terminal."""

from ascent.observe.metrics import MetricLog
from ascent.observe.progress import Progress

__all__ = ["MetricLog", "Progress"]
