"""Request bodies of OpenAI's protocol, and the generation options that they ask for.

`GenerationOptions` has the defaults and checks the values. A limit here is the server's own.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.generation.config import MIN_TEMPERATURE, Mode
from medley.serving.limits import Limits, RequestError

MAX_INT = 2**31 - 1
MAX_SCALE = 100  # Larger scales may overflow the logits, which ends all running requests.
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE)]
Tokens = Annotated[int, Field(ge=1, le=MAX_INT)]
Zero = Annotated[float, Field(ge=0, le=0)]
StopString = Annotated[str, Field(max_length=256)]


class GenerationFields(BaseModel):
    """Fields of every request: generation options under the names of `GenerationOptions`, and
    fields that clients send by default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

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
    user: str | None = None  # ignored
    metadata: dict[str, Any] | None = None  # ignored

    @property
    def num_choices(self) -> int:
        return self.n or 1

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
            name = str(error).partition(" ")[0]
            raise RequestError(str(error), param=name if name in values else None) from error


def random_seed() -> int:
    return secrets.randbelow(2**31)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`.

    `previews` is the number of previews of each image while a streamed response generates it.
    """

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Scale | None = None
    top_p: float | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    previews: Annotated[int, Field(ge=0, le=64)] = 0
    # Fields of OpenAI's protocol of which only the default value is supported.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    store: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text", "image"]] | None = None

    def generation(self, limits: Limits) -> GenerationOptions:
        """Generation options of the request. Raises RequestError for an invalid value."""
        max_new_tokens = self.max_completion_tokens or self.max_tokens or limits.max_tokens
        if max_new_tokens > limits.max_tokens:
            raise RequestError(
                f"max_tokens: Too large (got {max_new_tokens}, limit {limits.max_tokens}).",
                param="max_tokens",
            )
        mode: Mode = "any"
        if self.modalities is not None and len(modalities := set(self.modalities)) == 1:
            mode = "text" if modalities == {"text"} else "image"
        sampling: dict[str, Any] = {}
        if self.temperature is not None and self.temperature < MIN_TEMPERATURE:
            sampling["text_greedy"] = True
        elif self.temperature is not None:
            sampling["text_temperature"] = self.temperature
        if self.top_p is not None:
            sampling["text_top_p"] = self.top_p
        return self.to_options(self.mode or mode, max_new_tokens, limits, **sampling)

    @property
    def stop_strings(self) -> list[str]:
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [string for string in strings if string]


class ImageRequest(GenerationFields):
    """`POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    size: Annotated[str, Field(max_length=32)] = "auto"
    response_format: Literal["b64_json"] | None = None
    quality: Literal["auto", "standard"] | None = None

    def generation(self, limits: Limits, size: int) -> GenerationOptions:
        """Generation options of one image; `size` is the model's image size.

        Raises RequestError for an invalid value.
        """
        if self.size not in ("auto", f"{size}x{size}"):
            raise RequestError(
                f"size: Unsupported (got {self.size!r}, expected {size}x{size} or auto).",
                param="size",
            )
        if self.mode not in (None, "image"):
            raise RequestError(f"mode: Must be image (got {self.mode!r}).", param="mode")
        return self.to_options("image", limits.max_tokens, limits, min_images=1, max_images=1)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: None


class ErrorBody(BaseModel):
    """The body of every response with an error status."""

    error: ErrorDetail
