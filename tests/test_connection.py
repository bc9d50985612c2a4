"""Clients that send or read slowly, or not at all: each connection ends by itself."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest
import uvicorn
from running_server import RunningServer

from medley.serving.connection import ServerConfig
from medley.serving.limits import Limits
from medley.serving.ui.mount import mount_ui

CHAT = "/v1/chat/completions"
SHORT = {"messages": [{"role": "user", "content": "Which organ is shown?"}], "mode": "text",
         "max_tokens": 2, "model": "tiny"}  # fmt: skip
# `request_timeout` is much longer: the limits begin with the connection, not with a request.
LIMITS = Limits(
    head_timeout=1.0, body_timeout=1.0, send_timeout=1.0, request_timeout=300, max_tokens=4096
)
WAIT = 60.0  # seconds until a test gives up
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(LIMITS, configure=mount_ui)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def serves_others_meanwhile(running: RunningServer) -> Iterator[None]:
    yield
    assert httpx.post(running.url + CHAT, json=SHORT, timeout=WAIT).status_code == 200
    assert running.becomes_idle()
    assert running.state.body_memory.used == 0


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def read_to_end(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection; fails if it does not."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def drip(connection: socket.socket, piece: bytes) -> bytes:
    """Sends a piece again and again, until the server closes the connection; what it has sent."""
    stopped = threading.Event()

    def send() -> None:
        deadline = time.monotonic() + WAIT
        with contextlib.suppress(OSError):
            while not stopped.wait(0.05) and time.monotonic() < deadline:
                connection.sendall(piece)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return read_to_end(connection)
    finally:
        stopped.set()
        sender.join()


def head(path: str, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


# --- heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start", [b"", b"G", b"GET /health HTTP/1.1\r\n", b"POST /login HTTP/1.1\r\nHost: x\r\nA: "]
)
def test_connection_without_a_complete_head_is_closed(start: bytes, running: RunningServer) -> None:
    with connect(running.url) as connection:
        connection.sendall(start)
        received = read_to_end(connection)
    assert received.startswith(b"HTTP/1.1 408 ") if start else received == b""


@pytest.mark.parametrize("piece", [b"a", b"b: c\r\n"])
def test_dripped_head_is_closed(piece: bytes, running: RunningServer) -> None:
    with connect(running.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nb: ")
        assert b"408" in drip(connection, piece)


def test_dripped_second_head_of_a_kept_connection_is_closed(running: RunningServer) -> None:
    with connect(running.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health HTTP/1.1\r\nb: ")
        assert b"408" in drip(connection, b"a")


def test_hundreds_of_half_open_connections_delay_nobody(running: RunningServer) -> None:
    connections = [connect(running.url) for _ in range(400)]
    for number, connection in enumerate(connections):
        connection.sendall(b"GET /health HTTP/1.1\r\n"[: number % 23])
    assert httpx.get(f"{running.url}/health", timeout=WAIT).status_code == 200
    for connection in connections:
        read_to_end(connection)
        connection.close()


def test_kept_connection_is_not_closed_between_complete_requests(running: RunningServer) -> None:
    with connect(running.url) as connection:
        for _ in range(4):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            response = HTTPResponse(connection)
            response.begin()
            assert (response.status, b'"ok"' in response.read()) == (200, True)
            time.sleep(LIMITS.head_timeout / 2)


# --- bodies -----------------------------------------------------------------------------------

PATHS = [
    CHAT, "/v1/images/generations", "/worker_generate_stream", "/login", "/gradio_api/upload",
    "/gradio_api/queue/join", "/unknown",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", ["Content-Length: 5000", "Transfer-Encoding: chunked"])
def test_dripped_body_is_closed(path: str, length: str, running: RunningServer) -> None:
    is_chunked = "chunked" in length
    with connect(running.url) as connection:
        connection.sendall(head(path, length))
        received = drip(connection, b"1\r\n \r\n" if is_chunked else b" ")
    status = received.split(b" ", 2)[1]
    if path in ("/login", "/unknown"):  # Rejected before the body was received.
        assert status in (b"404", b"405", b"408")
    else:
        assert status == b"408"
        assert b"not complete after 1 s" in received


@pytest.mark.parametrize("path", PATHS)
def test_body_that_never_comes_is_closed(path: str, running: RunningServer) -> None:
    with connect(running.url) as connection:
        connection.sendall(head(path, "Content-Length: 5000", "Connection: close"))
        assert read_to_end(connection).startswith(b"HTTP/1.1 4")


def test_body_that_a_client_continues_after_its_rejection_is_closed(running: RunningServer) -> None:
    with connect(running.url) as connection:
        connection.sendall(head(CHAT, f"Content-Length: {LIMITS.max_body_bytes + 1}"))
        assert b"413" in drip(connection, b" ")


def test_slow_body_within_the_limit_is_read(running: RunningServer) -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}'

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 30):
            time.sleep(0.1)
            yield body[start : start + 30]

    headers = {"Content-Type": "application/json"}
    response = httpx.post(running.url + CHAT, content=pieces(), headers=headers, timeout=WAIT)
    assert response.status_code == 200, response.text


# --- responses --------------------------------------------------------------------------------


def test_client_that_does_not_read_its_stream_holds_no_row(running: RunningServer) -> None:
    body = SHORT | {"mode": "image", "max_tokens": 1000, "min_images": 3, "max_images": 3,
                    "stream": True, "previews": 64}  # fmt: skip
    with connect(running.url) as connection:
        data = httpx.Request("POST", running.url + CHAT, json=body).content
        connection.sendall(head(CHAT, f"Content-Length: {len(data)}") + data)
        wait_until(lambda: running.worker.running == 1)
        wait_until(lambda: running.worker.running == 0)


@contextlib.contextmanager
def server_of(app: Any) -> Iterator[tuple[uvicorn.Server, str]]:
    """A server of an ASGI application with the connections of this project."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(ServerConfig(app, LIMITS, log_level="critical"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=WAIT)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("has_end", [True, False])
def test_client_that_does_not_read_is_disconnected(is_stream: bool, has_end: bool) -> None:
    """Also if the application has ended its response, so that only the connection remains."""
    size, sent = 32 << 20, threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(512 if is_stream else 1):
            part = b"x" * (size // 512 if is_stream else size)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if has_end:
            await send({"type": "http.response.body", "body": b""})
        sent.set()
        if not has_end:
            raise ConnectionError

    with server_of(app) as (server, url), connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: len(server.server_state.connections) == 1)
        wait_until(lambda: not server.server_state.connections)
        assert sent.wait(WAIT)


def test_slow_reader_that_makes_progress_gets_its_response() -> None:
    size = 2 << 20

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [(b"content-length", str(size).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"x" * size})

    with server_of(app) as (_, url), connect(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        while piece := connection.recv(1 << 16):
            received += len(piece)
            time.sleep(0.08)
        assert received > size


def test_shutdown_does_not_wait_for_half_open_connections() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no request is complete")

    with server_of(app) as (server, url), connect(url) as first, connect(url) as second:
        second.sendall(b"GET /")
        wait_until(lambda: len(server.server_state.connections) == 2)
        server.should_exit = True
        assert read_to_end(first) == b""
        read_to_end(second)
