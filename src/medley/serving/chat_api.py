"""`POST /v1/chat/completions`.

A message with images has them in `images`, and in `parts` together with the text in their order;
`content` is the text alone, which existing clients expect. `images_as: "markdown"` has the images
in `content` instead.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from medley.serving.image_text import to_markdown
from medley.serving.json_body import JsonRoute, free_body
from medley.serving.messages import to_document
from medley.serving.neutral_values import left_out
from medley.serving.response_message import (
    JSON_OR_EVENTS,
    encode_event,
    event_response,
    note_of,
    to_content_part,
    to_message,
    usage_of,
)
from medley.serving.response_stream import Chunk, ResponseStream
from medley.serving.schema import ChatRequest, ImagesAs
from medley.serving.served_names import choose_mode, default_mode, find_model
from medley.serving.state import ServerState, first_or_disconnect, get_state, until_disconnect
from medley.serving.untrusted_inputs import RequestReader

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", **JSON_OR_EVENTS)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    state = get_state(request)
    model = find_model(state, body.model)
    worker, body = model.worker, state.defaults.apply(body)
    default = default_mode(state, worker)
    if default == "text" and body.asks_for_images:
        default = "any"
    options = body.generation(state.limits, choose_mode(model, body, default))
    reader = RequestReader.of_worker(worker)
    async with state.decode_slots:  # Decoding images in this thread would block all requests.
        document = await asyncio.to_thread(to_document, body.messages, reader)
    body.messages.clear()  # The images are large, and the request may wait in the queue.
    free_body(request)
    preview_every = 0
    if body.previews and body.stream:
        codes = worker.model.image_tokenizer.codes_per_image
        preview_every = -(-codes // (body.previews + 1))
    responses = ResponseStream(
        worker, document, options, body.num_choices, body.stop_strings, preview_every
    )
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
            "model": model.name, "seed": options.seed, **left_out()}  # fmt: skip
    images_as = body.images_as or state.defaults.images_as
    if body.stream:
        head["object"] = "chat.completion.chunk"
        events = _stream_events(state, body, responses, head, images_as)
        # A rejected request fails here, while the response can still have an error status.
        first = await first_or_disconnect(request, events)
        return event_response(first, events)
    ends: dict[int, dict[str, Any]] = {}
    async for chunk in until_disconnect(request, state.instrument(worker, responses)):
        if chunk.finish_reason:
            ends[chunk.index] = {"finish_reason": chunk.finish_reason, **note_about(chunk)}
    choices = [
        {"index": i, "message": to_message(responses.parts[i], images_as), "logprobs": None,
         **ends[i]}
        for i in range(body.num_choices)
    ]  # fmt: skip
    return JSONResponse(
        {**head, "object": "chat.completion", "choices": choices, "usage": usage_of(responses)}
    )


def note_about(chunk: Chunk) -> dict[str, str]:
    """The field of a choice that explains why an image is missing."""
    response = chunk.event.response
    return {"note": response.note} if response is not None and response.note else {}


async def _stream_events(
    state: ServerState,
    body: ChatRequest,
    responses: ResponseStream,
    head: dict[str, Any],
    images_as: ImagesAs,
) -> AsyncGenerator[str, None]:
    """The server-sent events of a streamed response."""

    def event(index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **more}
        return encode_event({**head, "choices": [choice]})

    started: set[int] = set()
    async with aclosing(state.instrument(responses.worker, responses)) as chunks:
        async for chunk in chunks:
            new, index = chunk.event, chunk.index
            if index not in started:
                started.add(index)
                yield event(index, {"role": "assistant", "content": ""})
            if new.text:
                yield event(index, {"content": new.text})
            elif new.image is not None and images_as == "markdown":
                yield event(index, {"content": to_markdown(new.image)})
            elif new.image is not None:
                yield event(index, {"images": [to_content_part(new.image)]})
            elif new.preview is not None and (progress := new.progress or 0) < 1:
                # At a progress of 1 the complete image follows at once.
                preview = {"progress": round(progress, 4), **to_content_part(new.preview)}
                yield event(index, {"preview": preview})
            if chunk.finish_reason:
                if images_as == "images" and (note := note_of(responses.parts[index])):
                    yield event(index, {"content": note})
                yield event(index, {}, chunk.finish_reason, **note_about(chunk))
    if body.stream_options is not None and body.stream_options.include_usage:
        yield encode_event({**head, "choices": [], "usage": usage_of(responses)})
    yield "data: [DONE]\n\n"
