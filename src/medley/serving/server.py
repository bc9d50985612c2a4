"""The HTTP server process: listens, and finishes running requests before it exits."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from medley.errors import UserError
from medley.serving.connection import ServerConfig
from medley.serving.state import ServerState

MIN_DRAIN_SECONDS = 1.0  # so that a load balancer's health check can see the status 503


class DrainingServer(uvicorn.Server):
    """Drains on SIGTERM and SIGINT: rejects new requests and waits for running ones.

    SIGTERM drains for at least one second. A second SIGINT exits at once. After `drain_seconds`,
    running requests are ended with an error.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, drain_seconds: float) -> None:
        super().__init__(config)
        self.state, self.drain_seconds = state, drain_seconds
        self._drain_start: float | None = None
        self._min_drain = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_start is not None:
            if sig == signal.SIGINT:
                self.force_exit = self.should_exit = True
            return
        self._drain_start, self.state.draining = time.monotonic(), True
        self._min_drain = MIN_DRAIN_SECONDS if sig == signal.SIGTERM else 0.0

    async def on_tick(self, counter: int) -> bool:
        if self._drain_start is not None:
            seconds = time.monotonic() - self._drain_start
            is_late = seconds > self.drain_seconds
            self.should_exit |= seconds >= self._min_drain and (self.state.is_idle or is_late)
            if self.should_exit:
                for close in self.state.on_shutdown:
                    close()
            if is_late:
                await asyncio.gather(
                    *(asyncio.to_thread(worker.stop) for worker in self.state.workers.values())
                )
        return await super().on_tick(counter)


def run_server(
    app: FastAPI, state: ServerState, host: str, port: int, drain_seconds: float
) -> None:
    """Serves until SIGTERM or SIGINT. Raises UserError if it cannot listen at the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from error
    name = f"[{host}]" if ":" in host else host
    print(f"listening at http://{name}:{listener.getsockname()[1]}", flush=True)
    server = DrainingServer(ServerConfig(app, state.limits), state, drain_seconds)
    asyncio.run(server.serve(sockets=[listener]))
