"""Inputs of completions and embeddings: one or several texts, lists of token ids, content parts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from medley.serving.untrusted_inputs import repr_short

MAX_TOKEN = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN, strict=True)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Part = dict[str, Any]
Parts = Annotated[list[Part], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


def _error(message: str) -> PydanticCustomError:
    return PydanticCustomError("input_type", "{message}", {"message": message})


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_id, value))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _to_list(value: Any) -> list[Any]:
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list):
        raise _error(f"Must be a text, token ids, or a list of them (got {repr_short(value)}).")
    if not value:
        raise _error("Must not be empty (got []).")
    return value


def _prompts(value: Any) -> list[Any]:
    items = _to_list(value)
    for number, item in enumerate(items):
        if not (isinstance(item, str) or _is_ids(item)):
            raise _error(
                f"Item {number} must be a text or token ids, not empty (got {repr_short(item)})."
            )
    return items


def _embedding_inputs(value: Any) -> list[Any]:
    items = _to_list(value)
    for number, item in enumerate(items):
        if item == "":
            raise _error(f"Item {number} is empty. An empty text has no embedding.")
        if not (isinstance(item, (str, dict)) or _is_ids(item) or _is_parts(item)):
            raise _error(
                f"Item {number} must be a text, token ids, a content part or a list of content "
                f"parts, not empty (got {repr_short(item)})."
            )
    return items


MAX_PROMPTS = 128
MAX_INPUTS = 2048  # OpenAI's limit
# A single input becomes a list of one.
Prompts = Annotated[
    list[Any],
    Field(max_length=MAX_PROMPTS),
    BeforeValidator(
        _prompts,
        json_schema_input_type=str
        | Ids
        | Annotated[list[str | Ids], Field(min_length=1, max_length=MAX_PROMPTS)],
    ),
]
EmbeddingInputs = Annotated[
    list[Any],
    Field(max_length=MAX_INPUTS),
    BeforeValidator(
        _embedding_inputs,
        json_schema_input_type=Text
        | Ids
        | Annotated[list[Text | Ids | Part | Parts], Field(min_length=1, max_length=MAX_INPUTS)],
    ),
]
