"""Request bodies of OpenAI's protocol, and the generation options that they ask for.

`GenerationOptions` has the defaults and checks the values. A limit here is the server's own.
Fields that are not implemented are in `neutral_values.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema

from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.generation.config import MIN_TEMPERATURE, Mode
from medley.serving.limits import Limits, RequestError
from medley.serving.neutral_values import (
    CHAT,
    IMAGES,
    Unserved,
    add_to_schema,
    drop_neutral_values,
    leave_out,
)

ImagesAs = Literal["images", "markdown"]
MAX_INT = 2**31 - 1
MAX_SCALE = 100  # Larger scales may overflow the logits, which ends all running requests.
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE)]
Tokens = Annotated[int, Field(ge=1, le=MAX_INT)]
StopString = Annotated[str, Field(max_length=256)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=16),
    BeforeValidator(
        lambda stop: [stop] if isinstance(stop, str) else stop,
        json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=16)],
    ),
]


class RequestFields(BaseModel):
    """Fields of a request. A value that changes nothing is dropped before it is validated.

    `unserved` are the fields that are not implemented. Null means the default of every optional
    field, and so do the values of `defaults`.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    unserved: ClassVar[Mapping[str, Unserved]] = {}
    # -1 is "random", "no limit" and "all" in other servers and in this server's web UI.
    defaults: ClassVar[Mapping[str, tuple[Any, ...]]] = dict.fromkeys(
        ("seed", "max_tokens", "max_completion_tokens", "top_k"), (-1,)
    )

    @classmethod
    def _served(cls) -> dict[str, tuple[Any, ...]]:
        return {
            name: () if field.is_required() else (None, *cls.defaults.get(name, ()))
            for name, field in cls.model_fields.items()
        }

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_values(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return drop_neutral_values(data, cls.unserved, cls._served())

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        add_to_schema(schema, cls.unserved, cls._served())
        return schema


class GenerationFields(RequestFields):
    """Fields of every request: generation options under the names of `GenerationOptions`."""

    mode: Mode | None = None
    seed: int | None = None
    text_greedy: bool = GenerationOptions.text_greedy
    text_top_k: Count = GenerationOptions.text_top_k
    repetition_penalty: float = GenerationOptions.repetition_penalty
    image_greedy: bool = GenerationOptions.image_greedy
    image_temperature: Scale = GenerationOptions.image_temperature
    image_top_p: float = GenerationOptions.image_top_p
    image_top_k: Count = GenerationOptions.image_top_k
    guidance_scale_text: Scale = GenerationOptions.guidance_scale_text
    guidance_scale_image: Scale = GenerationOptions.guidance_scale_image
    min_images: Count = GenerationOptions.min_images
    max_images: Count | None = GenerationOptions.max_images
    n: Tokens | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def requested_mode(self) -> Mode | None:
        """The mode that the request names; None for the default of the model or the server."""
        return self.mode

    def to_options(
        self, mode: Mode, max_new_tokens: int, limits: Limits, **overrides: Any
    ) -> GenerationOptions:
        """Generation options; with a random seed if the request has none.

        Raises RequestError for a value beyond a limit, and for values that contradict each other.
        """
        if self.num_choices > limits.max_choices:
            raise RequestError(
                f"n: Too large (got {self.n}, limit {limits.max_choices}).", param="n"
            )
        names = GenerationOptions.__dataclass_fields__.keys() & GenerationFields.model_fields
        values = {name: getattr(self, name) for name in names} | {
            "mode": mode, "max_new_tokens": max_new_tokens,
            "seed": random_seed() if self.seed is None else self.seed, **overrides,
        }  # fmt: skip
        try:
            return GenerationOptions(**values)
        except UserError as error:
            name, _, reason = str(error).partition(" ")
            field = _FIELDS.get(name, name)
            param = field if name in values else None
            raise RequestError(f"{field} {reason}", param=param) from error


# Fields of OpenAI's protocol, by the generation option that they set.
_FIELDS = {"text_top_p": "top_p"}


def random_seed() -> int:
    return secrets.randbelow(2**31)


class StreamOptions(RequestFields):
    include_usage: bool = False


class SamplingFields(GenerationFields):
    """Fields of a request whose response has text. `max_tokens_fields`: the first one wins."""

    max_tokens_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)

    stream: bool | None = None
    temperature: Scale | None = None
    top_p: float | None = None
    top_k: Count | None = None
    stop: StopStrings | None = None
    images_as: ImagesAs | None = None

    def generation(self, limits: Limits, mode: Mode = "any") -> GenerationOptions:
        """Generation options; `mode` is that of a request that names none.

        Raises RequestError for an invalid value.
        """
        max_new_tokens = self._max_new_tokens(limits)
        sampling: dict[str, Any] = {}
        if self.temperature is not None and self.temperature >= MIN_TEMPERATURE:
            sampling["text_temperature"] = self.temperature
        elif self.temperature is not None:
            sampling["text_greedy"] = True
        if self.top_p == 0:
            sampling["text_greedy"] = True
        elif self.top_p is not None:
            sampling["text_top_p"] = self.top_p
        if self.top_k is not None:
            sampling["text_top_k"] = self._checked_top_k(self.top_k)
        return self.to_options(self.requested_mode or mode, max_new_tokens, limits, **sampling)

    def _max_new_tokens(self, limits: Limits) -> int:
        given = {name: getattr(self, name) for name in self.max_tokens_fields}
        for name, value in given.items():
            is_large = value is not None and value > limits.max_tokens
            if is_large and leave_out(f"{name}: {value} was cut to {limits.max_tokens}."):
                return limits.max_tokens
            if is_large:
                # As vLLM and OpenAI do. A silently shorter response would change an evaluation.
                raise RequestError(
                    f"{name}: Too large (got {value}, limit {limits.max_tokens}). Send a smaller "
                    f"{name} or none, or start the server with a larger --max_tokens.",
                    param=name,
                )
            if value is not None:
                return int(value)
        return limits.max_tokens

    def _checked_top_k(self, top_k: int) -> int:
        """`top_k` is another name of `text_top_k`. Raises RequestError if they differ."""
        if "text_top_k" in self.model_fields_set and self.text_top_k != top_k:
            raise RequestError(
                f"top_k: Differs from text_top_k (got {top_k} and {self.text_top_k}). Send one of "
                "them.",
                param="top_k",
            )
        return top_k

    @property
    def stop_strings(self) -> list[str]:
        return [string for string in self.stop or [] if string]


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`.

    `previews` is the number of previews of each image while a streamed response generates it.
    """

    unserved = CHAT
    max_tokens_fields = ("max_completion_tokens", "max_tokens")

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    previews: Annotated[int, Field(ge=0, le=64)] = 0
    modalities: list[Literal["text", "image"]] | None = None

    @property
    def requested_mode(self) -> Mode | None:
        """`mode`, or the mode of OpenRouter's `modalities`."""
        outputs = {"text", "image"} & set(self.modalities or ())
        if self.mode is not None or not outputs:
            return self.mode
        if len(outputs) == 2:
            return "any"
        return "text" if "text" in outputs else "image"

    @property
    def asks_for_images(self) -> bool:
        """Whether the request has options that make sense with images only."""
        return self.min_images > 0 or bool(self.max_images) or self.previews > 0


class ImageRequest(GenerationFields):
    """`POST /v1/images/generations`."""

    unserved = IMAGES

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] = "auto"
    response_format: Literal["b64_json", "url"] | None = None

    def size_note(self, size: int) -> str | None:
        """What the response says if its images have another size than requested."""
        if self.size in ("auto", f"{size}x{size}"):
            return None
        return f"size: {self.size} is not available. The images have {size}x{size} pixels."

    def generation(self, limits: Limits, size: int, strict: bool = False) -> GenerationOptions:
        """Generation options of one image; `size` is the model's image size.

        Raises RequestError for an invalid value, and for another size if `strict`.
        """
        if strict and self.size_note(size) is not None:
            raise RequestError(
                f"size: Unsupported (got {self.size}, expected {size}x{size} or auto).",
                param="size",
            )
        if self.mode not in (None, "image"):
            raise RequestError(f"mode: Must be image (got {self.mode!r}).", param="mode")
        return self.to_options("image", limits.max_tokens, limits, min_images=1, max_images=1)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response with an error status."""

    error: ErrorDetail
