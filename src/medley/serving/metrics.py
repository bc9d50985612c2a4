"""Prometheus metrics: requests, generated tokens, queue length and latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from medley.serving.worker import EngineWorker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Metrics of one process. They contain neither clients nor contents of requests."""

    def __init__(self, workers: Mapping[str, EngineWorker]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "medley_requests", "Finished requests", ["path", "status"], registry=registry
        )
        self.first_token_seconds = Histogram(
            "medley_first_token_seconds", "Time to the first token", ["model"], registry=registry
        )
        self.request_seconds = Histogram(
            "medley_request_seconds", "Time to the end of a response", ["model"], registry=registry
        )
        gauges: dict[str, tuple[str, Callable[[EngineWorker], float]]] = {
            "medley_waiting": ("Waiting requests", lambda worker: worker.waiting),
            "medley_running": ("Running requests", lambda worker: worker.running),
            "medley_generated_tokens": (
                "Generated tokens since the start", lambda worker: worker.generated_tokens
            ),
        }  # fmt: skip
        for name, (description, read) in gauges.items():
            gauge = Gauge(name, description, ["model"], registry=registry)
            for model, worker in workers.items():
                gauge.labels(model).set_function(partial(read, worker))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
