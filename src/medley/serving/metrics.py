"""Counters for Prometheus: requests, tokens, what waits, and how long the first token takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from medley.serving.worker import EngineWorker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one process; nothing in them tells who asked, or what."""

    def __init__(self, workers: Mapping[str, EngineWorker]) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "medley_requests", "Requests that ended", ["path", "status"], registry=own
        )
        self.first_token = Histogram(
            "medley_first_token_seconds", "Until the first token", ["model"], registry=own
        )
        self.whole = Histogram(
            "medley_request_seconds", "Until the end of an answer", ["model"], registry=own
        )
        gauges: dict[str, tuple[str, Callable[[EngineWorker], float]]] = {
            "medley_waiting": ("Requests that wait", lambda worker: worker.waiting),
            "medley_running": ("Requests at work", lambda worker: worker.running),
            "medley_generated_tokens": ("Tokens since the start", lambda worker: worker.tokens),
        }
        for name, (text, read) in gauges.items():
            gauge = Gauge(name, text, ["model"], registry=own)
            for model, worker in workers.items():
                gauge.labels(model).set_function(partial(read, worker))

    def text(self) -> bytes:
        return generate_latest(self.registry)
