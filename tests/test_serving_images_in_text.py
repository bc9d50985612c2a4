"""Images of responses in the text of messages: Markdown, notes, and the way back to their codes."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from running_server import RunningServer
from test_ui import SETTING_VALUES

import medley
from medley.data.document import ImagePart
from medley.serving.error_responses import CodedError
from medley.serving.generated_images import GeneratedImages, content_hash
from medley.serving.image_text import (
    ImageReference,
    count_markdown_images,
    remove_notes,
    split_images,
    to_markdown,
    to_note,
)
from medley.serving.limits import Limits, RequestError
from medley.serving.messages import to_document
from medley.serving.ui.conversation import Conversation
from medley.serving.ui.generate import generate_response
from medley.serving.ui.image_store import ImageStore
from medley.serving.untrusted_inputs import RequestReader
from medley.utils.html import data_url

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(Limits(request_timeout=60, max_tokens=400, max_images=2))
    yield server
    server.stop()


@pytest.fixture
def client(running: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as own:
        yield own


@functools.cache
def image_tokenizer() -> medley.ImageTokenizer:
    return medley.ImageTokenizer.from_checkpoint("tiny")


def noise(seed: int, size: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


CODES = tuple(range(64))


def reader(*images: Image.Image, max_images: int = 8) -> RequestReader:
    """A reader whose server has generated the images, with codes that the encoder never gives."""
    known = GeneratedImages()
    for image in images:
        known.add(image_tokenizer().fingerprint, content_hash(image), CODES)
    return RequestReader(Limits(max_images=max_images), image_tokenizer(), 1000, known)


def parts_of(answer: dict[str, Any], own: RequestReader) -> list[Any]:
    """The parts of an assistant message; the codes of images that the server has generated."""
    user = {"role": "user", "content": "q"}
    document = to_document([user, {"role": "assistant"} | answer, user], own)
    return [p.codes or p.image if isinstance(p, ImagePart) else p for p in document.turns[1].parts]


# --- texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts", [("", ""), ("a", "b"), ("a!", "\n"), ("![x](y) ", "(z)"), ("[", "]")]
)
def test_markdown_splits_into_the_same_parts(texts: tuple[str, str]) -> None:
    image = noise(0)
    text = texts[0] + to_markdown(image) + to_markdown(image) + texts[1]
    reference = ImageReference(url=data_url(image))
    expected = [*filter(None, texts[:1]), reference, reference, *filter(None, texts[1:])]
    assert list(split_images(text)) == expected
    assert count_markdown_images(text) == 2


@pytest.mark.parametrize(
    "form",
    ["![a]({})", "![]({})", "![a b]( {} )", '![a]({} "title")', "![a](<{}>)", "![[a]]({})"],
)
def test_markdown_of_other_programs_is_read(form: str) -> None:
    url = data_url(noise(0))
    assert list(split_images(f"x{form.format(url)}y")) == ["x", ImageReference(url=url), "y"]


@pytest.mark.parametrize(
    "text",
    [
        "", "plain", "![a](http://host/a.png)", "![a](data:text/plain;base64,aGk=)",
        "![a](data:image/png;base64,...)", "[a](data:image/png;base64,aGk=)",
        "![a](data:image/png,x)",
        "(data:image/png;base64,aGk=)", "![a](data:image/png;base64,aGk=", "[image 12]",
        "[image XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX]",
    ],
)  # fmt: skip
def test_other_texts_stay_texts(text: str) -> None:
    assert list(split_images(text)) == ([text] if text else [])


@pytest.mark.parametrize(
    "piece",
    ["![", "](data:image/", '](data:image/a "', "![](  ", "[image ", "![a](data:image/png;base64,"],
)
def test_hostile_texts_are_split_at_once(piece: str) -> None:
    """With quadratic time, the test would not end."""
    text = piece * 200_000
    assert list(split_images(text)) == [text]


def test_a_note_names_the_image_by_its_content() -> None:
    first, second = noise(1), noise(2)
    assert to_note(first) == to_note(noise(1)) != to_note(second)
    assert remove_notes(f"a{to_note(first)}b{to_markdown(second)}") == f"ab{to_markdown(second)}"


# --- codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["markdown", "note", "images", "parts", "content", "images and note"]
)
def test_every_form_of_a_generated_image_has_its_codes(form: str) -> None:
    image = noise(3)
    part = {"type": "image_url", "image_url": {"url": data_url(image)}}
    forms: dict[str, dict[str, Any]] = {
        "markdown": {"content": to_markdown(image)},
        "note": {"content": to_note(image)},
        "images": {"content": "", "images": [part]},
        "parts": {"content": "a", "parts": [part], "images": [part]},
        "content": {"content": [part]},
        "images and note": {"content": to_note(image), "images": [part]},
    }
    parts = [p for p in parts_of(forms[form], reader(image)) if p]
    assert parts == [CODES]


def test_text_around_an_image_keeps_its_place() -> None:
    image = noise(3)
    content = f"before{to_markdown(image)}after"
    assert parts_of({"content": content}, reader(image)) == ["before", CODES, "after"]
    listed = [{"type": "text", "text": content}, {"type": "text", "text": to_note(image)}]
    assert parts_of({"content": listed}, reader(image)) == ["before", CODES, "after", CODES]


def test_another_image_is_encoded_and_an_unknown_note_stays_text() -> None:
    image, other = noise(3), noise(4)
    (pixels,) = parts_of({"content": to_markdown(other)}, reader(image))
    assert isinstance(pixels, Image.Image)
    assert parts_of({"content": to_note(other)}, reader(image)) == [to_note(other)]


def test_codes_belong_to_a_token_space() -> None:
    image, known = noise(3), GeneratedImages()
    known.add("another fingerprint", content_hash(image), CODES)
    own = RequestReader(Limits(), image_tokenizer(), 1000, known)
    (pixels,) = parts_of({"content": to_markdown(image)}, own)
    assert isinstance(pixels, Image.Image)


def test_markdown_of_a_user_stays_text() -> None:
    text = "![a](data:image/png;base64,aGk=)" * 9
    document = to_document([{"role": "user", "content": text}], reader(max_images=1))
    assert document.turns[0].parts == (text,)


def test_images_in_text_count_and_are_named_in_errors() -> None:
    image = noise(3)
    with pytest.raises(RequestError, match=r"Too many images \(got 3, limit 2\)"):
        parts_of({"content": to_markdown(image) * 3}, reader(max_images=2))
    broken = "![a](data:image/png;base64,aGVsbG8=)"
    with pytest.raises(RequestError, match=r"messages\[1\]\.content: image: Unsupported image"):
        parts_of({"content": broken}, reader())


@pytest.mark.parametrize("form", ["notes", "texts", "generated images"])
def test_image_codes_are_charged_like_text_and_stored_once(form: str) -> None:
    """A note of 41 characters becomes many codes, and a request may have it a million times."""

    def content(count: int) -> Any:
        note = to_note(noise(3))
        if form == "notes":
            return note * count
        generated = {"type": "generated_image", "id": content_hash(noise(3))}
        return [{"type": "text", "text": note} if form == "texts" else generated] * count

    count = 1000 // len(CODES)  # of the images that fit the reader's context
    known = parts_of({"content": content(count)}, reader(noise(3)))
    assert known == [CODES] * count
    assert len(set(map(id, known))) == 1
    for other in (count + 1, 1000):
        with pytest.raises(CodedError, match=r"messages\[1\].*does not fit the model") as caught:
            parts_of({"content": content(other)}, reader(noise(3)))
        assert caught.value.code == "context_length_exceeded"


def test_a_million_notes_take_no_memory() -> None:
    text, own = to_note(noise(3)) * 100_000, reader(noise(3))
    image_tokenizer()
    tracemalloc.start()
    try:
        assert count_markdown_images(text) == 0
        with pytest.raises(CodedError, match="does not fit"):
            parts_of({"content": text}, own)
        assert tracemalloc.get_traced_memory()[1] < len(text) // 4
    finally:
        tracemalloc.stop()


def test_text_and_image_codes_share_one_limit() -> None:
    content = to_note(noise(3))
    fits = "x" * (1000 - 2 - len(CODES))  # The two questions have one character each.
    assert parts_of({"content": fits + content}, reader(noise(3))) == [fits, CODES]
    with pytest.raises(CodedError, match="does not fit"):
        parts_of({"content": f"x{fits}{content}"}, reader(noise(3)))


def test_the_store_is_bounded_and_drops_the_least_recently_used() -> None:
    store = GeneratedImages(max_bytes=5000)
    for number in range(1000):
        store.add("space", str(number), CODES)
        store.get("space", "0")
        assert store.size <= 5000
    assert store.get("space", "0") == CODES
    assert store.get("space", "999") == CODES
    assert store.get("space", "500") is None
    store.add("space", "0", CODES[:1])
    assert store.get("space", "0") == CODES[:1]


# --- the server -------------------------------------------------------------------------------


def ask(running: RunningServer, messages: list[Any], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": messages, "seed": 4, **fields}
    response = httpx.post(running.url + CHAT, json=body, timeout=60)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


QUESTION = {"role": "user", "content": "Write a report on an image."}


@pytest.mark.parametrize("mode", ["image", "any"])
def test_a_response_as_markdown_is_the_same_response(
    mode: str, running: RunningServer, client: openai.OpenAI
) -> None:
    plain = ask(running, [QUESTION], mode=mode)["choices"][0]["message"]
    message = ask(running, [QUESTION], mode=mode, images_as="markdown")["choices"][0]["message"]
    assert message.keys() == {"role", "content"}
    expected = [
        part["text"] if part["type"] == "text" else ImageReference(url=part["image_url"]["url"])
        for part in plain["parts"]
    ]
    assert list(split_images(message["content"])) == expected
    stream: Any = client.chat.completions.create(
        model="tiny", messages=[QUESTION], seed=4, stream=True,  # type: ignore[list-item]
        extra_body={"mode": mode, "images_as": "markdown"},
    )  # fmt: skip
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == message["content"]


@pytest.mark.parametrize("images_as", ["images", "markdown"])
def test_what_is_sent_back_has_the_tokens_that_were_generated(
    images_as: str, running: RunningServer
) -> None:
    """The reference is the library, which continues with the generated codes themselves."""
    reply = ask(running, [QUESTION], mode="any", images_as=images_as)
    messages = [QUESTION, reply["choices"][0]["message"], QUESTION]
    body = {"model": "tiny", "messages": messages}
    tokens = httpx.post(f"{running.url}/tokenize", json=body, timeout=60).json()["tokens"]
    model = medley.load("tiny")
    session = model.chat("any", seed=4)
    assert list(session.send(QUESTION["content"]))
    assert any(token in model.vocabulary.image_codes for token in session.ids)
    assert tokens == [*session.ids, *model.encode_prompt(QUESTION["content"])[1:]]


@pytest.mark.parametrize("path", ["llava", "ui"])
def test_other_interfaces_find_the_codes_of_generated_images(
    path: str, running: RunningServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image, other = noise(11), noise(12)
    running.worker.remember_image(image, CODES)
    prompts: list[Any] = []
    read_prompt = running.worker.read_prompt

    def record(prompt: Any, *rest: Any) -> Any:
        prompts.append(prompt)
        return read_prompt(prompt, *rest)

    monkeypatch.setattr(running.worker, "read_prompt", record)
    if path == "llava":
        images = [data_url(i).partition(",")[2] for i in (image, other)]
        body = {"model": "tiny", "prompt": "<image><image>", "images": images, "max_new_tokens": 1}
        response = httpx.post(f"{running.url}/worker_generate_stream", json=body, timeout=60)
        assert b'"error_code": 1' not in response.content
    else:
        store = ImageStore(tmp_path / "store")
        stored = [store.add_generated(i) for i in (image, other)]
        conversation = Conversation().with_user_message(stored)

        async def respond() -> list[Conversation]:
            settings = {**SETTING_VALUES, "max_new_tokens": 1, "mode": "text"}
            updates = generate_response(running.state, store, "tiny", conversation, settings)
            return [update async for update in updates]

        assert asyncio.run(respond())[-1].messages[-1].status == ""
    first, second = prompts[0].turns[0].parts
    assert (first.codes, first.image) == (CODES, None)
    assert (second.codes, second.image) == (None, other)


def test_an_image_alone_has_a_note_and_text_has_none(
    running: RunningServer, client: openai.OpenAI
) -> None:
    message = ask(running, [QUESTION], mode="image")["choices"][0]["message"]
    url = message["images"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert message["content"] == to_note(image)
    stream: Any = client.chat.completions.create(
        model="tiny:image", messages=[QUESTION], seed=4, stream=True,  # type: ignore[list-item]
    )  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in stream) == to_note(image)
    mixed = ask(running, [QUESTION], mode="any")["choices"][0]["message"]
    assert "[image" not in mixed["content"]
    # A client that keeps only the text brings the image back by its note.
    alone = [QUESTION, {"role": "assistant", "content": to_note(image)}, QUESTION]
    whole = [QUESTION, message, QUESTION]
    first, second = (ask(running, m, mode="text", max_tokens=1)["usage"] for m in (alone, whole))
    assert first == second
