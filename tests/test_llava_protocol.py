"""LLaVA's worker and controller protocol, compared with recorded sessions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from conftest import golden

import medley
from medley.serving.controller import (
    Controller,
    RegisteredWorker,
    WorkerStatus,
    make_controller_app,
)
from medley.serving.limits import Limits, RequestError
from medley.serving.llava_api import GenerateRequest, encode_stream
from medley.serving.stop_strings import StopStringFilter
from medley.serving.untrusted_inputs import RequestReader

CASES = golden("serve_protocol.json")


def make_reader() -> RequestReader:
    return RequestReader(Limits(), medley.ImageTokenizer.from_checkpoint("tiny"), 100_000)


async def no_status(url: str) -> WorkerStatus | None:
    return None


# --- the worker -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["worker_generate_stream"], ids=lambda c: c["id"])
def test_messages_equal_the_recorded_ones(
    case: dict[str, Any], exceptions: dict[str, dict[str, str]]
) -> None:
    inputs, expected = case["input"], case["expected"]
    exception = exceptions["serve_protocol"].get(case["id"])
    body = {k: v for k, v in inputs["json_body"].items() if k != "images"}
    if expected["generate_kwargs"] is None:  # LLaVA's worker fails; ours reports an error.
        with pytest.raises((RequestError, ValueError)):
            GenerateRequest.model_validate(inputs["json_body"]).to_document(make_reader())
        return
    request = GenerateRequest.model_validate(body)
    options, recorded = request.to_options(), expected["generate_kwargs"]
    assert options.text_greedy == (not recorded["do_sample"])
    if not options.text_greedy:
        assert options.text_temperature == recorded["temperature"]
    assert options.text_top_p == recorded["top_p"]
    if inputs["model_context"] == 2048:  # The engine handles a shorter context.
        assert options.max_new_tokens == recorded["max_new_tokens"]
    stop = StopStringFilter([request.stop] if request.stop else [])

    async def pieces() -> AsyncIterator[str]:
        for piece in inputs["text_pieces_from_model"]:
            if text := stop(piece):
                yield text
        if rest := stop.flush():
            yield rest

    async def messages() -> list[dict[str, Any]]:
        return [json.loads(m[:-1]) async for m in encode_stream(request.prompt, pieces())]

    actual = asyncio.run(messages())
    if exception:
        assert request.stop not in actual[-1]["text"]
        return
    # LLaVA repeats the last message, and so does our worker (not this stream).
    assert actual == [
        m for n, m in enumerate(expected["messages"]) if m not in expected["messages"][:n]
    ]


# --- the controller ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["controller_sessions"], ids=lambda c: c["id"])
def test_controller_sessions_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    workers: dict[str, Any] = dict(case.get("workers_known_to_stub", {}))

    def worker(request: httpx.Request) -> httpx.Response:
        url = f"{request.url.scheme}://{request.url.host}"
        if request.url.path == "/worker_get_status" and url in workers:
            return httpx.Response(200, json=workers[url])
        if request.url.path == "/worker_generate_stream" and url in workers:
            messages = [{"text": text, "error_code": 0} for text in ("P a", "P ab")]
            return httpx.Response(
                200, content=b"".join(json.dumps(m).encode() + b"\0" for m in messages)
            )
        raise httpx.ConnectError("no such worker")

    async def replay() -> None:
        to_workers = httpx.AsyncClient(transport=httpx.MockTransport(worker))
        hosts = frozenset(("w1", "w2", "w9", "dead"))
        app = make_controller_app(case.get("dispatch_method", "shortest_queue"), hosts, to_workers)
        to_controller = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=to_controller, base_url="http://c") as client:
            for step in case["steps"]:
                if "stopped answering" in step.get("note", ""):
                    workers.pop("http://w1", None)
                request, expected = step["request"], step["response"]
                actual = await client.request(
                    request["method"], request["path"], json=request["json"]
                )
                if expected["status"] == 500:  # A field is missing; our error names it.
                    assert actual.status_code == 400
                    assert "Field required" in actual.json()["error"]["message"]
                elif "json" in expected:
                    assert actual.status_code == expected["status"]
                    assert actual.json() == expected["json"]
                elif "NETWORK ERROR" in expected["body_utf8"]:  # Ours sends one message.
                    (message,) = [json.loads(m) for m in actual.content.split(b"\0") if m]
                    first = json.loads(expected["body_utf8"].split("\0")[0])
                    assert message["error_code"] == first["error_code"]
                    assert "NETWORK ERROR" not in message["text"]
                else:
                    assert actual.text == expected["body_utf8"]

    asyncio.run(replay())


def test_workers_without_heartbeat_are_removed() -> None:
    case = CASES["heartbeat_expiry"]
    controller = Controller(no_status)
    for url, row in case["input"].items():
        status = WorkerStatus(model_names=[url])
        controller.workers[url] = RegisteredWorker(status, row["check"], 1000.0 - row["age_s"])
    controller.remove_expired(1000.0)
    assert sorted(controller.workers) == case["kept"]


def test_workers_on_other_hosts_are_rejected() -> None:
    async def register(url: str) -> bool:
        return await Controller(no_status).register(url, True, WorkerStatus(model_names=["m"]))

    for url in (
        "http://example.org", "http://10.0.0.1:80", "file:///x", "gopher://127.0.0.1",
        "http://127.0.0.1:9200/any/path?x=", "http://127.0.0.1:99999999", "http://[",
        "http://a@127.0.0.1:80", "http://127.0.0.1:80#", "",
    ):  # fmt: skip
        with pytest.raises(RequestError, match="Not scheme://host:port of an allowed host"):
            asyncio.run(register(url))
    assert asyncio.run(register("http://127.0.0.1:21002"))


def test_lottery_is_proportional_to_worker_speed() -> None:
    controller = Controller(no_status, "lottery", seed=0)
    for url, speed in (("a", 1.0), ("b", 3.0)):
        controller.workers[url] = RegisteredWorker(
            WorkerStatus(model_names=["m"], speed=speed), True, 0
        )
    chosen = [controller.choose_worker("m") for _ in range(400)]
    assert 60 < chosen.count("a") < 140
