"""What the server counts, in Prometheus' exposition format. Names follow its conventions: base units, `_total`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ascent.serve.chat import CallRecord

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Gauges = Callable[[], Iterable[tuple[str, str, dict[str, str], float]]]
"""Yields (name, help, labels, value) of what is true at this moment."""


class Metrics:
    """Counters of requests and calls, and gauges that are asked when somebody looks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ascent_requests", "Requests by operation and HTTP status.", ("operation", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "ascent_request_seconds",
            "Time until the last byte of a response.",
            ("operation",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "ascent_tokens",
            "Tokens by model and kind: prompt, cached, completion.",
            ("model", "kind"),
            registry=self.registry,
        )
        self.first_token = Histogram(
            "ascent_first_token_seconds",
            "Time until the first token of an answer.",
            ("model",),
            buckets=SECONDS,
            registry=self.registry,
        )

    def request(self, operation: str, status: int, seconds: float) -> None:
        """Count one request that was answered."""
        self.requests.labels(operation, str(status)).inc()
        self.seconds.labels(operation).observe(seconds)

    def call(self, record: CallRecord) -> None:
        """Count one finished call of a model."""
        for kind, count in (
            ("prompt", record.prompt_tokens),
            ("cached", record.cached_tokens),
            ("completion", record.completion_tokens),
        ):
            self.tokens.labels(record.model, kind).inc(count)
        if record.first_token_s is not None:
            self.first_token.labels(record.model).observe(record.first_token_s)

    def watch(self, gauges: Gauges) -> None:
        """Ask `gauges` whenever the page is read."""
        self.registry.register(_Asked(gauges))

    def page(self) -> bytes:
        """Return the page."""
        found: bytes = generate_latest(self.registry)
        return found


class _Asked(Collector):
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Any] = {}
        for name, text, labels, value in self._gauges():
            family = families.setdefault(name, GaugeMetricFamily(name, text, labels=list(labels)))
            family.add_metric(list(labels.values()), value)
        yield from families.values()

    def describe(self) -> Iterable[Metric]:
        """Say nothing ahead: which gauges there are depends on what is deployed."""
        return ()
