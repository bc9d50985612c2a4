"""Input items of `/v1/responses` -> chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medley.serving.error_responses import CodedError
from medley.serving.limits import RequestError
from medley.serving.messages import GENERATED_IMAGE
from medley.serving.untrusted_inputs import repr_short

IMAGE_CALL = "image_generation_call"


def to_messages(value: str | Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages, and the item that each one begins with, for errors.

    The items of one response follow each other: text and images become one message. Raises
    RequestError for an item of another type.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}], ["input"]
    messages: list[dict[str, Any]] = []
    names: list[str] = []
    for number, item in enumerate(value):
        where = f"input[{number}]"
        role, parts = _read_item(item, where)
        if messages and role == messages[-1]["role"] == "assistant":
            messages[-1]["content"] += parts
        else:
            messages.append({"role": role, "content": parts})
            names.append(where)
    return messages, names


def _read_item(item: dict[str, Any], where: str) -> tuple[Any, list[Any]]:
    """Role and content of an item."""
    kind = item.get("type", "message")
    if kind == IMAGE_CALL:
        return "assistant", [_image_part(item, where)]
    if kind != "message":
        raise CodedError(
            f"{where}.type: Unsupported item (got {repr_short(kind)}, expected message or "
            f"{IMAGE_CALL}).",
            "unsupported_value", f"{where}.type",
        )  # fmt: skip
    content = item.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if content is not None and not isinstance(content, list):
        raise RequestError(f"{where}.content: Must be text or a list of parts.", param=where)
    return item.get("role"), [_read_part(part) for part in content or []]


def _read_part(part: Any) -> Any:
    """A content part as a chat message has it; a refusal is a text."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _image_part(item: dict[str, Any], where: str) -> dict[str, Any]:
    """A generated image: its contents, or the id under which the server remembers it."""
    result, name = item.get("result"), item.get("id")
    if isinstance(result, str) and result:
        url = result if result[:5].lower() == "data:" else f"data:image/png;base64,{result}"
        return {"type": "image_url", "image_url": {"url": url}}
    if isinstance(name, str) and name.startswith("ig_"):
        return {"type": GENERATED_IMAGE, "id": name}
    raise RequestError(
        f"{where}: An {IMAGE_CALL} needs result, the base64 of the image.", param=where
    )
