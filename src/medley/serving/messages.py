"""OpenAI chat messages -> documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medley.data.document import ContentPart, Document, DocumentError, ImagePart, Turn
from medley.serving.limits import RequestError
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
        parts = _read_parts(content, f"{where}.content", reader)
        if role in ("system", "developer"):
            if turns:
                raise RequestError(
                    f"{where}: A system message must come before all other messages.", param=where
                )
            system += [*parts, "\n"]
        elif role in ("user", "assistant"):
            if turns and turns[-1][0] == role:
                turns[-1][1].extend(["\n", *parts])
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


def _content_of(message: dict[str, Any]) -> Any:
    """The content of a message, with its images.

    A response of this server that is sent back as it came has its images beside `content`: in
    `parts` with the text in their order, and in `images` without the text.
    """
    content = message.get("content")
    if isinstance(content, list) and _count_images(content):
        return content
    if isinstance(message.get("parts"), list):
        return message["parts"]
    if isinstance(message.get("images"), list):
        text = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        return [*text, *message["images"]] if isinstance(text, list) else content
    return content


def _count_images(content: Any) -> int:
    parts = content if isinstance(content, list) else []
    return sum(isinstance(part, dict) and part.get("type") in _IMAGE_TYPES for part in parts)


def _read_parts(content: Any, where: str, reader: RequestReader) -> list[ContentPart]:
    if content is None:
        return []
    if isinstance(content, str):
        return [reader.text(content, where)]
    if not isinstance(content, list):
        raise RequestError(f"{where}: Must be text or a list of content parts.", param=where)
    parts: list[ContentPart] = []
    for number, part in enumerate(content):
        own = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_TYPES and isinstance(part.get("text"), str):
            parts.append(reader.text(part["text"], own))
        elif kind in _IMAGE_TYPES:
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            parts.append(ImagePart(image=reader.image_from_url(url, own)))
        else:
            raise RequestError(
                f"{own}: Unsupported type (got {repr_short(kind)}, expected text or image_url).",
                param=own,
            )
    return parts
