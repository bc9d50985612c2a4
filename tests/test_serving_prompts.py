"""Prompts are read outside of the engine's thread; memory that runs out; what /health reports."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from running_server import RunningServer

import medley
from medley.phantoms import Phantom
from medley.serving.limits import Limits
from medley.utils.html import data_url

CHAT = "/v1/chat/completions"
LIMIT = 60  # seconds; a request that hangs fails the test after them
pytestmark = pytest.mark.slow


def body(text: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "mode": "text", "max_tokens": 3, **options}


def image_body(text: str) -> dict[str, Any]:
    url = data_url(Phantom("CT", "head").image(64))
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return body("") | {"messages": [{"role": "user", "content": content}]}


@pytest.fixture
def running() -> Iterator[RunningServer]:
    server = RunningServer(Limits(request_timeout=LIMIT), max_num_seqs=4)
    yield server
    server.stop()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def send(running: RunningServer, request: dict[str, Any]) -> httpx.Response:
    return httpx.post(running.url + CHAT, json=request, timeout=LIMIT)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class BlockedReader:
    """Reading a prompt that contains "Wait" ends when `go` is set."""

    def __init__(self, running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.threads: list[str] = []
        encode_prompt = running.model.encode_prompt

        def encode(prompt: Any, raw_prompt: bool = False) -> list[int]:
            self.threads.append(threading.current_thread().name)
            if "Wait" in str(prompt):
                self.begun.set()
                assert self.go.wait(LIMIT)
            return encode_prompt(prompt, raw_prompt)

        monkeypatch.setattr(running.model, "encode_prompt", encode)


# --- reading ----------------------------------------------------------------------------------


def test_running_requests_continue_while_a_prompt_is_read(
    running: RunningServer, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = BlockedReader(running, monkeypatch)
    image = pool.submit(send, running, body("Show me a CT scan.", mode="image", max_tokens=70))
    wait_for(lambda: running.worker.running == 1)
    slow = pool.submit(send, running, body("Wait"))
    assert reader.begun.wait(LIMIT)
    assert image.result(LIMIT).status_code == 200
    assert not slow.done()
    assert running.worker.waiting == 1
    reader.go.set()
    assert slow.result(LIMIT).status_code == 200
    assert not any(name == "medley-tiny" for name in reader.threads)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_texts_do_not_wait_for_images_and_very_long_texts_of_others(
    running: RunningServer, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    reader = BlockedReader(running, monkeypatch)
    long = f"Wait{' ' * running.worker.max_characters}"[: running.worker.max_characters]
    slow = image_body("Wait") if kind == "image" else body(long)
    others = [pool.submit(send, running, slow) for _ in range(3)]
    assert reader.begun.wait(LIMIT)
    assert send(running, body("Which organ is shown?")).status_code == 200
    assert not any(other.done() for other in others)
    reader.go.set()
    assert len({other.result(LIMIT).status_code for other in others}) == 1


def test_prompt_without_room_is_refused_while_the_engine_is_busy(
    running: RunningServer, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, step = threading.Event(), running.model.engine.step

    def slow_step() -> None:
        assert go.wait(LIMIT)
        step()

    monkeypatch.setattr(running.model.engine, "step", slow_step)
    waiting = pool.submit(send, running, body("Which organ is shown?"))
    wait_for(lambda: running.worker.running == 1)
    words = "nodule " * (running.model.engine.max_seq_len + 10)
    refused = send(running, body(words))
    assert refused.status_code == 400
    assert f"context is {running.model.engine.max_seq_len}" in refused.text
    assert not waiting.done()
    go.set()
    assert waiting.result(LIMIT).status_code == 200


def test_prompt_of_several_responses_is_read_once(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = BlockedReader(running, monkeypatch)
    response = send(running, body("Which organ is shown?", n=4, seed=1, temperature=1.0))
    assert len(response.json()["choices"]) == 4
    assert len(reader.threads) == 1


def test_places_of_prompts_that_could_not_be_read_are_given_back(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = RunningServer(Limits(max_queue=0, request_timeout=LIMIT), max_num_seqs=1)
    reader = BlockedReader(small, monkeypatch)
    first = pool.submit(send, small, body("Wait"))
    assert reader.begun.wait(LIMIT)
    refused = send(small, body("Which organ is shown?"))
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    reader.go.set()
    assert first.result(LIMIT).status_code == 200
    words = "nodule " * (small.model.engine.max_seq_len + 10)
    for _ in range(2):
        wait_for(lambda: small.worker.running + small.worker.waiting == 0)
        assert send(small, body(words)).status_code == 400
    wait_for(lambda: small.worker.running + small.worker.waiting == 0)
    assert send(small, body("Which organ is shown?")).status_code == 200
    small.stop()


def test_client_that_leaves_while_its_prompt_is_read_frees_its_place(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = BlockedReader(running, monkeypatch)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(running.url + CHAT, json=body("Wait"), timeout=httpx.Timeout(LIMIT, read=0.3))
    wait_for(lambda: running.worker.waiting == 0)
    reader.go.set()
    assert send(running, body("Which organ is shown?")).status_code == 200


def test_stopped_worker_fails_requests_whose_prompts_are_not_read(
    running: RunningServer, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = BlockedReader(running, monkeypatch)
    requests = [pool.submit(send, running, body("Wait")) for _ in range(3)]
    wait_for(lambda: running.worker.waiting == 3)
    running.worker.stop()
    reader.go.set()
    responses = [request.result(LIMIT) for request in requests]
    assert {response.status_code for response in responses} == {503}
    assert "shutting down" in responses[0].text


def test_prompts_read_in_several_threads_have_the_ids_of_one_thread() -> None:
    """Texts with new and known words, long texts without blanks, and images."""
    rng = random.Random(0)
    letters = "abcdefghij éß木😀 \n'0123.,"
    texts = ["".join(rng.choices(letters, k=rng.choice((5, 60, 3000)))) for _ in range(60)]
    images = [Phantom("MR", "chest", seed=i).image(64) for i in range(4)]
    prompts: list[list[str | Image.Image]] = [[text] for text in texts]
    prompts += [[image, "Is there a cyst?"] for image in images]
    expected = [medley.load("tiny").encode_prompt(prompt) for prompt in prompts]
    model = medley.load("tiny")
    with ThreadPoolExecutor(6) as threads:
        futures: list[Future[list[int]]] = [
            threads.submit(model.encode_prompt, prompt) for _ in range(3) for prompt in prompts
        ]
        assert [future.result(LIMIT) for future in futures] == expected * 3


# --- memory and health ------------------------------------------------------------------------


def health(running: RunningServer) -> tuple[int, str]:
    response = httpx.get(f"{running.url}/health", timeout=LIMIT)
    return response.status_code, response.json()["status"]


def test_request_without_memory_fails_alone_and_health_reports_repeated_failures(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    request = body("Which organ is shown?")
    with monkeypatch.context() as patched:
        patched.setattr(running.model.engine.runner, "_prefill_contexts", fail)
        response = send(running, request)
        assert response.status_code == 503
        assert "ran out of memory while its prompt was read" in response.text
        streamed = send(running, request | {"stream": True})
        assert streamed.status_code == 503
        assert health(running) == (200, "ok")
        assert send(running, request).status_code == 503
        assert health(running) == (503, "failing: tiny")
    assert send(running, request).status_code == 200
    assert health(running) == (200, "ok")


def test_health_reports_an_engine_whose_steps_fail(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(running.model.engine.runner, "_prefill_contexts", lambda *_: 1 / 0)
        for _ in range(3):
            assert send(running, body("Which organ is shown?")).status_code == 500
        assert health(running) == (503, "failing: tiny")
    assert send(running, body("Which organ is shown?")).status_code == 200
    assert health(running) == (200, "ok")


def test_request_that_can_never_fit_into_memory_is_refused(running: RunningServer) -> None:
    engine = running.model.engine
    engine.set_cache_bytes(1024 * engine.budget.bytes_per_token)
    assert send(running, body("Which organ is shown?")).status_code == 200
    response = send(running, body("Which organ is shown?", max_tokens=2000))
    assert response.status_code == 400
    assert "does not fit into memory" in response.text
    assert "--kv_cache_gb" in response.text


def test_requests_wait_for_memory_and_give_the_same_responses(
    running: RunningServer, pool: ThreadPoolExecutor
) -> None:
    engine = running.model.engine
    bodies = [body(f"Show me a {m} scan of the head.", mode="image", max_tokens=70, seed=5)
              for m in ("CT", "MR", "CT", "MR")]  # fmt: skip

    def images(responses: list[httpx.Response]) -> list[Any]:
        assert {response.status_code for response in responses} == {200}
        return [response.json()["choices"][0]["message"]["images"] for response in responses]

    expected = images([send(running, request) for request in bodies])
    engine.set_cache_bytes(2 * 256 * engine.budget.bytes_per_token)  # room for one of them
    together = [pool.submit(send, running, request) for request in bodies]
    assert images([future.result(LIMIT) for future in together]) == expected
    assert running.becomes_idle()
