"""One line about what the server is doing."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil
import torch

from medley.serving.state import State

LOOK = 1.0  # seconds between two looks at the counters


class Status:
    """Rows at work and waiting, tokens a second, and memory, of all models of a server."""

    def __init__(self, state: State) -> None:
        self.state, self.workers = state, state.workers
        self._lock = threading.Lock()
        self._seen = (time.monotonic(), self._tokens())
        self._pace = 0.0

    def _tokens(self) -> int:
        return sum(worker.tokens for worker in self.workers.values())

    def pace(self) -> float:
        """Tokens a second, since the look before; several browsers share one."""
        with self._lock:
            now, tokens = time.monotonic(), self._tokens()
            before, had = self._seen
            if now - before >= LOOK:
                self._pace = (tokens - had) / (now - before)
                self._seen = (now, tokens)
            return self._pace

    def line(self) -> str:
        running = sum(worker.running for worker in self.workers.values())
        waiting = sum(worker.waiting for worker in self.workers.values())
        memory = psutil.Process().memory_info().rss / 1e9
        said = [f"{running} at work", f"{waiting} waiting", f"{self.pace():.0f} tokens/s",
                f"{memory:.1f} GB of memory"]  # fmt: skip
        if torch.cuda.is_available():
            said.append(f"{torch.cuda.memory_allocated() / 1e9:.1f} GB on the GPU")
        dead = [name for name, worker in self.workers.items() if not worker.alive]
        if dead:
            said.append(f"not running: {', '.join(dead)}")
        return " · ".join(said)

    def told(self) -> dict[str, Any]:
        """What the page asks for every few seconds."""
        return {"line": self.line(), "instance": self.state.instance,
                "draining": self.state.draining}  # fmt: skip
