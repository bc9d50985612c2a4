"""OpenAI chat messages -> documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medley.data.document import ContentPart, Document, DocumentError, Turn
from medley.serving.error_responses import CodedError
from medley.serving.image_text import count_markdown_images, remove_notes, split_images
from medley.serving.limits import RequestError
from medley.serving.neutral_values import MESSAGE, complaint, is_neutral
from medley.serving.untrusted_inputs import RequestReader, repr_short

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image_url", "input_image")
GENERATED_IMAGE = "generated_image"  # a part that names an image that this server has generated
_SYSTEM_ROLES = ("system", "developer")
_ROLES = ("user", "assistant", *_SYSTEM_ROLES)


def to_document(
    messages: Sequence[dict[str, Any]], reader: RequestReader, names: Sequence[str] = ()
) -> Document:
    """A conversation that ends with a user turn.

    System messages join the user turn beside them. Consecutive messages of one role become one
    turn. Raises RequestError with the name of the invalid message (default `messages[0]` etc.).
    """
    contents = [_content_of(message) for message in messages]
    reader.check_image_count(
        sum(map(_count_images, contents, [_is_response(message) for message in messages]))
    )
    field = names[0].partition("[")[0] if names else "messages"
    turns: list[tuple[str, list[ContentPart]]] = []
    for number, (message, content) in enumerate(zip(messages, contents, strict=True)):
        where = names[number] if names else f"messages[{number}]"
        role = message.get("role")
        _check_fields(message, where)
        parts = read_parts(content, f"{where}.content", reader, _is_response(message))
        if not parts and role == "user":
            raise RequestError(
                f"{where}.content: A user message needs text or an image (got "
                f"{repr_short(message.get('content'))}).",
                param=f"{where}.content",
            )
        if role not in _ROLES:
            raise RequestError(
                f"{where}.role: Unsupported role (got {repr_short(role)}, expected system, user "
                "or assistant).",
                param=where,
            )
        if not parts and role in _SYSTEM_ROLES:
            continue
        turn = "assistant" if role == "assistant" else "user"
        if turns and turns[-1][0] == turn:
            turns[-1][1].extend(["\n", *parts] if parts else [])
        else:
            turns.append((turn, parts))
    if not turns or turns[-1][0] != "user":
        raise RequestError(f"{field}: The last message must be a user message.", param=field)
    if turns[0][0] != "user":
        raise RequestError(f"{field}: The first message must be a user message.", param=field)
    try:
        return Document(tuple(Turn(role, tuple(parts)) for role, parts in turns))
    except DocumentError as error:
        raise RequestError(f"{field}: {error}", param=field) from error


def _check_fields(message: dict[str, Any], where: str) -> None:
    """Raises RequestError for a field whose contents would be lost."""
    for name, field in MESSAGE.items():
        if not is_neutral(message.get(name), field.neutral):
            own = f"{where}.{name}"
            raise CodedError(f"{own}: {complaint(message[name], field)}", "unsupported_value", own)


def _content_of(message: dict[str, Any]) -> Any:
    """The content of a message, with its images.

    Null and empty content is no content, which a message with images beside it may have.
    A response of this server that is sent back as it came has its images in `content`, as
    Markdown, or beside it: in `parts` with the text in their order, and in `images` without it.
    """
    content = message.get("content")
    if _count_images(content, _is_response(message)):
        return content
    if isinstance(message.get("parts"), list) and message["parts"]:
        return message["parts"]
    if isinstance(message.get("images"), list) and message["images"]:
        if isinstance(content, str):
            text = remove_notes(content) if _is_response(message) else content
            content = [{"type": "text", "text": text}]
        content = content or []
        return [*content, *message["images"]] if isinstance(content, list) else content
    return content


def _is_response(message: dict[str, Any]) -> bool:
    """Whether Markdown in the text of a message may be an image that this server has generated."""
    return message.get("role") == "assistant"


def _count_images(content: Any, has_markdown: bool) -> int:
    if isinstance(content, str):
        return count_markdown_images(content) if has_markdown else 0
    count = 0
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and part.get("type") in _IMAGE_TYPES:
            count += 1
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            count += _count_images(part["text"], has_markdown)
    return count


def read_parts(
    content: Any, where: str, reader: RequestReader, has_markdown: bool = False
) -> list[ContentPart]:
    """The texts and images of a content. With `has_markdown`, texts may have images."""
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return _read_text(content, where, reader, has_markdown)
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
            parts += _read_text(text, own, reader, has_markdown) if text else []
        elif kind in _IMAGE_TYPES:
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            parts.append(reader.part_from_url(url, own))
        elif kind == GENERATED_IMAGE:
            image = reader.generated_image(str(part.get("id")), own)
            if image is None:
                raise RequestError(
                    f"{own}: This server no longer has the image {repr_short(part.get('id'))}. "
                    "Send its contents.",
                    param=own,
                )
            parts.append(image)
        else:
            raise RequestError(
                f"{own}: Unsupported type (got {repr_short(kind)}, expected an object of type text "
                "or image_url).",
                param=own,
            )
    return parts


def _read_text(
    text: str, where: str, reader: RequestReader, has_markdown: bool
) -> list[ContentPart]:
    """The parts of a text. In a response that is sent back, images are part of the text."""
    parts: list[ContentPart] = []
    for part in split_images(text) if has_markdown else [text]:
        if isinstance(part, str):
            parts.append(reader.text(part, where))
        elif part.url:
            parts.append(reader.part_from_url(part.url, where))
        else:  # The server may have dropped the image; the note is then all there is.
            image = reader.generated_image(part.content_hash, where)
            parts.append(image or reader.text(part.note, where))
    return parts
