"""Messages as clients of OpenAI's protocol send them -> documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medley.data.document import ContentPart, Document, DocumentError, ImagePart, Turn
from medley.serving.limits import RequestError
from medley.serving.untrusted_inputs import RequestReader, shown

_TEXT_KINDS = ("text", "input_text", "output_text")
_IMAGE_KINDS = ("image_url", "input_image")


def document_of(messages: Sequence[dict[str, Any]], reader: RequestReader) -> Document:
    """A talk that ends with the user's turn. A system's text joins the first user turn; turns of
    one role that follow each other are one.

    Raises RequestError with the place of what is wrong.
    """
    contents = [_content(message) for message in messages]
    reader.refuse_many(sum(map(_pictures, contents)))
    turns: list[tuple[str, list[ContentPart]]] = []
    told: list[ContentPart] = []
    for number, (message, content) in enumerate(zip(messages, contents, strict=True)):
        place = f"messages[{number}]"
        role = message.get("role")
        parts = _parts(content, f"{place}.content", reader)
        if role in ("system", "developer"):
            if turns:
                raise RequestError(f"{place}: a system message stands before the talk", param=place)
            told += [*parts, "\n"]
        elif role in ("user", "assistant"):
            if turns and turns[-1][0] == role:
                turns[-1][1].extend(["\n", *parts])
            else:
                turns.append((role, parts))
        else:
            raise RequestError(
                f"{place}.role is {shown(role)}, expected system, user or assistant", param=place
            )
    if not turns or turns[-1][0] != "user":
        raise RequestError("the last message has to be the user's", param="messages")
    if turns[0][0] != "user":
        raise RequestError("the talk has to begin with the user", param="messages")
    turns[0][1][:0] = told
    try:
        return Document(tuple(Turn(role, tuple(parts)) for role, parts in turns))
    except DocumentError as error:
        raise RequestError(str(error), param="messages") from error


def _content(message: dict[str, Any]) -> Any:
    """Of a message. Our own answers, sent back as they came, hold their pictures beside the words:
    in `parts` in their order, in `images` without it."""
    content = message.get("content")
    if isinstance(content, list) and _pictures(content):
        return content
    if isinstance(message.get("parts"), list):
        return message["parts"]
    if isinstance(message.get("images"), list):
        words = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        return [*words, *message["images"]] if isinstance(words, list) else content
    return content


def _pictures(content: Any) -> int:
    parts = content if isinstance(content, list) else []
    return sum(isinstance(part, dict) and part.get("type") in _IMAGE_KINDS for part in parts)


def _parts(content: Any, place: str, reader: RequestReader) -> list[ContentPart]:
    if content is None:
        return []
    if isinstance(content, str):
        return [reader.text(content, place)]
    if not isinstance(content, list):
        raise RequestError(f"{place} is neither text nor a list of parts", param=place)
    found: list[ContentPart] = []
    for number, part in enumerate(content):
        own = f"{place}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_KINDS and isinstance(part.get("text"), str):
            found.append(reader.text(part["text"], own))
        elif kind in _IMAGE_KINDS:
            address = part.get("image_url")
            address = address.get("url") if isinstance(address, dict) else address
            found.append(ImagePart(image=reader.address(address, own)))
        else:
            raise RequestError(
                f"{own}: type is {shown(kind)}, expected text or image_url", param=own
            )
    return found
