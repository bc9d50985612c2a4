"""Request fields as clients send them: neutral values, other servers' names, empty messages."""

from __future__ import annotations

import functools
import json
import typing
from typing import Any, get_type_hints

import jsonschema_rs
import pytest
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionUserMessageParam,
    completion_create_params,
)
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.image_generate_params import ImageGenerateParamsNonStreaming
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from PIL import Image
from pydantic import BaseModel, ValidationError

import medley
from medley.data.document import Document, ImagePart
from medley.generation import GenerationOptions
from medley.serving.completions_api import CompletionRequest
from medley.serving.embeddings_api import EmbeddingRequest
from medley.serving.limits import Limits, RequestError
from medley.serving.messages import to_document
from medley.serving.neutral_values import CHAT, IMAGES, MESSAGE, OFF, Unserved
from medley.serving.responses_schema import ResponseRequest
from medley.serving.schema import ChatRequest, ImageRequest, RequestFields
from medley.serving.untrusted_inputs import RequestReader
from medley.utils.html import data_url

CHAT_BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
IMAGE_BODY = {"prompt": "x"}
BODIES: list[tuple[type[RequestFields], dict[str, Any]]] = [
    (ChatRequest, CHAT_BODY), (ImageRequest, IMAGE_BODY),
    (CompletionRequest, {"model": "tiny", "prompt": "x"}),
    (EmbeddingRequest, {"model": "tiny", "input": "x"}),
    (ResponseRequest, {"model": "tiny", "input": "x"}),
]  # fmt: skip
NEUTRAL = [
    (kind, body, name, value)
    for kind, body in BODIES
    for name, field in kind.unserved.items()
    for value in field.neutral or (None, "x", 7, {"a": 1})
]
ON: list[Any] = [1, True, 0.5, "x", "required", [{}], {"a": True}, {"type": "json_object"}]


def errors_of(kind: type[BaseModel], body: dict[str, Any]) -> list[Any]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return caught.value.errors()


# --- fields that are not implemented ----------------------------------------------------------


@pytest.mark.parametrize(("kind", "body", "name", "value"), NEUTRAL)
def test_a_neutral_value_changes_nothing(
    kind: type[BaseModel], body: dict[str, Any], name: str, value: Any
) -> None:
    assert kind.model_validate(body | {name: value}) == kind.model_validate(body)


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_every_other_value_is_rejected_by_the_name_of_its_field(
    kind: type[RequestFields], body: dict[str, Any]
) -> None:
    for name, field in kind.unserved.items():
        # In Python 1 == True; in JSON they are different values.
        neutral = {json.dumps(value) for value in field.neutral}
        for value in ON if field.neutral else []:
            if json.dumps(value) in neutral:
                continue
            (error,) = errors_of(kind, body | {name: value})
            assert error["loc"] == (name,)
            assert error["type"] == "unsupported_value"
            assert field.supported in error["msg"]


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_an_unknown_field_may_be_empty_only(kind: type[BaseModel], body: dict[str, Any]) -> None:
    empty: list[Any] = [None, False, "", [], {}, {"a": None}]
    for value in empty:
        assert kind.model_validate(body | {"new_field": value}) == kind.model_validate(body)
    others: list[Any] = [0, 1, True, "none", "x", [0], {"a": 1}]
    for value in others:
        (error,) = errors_of(kind, body | {"new_field": value})
        assert (error["loc"], error["type"]) == (("new_field",), "unknown_parameter")


def test_null_is_the_default_of_every_optional_field() -> None:
    for kind, body in BODIES:
        optional = [n for n, field in kind.model_fields.items() if not field.is_required()]
        nulls = dict.fromkeys(optional)
        assert len(optional) > 1
        assert kind.model_validate(body | nulls) == kind.model_validate(body)


@pytest.mark.parametrize(
    ("parameters", "kind"),
    [
        (completion_create_params.CompletionCreateParamsNonStreaming, ChatRequest),
        (ImageGenerateParamsNonStreaming, ImageRequest),
        (CompletionCreateParamsNonStreaming, CompletionRequest),
        (EmbeddingCreateParams, EmbeddingRequest),
        (ResponseCreateParamsNonStreaming, ResponseRequest),
    ],
)
def test_every_field_of_the_openai_package_is_known(
    parameters: type, kind: type[RequestFields]
) -> None:
    """A new version of the package may add a field, whose neutral values belong into the table."""
    fields = get_type_hints(parameters).keys()
    assert fields - kind.model_fields.keys() - kind.unserved.keys() == set()


def test_every_field_of_a_message_of_the_openai_package_is_known() -> None:
    for message in (ChatCompletionAssistantMessageParam, ChatCompletionUserMessageParam):
        fields = get_type_hints(message).keys()
        assert fields - MESSAGE.keys() - {"role", "content", "name"} == set()


def test_literal_values_of_the_openai_package_are_neutral_or_rejected() -> None:
    """No value that the package's types name is an unknown field or a server error."""
    hints = get_type_hints(completion_create_params.CompletionCreateParamsNonStreaming)
    count = 0
    for name, hint in hints.items():
        for value in _literals(hint) if name in CHAT else []:
            count += 1
            try:
                ChatRequest.model_validate(CHAT_BODY | {name: value})
            except ValidationError as error:
                assert [e["type"] for e in error.errors()] == ["unsupported_value"]
            else:
                assert value in (*CHAT[name].neutral, *(() if CHAT[name].neutral else (value,)))
    assert count > 10


def _literals(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [value for argument in typing.get_args(hint) for value in _literals(argument)]


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_the_schema_accepts_what_the_server_accepts(
    kind: type[RequestFields], body: dict[str, Any]
) -> None:
    validator = jsonschema_rs.validator_for(kind.model_json_schema())
    for name in (*kind.unserved, "new_field"):
        for value in (*OFF, *ON, -1, 0.0, {"type": "text"}, {"type": "text", "x": None}, "auto"):
            try:
                kind.model_validate(body | {name: value})
            except ValidationError:
                accepted = False
            else:
                accepted = True
            assert validator.is_valid(body | {name: value}) == accepted, (name, value)


def test_an_error_quotes_no_long_value() -> None:
    (error,) = errors_of(ChatRequest, CHAT_BODY | {"prediction": "secret" * 100})
    assert "secret" not in error["msg"]
    (error,) = errors_of(ChatRequest, CHAT_BODY | {"x" * 1000: 1})
    assert len(error["loc"][0]) < 100
    (error,) = errors_of(ChatRequest, CHAT_BODY | {"\ud83d": 1})
    assert error["loc"] == ("\\ud83d",)


def test_a_member_that_is_on_is_named() -> None:
    thinking = {"chat_template_kwargs": {"add_x": None, "enable_thinking": True}}
    (error,) = errors_of(ChatRequest, CHAT_BODY | thinking)
    assert "(got enable_thinking: true)" in error["msg"]
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    (error,) = errors_of(ChatRequest, CHAT_BODY | options)
    assert error["loc"] == ("stream_options", "continuous_usage_stats")
    quiet = {"stream_options": {"include_usage": True, "include_obfuscation": False}}
    request = ChatRequest.model_validate(CHAT_BODY | quiet)
    assert request.stream_options is not None
    assert request.stream_options.include_usage


def test_tools_are_named_before_the_options_of_tools() -> None:
    """The user of a framework has set tools, not the options that the framework adds."""
    body = {"parallel_tool_calls": False, "tool_choice": "required", "tools": [{"type": "x"}]}
    (error,) = errors_of(ChatRequest, CHAT_BODY | body)
    assert error["loc"] == ("tools",)


# --- other values of implemented fields -------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"top_p": 0}, {"text_greedy": True}), ({"top_p": 0.0, "temperature": 1},
        {"text_greedy": True, "text_temperature": 1}), ({"temperature": 0}, {"text_greedy": True}),
        ({"top_p": 0.5}, {"text_top_p": 0.5}), ({"top_k": 20}, {"text_top_k": 20}),
        ({"top_k": -1}, {}), ({"top_k": 0}, {}), ({"top_k": 3, "text_top_k": 3}, {"text_top_k": 3}),
        ({"top_k": 3, "text_top_k": None}, {"text_top_k": 3}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}), ({"max_tokens": -1}, {}),
        ({"max_completion_tokens": 6}, {"max_new_tokens": 6}), ({"modalities": []}, {}),
        ({"modalities": ["text"]}, {"mode": "text"}), ({"stop": "a"}, {}), ({"stop": []}, {}),
    ],
)  # fmt: skip
def test_values_of_other_servers_set_the_options(
    fields: dict[str, Any], options: dict[str, Any]
) -> None:
    request = ChatRequest.model_validate(CHAT_BODY | {"seed": 0} | fields)
    assert request.generation(Limits()) == GenerationOptions(**options)


def test_seed_of_minus_one_is_random() -> None:
    request = ChatRequest.model_validate(CHAT_BODY | {"seed": -1})
    assert len({request.generation(Limits()).seed for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": 32768}, "max_tokens", "(got 32768, limit 4096)"),
        ({"max_completion_tokens": 32768}, "max_completion_tokens", "(got 32768, limit 4096)"),
        ({"top_p": 2}, "top_p", "top_p is 2.0"), ({"seed": -2}, "seed", "seed is -2"),
        ({"top_p": 2, "temperature": 0}, "top_p", "top_p is 2.0"),
        ({"top_k": 3, "text_top_k": 4}, "top_k", "(got 3 and 4)"),
        ({"image_top_p": 0}, "image_top_p", "image_top_p is 0"),
    ],
)  # fmt: skip
def test_values_beyond_a_limit_are_rejected_by_the_field_that_was_sent(
    fields: dict[str, Any], param: str, message: str
) -> None:
    request = ChatRequest.model_validate(CHAT_BODY | fields)
    with pytest.raises(RequestError) as caught:
        request.generation(Limits())
    assert caught.value.param == param
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_request_without_a_size_has_the_size_of_the_model() -> None:
    for size in (None, "auto", "64x64"):
        request = ImageRequest.model_validate({"prompt": "x", "size": size})
        assert request.generation(Limits(), 64, strict=True).mode == "image"
        assert request.size_note(64) is None


@pytest.mark.parametrize("size", ["1024x1024", "64x65", "1x1", "512x512"])
def test_another_image_size_has_a_note_or_is_rejected(size: str) -> None:
    request = ImageRequest.model_validate({"prompt": "x", "size": size})
    assert request.generation(Limits(), 64).mode == "image"
    note = request.size_note(64)
    assert note is not None
    assert size in note
    assert "64x64" in note
    with pytest.raises(RequestError, match="expected 64x64 or auto"):
        request.generation(Limits(), 64, strict=True)


# --- messages ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_part() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (64, 64)))}}


@functools.cache
def image_tokenizer() -> medley.ImageTokenizer:
    return medley.ImageTokenizer.from_checkpoint("tiny")


def document_of(*messages: dict[str, Any]) -> Document:
    return to_document(messages, RequestReader(Limits(), image_tokenizer(), 1000))


def shape_of(document: Document) -> list[tuple[str, str]]:
    """Role and contents of each turn."""
    return [
        (turn.role, "".join("<image>" if isinstance(p, ImagePart) else p for p in turn.parts))
        for turn in document.turns
    ]


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}]])
def test_a_user_message_without_content_is_rejected(content: Any) -> None:
    for messages in ([{"role": "user", "content": content}], [USER, {"role": "user"}, USER]):
        with pytest.raises(RequestError, match="A user message needs text or an image") as caught:
            document_of(*messages)
        assert str(caught.value.param).endswith(".content")


@pytest.mark.parametrize("content", [None, "", []])
@pytest.mark.parametrize("empty", [None, []])
def test_an_assistant_message_may_have_images_only(
    content: Any, empty: Any, image_part: dict[str, Any]
) -> None:
    for images in ({"images": [image_part]}, {"parts": [image_part], "images": [image_part]},
                   {"images": [image_part], "parts": empty}):  # fmt: skip
        answer = {"role": "assistant", "content": content, "tool_calls": empty} | images
        shape = shape_of(document_of(USER, answer, USER))
        assert shape == [("user", "a"), ("assistant", "<image>"), ("user", "a")]


def test_empty_messages_of_the_assistant_and_the_system_add_nothing() -> None:
    contents: list[Any] = [None, "", []]
    for content in contents:
        empty = {"role": "assistant", "content": content}
        shape = shape_of(document_of(USER, empty, USER))
        assert shape == [("user", "a"), ("assistant", ""), ("user", "a")]
        shape = shape_of(document_of({"role": "system", "content": content}, USER))
        assert shape == [("user", "a")]


def test_empty_parts_do_not_hide_the_content() -> None:
    for field in ("parts", "images"):
        assert shape_of(document_of(USER | {field: []})) == [("user", "a")]


@pytest.mark.parametrize(("name", "field"), MESSAGE.items())
def test_contents_of_a_message_that_would_be_lost_are_rejected(name: str, field: Unserved) -> None:
    for value in field.neutral:
        answer = {"role": "assistant", "content": "b", name: value}
        assert len(document_of(USER, answer, USER).turns) == 3
    for value in ("words", [{"id": "1"}], {"name": "f"}):
        with pytest.raises(RequestError, match=rf"messages\[1\]\.{name}: Unsupported") as caught:
            document_of(USER, {"role": "assistant", "content": "b", name: value}, USER)
        assert caught.value.param == f"messages[1].{name}"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "text"}, r"content\[0\]\.text: Must be text \(got None\)"),
        ({"type": "text", "text": 5}, r"content\[0\]\.text: Must be text \(got 5\)"),
        ("hello", r"content\[0\]: Unsupported type \(got None, expected an object"),
        ({"type": "input_audio"}, r"content\[0\]: Unsupported type \(got 'input_audio'"),
        ({"type": "image_url", "image_url": None}, r"content\[0\]: The image has no URL"),
    ],
)  # fmt: skip
def test_invalid_content_parts_are_named(part: Any, message: str) -> None:
    with pytest.raises(RequestError, match=rf"messages\[0\]\.{message}"):
        document_of({"role": "user", "content": [part]})


def test_every_table_has_a_reason_and_accepts_null() -> None:
    for field in (*CHAT.values(), *IMAGES.values(), *MESSAGE.values()):
        assert field.supported and not field.supported.endswith(".")
        assert not field.neutral or None in field.neutral
