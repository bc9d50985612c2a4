"""The server with invalid requests, a thousand concurrent clients, and after SIGKILL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from running_server import RunningServer, start_server
from schemathesis import GenerationMode, checks

from medley.serving.limits import Limits

CLIENTS = 1000
CHAT = "/v1/chat/completions"
SHORT = {"messages": [{"role": "user", "content": "Which organ is shown?"}], "mode": "text",
         "max_tokens": 2, "model": "tiny"}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(
        Limits(max_tokens=16, max_queue=2 * CLIENTS, request_timeout=120), max_num_seqs=32
    )
    yield server
    assert server.becomes_idle()
    server.stop()


# --- the schema -------------------------------------------------------------------------------


@pytest.mark.hostile(repeat=1)
def test_all_routes_conform_to_the_openapi_schema(running: RunningServer) -> None:
    """No request causes a server error; statuses, content types and bodies are those declared."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {CHAT, "/v1/images/generations"}
    openapi = schemathesis.specs.openapi.checks
    required = [
        checks.not_a_server_error, openapi.status_code_conformance,
        openapi.content_type_conformance, openapi.response_schema_conformance,
        openapi.negative_data_rejection,
    ]  # fmt: skip
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(max_examples=hostile.scaled(25), deadline=None, derandomize=True,
                      database=None, suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                case.call_and_validate(timeout=60, checks=required)

            try:
                check()
            except Unsatisfiable:  # A route without parameters has no invalid request.
                assert mode is GenerationMode.NEGATIVE


# --- invalid requests -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS, which the server does not support
        b"\0" * 4096, b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{",
        b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)  # fmt: skip
def test_invalid_http_affects_only_its_own_connection(data: bytes, running: RunningServer) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ),  # The server may close the connection early.
    ):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1 << 16)
    assert httpx.post(running.url + CHAT, json=SHORT, timeout=60).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"\xff\xfe", b'{"model": "tiny", "messages": ' + b"[" * 100_000,
        b'{"model": "tiny", "messages": [{"role": "user", "content": NaN}]}',
        b'{"model": "tiny", "messages": [{}], "n": 1e999}', b'{"model": "tiny", "messages": {}}',
        b'{"model": 1' + b"0" * 5000 + b', "messages": []}',
    ],
)  # fmt: skip
def test_invalid_bodies_are_rejected(body: bytes, running: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(running.url + CHAT, content=body, headers=headers, timeout=60)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(response.text) < 1000  # The error does not contain the body.


# --- load -------------------------------------------------------------------------------------


def test_a_thousand_concurrent_requests_all_succeed(running: RunningServer) -> None:
    async def send_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:
            requests = [
                client.post(running.url + CHAT, json=SHORT | {"seed": i}) for i in range(CLIENTS)
            ]
            return list(await asyncio.gather(*requests))

    responses = asyncio.run(send_all())
    assert Counter(response.status_code for response in responses) == {200: CLIENTS}


# --- SIGKILL ----------------------------------------------------------------------------------


@pytest.mark.hostile(repeat=3)
def test_killed_server_restarts_at_its_port_with_equal_responses(tmp_path: Path) -> None:
    process, url = start_server(tmp_path / "log", 0)
    port = int(url.rsplit(":", 1)[1])
    try:
        before = httpx.post(url + CHAT, json=SHORT | {"seed": 3}, timeout=60).json()
        with httpx.stream("POST", url + CHAT, timeout=60, json=SHORT | {
            "mode": "image", "max_tokens": 2000, "stream": True, "previews": 60,
        }) as response:  # fmt: skip
            lines = response.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                list(lines)
        process.wait(timeout=30)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        process, second_url = start_server(tmp_path / "log2", port)
        assert second_url == url
        after = httpx.post(url + CHAT, json=SHORT | {"seed": 3}, timeout=60).json()
        assert after["choices"] == before["choices"]
    finally:
        process.kill()
        process.wait(timeout=30)
