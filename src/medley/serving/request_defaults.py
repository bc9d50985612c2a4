"""What a request means that leaves a field out: the defaults of a server (`--defaults`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from medley.errors import UserError
from medley.generation.config import Mode
from medley.serving.limits import Limits
from medley.serving.schema import ChatRequest, ImagesAs, RequestFields

Body = TypeVar("Body", bound=RequestFields)
# Fields that belong to one request.
_NO_DEFAULT = frozenset(
    ("model", "messages", "stream", "stream_options", "n", "modalities", "max_completion_tokens")
)
_NAMES = sorted(ChatRequest.model_fields.keys() - _NO_DEFAULT)
_SYNONYMS = (("top_k", "text_top_k"), ("temperature", "text_greedy"),
             ("max_tokens", "max_completion_tokens"))  # fmt: skip


@dataclass(frozen=True)
class RequestDefaults:
    """Defaults of a server's requests.

    Attributes:
        mode: mode of a request that does not ask for images
        images_as: the form of images in responses
        values: other fields by name
        lenient: whether unknown fields and values are left out, and limits cut, instead of rejected
        strict_image_size: whether an image size that the model cannot generate is rejected
    """

    mode: Mode = "any"
    images_as: ImagesAs = "images"
    values: Mapping[str, Any] = field(default_factory=dict)
    strict_image_size: bool = False
    lenient: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.mode, "images_as": self.images_as, **self.values}

    def apply(self, body: Body) -> Body:
        """A request with the defaults of the fields that it has left out."""
        sent = body.model_fields_set
        names = {other for pair in _SYNONYMS if sent & set(pair) for other in pair} | sent
        fields = type(body).model_fields
        values = {name: value for name, value in self.values.items()
                  if name in fields and name not in names}  # fmt: skip
        if "max_output_tokens" in fields and "max_output_tokens" not in sent:
            values["max_output_tokens"] = self.values.get("max_tokens")
        return body.model_copy(update=values)


def parse_defaults(
    texts: Sequence[str],
    limits: Limits,
    mode: Mode | None = None,
    images_as: ImagesAs | None = None,
    strict_image_size: bool = False,
) -> RequestDefaults:
    """`NAME=VALUE[,NAME=VALUE ...]` -> defaults. `mode` and `images_as` are flags of their own.

    Raises UserError for an unknown field, an invalid value, and a value that is given twice.
    """
    values: dict[str, Any] = {}
    given = {"mode": mode, "images_as": images_as}
    pairs = [pair.strip() for text in texts for pair in text.split(",")]
    for pair in filter(None, pairs):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or name not in _NAMES:
            raise UserError(
                f"--defaults: Invalid default (got {pair!r}, expected NAME=VALUE). Names are "
                f"{', '.join(_NAMES)}."
            )
        if name in values or given.get(name) is not None:
            raise UserError(f"--defaults: {name} is given twice. Give one value.")
        values[name] = _parse_value(value)
    body = {"model": "", "messages": [{}], **values}
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"--defaults: {name}: {first['msg'].removesuffix('.')}.") from error
    try:
        request.generation(limits)
    except UserError as error:
        raise UserError(f"--defaults: {error}") from error
    own = {name: getattr(request, name) for name in values if name in request.model_fields_set}
    return RequestDefaults(
        mode or own.pop("mode", RequestDefaults.mode),
        images_as or own.pop("images_as", RequestDefaults.images_as),
        own, strict_image_size,
    )  # fmt: skip


def _parse_value(text: str) -> Any:
    """A JSON value, or the text itself: `mode=text` needs no quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text
