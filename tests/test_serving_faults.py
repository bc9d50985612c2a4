"""Faults of the engine, of its thread and of clients; untrusted images; shutdown."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from PIL import Image
from running_server import RunningServer

import medley
from medley.generation import GenerationOptions
from medley.images.remote import is_allowed_host
from medley.phantoms import Phantom
from medley.serving.controller import make_controller_app
from medley.serving.limits import Limits, RequestError
from medley.serving.response_stream import ResponseStream
from medley.serving.untrusted_inputs import RequestReader, read_untrusted_image
from medley.serving.worker_heartbeat import keep_registered
from medley.utils.html import data_url

CHAT = "/v1/chat/completions"
SHORT = {"model": "tiny", "messages": [{"role": "user", "content": "Which organ is shown?"}],
         "mode": "text", "max_tokens": 3}  # fmt: skip
LONG = SHORT | {"mode": "image", "max_tokens": 1000, "min_images": 9, "max_images": 9}
pytestmark = pytest.mark.slow


@pytest.fixture
def running() -> Iterator[RunningServer]:
    server = RunningServer(Limits(request_timeout=60), max_num_seqs=2)
    yield server
    server.stop()


def send(running: RunningServer, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(running.url + CHAT, json=body, timeout=60)


def run_concurrently(calls: Sequence[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    responses: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda c=call: responses.append(c())) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return responses


# --- the engine thread ------------------------------------------------------------------------


def test_unreadable_prompt_fails_alone(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = running.model.encode_prompt

    def encode_prompt(prompt: Any, raw_prompt: bool = False) -> list[int]:
        if "Bad" in str(prompt):
            raise MemoryError
        return original(prompt, raw_prompt)

    monkeypatch.setattr(running.model, "encode_prompt", encode_prompt)
    bad = SHORT | {"messages": [{"role": "user", "content": "Bad"}]}
    bodies = (SHORT, bad, SHORT, bad, SHORT)
    responses = run_concurrently([lambda b=b: send(running, b) for b in bodies])
    assert sorted(r.status_code for r in responses) == [200, 200, 200, 500, 500]
    assert running.becomes_idle()


def test_undecodable_image_fails_alone(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.model.image_tokenizer, "decode", lambda codes: 1 / 0)
    image_request = SHORT | {"mode": "image", "max_tokens": 100}
    responses = run_concurrently([lambda b=b: send(running, b) for b in (SHORT, image_request)])
    assert sorted(response.status_code for response in responses) == [200, 500]
    assert running.becomes_idle()


def test_engine_crash_fails_pending_requests_and_rejects_new_ones(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    def step() -> None:
        time.sleep(0.2)
        raise Crash

    monkeypatch.setattr(running.model.engine, "step", step)
    responses = run_concurrently([lambda: send(running, SHORT)] * 5)
    assert {response.status_code for response in responses} == {503}
    assert "Model tiny is unavailable" in responses[0].json()["error"]["message"]
    assert send(running, SHORT).status_code == 503
    assert httpx.get(f"{running.url}/health").status_code == 503


def test_queued_requests_of_disconnected_clients_are_removed(running: RunningServer) -> None:
    """Their prompts are never read."""
    first = threading.Thread(target=lambda: run_concurrently([lambda: send(running, LONG)] * 2))
    first.start()
    while running.worker.running < 2:
        time.sleep(0.01)
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(running.url + CHAT, json=LONG | {"stream": stream},
                       timeout=httpx.Timeout(5, read=0.1))  # fmt: skip
    deadline = time.monotonic() + 5
    while running.worker.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (running.worker.running, running.worker.waiting) == (2, 0)
    first.join()


def test_stopped_worker_fails_running_and_waiting_requests(running: RunningServer) -> None:
    threading.Timer(0.5, running.worker.stop).start()
    responses = run_concurrently([lambda: send(running, LONG)] * 4)
    assert {response.status_code for response in responses} == {503}
    assert "shutting down" in responses[0].json()["error"]["message"]


def test_idle_server_accepts_a_request_with_a_queue_of_zero() -> None:
    small = RunningServer(Limits(max_queue=0, request_timeout=60), max_num_seqs=1)
    assert send(small, SHORT).status_code == 200
    small.stop()


def test_finished_request_is_freed_without_garbage_collection(running: RunningServer) -> None:
    import gc
    import weakref

    async def generate() -> weakref.ref[ResponseStream]:
        options = GenerationOptions(mode="text", max_new_tokens=2)
        stream = ResponseStream(running.worker, ["Which organ is shown?"], options)
        async for _ in stream.chunks():
            pass
        return weakref.ref(stream)

    gc.disable()
    try:
        assert asyncio.run(generate())() is None
    finally:
        gc.enable()


# --- images -----------------------------------------------------------------------------------


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]
)
def test_uploaded_images_have_the_codes_of_the_library(image_format: str) -> None:
    tokenizer = medley.ImageTokenizer.from_checkpoint("tiny")
    image = Phantom("MR", "head", seed=2).image(150).resize((190, 150))
    data = encode(image, image_format)
    reader = RequestReader(Limits(), tokenizer, 10)
    square = reader.part_from_base64(base64.b64encode(data).decode(), "x").image
    assert square is not None
    assert square.size == (tokenizer.size, tokenizer.size)
    with Image.open(io.BytesIO(data)) as opened:
        expected = tokenizer.encode([opened.convert("RGB")])
    assert (tokenizer.encode([square]) == expected).all()


def test_large_and_unsupported_images_are_rejected() -> None:
    limits = Limits(max_pixels=10_000)
    several = encode(
        Image.new("L", (9, 9)), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]
    )
    deflated = b"\0" * 128 + b"DICM" + b"x" * 40 + b"1.2.840.10008.1.2.1.99"
    volume = b"\0" * 400
    for data, name, message in (
        (encode(Image.new("L", (200, 200)), "PNG"), "x", r"\(got 40000, limit 10000\)"),
        (encode(Image.new("L", (16, 16)), "EPS"), "x", "EPS is not opened"),
        (several, "x", "several frames"), (deflated, "x", "[Dd]eflated DICOM"),
        (volume, "x.nii.gz", "Volumes are not supported"), (b"", "x", "The file is empty"),
    ):  # fmt: skip
        with pytest.raises(medley.errors.UserError, match=message):
            read_untrusted_image(data, name, limits)


@contextlib.contextmanager
def http_server(responses: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """Serves status, headers and body of each path; yields host:port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = responses[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_images_are_fetched_only_from_allowed_hosts_without_redirects_to_others() -> None:
    tokenizer = medley.ImageTokenizer.from_checkpoint("tiny")
    image = encode(Phantom("CT", "head").image(64), "PNG")
    responses: dict[str, tuple[int, dict[str, str], bytes]] = {"/a.png": (200, {}, image)}
    with http_server(responses) as host, http_server({"/a.png": (200, {}, image)}) as other:
        responses["/to-other"] = (302, {"Location": f"http://{other}/a.png"}, b"")
        responses["/to-same"] = (302, {"Location": "/a.png"}, b"")
        reader = RequestReader(Limits(image_hosts=frozenset([host])), tokenizer, 10)
        for path in ("a.png", "to-same"):
            square = reader.part_from_url(f"http://{host}/{path}", "x").image
            assert square is not None
            assert square.size == (64, 64)
        with pytest.raises(RequestError, match="not allowed"):
            reader.part_from_url(f"http://{host}/to-other", "x")
        with pytest.raises(RequestError, match="only from the hosts"):
            reader.part_from_url(f"http://{other}/a.png", "x")
    assert is_allowed_host("http://Example.org/x", ["example.ORG"])
    assert not is_allowed_host("http://example.org:8080/x", ["example.org"])
    assert not is_allowed_host("http://me@example.org/x", ["example.org"])
    assert not is_allowed_host("http://example.org.evil/x", ["example.org"])


# --- LLaVA over HTTP --------------------------------------------------------------------------


def test_registered_worker_responds_directly_and_through_the_controller(
    running: RunningServer,
) -> None:
    import uvicorn

    app = make_controller_app()
    config = uvicorn.Config(app, port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    controller = f"http://127.0.0.1:{port}"

    async def register() -> None:
        heartbeat = asyncio.create_task(
            keep_registered(running.state, controller, running.url, 0.1)
        )
        for _ in range(100):
            await asyncio.sleep(0.05)
            if app.state.controller.models():
                break
        heartbeat.cancel()

    asyncio.run(register())
    assert httpx.post(f"{controller}/list_models").json() == {"models": ["tiny"]}
    image = data_url(Phantom("CT", "head").image(64)).partition(",")[2]
    prompt = "<image>Is the picture normal?"  # alias
    body = {"model": "tiny", "prompt": prompt, "images": [image], "temperature": 0,
            "max_new_tokens": 8, "stop": "</s>"}  # fmt: skip
    for url in (running.url, controller):
        response = httpx.post(f"{url}/worker_generate_stream", json=body, timeout=60)
        messages = [message for message in response.content.split(b"\0") if message]
        last = httpx.Response(200, content=messages[-1]).json()
        assert last["error_code"] == 0
        assert last["text"].startswith(prompt)
        assert len(last["text"]) > len(prompt)
    running.state.draining = True
    response = httpx.post(f"{controller}/worker_generate_stream", json=body, timeout=60)
    assert httpx.Response(200, content=response.content.rstrip(b"\0")).json()["error_code"] == 3
    running.state.draining = False
    server.should_exit = True
    thread.join(timeout=30)
