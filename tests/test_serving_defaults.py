"""Defaults of a server, modes by the names of models, and late system messages."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from running_server import RunningServer

import medley
from medley import cli
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.serving.completions_api import CompletionRequest
from medley.serving.limits import Limits, RequestError
from medley.serving.messages import to_document
from medley.serving.request_defaults import RequestDefaults, parse_defaults
from medley.serving.responses_schema import ResponseRequest
from medley.serving.schema import ChatRequest, ImageRequest
from medley.serving.state import ServerState
from medley.serving.untrusted_inputs import RequestReader

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
QUESTION = [{"role": "user", "content": "Write a report on an image."}]


def running_with(defaults: RequestDefaults) -> RunningServer:
    def configure(app: FastAPI, state: ServerState) -> None:
        state.defaults = defaults

    return RunningServer(
        Limits(request_timeout=60, max_tokens=400), configure=configure, names=("tiny", "a:text")
    )


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = running_with(RequestDefaults())
    yield server
    server.stop()


def message_of(server: RunningServer, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": QUESTION, "seed": 4, **fields}
    response = httpx.post(server.url + CHAT, json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == body["model"]
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


def kind_of(message: dict[str, Any]) -> str:
    """The mode that a message shows: the question asks for text with an image."""
    if "images" not in message:
        return "text"
    return "image" if message["content"].startswith("[image ") else "any"


# --- names with a mode ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "any"), ({"model": "tiny:any"}, "any"), ({"model": "tiny:text"}, "text"),
        ({"model": "tiny:image"}, "image"), ({"mode": "text"}, "text"),
        ({"modalities": ["text"]}, "text"), ({"modalities": ["image"]}, "image"),
        ({"modalities": ["image", "text"]}, "any"), ({"modalities": []}, "any"),
        ({"model": "tiny:any", "mode": "text"}, "text"),
        ({"model": "tiny:text", "modalities": ["text"]}, "text"),
        ({"model": "tiny:image", "mode": "image"}, "image"),
        ({"model": "a:text"}, "any"),  # the name of a model, which has no mode
        ({"model": "a:text:text"}, "text"),
    ],
)  # fmt: skip
def test_the_mode_is_that_of_the_request_or_the_name(
    fields: dict[str, Any], kind: str, running: RunningServer
) -> None:
    assert kind_of(message_of(running, **fields)) == kind


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "tiny:text", "mode": "image"}, 400, "invalid_value"),
        ({"model": "tiny:text", "modalities": ["text", "image"]}, 400, "invalid_value"),
        ({"model": "tiny:image", "mode": "text"}, 400, "invalid_value"),
        ({"model": "tiny:audio"}, 404, "model_not_found"),
        ({"model": ":text"}, 404, "model_not_found"), ({"model": ""}, 404, "model_not_found"),
        ({"model": "tiny:"}, 404, "model_not_found"), ({"model": "a"}, 404, "model_not_found"),
        ({"model": "tiny:text:text"}, 404, "model_not_found"),
    ],
)  # fmt: skip
def test_contradictions_and_unknown_names_are_rejected(
    fields: dict[str, Any], status: int, code: str, running: RunningServer
) -> None:
    response = httpx.post(running.url + CHAT, json=BODY | fields, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": QUESTION}), ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("name", "mode"), [("text", "image"), ("text", "any"), ("image", "text")])
def test_every_endpoint_rejects_a_mode_that_contradicts_the_name(
    path: str, body: dict[str, Any], name: str, mode: str, running: RunningServer
) -> None:
    contradiction = {"model": f"tiny:{name}", "mode": mode}
    response = httpx.post(running.url + path, json=body | contradiction, timeout=60)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "mode"
    assert f"got mode {mode} and model tiny:{name}" in response.json()["error"]["message"]


def test_models_are_listed_with_their_abilities(running: RunningServer) -> None:
    rows = {row["id"]: row for row in httpx.get(f"{running.url}/v1/models").json()["data"]}
    names = ["tiny", "a:text"]
    assert list(rows) == names + [f"{n}:{m}" for n in names for m in ("any", "text", "image")]
    outputs = {name: row["architecture"]["output_modalities"] for name, row in rows.items()}
    assert outputs["tiny"] == outputs["tiny:any"] == ["text", "image"]
    assert (outputs["tiny:text"], outputs["tiny:image"]) == (["text"], ["image"])
    assert rows["tiny:text"]["root"] == "tiny"
    assert not rows["tiny:text"]["generates_images"]
    for name, row in rows.items():
        assert httpx.get(f"{running.url}/v1/models/{name}").json() == row


def test_a_model_without_a_decoder_generates_text(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for worker in running.state.workers.values():
        monkeypatch.setattr(worker.model.image_tokenizer, "has_decoder", False)
    ids = [row["id"] for row in httpx.get(f"{running.url}/v1/models").json()["data"]]
    assert ids == ["tiny", "a:text", "tiny:text", "a:text:text"]
    assert kind_of(message_of(running)) == "text"


def test_images_need_a_model_that_generates_them(running: RunningServer) -> None:
    url = f"{running.url}/v1/images/generations"
    for name, status in (("tiny", 200), ("tiny:image", 200), ("tiny:any", 200), ("tiny:text", 400)):
        assert httpx.post(url, json={"model": name, "prompt": "x"}).status_code == status


# --- defaults ---------------------------------------------------------------------------------


def test_a_server_for_text_clients() -> None:
    server = running_with(parse_defaults(["mode=text,images_as=markdown"], Limits()))
    try:
        assert kind_of(message_of(server)) == "text"
        for fields in ({"mode": "any"}, {"model": "tiny:any"}, {"min_images": 1},
                       {"modalities": ["text", "image"]}):  # fmt: skip
            assert "![image](data:image/png;base64," in message_of(server, **fields)["content"]
        assert "images" in message_of(server, mode="any", images_as="images")
        model = httpx.get(f"{server.url}/v1/models/tiny").json()
        assert model["defaults"] == {"mode": "text", "images_as": "markdown"}
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        ([], {}), (["repetition_penalty=1"], {"repetition_penalty": 1}),
        (["repetition_penalty=1,temperature=0"], {"repetition_penalty": 1, "text_greedy": True}),
        (["temperature=0.5"], {"text_temperature": 0.5}),
        (["top_p=1", "image_top_k=3, min_images=0"], {"text_top_p": 1, "image_top_k": 3}),
        (["max_tokens=7"], {"max_new_tokens": 7}), (["text_top_k=5"], {"text_top_k": 5}),
        (["text_greedy=true,"], {"text_greedy": True}), (["top_k=5"], {"text_top_k": 5}),
    ],
)  # fmt: skip
def test_defaults_apply_to_every_endpoint(texts: list[str], options: dict[str, Any]) -> None:
    defaults = parse_defaults(texts, Limits())
    chat = defaults.apply(ChatRequest.model_validate(BODY | {"seed": 0}))
    assert chat.generation(Limits()) == GenerationOptions(**options)
    for kind in (CompletionRequest, ResponseRequest):
        body = (
            {"model": "tiny", "prompt": "x"}
            if kind is CompletionRequest
            else {"model": "tiny", "input": "x"}
        )
        own = defaults.apply(kind.model_validate(body | {"seed": 0})).generation(Limits())
        expected = options | {"seed": 0}
        if kind is CompletionRequest:
            expected = {"max_new_tokens": 16} | expected
        assert own == GenerationOptions(**expected)
    image = defaults.apply(ImageRequest.model_validate({"prompt": "x", "seed": 0}))
    penalty = image.generation(Limits(), 64).repetition_penalty
    assert penalty == options.get("repetition_penalty", GenerationOptions.repetition_penalty)


@pytest.mark.parametrize(
    ("defaults", "fields", "options"),
    [
        ("temperature=0", {"temperature": 0.9}, {"text_temperature": 0.9}),
        ("text_greedy=true", {"temperature": 0.9}, {"text_temperature": 0.9}),
        ("top_k=5", {"text_top_k": 6}, {"text_top_k": 6}),
        ("text_top_k=5", {"top_k": 6}, {"text_top_k": 6}),
        ("max_tokens=5", {"max_completion_tokens": 6}, {"max_new_tokens": 6}),
        ("repetition_penalty=1", {"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ("repetition_penalty=1", {"repetition_penalty": None}, {"repetition_penalty": 1}),
    ],
)  # fmt: skip
def test_the_values_of_a_request_win(
    defaults: str, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    request = ChatRequest.model_validate(BODY | {"seed": 0} | fields)
    own = parse_defaults([defaults], Limits()).apply(request)
    assert own.generation(Limits()) == GenerationOptions(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode", "Invalid default (got 'mode'"), ("=1", "Invalid default"), ("x=1", "Names are"),
        ("model=a", "Names are"), ("messages=[]", "Names are"), ("stream=true", "Names are"),
        ("mode=video", "mode: Input should be"), ("temperature=hot", "temperature: "),
        ("temperature=-1", "temperature: "), ("seed=1,seed=2", "seed is given twice"),
        ("max_tokens=99999", "max_tokens: Too large (got 99999"), ("top_p=2", "top_p is 2"),
        ("images_as=html", "images_as: "), ("mode=text,min_images=1", "min_images is 1"),
    ],
)  # fmt: skip
def test_invalid_defaults_are_rejected(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_defaults([text], Limits())
    assert str(caught.value).startswith("--defaults: ")
    assert message in str(caught.value)


def test_flags_have_defaults_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_defaults([], Limits(), "text").mode == "text"
    assert parse_defaults([], Limits(), None, "markdown").images_as == "markdown"
    with pytest.raises(UserError, match="mode is given twice"):
        parse_defaults(["mode=text"], Limits(), "text")
    assert cli.main(["serve", "--ckpt", "tiny", "--defaults", "mode=video"]) != 0
    assert "--defaults: mode: " in capsys.readouterr().err


def test_a_strict_server_rejects_other_image_sizes() -> None:
    server = running_with(RequestDefaults(strict_image_size=True))
    body = {"model": "tiny", "prompt": "x", "size": "1024x1024"}
    response = httpx.post(f"{server.url}/v1/images/generations", json=body)
    server.stop()
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "size"


def test_a_lenient_server_names_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    server = running_with(RequestDefaults(lenient=True))
    odd = {"tools": [{"type": "function"}], "foo": 1, "max_tokens": 32768, "logit_bias": {"1": 2},
           "stream_options": {"bar": 1}, "user": "x", "store": False}  # fmt: skip
    bodies = (
        (CHAT, BODY | {"mode": "text"}), ("/v1/completions", {"model": "tiny", "prompt": "x"}),
        ("/v1/responses", {"model": "tiny", "input": "x"}),
        ("/v1/images/generations", {"model": "tiny", "prompt": "x"}),
        ("/v1/embeddings", {"model": "tiny", "input": "x"}),
        ("/tokenize", {"model": "tiny", "prompt": "x"}),
        ("/detokenize", {"model": "tiny", "tokens": [5]}),
    )  # fmt: skip
    try:
        with caplog.at_level(logging.INFO, "medley.serving"):
            plain = [httpx.post(server.url + p, json=b, timeout=60).json() for p, b in bodies]
            assert not any("left_out" in response for response in plain)
            response = httpx.post(server.url + CHAT, json=bodies[0][1] | odd, timeout=60)
        assert response.status_code == 200, response.text
        notes = response.json()["left_out"]
        names = {note.partition(":")[0] for note in notes}
        assert names == {"tools", "foo", "max_tokens", "logit_bias", "bar"}
        assert "max_tokens: 32768 was cut to 400." in notes
        assert any("left out" in record.getMessage() for record in caplog.records)
        for path, body in bodies:
            more = {"foo": 1, "max_output_tokens" if "responses" in path else "max_tokens": 32768}
            found = httpx.post(server.url + path, json=body | more, timeout=60).json()["left_out"]
            assert len(found) == 2
        # What cannot be read is still rejected.
        invalid: list[dict[str, Any]] = [
            {"n": 99}, {"messages": []}, {"temperature": "hot"}, {"model": "other"},
        ]  # fmt: skip
        for fields in invalid:
            response = httpx.post(server.url + CHAT, json=BODY | fields, timeout=60)
            assert response.status_code in (400, 404)
    finally:
        server.stop()


# --- system messages --------------------------------------------------------------------------


@functools.cache
def image_tokenizer() -> medley.ImageTokenizer:
    return medley.ImageTokenizer.from_checkpoint("tiny")


def turns_of(*messages: tuple[str, str]) -> list[tuple[str, str]]:
    rows = [{"role": role, "content": content} for role, content in messages]
    document = to_document(rows, RequestReader(Limits(), image_tokenizer(), 1000))
    return [(turn.role, "".join(map(str, turn.parts))) for turn in document.turns]


def test_late_system_messages_join_the_turn_beside_them() -> None:
    user, answer, system = ("user", "a"), ("assistant", "b"), ("system", "s")
    assert turns_of(system, user) == [("user", "s\na")]
    assert turns_of(user, system) == [("user", "a\ns")]
    assert turns_of(user, answer, system, user) == [user, answer, ("user", "s\na")]
    assert turns_of(user, answer, system) == [user, answer, ("user", "s")]
    assert turns_of(user, system, answer, ("developer", "d"), user) == [
        ("user", "a\ns"), answer, ("user", "d\na")
    ]  # fmt: skip
    assert turns_of(user, ("assistant", ""), system) == [user, ("assistant", ""), ("user", "s")]
    assert turns_of(user, ("system", ""), answer, ("system", ""), user) == [user, answer, user]
    with pytest.raises(RequestError, match="The last message must be a user message"):
        turns_of(user, answer, ("system", ""))


# --- the log ----------------------------------------------------------------------------------


def test_the_log_names_the_path_of_a_404(
    running: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "medley.serving"):
        httpx.post(f"{running.url}/v1/unknown/thing?secret=1")
        httpx.get(f"{running.url}/a%0Ab{'c' * 500}")
    lines = [record.getMessage() for record in caplog.records if " 404 " in record.getMessage()]
    assert len(lines) == 2
    assert "POST /v1/unknown/thing 404" in lines[0]
    assert "secret" not in lines[0]
    assert "\n" not in lines[1]
    assert len(lines[1]) < 200
