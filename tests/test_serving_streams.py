"""Streams of every endpoint: errors before and after the first event, and encoded prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running_server import RunningServer

from medley.serving.limits import Limits, RequestError

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Write a report."}]},
    COMPLETIONS: {"prompt": "Write a report."},
    RESPONSES: {"input": "Write a report."},
}


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    """One place for a request, none in the queue: a request with two choices never fits."""
    server = RunningServer(Limits(max_queue=0, request_timeout=60), max_num_seqs=1)
    yield server
    assert server.becomes_idle()
    server.stop()


def send(running: RunningServer, path: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "seed": 4, **BODIES[path], **fields}
    return httpx.post(running.url + path, json=body, timeout=60)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_gives_its_status(stream: bool, echo: bool, running: RunningServer) -> None:
    response = send(running, COMPLETIONS, stream=stream, echo=echo, n=2)
    assert response.status_code == 429, response.text
    assert "retry-after" in response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_without_generation_needs_no_place(stream: bool, running: RunningServer) -> None:
    response = send(running, COMPLETIONS, stream=stream, echo=True, max_tokens=0)
    assert response.status_code == 200
    assert "Write a report." in response.text


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 1), ({"echo": True}, 1), ({"echo": True, "stream": True}, 1), ({"logprobs": 1}, 1),
        ({"prompt": ["a", "b"], "echo": True, "stream": True}, 2),
        ({"echo": True, "max_tokens": 0}, 1),
    ],
)  # fmt: skip
def test_a_prompt_is_encoded_once(
    fields: dict[str, Any], count: int, running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = []
    encode_prompt = running.model.encode_prompt

    def record(prompt: Any, *rest: Any) -> Any:
        prompts.append(prompt)
        return encode_prompt(prompt, *rest)

    monkeypatch.setattr(running.model, "encode_prompt", record)
    response = send(running, COMPLETIONS, **({"max_tokens": 2} | fields))
    assert response.status_code == 200, response.text
    assert len(prompts) == count


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("error", [RuntimeError("broken"), RequestError("refused", 503)])
def test_an_internal_error_in_a_stream_is_logged(
    error: Exception,
    path: str,
    running: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its traceback is nowhere else: the response has status 200. A refusal is no fault."""
    instrument = running.state.instrument

    async def fail_after_the_first_chunk(*arguments: Any) -> Any:
        async for chunk in instrument(*arguments):
            yield chunk
            raise error

    monkeypatch.setattr(running.state, "instrument", fail_after_the_first_chunk)
    with caplog.at_level(logging.ERROR, "medley.serving"):
        response = send(running, path, stream=True)
    assert response.status_code == 200
    assert '"error"' in response.text
    assert "[DONE]" not in response.text
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert logged == ([error] if isinstance(error, RuntimeError) else [])
    assert running.becomes_idle()
