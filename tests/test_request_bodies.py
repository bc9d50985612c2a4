"""Request bodies: JSON floods, memory for all bodies, and the event loop during a parse."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running_server import RunningServer
from test_connection import connect, head, wait_until

from medley.phantoms import Phantom
from medley.serving import json_body
from medley.serving.controller import make_controller_app
from medley.serving.json_body import MAX_DEPTH, MAX_VALUES, parse_json
from medley.serving.limits import Limits, RequestError
from medley.utils.html import data_url

CHAT = "/v1/chat/completions"
LLAVA = "/worker_generate_stream"
SHORT = {"messages": [{"role": "user", "content": "Which organ is shown?"}], "mode": "text",
         "max_tokens": 2, "model": "tiny"}  # fmt: skip
JSON = {"Content-Type": "application/json"}
MEGABYTE = 1 << 20
LIMITS = Limits(
    max_body_bytes=32 * MEGABYTE, max_bodies=2, request_timeout=300, max_messages=50, max_parts=80
)
WAIT = 120.0  # seconds until a test gives up


# --- the structure of JSON --------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a",:[]{}\\/\n\u2c22\u5c5d😀', max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=3), values),
)


def count(value: Any) -> int:
    """Values, where an array or an object counts as one more than its items, or two."""
    if not isinstance(value, dict | list):
        return 1
    items = list(value.values()) if isinstance(value, dict) else value
    return 1 + (sum(map(count, items)) if items else 1)


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@given(value=JSON_VALUES, is_ascii=st.booleans(), chunk=st.integers(1, 9))
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_values_and_depth_are_counted_outside_of_strings(
    value: Any, is_ascii: bool, chunk: int
) -> None:
    data = json.dumps(value, ensure_ascii=is_ascii).encode()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_body, "_CHUNK", chunk)
        assert json_body._measure(data) == (count(value), depth(value))


FLOODS = {
    "objects": b'{"a": [' + b"{}," * MAX_VALUES + b"{}]}",
    "numbers": b"[" + b"1," * MAX_VALUES + b"1]",
    "texts": b"[" + b'"\\"",' * MAX_VALUES + b'""]',
    "keys": b"{" + b'"a":1,' * MAX_VALUES + b'"b":1}',
    "arrays of arrays": b"[" + b"[[]]," * (MAX_VALUES // 2) + b"0]",
    "unfinished": b'{"messages": [' + b"{}," * MAX_VALUES,
    "after a long text": b'["' + b"A" * (3 * MEGABYTE) + b'",' + b"{}," * MAX_VALUES + b"0]",
    "after text of another encoding": '["∀", '.encode("utf-16") + b"[],"[:3] * MAX_VALUES,
    "depth": b"[" * 500_000,
    "depth with ends": b'{"a":' * 5000 + b"1" + b"}" * 5000,
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=list(FLOODS))
def test_floods_are_rejected_before_they_are_parsed(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("json.loads", lambda text: pytest.fail("it was parsed"))
    expected = rf"got at least \d+, limit {MAX_VALUES}|got \d+ levels, limit {MAX_DEPTH}"
    with pytest.raises((RequestError, UnicodeDecodeError)) as raised:
        asyncio.run(parse_json(data, Limits()))
    assert isinstance(raised.value, UnicodeDecodeError) or re.search(expected, str(raised.value))


@pytest.mark.parametrize(
    "value",
    [
        {"a": "," * (3 * MAX_VALUES)}, {"a": "[{" * MAX_VALUES}, {"a": '\\"' * MAX_VALUES},
        {"a": list(range(MAX_VALUES - 10))}, {"a": "x" * (8 * MEGABYTE), "b": [[], {}]}, None,
    ],
)  # fmt: skip
def test_long_texts_and_many_values_within_the_limit_are_parsed(value: Any) -> None:
    assert asyncio.run(parse_json(json.dumps(value).encode(), Limits())) == value


# --- messages and parts -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(LIMITS, max_num_seqs=1)
    yield server
    server.stop()


def post(running: RunningServer, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(running.url + path, content=content, headers=JSON, timeout=WAIT)


TEXT = {"type": "text", "text": "a"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{}] * 51, "Too many messages (got 51, limit 50)"),
        ([{"role": "user", "content": [TEXT] * 81}], "Too many content parts (got 81, limit 80)"),
        ([{"role": "user", "content": [TEXT] * 2}] * 41, "Too many content parts (got 82"),
        ([{"role": "user", "parts": [{}] * 81}], "Too many content parts (got 81, limit 80)"),
    ],
)  # fmt: skip
def test_too_many_messages_or_parts_are_rejected(
    messages: Any, message: str, running: RunningServer
) -> None:
    response = post(running, CHAT, SHORT | {"messages": messages})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert message in error["message"]


@pytest.mark.slow
def test_flood_is_rejected_by_each_route(running: RunningServer) -> None:
    flood = b'{"model": "tiny", "messages": [' + b"{}," * 1_000_000 + b"{}]}"
    limit = f"limit {MAX_VALUES}"
    for path in (CHAT, "/v1/images/generations"):
        response = post(running, path, flood)
        assert response.status_code == 400 and limit in response.json()["error"]["message"]
    response = post(running, LLAVA, flood)
    message = json.loads(response.content.rstrip(b"\0"))
    assert message["error_code"] == 1 and limit in message["text"]


def test_flood_is_rejected_by_the_controller() -> None:
    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_controller_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return [
                await client.post(path, content=FLOODS["objects"], headers=JSON)
                for path in ("/register_worker", LLAVA)
            ]

    registered, generated = asyncio.run(send())
    assert registered.status_code == 400 and "limit" in registered.json()["error"]["message"]
    assert "too many JSON values" in json.loads(generated.content.rstrip(b"\0"))["text"]


# --- the event loop ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, LLAVA])
def test_other_requests_are_answered_while_a_body_is_parsed(
    path: str, running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_parsing, may_end = threading.Event(), threading.Event()
    original = json_body._parse

    def slow_parse(data: bytes | bytearray, limits: Limits) -> Any:
        is_parsing.set()
        assert may_end.wait(WAIT)
        return original(data, limits)

    bodies: list[httpx.Response] = []
    body = SHORT | {"prompt": "Hi", "max_new_tokens": 2} if path == LLAVA else SHORT
    with monkeypatch.context() as patched:
        patched.setattr(json_body, "_parse", slow_parse)
        thread = threading.Thread(target=lambda: bodies.append(post(running, path, body)))
        thread.start()
        assert is_parsing.wait(WAIT)
        assert httpx.get(f"{running.url}/health", timeout=WAIT).status_code == 200
        assert not bodies
        may_end.set()
        thread.join(timeout=WAIT)
    assert bodies[0].status_code == 200


# --- memory -----------------------------------------------------------------------------------


def open_bodies(url: str, count: int, piece: bytes, is_chunked: bool) -> list[socket.socket]:
    """Connections that have sent all of a body except for its end."""
    connections = []
    for _ in range(count):
        connection = connect(url)
        length = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(piece) + 9}"
        connection.sendall(head(CHAT, length))
        data = b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece
        sender = threading.Thread(target=_send_all, args=(connection, data))
        sender.start()
        sender.join(timeout=WAIT)
        connections.append(connection)
    return connections


def _send_all(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:  # The server has rejected the body and closed the connection.
        return


@pytest.mark.slow
@pytest.mark.parametrize("is_chunked", [True, False])
def test_many_unfinished_bodies_use_bounded_memory(
    is_chunked: bool, running: RunningServer
) -> None:
    memory, process = running.state.body_memory, psutil.Process()
    piece = b" " * (16 * MEGABYTE)
    before = process.memory_info().rss
    connections = open_bodies(running.url, 24, piece, is_chunked)
    try:
        wait_until(lambda: memory.used > memory.limit - len(piece))
        assert memory.used <= memory.limit == 64 * MEGABYTE
        assert process.memory_info().rss - before < 5 * memory.limit < 24 * len(piece)
        rejected = connections[-1].recv(1 << 16)
        assert rejected.startswith(b"HTTP/1.1 503 ") and b"retry-after: 5" in rejected.lower()
        assert b"too many request bodies" in rejected
        assert httpx.get(f"{running.url}/health", timeout=WAIT).status_code == 200
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: memory.used == 0)
    assert post(running, CHAT, SHORT).status_code == 200


@pytest.mark.slow
def test_declared_length_without_memory_is_rejected_before_the_body(
    running: RunningServer,
) -> None:
    memory = running.state.body_memory
    memory.used += memory.limit - 1000  # bodies of others
    try:
        response = post(running, CHAT, b" " * 2000)
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert "Retry in 5 s" in response.json()["error"]["message"]
        assert post(running, CHAT, SHORT).status_code == 200
    finally:
        memory.used -= memory.limit - 1000


@pytest.mark.slow
def test_endless_chunked_body_is_rejected(running: RunningServer) -> None:
    piece = b"%x\r\n%b\r\n" % (MEGABYTE, b" " * MEGABYTE)
    with connect(running.url) as connection:
        connection.sendall(head(CHAT, "Transfer-Encoding: chunked"))
        endless = piece * (2 * LIMITS.max_body_bytes // MEGABYTE)
        sender = threading.Thread(target=_send_all, args=(connection, endless))
        sender.start()
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
        wait_until(lambda: running.state.body_memory.used == 0)  # although the client still sends
        connection.shutdown(socket.SHUT_RDWR)
        sender.join(timeout=WAIT)


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, LLAVA])
def test_waiting_request_has_returned_the_memory_of_its_body(
    path: str, running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = data_url(Phantom("CT", "head").image(256))
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Hi"}]
    body = SHORT | {"messages": [{"role": "user", "content": parts}]}
    if path == LLAVA:
        images = [image.partition(",")[2]]
        body = {"model": "tiny", "prompt": "<image>Hi", "images": images, "max_new_tokens": 2}
    may_step, step = threading.Event(), running.model.engine.step

    def slow_step() -> Any:
        assert may_step.wait(WAIT)
        return step()

    monkeypatch.setattr(running.model.engine, "step", slow_step)
    responses: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: responses.append(post(running, path, body)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: (running.worker.running, running.worker.waiting) == (1, 2))
        assert running.state.body_memory.used == 0
    finally:
        may_step.set()
        for thread in threads:
            thread.join(timeout=WAIT)
    assert [response.status_code for response in responses] == [200] * 3
