"""A server of `tiny`, in a thread of the tests' process or in one of its own."""

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
from medley.serving.limits import Limits
from medley.serving.state import State
from medley.serving.worker import EngineWorker


class Running:
    """Its model, its worker and its address."""

    def __init__(
        self, limits: Limits, token: str | None = None, rows: int = 8,
        change: Callable[[FastAPI, State], None] | None = None, names: Sequence[str] = ("tiny",),
    ) -> None:  # fmt: skip
        workers = {name: EngineWorker(name, medley.load("tiny"), limits, rows) for name in names}
        self.worker = workers[names[0]]
        self.model = self.worker.model
        self.state = State(workers, limits, token)
        app = make_app(self.state)
        if change is not None:
            change(app, self.state)
        listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", access_log=False)
        self.server = uvicorn.Server(config)
        self.loop: asyncio.AbstractEventLoop | None = None

        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve(sockets=[listening])

        self.thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self.thread.start()
        until = time.monotonic() + 60
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < until, "it did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        def close() -> None:
            for closing in self.state.closing:
                closing()
            self.server.should_exit = True

        assert self.loop is not None
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(close)
            self.thread.join(timeout=60)
        assert not self.thread.is_alive()

    def cut(self) -> None:
        """Breaks every connection, as a bad network does; the server runs on."""
        assert self.loop is not None
        for connection in list(self.server.server_state.connections):
            self.loop.call_soon_threadsafe(connection.transport.abort)  # type: ignore[union-attr]

    def idle(self) -> bool:
        """Whether every row is free, at once or a moment later."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            at_work = [
                worker.model.engine.has_work or worker.running or worker.waiting
                for worker in self.state.workers.values()
            ]
            if not any(at_work):
                return True
            time.sleep(0.02)
        return False


def started(log: Path, port: int, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    """`medley serve` as a process, and its address; what it prints goes to `log`."""
    command = [sys.executable, "-m", "medley.cli", "serve", "--ckpt", "tiny", "--port", str(port)]
    with open(log, "wb") as out:
        process = subprocess.Popen([*command, *more], cwd=ROOT, stdout=out, stderr=out)
    until = time.monotonic() + 120
    while "listening at" not in (text := log.read_text()):
        assert process.poll() is None and time.monotonic() < until, text
        time.sleep(0.05)
    return process, text.split("listening at ")[1].split()[0]
