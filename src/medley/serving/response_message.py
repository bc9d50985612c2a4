"""Responses in OpenAI's form: messages, usage, server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse
from PIL import Image

from medley.serving.error_responses import logged_error
from medley.serving.image_text import to_markdown, to_note
from medley.serving.response_stream import ResponsePart, ResponseStream, join_texts
from medley.serving.schema import ImagesAs
from medley.utils.html import data_url


def to_content_part(part: ResponsePart) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": data_url(part)}}


def to_text(parts: Sequence[ResponsePart], images_as: ImagesAs) -> str:
    """The text of a response: with its images as Markdown, or a note if it has images only."""
    if images_as == "markdown":
        return "".join(part if isinstance(part, str) else to_markdown(part) for part in parts)
    return "".join(part for part in parts if isinstance(part, str)) or note_of(parts)


def note_of(parts: Sequence[ResponsePart]) -> str:
    """Notes in place of the images of a response that has no text."""
    if any(isinstance(part, str) and part for part in parts):
        return ""
    return "".join(to_note(part) for part in parts if isinstance(part, Image.Image))


def to_message(parts: Sequence[ResponsePart], images_as: ImagesAs = "images") -> dict[str, Any]:
    """Text and images of a response as a message."""
    message: dict[str, Any] = {"role": "assistant", "content": to_text(parts, images_as)}
    has_images = any(isinstance(part, Image.Image) for part in parts)
    if has_images and images_as == "images":
        content = [to_content_part(part) for part in join_texts(parts)]
        message["images"] = [part for part in content if part["type"] == "image_url"]
        message["parts"] = content
    return message


def usage_of(responses: ResponseStream) -> dict[str, int]:
    prompt, generated = responses.prompt_tokens, responses.generated_tokens
    return {
        "prompt_tokens": prompt, "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }  # fmt: skip


# Arguments of a route that responds with JSON or with a stream of events.
JSON_OR_EVENTS: dict[str, Any] = {
    "response_model": None,
    "response_class": Response,
    "responses": {200: {"content": {"application/json": {}, "text/event-stream": {}}}},
}


def encode_event(value: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event."""
    # ASCII: some clients treat U+2028 as the end of a line.
    return f"event: {name}\n" * (name is not None) + f"data: {json.dumps(value)}\n\n"


def error_event(body: dict[str, Any]) -> Iterable[str]:
    """The event that ends a stream in which an error with this body was raised."""
    return [encode_event(body)]


def event_response(
    first: str,
    rest: AsyncGenerator[str, None],
    last_events: Callable[[dict[str, Any]], Iterable[str]] = error_event,
) -> StreamingResponse:
    """A stream of events; if one fails, `last_events` of the error's body end it."""
    return StreamingResponse(
        _to_the_end(first, rest, last_events), media_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )  # fmt: skip


async def _to_the_end(
    first: str,
    rest: AsyncGenerator[str, None],
    last_events: Callable[[dict[str, Any]], Iterable[str]],
) -> AsyncIterator[str]:
    async with aclosing(rest):
        try:
            yield first
            async for event in rest:
                yield event
        except Exception as error:
            _, body = logged_error(error, "a streamed response failed")
            for event in last_events(body):
                yield event
