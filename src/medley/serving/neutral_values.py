"""Request fields that this server does not implement, and the values that turn them off.

Clients send most fields of OpenAI's protocol with the value that means "off" or "default". Such a
value changes nothing, so it is dropped. Every other value asks for something that the server cannot
do; it is rejected, and the error names the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from medley.utils.files import escape_name

EMPTY: tuple[Any, ...] = (None, False, "", [], {})  # neutral in every field, known or not
OFF = (*EMPTY, 0, "none")  # neutral in a field whose meaning is known
_ENGINE = "The engine has no such option"
_QUOTED = 40  # characters of a value that an error message quotes


@dataclass(frozen=True)
class Unserved:
    """A field without effect.

    Attributes:
        supported: what an error says about the field
        neutral: the values that change nothing, apart from members of an object that are off.
            Without any, every value changes nothing
    """

    supported: str
    neutral: tuple[Any, ...] = OFF


_TOOLS = Unserved("The models call no tools")
_TOOL_CHOICE = Unserved(_TOOLS.supported, (*OFF, "auto"))
_PENALTY = Unserved("Use repetition_penalty")
_LOGPROBS = Unserved("Responses have no log probabilities")
_REASONING = Unserved("The models have no separate reasoning")
_SPECIAL = Unserved("Special tokens are never part of the text", (None, True))

# Identification and caching: no value of these fields can change a response.
_IGNORED = dict.fromkeys(
    (
        "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "user",
    ),
    Unserved("Ignored", ()),
)  # fmt: skip

# In the order in which errors name them: `tools` before the options of tools.
CHAT: Mapping[str, Unserved] = {
    "tools": _TOOLS,
    "functions": _TOOLS,
    "tool_choice": _TOOL_CHOICE,
    "function_call": _TOOL_CHOICE,
    "parallel_tool_calls": Unserved(_TOOLS.supported, (*OFF, True)),
    "response_format": Unserved("Responses are plain text", (*OFF, {"type": "text"})),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "logprobs": _LOGPROBS,
    "top_logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "logit_bias": Unserved("Tokens have no bias"),
    "audio": Unserved("Responses have text and images"),
    "prediction": Unserved("Predicted outputs are not used"),
    "moderation": Unserved("There is no moderation model"),
    "store": Unserved("Responses are not stored"),
    "service_tier": Unserved("All requests are equal", (*OFF, "auto", "default")),
    "verbosity": Unserved("Use max_tokens", (*OFF, "medium")),
    # An empty object would turn the search on.
    "web_search_options": Unserved("The models have no web search", (None, False)),
    "reasoning_effort": _REASONING,
    "reasoning": _REASONING,
    "thinking": Unserved(_REASONING.supported, (*OFF, {"type": "disabled"})),
    # Fields of vLLM.
    "chat_template_kwargs": Unserved("The prompt has a fixed format without options"),
    "add_generation_prompt": Unserved("A response always follows", (None, True)),
    "skip_special_tokens": _SPECIAL,
    "spaces_between_special_tokens": _SPECIAL,
    "best_of": Unserved("Use n", (*OFF, 1)),
    "length_penalty": Unserved(_ENGINE, (None, 1)),
    "min_p": Unserved("Use top_p or text_top_k"),
    "min_tokens": Unserved(_ENGINE),
    "priority": Unserved("All requests are equal"),
    **_IGNORED,
}
IMAGES: Mapping[str, Unserved] = {
    "quality": Unserved("Images have one quality", (*OFF, "auto", "standard")),
    "style": Unserved("Describe the style in the prompt", (*OFF, "vivid")),
    "background": Unserved("Images are opaque", (*OFF, "auto", "opaque")),
    "moderation": Unserved("Images are not moderated", (*OFF, "auto", "low")),
    "output_format": Unserved("Images are PNG files", (*OFF, "png")),
    "output_compression": Unserved("Images are PNG files", (None, 100)),
    "stream": Unserved("Use /v1/chat/completions with previews"),
    "partial_images": Unserved("Use /v1/chat/completions with previews"),
    "complexity": Unserved("Images have one quality"),
    "frame_count": Unserved("Images have one frame", (*OFF, 1)),
    "frame_duration_ms": Unserved("Images have one frame"),
    "svg": Unserved("Images are PNG files"),
    **_IGNORED,
}
EMBEDDINGS: Mapping[str, Unserved] = {
    "dimensions": Unserved("Embeddings have the width of the model"),
    "encoding_type": Unserved("Use encoding_format"),
    "truncate_prompt_tokens": Unserved("Inputs are not truncated"),
    "input_type": Unserved("All inputs are equal"),
    **_IGNORED,
}
# In the order of OpenAI's reference.
COMPLETIONS: Mapping[str, Unserved] = {
    "suffix": Unserved("Text is continued, not filled in"),
    **{
        name: CHAT[name]
        for name in (
            "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "min_p",
            "min_tokens", "length_penalty", "prompt_logprobs", "skip_special_tokens",
            "spaces_between_special_tokens", "priority", "response_format",
        )
    },
    **_IGNORED,
}  # fmt: skip
# `include` asks for parts of a response that no response has.
_INCLUDE = ["reasoning.encrypted_content"]
_TEXT = {"format": {"type": "text"}}
RESPONSES: Mapping[str, Unserved] = {
    "background": Unserved("Responses are not generated in the background"),
    "conversation": Unserved("Use previous_response_id"),
    "include": Unserved("Responses have no other parts", (*OFF, _INCLUDE)),
    "prompt": Unserved("There are no stored prompts"),
    "reasoning": _REASONING,
    "text": Unserved(
        "Responses are plain text",
        (*OFF, _TEXT, {"verbosity": "medium"}, {**_TEXT, "verbosity": "medium"}),
    ),
    "context_management": Unserved("Use truncation"),
    "max_tool_calls": Unserved("The only tool is image_generation", ()),
    "stream_options": Unserved("Ignored", ()),
    "top_logprobs": _LOGPROBS,
    "moderation": CHAT["moderation"],
    "service_tier": CHAT["service_tier"],
    "background_options": Unserved("Responses are not generated in the background"),
    "access_programs": Unserved("There are no such programs"),
    "image": Unserved("Use the tool image_generation"),
    **{name: field for name, field in _IGNORED.items() if name != "metadata"},
}
# Fields of the tool image_generation; its model and the fidelity of inputs change nothing.
IMAGE_TOOL: Mapping[str, Unserved] = {
    "action": Unserved("Images are generated", (*OFF, "auto", "generate")),
    "input_image_mask": Unserved("Images are not edited"),
    "quality": Unserved("Images have one quality", (*OFF, "auto")),
    "background": Unserved("Images are opaque", (*OFF, "auto", "opaque")),
    "moderation": Unserved("Images are not moderated", (*OFF, "auto", "low")),
    "output_format": Unserved("Images are PNG files", (*OFF, "png")),
    "output_compression": Unserved("Images are PNG files", (None, 100)),
    "complexity": Unserved("Images have one quality"),
    "frame_count": Unserved("Images have one frame", (*OFF, 1)),
    "frame_duration_ms": Unserved("Images have one frame"),
    "svg": Unserved("Images are PNG files"),
}
# Fields of a message. Other unknown fields of messages are ignored: clients send their own.
MESSAGE: Mapping[str, Unserved] = {
    "tool_calls": _TOOLS,
    "function_call": _TOOLS,
    "audio": Unserved("Messages have text and images"),
    "refusal": Unserved("Send the text of the refusal as content"),
}


# In a lenient server: what of the current request was left out or cut. None: it is rejected.
_left_out: ContextVar[list[str] | None] = ContextVar("left_out", default=None)


def start_request(is_lenient: bool) -> None:
    """Begins a request in the current context."""
    _left_out.set([] if is_lenient else None)


def leave_out(text: str) -> bool:
    """Notes that something is left out. False if the server is not lenient: reject it."""
    notes = _left_out.get()
    if notes is None:
        return False
    notes.append(text)
    return True


def left_out() -> dict[str, list[str]]:
    """The field of a response that names what was left out of its request."""
    notes = _left_out.get()
    return {"left_out": notes} if notes else {}


def is_neutral(value: Any, neutral: Iterable[Any] = EMPTY) -> bool:
    """Whether a value is in `neutral`, not counting the members of an object that are off."""
    if isinstance(value, dict):
        value = {name: member for name, member in value.items() if not _is_in(member, OFF)}
    return _is_in(value, neutral)


def _is_in(value: Any, values: Iterable[Any]) -> bool:
    """Membership that distinguishes booleans from numbers, as JSON does."""
    return any(isinstance(value, bool) == isinstance(v, bool) and value == v for v in values)


def complaint(value: Any, unserved: Unserved) -> str:
    """Why a value is rejected. Quotes a short value, or the first member of an object that is on:
    a long value may be an image."""
    name = ""
    if isinstance(value, dict):
        on = ((n, member) for n, member in value.items() if not _is_in(member, OFF))
        name, value = next(on, ("", value))
    is_short = isinstance(value, (bool, int, float, str)) and len(str(value)) <= _QUOTED
    got = ": ".join([escape_name(name[:_QUOTED])] * bool(name) + [json.dumps(value)] * is_short)
    return f"Unsupported value{f' (got {got})' if got else ''}. {unserved.supported}."


def drop_neutral_values(
    data: dict[str, Any], unserved: Mapping[str, Unserved], served: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The fields of a request that have an effect. A lenient server notes the others.

    `served` are the implemented fields, each with the values that mean its default. Raises
    pydantic's ValidationError for another value of a field that is not implemented.
    """
    for name, field in unserved.items():
        if field.neutral and not is_neutral(data.get(name), field.neutral):
            text = complaint(data[name], field)
            if not leave_out(f"{name}: {text}"):
                raise _field_error(name, "unsupported_value", text)
    for name, value in data.items():
        if name not in unserved and name not in served and not is_neutral(value):
            text = "Unknown field. GET /openapi.json lists the fields of a request."
            if not leave_out(f"{escape_name(name[:_QUOTED])}: {text}"):
                raise _field_error(name, "unknown_parameter", text)
    return {n: v for n, v in data.items() if n in served and not _is_in(v, served[n])}


def _field_error(name: str, code: str, message: str) -> ValidationError:
    name = escape_name(name[:_QUOTED])
    error = PydanticCustomError(code, "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "request", [InitErrorDetails(type=error, loc=(name,), input=None)]
    )


def add_to_schema(
    schema: dict[str, Any], unserved: Mapping[str, Unserved], served: Mapping[str, tuple[Any, ...]]
) -> None:
    """Adds the fields without effect, and the values that mean a default, to a JSON schema."""
    properties = schema["properties"]
    for name, values in served.items():
        if values:
            properties[name] = {"anyOf": [properties[name], {"enum": list(values)}]}
    for name, field in unserved.items():
        properties[name] = _schema_of(field.neutral) | {"description": f"{field.supported}."}
    schema["additionalProperties"] = _schema_of(EMPTY)


def _schema_of(neutral: Sequence[Any]) -> dict[str, Any]:
    """The JSON schema of neutral values."""
    if not neutral:
        return {}
    schemas: list[dict[str, Any]] = [{"enum": [v for v in neutral if not isinstance(v, dict)]}]
    schemas += [
        {
            "type": "object", "properties": {name: {"const": v} for name, v in value.items()},
            "required": list(value), "additionalProperties": {"enum": list(OFF)},
        }
        for value in neutral if isinstance(value, dict)
    ]  # fmt: skip
    return {"anyOf": schemas}
