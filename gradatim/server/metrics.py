"""What the server counts, for Prometheus. One object per app, with a registry of its own.

Knows nothing of what is counted but its name; no label ever holds a client's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


@runtime_checkable
class HasStats(Protocol):
    """An engine that tells how it is doing; optional."""

    def stats(self) -> Mapping[str, float]: ...


class _EngineStats(Collector):
    def __init__(self, engine: HasStats) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, value in self._engine.stats().items():
            yield GaugeMetricFamily(f"gradatim_engine_{name}", f"the engine's {name}", value=float(value))

    def describe(self) -> Iterator[Metric]:
        return iter(())


class Metrics:
    """Counters and histograms of the request path."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._requests = Counter("gradatim_requests", "requests answered", ["route", "status"], registry=r)
        self._latency = Histogram("gradatim_request_seconds", "whole request", ["route"], buckets=_SECONDS, registry=r)
        self._tokens = Counter("gradatim_tokens", "tokens", ["kind"], registry=r)
        self.ttft = Histogram("gradatim_ttft_seconds", "request to first token", buckets=_SECONDS, registry=r)
        self.per_token = Histogram("gradatim_time_per_token_seconds", "between tokens", buckets=_SECONDS, registry=r)
        self.queue = Gauge("gradatim_queue_depth", "generations waiting or running", registry=r)
        self.responses = Counter("gradatim_responses", "generations ended", ["outcome"], registry=r)
        self.feedback = Counter("gradatim_feedback", "opinions recorded", ["kind"], registry=r)
        self.lost = Counter("gradatim_capture_lost", "steps that were answered but not recorded", registry=r)
        self.memory_failed = Counter("gradatim_memory_failed", "requests that went without their memory", registry=r)
        self.live_step = Gauge("gradatim_live_adapter_step", "step of the live adapter", registry=r)

    def watch(self, engine: object) -> None:
        """Also show the engine's own figures, where it has any."""
        if isinstance(engine, HasStats):
            self.registry.register(_EngineStats(engine))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def tokens(self, *, prompt: int, cached: int, completion: int) -> None:
        for kind, count in (("prompt", prompt), ("cached", cached), ("completion", completion)):
            if count:
                self._tokens.labels(kind).inc(count)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def counters(self) -> dict[str, int]:
        """The figures that ``/v1/status`` shows."""
        samples = [sample for family in self.registry.collect() for sample in family.samples]

        def total(name: str, label: str = "", prefix: str = "") -> int:
            """The sum of all samples of a name, or of those alone whose label begins with prefix."""
            values = [s.value for s in samples if s.name == name and s.labels.get(label, "").startswith(prefix)]
            return int(sum(values))

        return {
            "requests": total("gradatim_requests_total"),
            "errors": total("gradatim_requests_total", "status", "5"),
            "responses": total("gradatim_responses_total"),
            "aborted": total("gradatim_responses_total", "outcome", "aborted"),
            "prompt_tokens": total("gradatim_tokens_total", "kind", "prompt"),
            "cached_tokens": total("gradatim_tokens_total", "kind", "cached"),
            "completion_tokens": total("gradatim_tokens_total", "kind", "completion"),
            "feedback": total("gradatim_feedback_total"),
            "capture_lost": total("gradatim_capture_lost_total"),
            "queue_depth": total("gradatim_queue_depth"),
        }
