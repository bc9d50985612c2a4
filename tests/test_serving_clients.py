"""Requests as clients of all kinds send them: tokens, base64, bodies; error bodies."""

from __future__ import annotations

import base64
import io
import json
import textwrap
import urllib.parse
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from running_server import RunningServer

from medley.serving.limits import Limits
from medley.serving.untrusted_inputs import decode_base64, decode_data_url

CHAT = "/v1/chat/completions"
SHORT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "mode": "text",
         "max_tokens": 2}  # fmt: skip
TOKEN = "secret of the server"


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(Limits(request_timeout=60, max_tokens=512))
    yield server
    server.stop()


def post(running: RunningServer, body: Any, **fields: Any) -> httpx.Response:
    return httpx.post(running.url + CHAT, json=body | fields, timeout=60)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, whose body must have OpenAI's format."""
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert response.json().keys() == {"error"}
    assert error["message"] and error["type"] and error["code"]
    return error


# --- bearer tokens ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    server = RunningServer(Limits(), token=TOKEN)
    yield server
    server.stop()


@pytest.mark.parametrize("value", ["Bearer {}", "bearer {}", "BEARER {}", "bEaReR   {}"])
def test_the_scheme_of_a_token_has_no_case(value: str, guarded: RunningServer) -> None:
    headers = {"Authorization": value.format(TOKEN)}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        "{}", "Bearer", "", "Basic {}", "Bearer{}", "Bearer: {}", "Token {}",
        "Bearer {}x", "Bearer x{}", "Bearer Bearer {}", "Bearer \u00fc", "Bearer secret",
    ],
)  # fmt: skip
def test_a_token_needs_the_scheme_and_the_whole_value(value: str, guarded: RunningServer) -> None:
    headers = {b"Authorization": value.format(TOKEN).encode("latin-1")}
    response = httpx.get(f"{guarded.url}/v1/models", headers=headers)
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert TOKEN not in response.text


# --- base64 -----------------------------------------------------------------------------------


def image_bytes() -> bytes:
    """A PNG whose length is not a multiple of 3, and whose base64 has + and /."""
    for size in range(16, 64):
        buffer = io.BytesIO()
        image = Image.effect_noise((size, size), 90).convert("RGB")
        image.save(buffer, "PNG")
        text = base64.b64encode(buffer.getvalue()).decode()
        if text.endswith("=") and "+" in text and "/" in text:
            return buffer.getvalue()
    raise AssertionError("no such image")


DATA = image_bytes()
BASE64 = base64.b64encode(DATA).decode()
FORMS: dict[str, str] = {
    "plain": BASE64,
    "wrapped": textwrap.fill(BASE64, 76),
    "wrapped as in mail": textwrap.fill(BASE64, 64).replace("\n", "\r\n"),
    "newline at the end": BASE64 + "\n",
    "blanks": f" {BASE64[:9]}\t{BASE64[9:]} ",
    "without padding": BASE64.rstrip("="),
    "with too much padding": BASE64 + "==",
    "URL-safe": base64.urlsafe_b64encode(DATA).decode(),
    "URL-safe without padding": base64.urlsafe_b64encode(DATA).decode().rstrip("="),
    "wrapped padding": BASE64.replace("=", "\n=\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_base64_is_decoded_as_browsers_do(form: str) -> None:
    assert decode_base64(FORMS[form]) == DATA


@pytest.mark.parametrize(
    "header",
    [
        "data:image/png;base64,", "data:;base64,", "DATA:image/png;BASE64,",
        "data:image/png;charset=utf-8;base64,", "data:image/png;name=a.png;base64,",
        "data:image/png;base64;name=a.png,", "data:image/png; base64,", "data:text/plain;base64,",
        "data:image/jpeg;base64,", "data:application/octet-stream;base64,", "data:x;base64,",
    ],
)  # fmt: skip
def test_the_header_of_a_data_url_does_not_matter(header: str) -> None:
    assert decode_data_url(header + BASE64) == DATA
    assert decode_data_url(header + urllib.parse.quote(BASE64, safe="")) == DATA


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aGVs!G8=", "character '!' at position 4"), ("aG\nVs%G8", "character '%' at position 5"),
        ("aGVs\u00e9", "character '\u00e9' at position 4"), ("aGVs\0", r"'\x00' at position 4"),
        ("aGVs\ud83d", r"'\ud83d' at position 4"), ("aGk=aGk=", "character '=' at position 3"),
        ("aGVsb", "truncated after 5 characters"), ("a", "truncated after 1 characters"),
    ],
)  # fmt: skip
def test_invalid_base64_names_the_character(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode_base64(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:base64,aGk=", "data:image/png;base64", "data:", "data:,"]
)
def test_invalid_data_urls_are_rejected(url: str) -> None:
    with pytest.raises(ValueError, match="Invalid data URL"):
        decode_data_url(url)


def test_every_form_of_an_image_gives_one_response(running: RunningServer) -> None:
    urls = [f"data:image/png;base64,{text}" for text in FORMS.values()]
    urls += [f"data:;base64,{BASE64}", f"data:image/jpeg;base64,{BASE64}\n", f"\n{urls[0]}"]
    texts = set()
    for url in urls:
        part = {"type": "image_url", "image_url": {"url": url}}
        body = SHORT | {"messages": [{"role": "user", "content": [part]}], "temperature": 0}
        response = post(running, body)
        assert response.status_code == 200, response.text
        texts.add(json.dumps(response.json()["choices"]))
    assert len(texts) == 1


def test_an_invalid_image_is_named_by_message_and_part(running: RunningServer) -> None:
    text = {"type": "text", "text": "x"}
    for data, code, message in (
        ("aGVs!G8=", "invalid_base64", "character '!' at position 4"),
        ("aGVsbG8=", "invalid_value", "Unsupported image format"),
    ):
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [text, part]}]
        response = post(running, SHORT, messages=messages)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "messages[1].content[1]")
        assert error["message"].startswith("messages[1].content[1]: ")
        assert message in error["message"]
        assert error["code"] == code


def test_llava_clients_may_wrap_base64(running: RunningServer) -> None:
    body = {"model": "tiny", "prompt": "<image>x", "max_new_tokens": 2, "temperature": 0}
    for text, error_code in ((FORMS["wrapped"], 0), (BASE64[:-3] + "!", 1)):
        response = httpx.post(
            f"{running.url}/worker_generate_stream", json=body | {"images": [text]}, timeout=60
        )
        last = json.loads(response.content.rstrip(b"\0").split(b"\0")[-1])
        assert last["error_code"] == error_code
    assert "images[0]: Invalid base64 (character '!'" in last["text"]


# --- bodies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "content_type", "message"),
    [
        (json.dumps(SHORT), None, "the request has no Content-Type"),
        (json.dumps(SHORT), "text/plain", "the Content-Type is 'text/plain'"),
        (json.dumps(SHORT), "application/x-www-form-urlencoded", "form-urlencoded'). Send Content"),
        ("{", "text/plain", "Send Content-Type: application/json"),
        ('{"model": "tiny",}', "application/json", "Not JSON at character 17"),
        ('{"a": }', "application/json", "Not JSON at character 6"),
        ("hello", "application/json", "Not JSON at character 0"),
        ('{"model": "t\u00fc"}'.encode("latin-1"), "application/json", "Not UTF-8 at byte 12"),
        (json.dumps(SHORT).encode("utf-16"), "application/json", "Not UTF-8 at byte 0"),
        ('{"model": 1' + "0" * 5000 + "}", "application/json", "Not JSON ("),
        ("[" * 1000, "application/json", "nested too deeply"),
        ("", "application/json", "body: Empty"), ("null", "application/json", "body: "),
        ("[]", "application/json", "body: "), ('"x"', "application/json", "body: "),
        ("{}", "application/json", "model: Field required"),
    ],
)  # fmt: skip
def test_unreadable_bodies_are_rejected_in_words(
    content: str | bytes, content_type: str | None, message: str, running: RunningServer
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = httpx.post(running.url + CHAT, content=content, headers=headers, timeout=60)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert len(response.text) < 500


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"]
)
def test_json_may_have_parameters_and_a_byte_order_mark(
    content_type: str, running: RunningServer
) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        response = httpx.post(
            running.url + CHAT, content=json.dumps(SHORT).encode(encoding),
            headers={"Content-Type": content_type}, timeout=60,
        )  # fmt: skip
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "message"),
    [
        ("POST", "/v1/moderations", 404, "unknown_url", "POST /v1/moderations is not served"),
        ("POST", "/v1/audio/speech", 404, "unknown_url", "Served are GET /v1/models"),
        ("GET", "/", 404, "unknown_url", "The base URL of the API is http"),
        ("POST", "/chat/completions", 404, "unknown_url", "Use /v1/chat/completions (base URL"),
        ("GET", "/models/tiny", 404, "unknown_url", "Use /v1/models/tiny"),
        ("GET", "/v1/responses/resp_x", 404, "response_not_found", "No stored response 'resp_x'"),
        ("DELETE", "/v1/responses/%00", 404, "response_not_found", "No stored response"),
        ("GET", "/a%00%ff\u00e9", 404, "unknown_url", "is not served"),
        ("GET", CHAT, 405, "method_not_supported", "does not support GET. Use POST"),
        ("DELETE", "/v1/models", 405, "method_not_supported", "Use GET"),
        ("GET", "/v1/models/other", 404, "model_not_found", "available: tiny"),
    ],
)  # fmt: skip
def test_unknown_addresses_have_a_code(
    method: str, path: str, status: int, code: str, message: str, running: RunningServer
) -> None:
    response = httpx.request(method, running.url + path)
    assert response.status_code == status
    error = error_of(response)
    assert error["code"] == code
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": "other"}, "model_not_found", "model"), ({"n": 99}, "invalid_value", "n"),
        ({"messages": []}, "invalid_value", "messages"), ({"n": [1]}, "invalid_type", "n"),
        ({"messages": [5]}, "invalid_type", "messages[0]"),
        ({"tools": [{}]}, "unsupported_value", "tools"), ({"foo": 1}, "unknown_parameter", "foo"),
        ({"modalities": ["audio"]}, "invalid_value", "modalities[0]"),
        ({"max_tokens": 32768}, "invalid_value", "max_tokens"),
        ({"\ud83d": 1}, "unknown_parameter", "\\ud83d"),
        ({"messages": [{"role": "user", "content": "x" * 99_000}]}, "context_length_exceeded",
         "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\u4e00" * 5000}]}, "context_length_exceeded",
         None),
    ],
)  # fmt: skip
def test_invalid_fields_have_a_code(
    fields: dict[str, Any], code: str, param: str, running: RunningServer
) -> None:
    data = json.dumps(SHORT | fields)
    headers = {"Content-Type": "application/json"}
    error = error_of(httpx.post(running.url + CHAT, content=data, headers=headers, timeout=60))
    assert (error["code"], error["param"]) == (code, param)


def test_the_client_of_openai_finds_code_and_field(running: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=32768
        )
    assert (caught.value.code, caught.value.param) == ("invalid_value", "max_tokens")
    with pytest.raises(openai.NotFoundError) as missing:
        client.moderations.create(input="x")
    assert missing.value.code == "unknown_url"


@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_is_an_error_of_the_server(stream: bool) -> None:
    slow = RunningServer(Limits(request_timeout=0.05, max_tokens=4000))
    body = SHORT | {"mode": "image", "max_tokens": 4000, "min_images": 9, "max_images": 9}
    response = post(slow, body, stream=stream)
    slow.stop()
    if response.headers["content-type"].startswith("application/json"):
        assert response.status_code == 408
        error = error_of(response)
    else:
        error = json.loads(response.text.split("data: ")[-1])["error"]
    assert (error["type"], error["code"]) == ("server_error", "timeout")


def test_the_bodies_of_harnesses_and_frameworks_are_served(running: RunningServer) -> None:
    """As lmms-eval, VLMEvalKit and simpleAI's users send them, apart from the number of tokens."""
    harness = {"temperature": 0, "n": 1, "max_tokens": 2, "mode": "text"}
    bodies: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"enable_thinking": False}}, {"top_k": -1}, {"top_k": 20},
        {"temperature": 0.3, "top_p": 1, "stream": False, "stop": None, "presence_penalty": 0,
         "frequency_penalty": 0, "logit_bias": {}, "user": ""},
        {"tools": None, "tool_choice": "none", "parallel_tool_calls": False, "store": False,
         "service_tier": "auto", "response_format": {"type": "text"}, "top_logprobs": 0},
        {"seed": -1, "top_p": 0, "logprobs": False, "metadata": {}, "reasoning_effort": None},
    ]  # fmt: skip
    for fields in bodies:
        response = post(running, SHORT, **(harness | fields))
        assert response.status_code == 200, response.text
