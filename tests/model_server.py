"""A mock server of a chat model: configurable replies and faults, recorded requests."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Server:
    address: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)  # by the last message
    requests: Counter[str] = field(default_factory=Counter)  # by the last message
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    running: int = 0
    max_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    default_fault: str = ""  # of requests without an entry in `faults`
    reply: Callable[[str], str] = lambda message: f"User: Q of {message[-2:]}?\n\nAssistant: A toy."


@contextmanager
def running_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Runs on loopback, with short pauses between the openai package's retries."""
    state = Server()
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr("openai._constants.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            with state.lock:
                state.requests[text] += 1
                state.bodies.append(body)
                state.paths.append(self.path)
                state.running += 1
                state.max_running = max(state.max_running, state.running)
            time.sleep(0.03)
            with state.lock:
                state.running -= 1
            faults = state.faults.get(text, [])
            fault = faults.pop(0) if faults else state.default_fault
            if fault == "drop":
                self.connection.close()
                return
            status = int(fault) if fault.isdigit() else 200
            if fault == "stall":
                time.sleep(3)
            reply = "" if fault == "empty" else state.reply(text)
            message = {"role": "assistant", "content": reply}
            content: dict[str, Any] = {
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}]
            }
            if fault == "length":
                content["choices"][0]["finish_reason"] = "length"
            if fault == "surrogate":
                message["content"] = "User: a\nAssistant: \ud83d"
            data = b"not json" if fault == "garbage" else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        state.address = f"http://127.0.0.1:{http_server.server_port}/v1"
        yield state
        http_server.shutdown()
