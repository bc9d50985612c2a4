"""The body of `POST /v1/responses`."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from medley.generation.config import Mode
from medley.serving.error_responses import CodedError
from medley.serving.limits import RequestError
from medley.serving.neutral_values import IMAGE_TOOL, RESPONSES, complaint, is_neutral
from medley.serving.schema import SamplingFields, Tokens
from medley.serving.untrusted_inputs import repr_short

IMAGE_GENERATION = "image_generation"
MAX_PARTIAL_IMAGES = 3  # OpenAI's limit
MAX_TOOL_CHARACTERS = 4096  # The response, which may be stored, repeats the tools.
Items = Annotated[list[dict[str, Any]], Field(min_length=1)]
_CHOICES = ("auto", "none", "required")


def _checked_input(value: Any) -> Any:
    is_items = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    if value and (isinstance(value, str) or is_items):
        return value
    raise _error(f"Must be a text or a list of items, not empty (got {repr_short(value)}).")


def _checked_choice(value: Any) -> Any:
    if value in _CHOICES or (isinstance(value, dict) and value.get("type") == IMAGE_GENERATION):
        return value
    raise _error(
        f"Unsupported choice (got {repr_short(value)}, expected auto, none, required or "
        '{"type": "image_generation"}).'
    )


def _error(message: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_value", "{message}", {"message": message})


Input = Annotated[
    Any,
    BeforeValidator(
        _checked_input, json_schema_input_type=Annotated[str, Field(min_length=1)] | Items
    ),
]
ToolChoice = Annotated[
    Any,
    BeforeValidator(
        _checked_choice,
        json_schema_input_type=Literal["auto", "none", "required"] | dict[str, Any],
    ),
]
# OpenAI's limits. The response, which may be stored, repeats the metadata.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class ResponseRequest(SamplingFields):
    """`POST /v1/responses`. Without the tool `image_generation` or a mode, only text is generated.

    The tool's `partial_images` is the number of previews of each image in a stream.
    """

    unserved = RESPONSES
    max_tokens_fields = ("max_output_tokens",)
    defaults: ClassVar = {**SamplingFields.defaults, "max_output_tokens": (-1,)}

    model: str
    input: Input
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    store: bool = True
    max_output_tokens: Tokens | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True
    metadata: Metadata | None = None

    def check(self) -> None:
        """Raises RequestError for a tool or a choice that the server does not have."""
        if self.num_choices > 1:
            raise RequestError("n: A response has one choice. Send several requests.", param="n")
        for number, tool in enumerate(self.tools or []):
            _check_tool(tool, f"tools[{number}]")
        for name, value in (("tools", self.tools), ("tool_choice", self.tool_choice)):
            if (size := len(json.dumps(value))) > MAX_TOOL_CHARACTERS:
                raise RequestError(
                    f"{name}: Too large (got {size} characters of JSON, limit "
                    f"{MAX_TOOL_CHARACTERS}).",
                    param=name,
                )
        if self.tool_choice not in (None, "auto", "none") and not self.tools:
            raise RequestError("tool_choice: Needs the tool image_generation.", param="tool_choice")

    @property
    def requested_mode(self) -> Mode | None:
        """`mode`, or what the tool asks for."""
        if self.mode is not None or not self.tools or self.tool_choice == "none":
            return self.mode
        return "any" if self.tool_choice in (None, "auto") else "image"

    @property
    def partial_images(self) -> int:
        counts = [tool.get("partial_images") or 0 for tool in self.tools or []]
        return max(counts, default=0) if self.stream else 0


def _check_tool(tool: dict[str, Any], where: str) -> None:
    kind = tool.get("type")
    if kind != IMAGE_GENERATION:
        name = tool.get("name")
        own = f"{repr_short(kind)}{f' {repr_short(name)}' if name else ''}"
        raise CodedError(
            f"{where}: Unsupported tool (got {own}, expected {IMAGE_GENERATION}).",
            "unsupported_value", where,
        )  # fmt: skip
    count = tool.get("partial_images") or 0
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 3:
        raise RequestError(
            f"{where}.partial_images: Must be 0 to {MAX_PARTIAL_IMAGES} (got {repr_short(count)}).",
            param=f"{where}.partial_images",
        )
    for name, value in tool.items():
        field = IMAGE_TOOL.get(name)
        if field is not None and field.neutral and not is_neutral(value, field.neutral):
            own = f"{where}.{name}"
            raise CodedError(f"{own}: {complaint(value, field)}", "unsupported_value", own)
