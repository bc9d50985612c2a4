"""The server as clients use it: OpenAI's client, errors, limits, cancellation, metrics."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from running_server import RunningServer

import medley
from medley.generation import GenerationOptions
from medley.phantoms import Phantom
from medley.serving.limits import Limits
from medley.serving.schema import ChatRequest, GenerationFields
from medley.serving.stop_strings import StopStringFilter
from medley.utils.html import data_url

GREEDY = {"mode": "text", "repetition_penalty": 1.0}
PROMPT = "Show me a CT scan of the head."
DESCRIBE = "Describe the picture."  # alias


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(
        Limits(
            max_body_bytes=1 << 20, max_pixels=1_000_000, max_images=2, request_timeout=60,
            max_tokens=512,
        )
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture
def client(running: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def image_url() -> str:
    return data_url(Phantom("CT", "head").image(64))


def question(url: str, text: str = "Is there a cyst?") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


# --- responses --------------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI) -> None:
    models = [model.id for model in client.models.list().data]
    assert models == ["tiny", "tiny:any", "tiny:text", "tiny:image"]
    described = client.models.retrieve("tiny").model_dump()
    assert (described["image_size"], described["generates_images"]) == (64, True)
    with pytest.raises(openai.NotFoundError, match=r"Unknown model 'other' \(available: tiny\)"):
        client.models.retrieve("other")


def test_response_to_an_image_question_equals_the_library(
    client: openai.OpenAI, running: RunningServer, image_url: str
) -> None:
    completion = client.chat.completions.create(
        model="tiny", messages=question(image_url), temperature=0, extra_body=GREEDY, max_tokens=20
    )  # type: ignore[arg-type]
    expected = medley.load("tiny").generate(
        [Phantom("CT", "head").image(64), "Is there a cyst?"], mode="text", text_greedy=True,
        repetition_penalty=1.0, max_new_tokens=20,
    )  # fmt: skip
    assert [completion.choices[0].message.content] == expected
    assert completion.choices[0].finish_reason == "stop"
    usage = completion.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert running.becomes_idle()


def test_stream_has_previews_and_equals_the_complete_response(client: openai.OpenAI) -> None:
    body: Any = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "seed": 4,
                 "extra_body": {"mode": "image", "previews": 3}}  # fmt: skip
    message = client.chat.completions.create(**body).choices[0].message.model_dump()
    progress, images, usage = [], [], None
    stream = client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        delta = chunk.choices[0].delta.model_dump() if chunk.choices else {}
        if delta.get("preview"):
            progress.append(delta["preview"]["progress"])
        images += delta.get("images") or []
    assert progress == [0.25, 0.5, 0.75]
    assert images == message["images"]
    assert [part["type"] for part in message["parts"]] == ["image_url"]
    data = base64.b64decode(images[0]["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (64, 64)
    assert usage is not None
    assert usage.completion_tokens == 66


def test_images_are_generated_from_a_prompt(client: openai.OpenAI) -> None:
    first = client.images.generate(model="tiny", prompt=PROMPT, n=2, extra_body={"seed": 7})
    assert first.data is not None
    assert len({row.b64_json for row in first.data}) == 2
    second = client.images.generate(model="tiny", prompt=PROMPT, n=2, extra_body={"seed": 7})
    assert second.data == first.data
    greedy = {"image_greedy": True}  # The library warns about it; a request must not fail.
    assert client.images.generate(model="tiny", prompt=PROMPT, extra_body=greedy).data
    large = client.images.generate(
        model="tiny", prompt=PROMPT, size="1024x1024", response_format="url", extra_body={"seed": 7}
    ).model_dump()
    assert large["data"][0]["url"] == f"data:image/png;base64,{first.data[0].b64_json}"
    assert large["size"] == "64x64"
    assert large["note"].startswith("size: 1024x1024 is not available.")
    for size in ("large", "0x0", "64x64x64", "64", "-1x64"):
        with pytest.raises(openai.BadRequestError, match="size: "):
            client.images.generate(model="tiny", prompt=PROMPT, size=size)  # type: ignore[call-overload]


def test_generated_images_can_be_sent_back_in_a_conversation(
    client: openai.OpenAI, running: RunningServer
) -> None:
    first: Any = {"role": "user", "content": PROMPT}
    completion = client.chat.completions.create(
        model="tiny", messages=[first], extra_body={"mode": "image"}
    )
    message = completion.choices[0].message.model_dump(exclude_none=True)
    conversation: Any = [{"role": "system", "content": "Be brief."}, first, message,
                         {"role": "user", "content": "Which organ is shown?"}]  # fmt: skip
    completion = client.chat.completions.create(
        model="tiny", messages=conversation, temperature=0, extra_body=GREEDY
    )
    assert completion.usage is not None
    assert completion.usage.prompt_tokens > 66
    assert running.becomes_idle()


def test_stop_strings_end_a_response_at_any_position(client: openai.OpenAI, image_url: str) -> None:
    body: Any = {"model": "tiny", "messages": question(image_url, DESCRIBE),
                 "temperature": 0, "extra_body": GREEDY}  # fmt: skip
    complete = str(client.chat.completions.create(**body).choices[0].message.content)
    stop = complete[5:9]
    for stream in (False, True):
        response = client.chat.completions.create(**body, stop=[stop, "zzz"], stream=stream)
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in response if c.choices)
        else:
            text = response.choices[0].message.content
        assert text == complete[: complete.index(stop)]


@pytest.mark.parametrize(
    ("pieces", "stop_strings", "expected", "found"),
    [
        (["ab</", "s>", "more"], ["</s>"], "ab", True), (["ab</", "b"], ["</s>"], "ab</b", False),
        (["a", "b", "a", "c"], ["abac"], "", True), (["xaa", "ab"], ["aab"], "xa", True),
        (["abc"], [], "abc", False),
    ],
)  # fmt: skip
def test_stop_strings_are_found_across_pieces(
    pieces: list[str], stop_strings: list[str], expected: str, found: bool
) -> None:
    stop = StopStringFilter(stop_strings)
    assert "".join([stop(piece) for piece in pieces] + [stop.flush()]) == expected
    assert stop.found == found


def test_sampled_responses_do_not_depend_on_concurrent_requests(
    client: openai.OpenAI, running: RunningServer
) -> None:
    def generate(seed: int) -> str:
        completion = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Write a report."}],
            seed=seed, max_tokens=40, temperature=1.0, extra_body={"mode": "text"},
        )  # fmt: skip
        return str(completion.choices[0].message.content)

    alone = [generate(seed) for seed in range(12)]
    concurrent: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: concurrent.update({seed: generate(seed)}))
        for seed in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [concurrent[seed] for seed in range(12)] == alone
    assert len(set(alone)) > 1
    assert running.becomes_idle()


def test_request_defaults_are_the_generation_defaults() -> None:
    fields = GenerationFields.model_fields.keys() - {"n"}
    assert fields <= GenerationOptions.__dataclass_fields__.keys()
    body = ChatRequest(model="tiny", messages=[{"role": "user", "content": "x"}], seed=0)
    assert body.generation(Limits()) == GenerationOptions()


# --- rejected requests ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature"), ({"n": 99}, "n: Too large (got 99, limit 8)"),
        ({"foo": 1}, "foo: Unknown field"), ({"max_tokens": 5000}, "(got 5000, limit 512)"),
        ({"frequency_penalty": 1}, "frequency_penalty"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "Unsupported role (got 'tool'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "The last message must be"),
        ({"messages": [{"role": "user", "content": 5}]}, "Must be text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type (got 'audio'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "Unpaired surrogate"),
        ({"min_images": 3, "max_images": 1}, "max_images is 1"), ({"seed": -2}, "seed is -2"),
        ({"image_top_p": 2}, "image_top_p"), ({"text_top_k": 2**63 - 1}, "text_top_k"),
        ({"top_p": 2}, "top_p is 2"), ({"guidance_scale_text": 1e30}, "guidance_scale_text"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"), ({"stop": ["x"] * 17}, "stop"),
        ({"image_temperature": 1e-40}, "image_temperature"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, "does not fit the model's"),
    ],
)  # fmt: skip
def test_invalid_fields_are_named(
    change: dict[str, Any], message: str, running: RunningServer
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]} | change
    response = httpx.post(
        f"{running.url}/v1/chat/completions", content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"]


def decompression_bomb() -> str:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/x.png", "only from the hosts of --allowed_image_hosts"),
        ("file:///etc/passwd", "Send the image as a data URL"), ("/etc/hostname", "Send the"),
        ("data:image/png;base64,b!d", "Invalid base64"), ("data:image/png,abc", "Invalid data URL"),
        ("data:image/png;base64,aGVsbG8=", "Unsupported image format"),
        (decompression_bomb(), "limit"),
        ("", "The image has no URL"),
    ],
)  # fmt: skip
def test_invalid_and_remote_images_are_rejected(
    url: str, message: str, running: RunningServer
) -> None:
    body = {"model": "tiny", "messages": question(url)}
    response = httpx.post(f"{running.url}/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


def test_body_size_and_image_count_are_limited(running: RunningServer, image_url: str) -> None:
    url = f"{running.url}/v1/chat/completions"
    body = {"model": "tiny", "messages": question(image_url) * 3}
    message = httpx.post(url, json=body).json()["error"]["message"]
    assert "Too many images (got 3, limit 2)" in message
    large = b"x" * ((1 << 20) + 1)
    assert httpx.post(url, content=large).status_code == 413

    def without_content_length() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * (1 << 17)

    assert httpx.post(url, content=without_content_length()).status_code == 413
    assert httpx.post(url, content=b"{").status_code == 400
    assert httpx.get(f"{running.url}/nothing").json()["error"]["code"] == "unknown_url"
    assert running.becomes_idle()


def test_disconnected_client_ends_its_request(running: RunningServer) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Write a report."}],
            "max_tokens": 512, "mode": "image", "min_images": 7, "max_images": 7}  # fmt: skip
    before = running.worker.generated_tokens
    for stream in (True, False):
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{running.url}/v1/chat/completions", json=body | {"stream": stream},
                           timeout=httpx.Timeout(5, read=0.01))  # fmt: skip
    assert running.becomes_idle()
    # Less than half of the tokens of the complete responses.
    assert running.worker.generated_tokens - before < 8 * 7 * 66 / 2


def test_full_queue_returns_429_with_retry_after() -> None:
    small = RunningServer(Limits(max_queue=1, request_timeout=60), max_num_seqs=1)
    body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "mode": "image"}
    responses: list[httpx.Response] = []

    def send() -> None:
        responses.append(httpx.post(f"{small.url}/v1/chat/completions", json=body, timeout=60))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    small.stop()
    assert {response.status_code for response in responses} == {200, 429}
    rejected = next(response for response in responses if response.status_code == 429)
    assert int(rejected.headers["retry-after"]) >= 1
    assert rejected.json()["error"]["type"] == "rate_limit_error"


def test_late_requests_return_408() -> None:
    slow = RunningServer(Limits(request_timeout=0.05, max_tokens=4000))
    body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "mode": "image",
            "min_images": 9, "max_images": 9}  # fmt: skip
    url = f"{slow.url}/v1/chat/completions"
    assert httpx.post(url, json=body, timeout=60).status_code == 408
    streamed = httpx.post(url, json=body | {"stream": True}, timeout=60)
    assert "Timeout: not finished after" in streamed.text
    assert slow.becomes_idle()
    slow.stop()


def test_token_is_required_if_one_is_set() -> None:
    guarded = RunningServer(Limits(), token="secret")
    url = f"{guarded.url}/v1/models"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer other"}).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert httpx.get(f"{guarded.url}/metrics").status_code == 401
    guarded.stop()


def test_engine_error_fails_running_requests_only(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "mode": "text"}
    url = f"{running.url}/v1/chat/completions"
    with monkeypatch.context() as patched:
        patched.setattr(running.model.engine, "step", lambda: 1 / 0)
        response = httpx.post(url, json=body, timeout=60)
        assert response.status_code == 500
        assert "Internal server error (ZeroDivisionError)" in response.text
    assert httpx.post(url, json=body, timeout=60).status_code == 200
    assert httpx.get(f"{running.url}/health").json()["status"] == "ok"


def test_metrics_count_requests(running: RunningServer) -> None:
    text = httpx.get(f"{running.url}/metrics").text
    assert 'medley_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert 'medley_running{model="tiny"} 0.0' in text
    assert "medley_first_token_seconds_count" in text
