"""The server as its clients see it: OpenAI's client, errors, limits, rows that are freed, drain."""

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
from running_server import Running

import medley
from medley.phantoms import Phantom
from medley.serving.limits import Limits
from medley.serving.stop_strings import StopWords
from medley.serving.untrusted_inputs import data_address

GREEDY = {"mode": "text", "repetition_penalty": 1.0}
ASKED = "Show me a CT scan of the head."


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(Limits(body=1 << 20, pixels=1_000_000, pictures=2, seconds=60, tokens=512))
    yield found
    found.stop()


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def picture() -> str:
    return data_address(Phantom("CT", "head").image(64))


def question(picture: str, text: str = "Is there a cyst?") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


# --- answers ----------------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI) -> None:
    (row,) = client.models.list().data
    assert row.id == "tiny"
    assert client.models.retrieve("tiny").model_dump()["image_size"] == 64
    with pytest.raises(openai.NotFoundError, match="no model 'other', there is tiny"):
        client.models.retrieve("other")


def test_a_question_about_a_picture_is_answered_as_the_library_does(
    client: openai.OpenAI, running: Running, picture: str
) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=question(picture), temperature=0, extra_body=GREEDY, max_tokens=20
    )  # type: ignore[arg-type]
    expected = medley.load("tiny").generate(
        [Phantom("CT", "head").image(64), "Is there a cyst?"], mode="text", text_greedy=True,
        repetition_penalty=1.0, max_new_tokens=20,
    )  # fmt: skip
    assert [found.choices[0].message.content] == expected
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert running.idle()


def test_a_stream_says_the_same_and_shows_a_picture_growing(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": ASKED}], "seed": 4,
                  "extra_body": {"mode": "image", "previews": 3}}  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0].message.model_dump()
    progress, pictures, usage = [], [], None
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        delta = chunk.choices[0].delta.model_dump() if chunk.choices else {}
        if delta.get("preview"):
            progress.append(delta["preview"]["progress"])
        pictures += delta.get("images") or []
    assert progress == [0.25, 0.5, 0.75]
    assert pictures == whole["images"]
    assert [part["type"] for part in whole["parts"]] == ["image_url"]
    data = base64.b64decode(pictures[0]["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (64, 64)
    assert usage is not None
    assert usage.completion_tokens == 66 + 0


def test_pictures_from_words(client: openai.OpenAI) -> None:
    found = client.images.generate(model="tiny", prompt=ASKED, n=2, extra_body={"seed": 7})
    assert found.data is not None
    assert len({row.b64_json for row in found.data}) == 2
    again = client.images.generate(model="tiny", prompt=ASKED, n=2, extra_body={"seed": 7})
    assert again.data == found.data
    greedy = {"image_greedy": True}  # a warning that a library gives is no fault of a request
    assert client.images.generate(model="tiny", prompt=ASKED, extra_body=greedy).data
    with pytest.raises(openai.BadRequestError, match="this model draws 64x64"):
        client.images.generate(model="tiny", prompt=ASKED, size="1024x1024")


def test_a_talk_goes_on_with_pictures_of_its_own(client: openai.OpenAI, running: Running) -> None:
    first: Any = {"role": "user", "content": ASKED}
    drawn = client.chat.completions.create(
        model="tiny", messages=[first], extra_body={"mode": "image"}
    )
    message = drawn.choices[0].message.model_dump(exclude_none=True)
    talk: Any = [{"role": "system", "content": "Be brief."}, first, message,
                 {"role": "user", "content": "Which organ is shown?"}]  # fmt: skip
    found = client.chat.completions.create(
        model="tiny", messages=talk, temperature=0, extra_body=GREEDY
    )
    assert found.usage is not None
    assert found.usage.prompt_tokens > 66
    assert running.idle()


def test_stop_words_end_an_answer_wherever_they_fall(client: openai.OpenAI, picture: str) -> None:
    asked: Any = {"model": "tiny", "messages": question(picture, "Describe the picture."),
                  "temperature": 0, "extra_body": GREEDY}  # fmt: skip
    whole = str(client.chat.completions.create(**asked).choices[0].message.content)
    word = whole[5:9]
    for stream in (False, True):
        found = client.chat.completions.create(**asked, stop=[word, "zzz"], stream=stream)
        if stream:
            said = "".join(c.choices[0].delta.content or "" for c in found if c.choices)
        else:
            said = found.choices[0].message.content
        assert said == whole[: whole.index(word)]


def test_stop_words_in_pieces() -> None:
    for pieces, words, shown in (
        (["ab</", "s>", "more"], ["</s>"], "ab"), (["ab</", "b"], ["</s>"], "ab</b"),
        (["a", "b", "a", "c"], ["abac"], ""), (["xaa", "ab"], ["aab"], "xa"), (["abc"], [], "abc"),
    ):  # fmt: skip
        stop = StopWords(words)
        assert "".join([stop(piece) for piece in pieces] + [stop.rest()]) == shown
        assert stop.found == (shown not in ("ab</b", "abc"))


def test_random_answers_are_the_same_alone_and_in_company(
    client: openai.OpenAI, running: Running
) -> None:
    def ask(seed: int) -> str:
        found = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Write a report."}],
            seed=seed, max_tokens=40, temperature=1.0, extra_body={"mode": "text"},
        )  # fmt: skip
        return str(found.choices[0].message.content)

    alone = [ask(seed) for seed in range(12)]
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: ask(seed)}))
        for seed in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(12)] == alone
    assert len(set(alone)) > 1
    assert running.idle()


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": -1}, "temperature"), ({"n": 99}, "n is 99, the limit is 8"),
        ({"foo": 1}, "foo: Extra inputs"), ({"max_tokens": 5000}, "the limit is 512"),
        ({"frequency_penalty": 1}, "frequency_penalty"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role is 'tool'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message has to be"),
        ({"messages": [{"role": "user", "content": 5}]}, "neither text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type is 'audio'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a character"),
        ({"min_images": 3, "max_images": 1}, "max_images is 1"),
        ({"image_top_p": 2}, "image_top_p"), ({"text_top_k": 2**63 - 1}, "text_top_k"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"), ({"stop": ["x"] * 17}, "stop"),
        ({"image_temperature": 1e-40}, "image_temperature"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, "has no room for"),
    ],
)  # fmt: skip
def test_bad_requests_are_named_in_plain_words(
    change: dict[str, Any], said: str, running: Running
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]} | change
    found = httpx.post(
        f"{running.address}/v1/chat/completions", content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def bomb() -> str:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:9/x.png", "fetched only from hosts that the server's owner has named"),
        ("file:///etc/passwd", "send the picture as a data address"), ("/etc/hostname", "send the"),
        ("data:image/png;base64,b!d", "not base64"), ("data:image/png,abc", "expected data:image"),
        ("data:image/png;base64,aGVsbG8=", "the picture"), (bomb(), "limit"), ("", "without"),
    ],
)  # fmt: skip
def test_pictures_that_are_none_or_elsewhere_are_refused(
    address: str, said: str, running: Running
) -> None:
    body = {"model": "tiny", "messages": question(address)}
    found = httpx.post(f"{running.address}/v1/chat/completions", json=body)
    assert found.status_code == 400, found.text
    assert said in found.json()["error"]["message"]


def test_limits_of_body_and_pictures(running: Running, picture: str) -> None:
    address = f"{running.address}/v1/chat/completions"
    body = {"model": "tiny", "messages": question(picture) * 3}
    assert "3 pictures, the limit is 2" in httpx.post(address, json=body).json()["error"]["message"]
    large = b"x" * ((1 << 20) + 1)
    assert httpx.post(address, content=large).status_code == 413

    def dripping() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * (1 << 17)

    assert httpx.post(address, content=dripping()).status_code == 413
    assert httpx.post(address, content=b"{").status_code == 400
    assert httpx.get(f"{running.address}/nothing").json()["error"]["message"] == "Not Found"
    assert running.idle()


def test_who_vanishes_frees_a_row_at_once(running: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Write a report."}],
            "max_tokens": 512, "mode": "image", "min_images": 7, "max_images": 7}  # fmt: skip
    before = running.worker.tokens
    for stream in (True, False):
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{running.address}/v1/chat/completions", json=body | {"stream": stream},
                           timeout=httpx.Timeout(5, read=0.01))  # fmt: skip
    assert running.idle()
    assert running.worker.tokens - before < 8 * 7 * 66 / 2  # of what would have been drawn


def test_a_full_queue_says_when_to_come_again() -> None:
    small = Running(Limits(queue=1, seconds=60), rows=1)
    body = {"model": "tiny", "messages": [{"role": "user", "content": ASKED}], "mode": "image"}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{small.address}/v1/chat/completions", json=body, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    small.stop()
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_requests_that_take_too_long_end() -> None:
    slow = Running(Limits(seconds=0.05, tokens=4000))
    body = {"model": "tiny", "messages": [{"role": "user", "content": ASKED}], "mode": "image",
            "min_images": 9, "max_images": 9}  # fmt: skip
    found = httpx.post(f"{slow.address}/v1/chat/completions", json=body, timeout=60)
    assert found.status_code == 408
    streamed = httpx.post(
        f"{slow.address}/v1/chat/completions", json=body | {"stream": True}, timeout=60
    )
    assert "not done after" in streamed.text
    assert slow.idle()
    slow.stop()


def test_a_token_is_asked_for_where_one_is_set() -> None:
    guarded = Running(Limits(), token="secret")
    address = f"{guarded.address}/v1/models"
    assert httpx.get(address).status_code == 401
    assert httpx.get(address, headers={"Authorization": "Bearer other"}).status_code == 401
    assert httpx.get(address, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert httpx.get(f"{guarded.address}/health").status_code == 200
    assert httpx.get(f"{guarded.address}/metrics").status_code == 401
    guarded.stop()


def test_a_fault_of_the_engine_costs_its_rows_and_not_the_server(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "mode": "text"}
    address = f"{running.address}/v1/chat/completions"
    with monkeypatch.context() as patched:
        patched.setattr(running.model.engine, "step", lambda: 1 / 0)
        found = httpx.post(address, json=body)
        assert found.status_code == 500
        assert "ZeroDivisionError inside of the server" in found.text
    assert httpx.post(address, json=body).status_code == 200
    assert httpx.get(f"{running.address}/health").json()["status"] == "ok"


def test_counters_tell_what_was_done(running: Running) -> None:
    text = httpx.get(f"{running.address}/metrics").text
    assert 'medley_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert 'medley_running{model="tiny"} 0.0' in text
    assert "medley_first_token_seconds_count" in text
