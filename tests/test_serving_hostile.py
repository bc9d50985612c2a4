"""The server under clients that send what they should not, by thousands, or go away; and killed."""

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

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from running_server import Running, started
from schemathesis import GenerationMode, checks

from medley.serving.limits import Limits

CLIENTS = 1000
CHAT = "/v1/chat/completions"
SHORT = {"messages": [{"role": "user", "content": "Which organ is shown?"}], "mode": "text",
         "max_tokens": 2, "model": "tiny"}  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(Limits(tokens=16, queue=2 * CLIENTS, seconds=120), rows=32)
    yield found
    assert found.idle()
    found.stop()


# --- the schema -------------------------------------------------------------------------------


def test_every_route_keeps_to_its_schema(running: Running) -> None:
    """No fault of the server, whatever is sent; statuses, types and errors as they are told."""
    described = schemathesis.openapi.from_url(f"{running.address}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {CHAT, "/v1/images/generations"}
    own = schemathesis.specs.openapi.checks
    wanted = [checks.not_a_server_error, own.status_code_conformance, own.content_type_conformance,
              own.response_schema_conformance, own.negative_data_rejection]  # fmt: skip
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(max_examples=25, deadline=None, derandomize=True, database=None,
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def hold(case: Any) -> None:
                case.call_and_validate(timeout=60, checks=wanted)

            try:
                hold()
            except Unsatisfiable:  # nothing is negative where nothing is asked for
                assert mode is GenerationMode.NEGATIVE


# --- garbage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS, to a server without it
        b"\0" * 4096, b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{",
        b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)  # fmt: skip
def test_what_is_no_request_costs_its_own_connection_alone(sent: bytes, running: Running) -> None:
    host, port = running.address.removeprefix("http://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),  # closed before all was read
    ):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1 << 16)
    assert httpx.post(running.address + CHAT, json=SHORT, timeout=60).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"\xff\xfe", b'{"model": "tiny", "messages": ' + b"[" * 100_000,
        b'{"model": "tiny", "messages": [{"role": "user", "content": NaN}]}',
        b'{"model": "tiny", "messages": [{}], "n": 1e999}', b'{"model": "tiny", "messages": {}}',
        b'{"model": 1' + b"0" * 5000 + b', "messages": []}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_question_are_refused(body: bytes, running: Running) -> None:
    headers = {"Content-Type": "application/json"}
    found = httpx.post(running.address + CHAT, content=body, headers=headers, timeout=60)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert len(found.text) < 1000  # what was sent is not sent back


# --- many -------------------------------------------------------------------------------------


def test_a_thousand_connections_at_once_are_all_answered(running: Running) -> None:
    async def all_of_them() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:
            asked = [client.post(running.address + CHAT, json=SHORT | {"seed": i})
                     for i in range(CLIENTS)]  # fmt: skip
            return list(await asyncio.gather(*asked))

    answers = asyncio.run(all_of_them())
    assert Counter(answer.status_code for answer in answers) == {200: CLIENTS}


# --- killed -----------------------------------------------------------------------------------


def test_a_killed_server_starts_again_at_its_port_and_answers_the_same(tmp_path: Path) -> None:
    process, address = started(tmp_path / "log", 0)
    port = int(address.rsplit(":", 1)[1])
    try:
        before = httpx.post(address + CHAT, json=SHORT | {"seed": 3}, timeout=60).json()
        with httpx.stream("POST", address + CHAT, timeout=60, json=SHORT | {
            "mode": "image", "max_tokens": 2000, "stream": True, "previews": 60,
        }) as answer:  # fmt: skip
            lines = answer.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                list(lines)
        process.wait(timeout=30)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
        process, again = started(tmp_path / "log2", port)
        assert again == address
        after = httpx.post(address + CHAT, json=SHORT | {"seed": 3}, timeout=60).json()
        assert after["choices"] == before["choices"]
    finally:
        process.kill()
        process.wait(timeout=30)
