"""Load of the server, as one line of the web UI."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil
import torch

from medley.serving.state import ServerState

SAMPLING_SECONDS = 1.0  # minimum interval over which the token rate is measured


class ServerStatus:
    """Requests, tokens per second, and memory of all models of a server."""

    def __init__(self, state: ServerState) -> None:
        self.state, self.workers = state, state.workers
        self._lock = threading.Lock()
        self._last_sample = (time.monotonic(), self._generated_tokens())
        self._rate = 0.0

    def _generated_tokens(self) -> int:
        return sum(worker.generated_tokens for worker in self.workers.values())

    def tokens_per_second(self) -> float:
        """Rate since the last sample; all browsers share the samples."""
        with self._lock:
            now, tokens = time.monotonic(), self._generated_tokens()
            last_time, last_tokens = self._last_sample
            if now - last_time >= SAMPLING_SECONDS:
                self._rate = (tokens - last_tokens) / (now - last_time)
                self._last_sample = (now, tokens)
            return self._rate

    def line(self) -> str:
        running = sum(worker.running for worker in self.workers.values())
        waiting = sum(worker.waiting for worker in self.workers.values())
        memory = psutil.Process().memory_info().rss / 1e9
        parts = [f"{running} running", f"{waiting} queued",
                 f"{self.tokens_per_second():.0f} tokens/s", f"{memory:.1f} GB RAM"]  # fmt: skip
        if torch.cuda.is_available():
            parts.append(f"{torch.cuda.memory_allocated() / 1e9:.1f} GB GPU memory")
        if stopped := self.state.stopped_models():
            parts.append(f"unavailable: {', '.join(stopped)}")
        return " · ".join(parts)

    def snapshot(self) -> dict[str, Any]:
        """The status that the browser requests every few seconds."""
        return {"line": self.line(), "instance": self.state.instance,
                "draining": self.state.draining}  # fmt: skip
