"""What a request of OpenAI's protocol may hold, and generation's options made of it."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.generation.config import COLDEST, Mode
from medley.serving.limits import Limits, RequestError

_DEFAULTS = GenerationOptions()
Share = Annotated[float, Field(gt=0, le=1)]
Nothing = Annotated[float, Field(ge=0, le=0)]
Most = 2**31 - 1
Limit = Annotated[int, Field(ge=0, le=Most)]
Tokens = Annotated[int, Field(ge=1, le=Most)]
Temperature = Annotated[float, Field(ge=0, le=100)]
StopWord = Annotated[str, Field(max_length=256)]


class Generation(BaseModel):
    """Our options of generation, which any request may carry beside OpenAI's."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mode: Mode | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    text_greedy: bool = False
    text_top_k: Limit = _DEFAULTS.text_top_k
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = _DEFAULTS.repetition_penalty
    image_greedy: bool = False
    image_temperature: Annotated[float, Field(ge=COLDEST, le=100)] = _DEFAULTS.image_temperature
    image_top_p: Share = _DEFAULTS.image_top_p
    image_top_k: Limit = _DEFAULTS.image_top_k
    guidance_scale_text: Annotated[float, Field(ge=0, le=100)] = _DEFAULTS.guidance_scale_text
    guidance_scale_image: Annotated[float, Field(ge=0, le=100)] = _DEFAULTS.guidance_scale_image
    min_images: Limit = _DEFAULTS.min_images
    max_images: Limit | None = None
    n: Annotated[int, Field(ge=1, le=Most)] | None = None
    # What clients send on their own and we need not know.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def answers(self) -> int:
        return self.n or 1

    def options(self, mode: Mode, tokens: int, limits: Limits, **more: Any) -> GenerationOptions:
        """Without a seed, another one each time. Raises RequestError for values that are beyond
        the limits, or do not go together."""
        if self.answers > limits.answers:
            raise RequestError(f"n is {self.n}, the limit is {limits.answers}", param="n")
        kept = {
            name: getattr(self, name)
            for name in GenerationOptions.__dataclass_fields__.keys() & Generation.model_fields
            if name not in ("mode", "seed") and name not in more
        }
        try:
            return GenerationOptions(
                mode=mode, seed=any_seed() if self.seed is None else self.seed,
                max_new_tokens=tokens, **kept, **more,
            )  # fmt: skip
        except UserError as error:
            raise RequestError(str(error)) from error


def any_seed() -> int:
    return secrets.randbelow(2**31)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(Generation):
    """`POST /v1/chat/completions`. `previews` asks for that many pictures of a growing picture."""

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stop: StopWord | Annotated[list[StopWord], Field(max_length=16)] | None = None
    previews: Annotated[int, Field(ge=0, le=64)] = 0
    # Of OpenAI's protocol, where only the value that changes nothing is served.
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    logprobs: Literal[False] | None = None
    store: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text", "image"]] | None = None

    def generation(self, limits: Limits) -> GenerationOptions:
        """Raises RequestError for what is beyond the limits."""
        tokens = self.max_completion_tokens or self.max_tokens or limits.tokens
        if tokens > limits.tokens:
            raise RequestError(
                f"max_tokens is {tokens}, the limit is {limits.tokens}", param="max_tokens"
            )
        mode: Mode = "any"
        if self.modalities is not None:
            only = set(self.modalities)
            mode = "any" if len(only) != 1 else "text" if only == {"text"} else "image"
        sampled: dict[str, Any] = {}
        if self.temperature is not None and self.temperature < COLDEST:
            sampled["text_greedy"] = True
        elif self.temperature is not None:
            sampled["text_temperature"] = self.temperature
        if self.top_p is not None:
            sampled["text_top_p"] = self.top_p
        return self.options(self.mode or mode, tokens, limits, **sampled)

    @property
    def stops(self) -> list[str]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [word for word in found if word]


class ImageRequest(Generation):
    """`POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    size: Annotated[str, Field(max_length=32)] = "auto"
    response_format: Literal["b64_json"] | None = None
    quality: Literal["auto", "standard"] | None = None

    def generation(self, limits: Limits, size: int) -> GenerationOptions:
        """Raises RequestError for what is beyond the limits, and for another size than the
        model's."""
        if self.size not in ("auto", f"{size}x{size}"):
            raise RequestError(
                f"size is {self.size!r}, this model draws {size}x{size} (or auto)", param="size"
            )
        if self.mode not in (None, "image"):
            raise RequestError(f"mode is {self.mode!r}, here it is image", param="mode")
        return self.options("image", limits.tokens, limits, min_images=1, max_images=1)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: None


class ErrorBody(BaseModel):
    """What every refusal and every fault is told as, whatever its status."""

    error: ErrorDetail
