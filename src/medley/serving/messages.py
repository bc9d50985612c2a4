"""OpenAI chat messages -> documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medley.data.document import ContentPart, Document, DocumentError, ImagePart, Turn
from medley.serving.error_responses import CodedError
from medley.serving.limits import RequestError
from medley.serving.neutral_values import MESSAGE, complaint, is_neutral
from medley.serving.untrusted_inputs import RequestReader, repr_short

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image_url", "input_image")


def to_document(messages: Sequence[dict[str, Any]], reader: RequestReader) -> Document:
    """A conversation that ends with a user turn.

    System messages are prepended to the first user turn. Consecutive messages of one role become
    one turn. Raises RequestError that names the invalid message.
    """
    contents = [_content_of(message) for message in messages]
    reader.check_image_count(sum(map(_count_images, contents)))
    turns: list[tuple[str, list[ContentPart]]] = []
    system: list[ContentPart] = []
    for number, (message, content) in enumerate(zip(messages, contents, strict=True)):
        where = f"messages[{number}]"
        role = message.get("role")
        _check_fields(message, where)
        parts = _read_parts(content, f"{where}.content", reader)
        if not parts and role == "user":
            raise RequestError(
                f"{where}.content: A user message needs text or an image (got "
                f"{repr_short(message.get('content'))}).",
                param=f"{where}.content",
            )
        if role in ("system", "developer"):
            if turns:
                raise RequestError(
                    f"{where}: A system message must come before all other messages.", param=where
                )
            system += [*parts, "\n"] if parts else []
        elif role in ("user", "assistant"):
            if turns and turns[-1][0] == role:
                turns[-1][1].extend(["\n", *parts] if parts else [])
            else:
                turns.append((role, parts))
        else:
            raise RequestError(
                f"{where}.role: Unsupported role (got {repr_short(role)}, expected system, user "
                "or assistant).",
                param=where,
            )
    if not turns or turns[-1][0] != "user":
        raise RequestError("messages: The last message must be a user message.", param="messages")
    if turns[0][0] != "user":
        raise RequestError("messages: The first message must be a user message.", param="messages")
    turns[0][1][:0] = system
    try:
        return Document(tuple(Turn(role, tuple(parts)) for role, parts in turns))
    except DocumentError as error:
        raise RequestError(f"messages: {error}", param="messages") from error


def _check_fields(message: dict[str, Any], where: str) -> None:
    """Raises RequestError for a field whose contents would be lost."""
    for name, field in MESSAGE.items():
        if not is_neutral(message.get(name), field.neutral):
            own = f"{where}.{name}"
            raise CodedError(f"{own}: {complaint(message[name], field)}", "unsupported_value", own)


def _content_of(message: dict[str, Any]) -> Any:
    """The content of a message, with its images.

    Null and empty content is no content, which a message with images beside it may have.
    A response of this server that is sent back as it came has its images beside `content`: in
    `parts` with the text in their order, and in `images` without the text.
    """
    content = message.get("content")
    if isinstance(content, list) and _count_images(content):
        return content
    if isinstance(message.get("parts"), list) and message["parts"]:
        return message["parts"]
    if isinstance(message.get("images"), list) and message["images"]:
        text = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        return [*text, *message["images"]] if isinstance(text, list) else content
    return content


def _count_images(content: Any) -> int:
    parts = content if isinstance(content, list) else []
    return sum(isinstance(part, dict) and part.get("type") in _IMAGE_TYPES for part in parts)


def _read_parts(content: Any, where: str, reader: RequestReader) -> list[ContentPart]:
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [reader.text(content, where)]
    if not isinstance(content, list):
        raise RequestError(f"{where}: Must be text or a list of content parts.", param=where)
    parts: list[ContentPart] = []
    for number, part in enumerate(content):
        own = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_TYPES:
            text = part.get("text")
            if not isinstance(text, str):
                raise RequestError(f"{own}.text: Must be text (got {repr_short(text)}).", param=own)
            parts += [reader.text(text, own)] if text else []
        elif kind in _IMAGE_TYPES:
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            parts.append(ImagePart(image=reader.image_from_url(url, own)))
        else:
            raise RequestError(
                f"{own}: Unsupported type (got {repr_short(kind)}, expected an object of type text "
                "or image_url).",
                param=own,
            )
    return parts
