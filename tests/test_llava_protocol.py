"""LLaVA's worker and controller, against the recorded sessions."""

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
from medley.serving.llava_api import GenerateRequest, told
from medley.serving.stop_strings import StopWords
from medley.serving.untrusted_inputs import RequestReader

CASES = golden("serve_protocol.json")


def reader() -> RequestReader:
    return RequestReader(Limits(), medley.ImageTokenizer.from_checkpoint("tiny"), 100_000)


# --- the worker -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["worker_generate_stream"], ids=lambda c: c["id"])
def test_messages_are_the_recorded_ones(
    case: dict[str, Any], exceptions: dict[str, dict[str, str]]
) -> None:
    given, expected = case["input"], case["expected"]
    fault = exceptions["serve_protocol"].get(case["id"])
    body = {k: v for k, v in given["json_body"].items() if k != "images"}
    if expected["generate_kwargs"] is None:  # an error, which ours puts into words
        with pytest.raises((RequestError, ValueError)):
            GenerateRequest.model_validate(given["json_body"]).document(reader())
        return
    asked = GenerateRequest.model_validate(body)
    options, wanted = asked.options(), expected["generate_kwargs"]
    assert options.text_greedy == (not wanted["do_sample"])
    if not options.text_greedy:
        assert options.text_temperature == wanted["temperature"]
    assert options.text_top_p == wanted["top_p"]
    if given["model_context"] == 2048:  # of a smaller one the engine takes care
        assert options.max_new_tokens == wanted["max_new_tokens"]
    stop = StopWords([asked.stop] if asked.stop else [])

    async def pieces() -> AsyncIterator[str]:
        for piece in given["text_pieces_from_model"]:
            if text := stop(piece):
                yield text
        if rest := stop.rest():
            yield rest

    async def messages() -> list[dict[str, Any]]:
        return [json.loads(m[:-1]) async for m in told(asked.prompt, pieces())]

    found = asyncio.run(messages())
    if fault:
        assert asked.stop not in found[-1]["text"]
        return
    # Theirs says the whole once more at its end, as the worker itself does.
    assert found == [
        m for n, m in enumerate(expected["messages"]) if m not in expected["messages"][:n]
    ]


# --- the controller ---------------------------------------------------------------------------


def session(case: dict[str, Any]) -> None:
    known: dict[str, Any] = dict(case.get("workers_known_to_stub", {}))

    def worker(request: httpx.Request) -> httpx.Response:
        name = f"{request.url.scheme}://{request.url.host}"
        if request.url.path == "/worker_get_status" and name in known:
            return httpx.Response(200, json=known[name])
        if request.url.path == "/worker_generate_stream" and name in known:
            parts = [{"text": text, "error_code": 0} for text in ("P a", "P ab")]
            return httpx.Response(
                200, content=b"".join(json.dumps(p).encode() + b"\0" for p in parts)
            )
        raise httpx.ConnectError("no such worker")

    async def play() -> None:
        outward = httpx.AsyncClient(transport=httpx.MockTransport(worker))
        hosts = frozenset(("w1", "w2", "w9", "dead"))
        app = make_controller_app(case.get("dispatch_method", "shortest_queue"), hosts, outward)
        inward = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=inward, base_url="http://controller") as client:
            for step in case["steps"]:
                if "stopped answering" in step.get("note", ""):
                    known.pop("http://w1", None)
                asked, expected = step["request"], step["response"]
                found = await client.request(asked["method"], asked["path"], json=asked["json"])
                if expected["status"] == 500:  # a field is missing: ours says which
                    assert found.status_code == 400
                    assert "Field required" in found.json()["error"]["message"]
                elif "json" in expected:
                    assert found.status_code == expected["status"]
                    assert found.json() == expected["json"]
                elif "NETWORK ERROR" in expected["body_utf8"]:  # once, and in plain words
                    (message,) = [json.loads(m) for m in found.content.split(b"\0") if m]
                    first = json.loads(expected["body_utf8"].split("\0")[0])
                    assert message["error_code"] == first["error_code"]
                    assert "NETWORK ERROR" not in message["text"]
                else:
                    assert found.text == expected["body_utf8"]

    asyncio.run(play())


@pytest.mark.parametrize("case", CASES["controller_sessions"], ids=lambda c: c["id"])
def test_the_controller_answers_as_recorded(case: dict[str, Any]) -> None:
    session(case)


def test_silent_workers_are_forgotten() -> None:
    case = CASES["heartbeat_expiry"]
    controller = Controller(lambda name: None)
    for name, row in case["input"].items():
        status = WorkerStatus(model_names=[name])
        controller.workers[name] = RegisteredWorker(status, row["check"], 1000.0 - row["age_s"])
    controller.forget_silent(1000.0)
    assert sorted(controller.workers) == case["kept"]


def test_workers_elsewhere_are_not_taken() -> None:
    async def register(name: str) -> bool:
        return await Controller(lambda n: None).register(
            name, True, WorkerStatus(model_names=["m"])
        )

    for name in (
        "http://example.org", "http://10.0.0.1:80", "file:///x", "gopher://127.0.0.1",
        "http://127.0.0.1:9200/any/path?x=", "http://127.0.0.1:99999999", "http://[",
        "http://a@127.0.0.1:80", "http://127.0.0.1:80#", "",
    ):  # fmt: skip
        with pytest.raises(RequestError, match="not on one of this controller's hosts"):
            asyncio.run(register(name))
    assert asyncio.run(register("http://127.0.0.1:21002"))


def test_a_lottery_follows_the_speeds() -> None:
    controller = Controller(lambda name: None, "lottery", seed=0)
    for name, speed in (("a", 1.0), ("b", 3.0)):
        controller.workers[name] = RegisteredWorker(
            WorkerStatus(model_names=["m"], speed=speed), True, 0
        )
    drawn = [controller.address("m") for _ in range(400)]
    assert 60 < drawn.count("a") < 140
