"""A server of `tiny`, in a thread of the test process or as a process of its own."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from conftest import ROOT
from fastapi import FastAPI

import medley
from medley.serving.app import make_app
from medley.serving.connection import ServerConfig
from medley.serving.limits import Limits
from medley.serving.state import ServerState


class RunningServer:
    """A server in a thread, with its model, its worker and its URL.

    `configure` is called with the application and its state before the server starts.
    """

    def __init__(
        self,
        limits: Limits,
        token: str | None = None,
        max_num_seqs: int = 8,
        configure: Callable[[FastAPI, ServerState], object] | None = None,
        names: Sequence[str] = ("tiny",),
        allowed_origins: Sequence[str] = (),
    ) -> None:
        models = {name: medley.load("tiny") for name in names}
        self.state = ServerState.of_models(models, limits, token, max_num_seqs)
        self.worker = self.state.workers[names[0]]
        self.model = self.worker.model
        app = make_app(self.state, allowed_origins)
        if configure is not None:
            configure(app, self.state)
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(ServerConfig(app, limits, log_level="critical"))
        self.loop: asyncio.AbstractEventLoop | None = None

        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve(sockets=[listener])

        self.thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < deadline, "it did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        def close() -> None:
            for callback in self.state.on_shutdown:
                callback()
            self.server.should_exit = True

        assert self.loop is not None
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(close)
            self.thread.join(timeout=60)
        assert not self.thread.is_alive()

    def abort_connections(self) -> None:
        """Aborts every connection, like a network failure; the server keeps running."""
        assert self.loop is not None
        for connection in list(self.server.server_state.connections):
            self.loop.call_soon_threadsafe(connection.transport.abort)

    def becomes_idle(self) -> bool:
        """Waits until no request runs or waits; False after 20 seconds."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            busy = [
                worker.model.engine.has_work or worker.running or worker.waiting
                for worker in self.state.workers.values()
            ]
            if not any(busy):
                return True
            time.sleep(0.02)
        return False


def start_server(log: Path, port: int, *flags: str) -> tuple[subprocess.Popen[bytes], str]:
    """Starts `medley serve` as a process; its output goes to `log`. Returns it and its URL."""
    command = [sys.executable, "-m", "medley.cli", "serve", "--ckpt", "tiny", "--port", str(port)]
    with open(log, "wb") as out:
        process = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=out, stderr=out)
    deadline = time.monotonic() + 120
    while "listening at" not in (text := log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.05)
    return process, text.split("listening at ")[1].split()[0]
