"""The server when its engine, its thread or its clients fail, and as it ends: all are told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from running_server import Running

import medley
from medley.generation import GenerationOptions
from medley.images.remote import on_hosts
from medley.phantoms import Phantom
from medley.serving.controller import make_controller_app
from medley.serving.limits import Limits, RequestError
from medley.serving.response_stream import ResponseStream
from medley.serving.untrusted_inputs import FORMATS, RequestReader, data_address, read_unknown
from medley.serving.worker_heartbeat import keep_registered

CHAT = "/v1/chat/completions"
SHORT = {"model": "tiny", "messages": [{"role": "user", "content": "Which organ is shown?"}],
         "mode": "text", "max_tokens": 3}  # fmt: skip
LONG = SHORT | {"mode": "image", "max_tokens": 1000, "min_images": 9, "max_images": 9}


@pytest.fixture
def running() -> Iterator[Running]:
    found = Running(Limits(seconds=60), rows=2)
    yield found
    found.stop()


def ask(running: Running, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(running.address + CHAT, json=body, timeout=60)


def in_threads(works: list[Any]) -> list[httpx.Response]:
    found: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda w=w: found.append(w())) for w in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return found


# --- the worker's thread ----------------------------------------------------------------------


def test_a_request_that_cannot_be_read_fails_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = running.model.encode_prompt

    def prompt_ids(prompt: Any, complete: bool = False) -> list[int]:
        if "Bad" in str(prompt):
            raise MemoryError
        return read(prompt, complete)

    monkeypatch.setattr(running.model, "prompt_ids", prompt_ids)
    bad = SHORT | {"messages": [{"role": "user", "content": "Bad"}]}
    found = in_threads([lambda b=b: ask(running, b) for b in (SHORT, bad, SHORT, bad, SHORT)])
    assert sorted(answer.status_code for answer in found) == [200, 200, 200, 500, 500]
    assert running.idle()


def test_an_answer_that_cannot_be_told_fails_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.model.image_tokenizer, "decode", lambda codes: 1 / 0)
    drawing = SHORT | {"mode": "image", "max_tokens": 100}
    found = in_threads([lambda b=b: ask(running, b) for b in (SHORT, drawing)])
    assert sorted(answer.status_code for answer in found) == [200, 500]
    assert running.idle()


def test_a_thread_that_dies_tells_everybody_and_takes_no_more(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(BaseException):
        pass

    def step() -> None:
        time.sleep(0.2)
        raise Gone

    monkeypatch.setattr(running.model.engine, "step", step)
    found = in_threads([lambda: ask(running, SHORT)] * 5)
    assert {answer.status_code for answer in found} == {503}
    assert "out of order" in found[0].json()["error"]["message"]
    assert ask(running, SHORT).status_code == 503
    assert httpx.get(f"{running.address}/health").status_code == 503


def test_requests_leave_the_queue_when_their_clients_do(running: Running) -> None:
    """Before they have got a row: nothing is read or drawn for them."""
    first = threading.Thread(target=lambda: in_threads([lambda: ask(running, LONG)] * 2))
    first.start()
    while running.worker.running < 2:
        time.sleep(0.01)
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(running.address + CHAT, json=LONG | {"stream": stream},
                       timeout=httpx.Timeout(5, read=0.1))  # fmt: skip
    until = time.monotonic() + 5
    while running.worker.waiting and time.monotonic() < until:
        time.sleep(0.01)
    assert (running.worker.running, running.worker.waiting) == (2, 0)
    first.join()


def test_stopping_tells_those_at_work_and_those_that_wait(running: Running) -> None:
    threading.Timer(0.5, running.worker.stop).start()
    found = in_threads([lambda: ask(running, LONG)] * 4)
    assert {answer.status_code for answer in found} == {503}
    assert "shutting down" in found[0].json()["error"]["message"]


def test_an_idle_server_takes_a_request_without_a_queue() -> None:
    small = Running(Limits(queue=0, seconds=60), rows=1)
    assert ask(small, SHORT).status_code == 200
    small.stop()


def test_a_finished_request_leaves_nothing_behind(running: Running) -> None:
    """Its pictures go with it, at once, and not when the collector of circles comes by."""
    import gc
    import weakref

    async def once() -> weakref.ref[ResponseStream]:
        running_options = GenerationOptions(mode="text", max_new_tokens=2)
        answers = ResponseStream(running.worker, ["Which organ is shown?"], running_options)
        async for _ in answers.pieces():
            pass
        return weakref.ref(answers)

    gc.disable()
    try:
        assert asyncio.run(once())() is None
    finally:
        gc.enable()


# --- pictures ---------------------------------------------------------------------------------


def packed(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_of_every_kind_give_the_codes_that_the_library_gives() -> None:
    tokenizer = medley.ImageTokenizer.from_checkpoint("tiny")
    image = Phantom("MR", "head", seed=2).image(150).resize((190, 150))
    for kind in FORMATS:
        data = packed(image, kind)
        reader = RequestReader(Limits(), tokenizer, 10)
        square = reader.base64(base64.b64encode(data).decode(), "x")
        assert square.size == (tokenizer.size, tokenizer.size)
        with Image.open(io.BytesIO(data)) as opened:
            whole = tokenizer.encode([opened.convert("RGB")])
        assert (tokenizer.encode([square]) == whole).all()


def test_pictures_that_hide_their_size_are_refused() -> None:
    limits = Limits(pixels=10_000)
    several = packed(
        Image.new("L", (9, 9)), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]
    )
    deflated = b"\0" * 128 + b"DICM" + b"x" * 40 + b"1.2.840.10008.1.2.1.99"
    volume = b"\0" * 400
    for data, name, said in (
        (packed(Image.new("L", (200, 200)), "PNG"), "x", "40000 pixels, the limit is 10000"),
        (packed(Image.new("L", (16, 16)), "ICO"), "x", "not a picture in a format that is known"),
        (several, "x", "several frames"), (deflated, "x", "deflated DICOM"),
        (volume, "x.nii.gz", "a volume"), (b"", "x", "not a picture"),
    ):  # fmt: skip
        with pytest.raises(medley.errors.UserError, match=said):
            read_unknown(data, name, limits)


@contextlib.contextmanager
def web(pages: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = pages[self.path]
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


def test_only_named_hosts_are_asked_and_nobody_that_they_lead_to() -> None:
    tokenizer = medley.ImageTokenizer.from_checkpoint("tiny")
    image = packed(Phantom("CT", "head").image(64), "PNG")
    pages: dict[str, tuple[int, dict[str, str], bytes]] = {"/a.png": (200, {}, image)}
    with web(pages) as host, web({"/a.png": (200, {}, image)}) as other:
        pages["/there"] = (302, {"Location": f"http://{other}/a.png"}, b"")
        pages["/here"] = (302, {"Location": "/a.png"}, b"")
        reader = RequestReader(Limits(hosts=frozenset([host])), tokenizer, 10)
        for path in ("a.png", "here"):
            assert reader.address(f"http://{host}/{path}", "x").size == (64, 64)
        with pytest.raises(RequestError, match="which is not allowed"):
            reader.address(f"http://{host}/there", "x")
        with pytest.raises(RequestError, match="only from hosts"):
            reader.address(f"http://{other}/a.png", "x")
    assert on_hosts("http://Example.org/x", ["example.ORG"])
    assert not on_hosts("http://example.org:8080/x", ["example.org"])
    assert not on_hosts("http://me@example.org/x", ["example.org"])
    assert not on_hosts("http://example.org.evil/x", ["example.org"])


# --- LLaVA over the wire ----------------------------------------------------------------------


def test_a_worker_registers_answers_and_is_passed_over_when_it_fails(running: Running) -> None:
    import uvicorn

    app = make_controller_app()
    config = uvicorn.Config(app, port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    address = f"http://127.0.0.1:{port}"

    async def register() -> None:
        telling = asyncio.create_task(keep_registered(running.state, address, running.address, 0.1))
        for _ in range(100):
            await asyncio.sleep(0.05)
            if app.state.controller.models():
                break
        telling.cancel()

    asyncio.run(register())
    assert httpx.post(f"{address}/list_models").json() == {"models": ["tiny"]}
    picture = data_address(Phantom("CT", "head").image(64)).partition(",")[2]
    asked = {"model": "tiny", "prompt": "<image>Is the picture normal?", "images": [picture],
             "temperature": 0, "max_new_tokens": 8, "stop": "</s>"}  # fmt: skip
    for place in (running.address, address):
        found = httpx.post(f"{place}/worker_generate_stream", json=asked, timeout=60)
        rows = [row for row in found.content.split(b"\0") if row]
        last = httpx.Response(200, content=rows[-1]).json()
        assert last["error_code"] == 0
        assert last["text"].startswith(asked["prompt"])
        assert len(last["text"]) > len(str(asked["prompt"]))
    running.state.draining = True
    found = httpx.post(f"{address}/worker_generate_stream", json=asked, timeout=60)
    assert httpx.Response(200, content=found.content.rstrip(b"\0")).json()["error_code"] == 3
    running.state.draining = False
    server.should_exit = True
    thread.join(timeout=30)
