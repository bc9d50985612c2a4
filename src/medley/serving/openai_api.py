"""OpenAI's protocol: models, chat completions, image generation.

A message with images has them in `images`, and in `parts` together with the text in their order;
`content` is the text alone, which existing clients expect.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from medley.serving.error_responses import openai_error
from medley.serving.json_body import JsonRoute, free_body
from medley.serving.limits import RequestError
from medley.serving.messages import to_document
from medley.serving.response_stream import ResponsePart, ResponseStream
from medley.serving.schema import ChatRequest, ImageRequest
from medley.serving.state import ServerState, first_or_disconnect, until_disconnect
from medley.serving.untrusted_inputs import RequestReader
from medley.serving.worker import EngineWorker
from medley.utils.html import data_url

router = APIRouter(route_class=JsonRoute)


def get_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.medley
    return state


# --- models -----------------------------------------------------------------------------------


def describe_model(worker: EngineWorker) -> dict[str, Any]:
    model = worker.model
    return {
        "id": worker.name, "object": "model", "created": worker.created, "owned_by": "medley",
        "max_model_len": model.engine.max_seq_len, "image_size": model.image_tokenizer.size,
        "codes_per_image": model.image_tokenizer.codes_per_image,
        "generates_images": model.image_tokenizer.has_decoder,
        "context": model.engine.max_seq_len,  # alias
        "draws": model.image_tokenizer.has_decoder,  # alias
    }  # fmt: skip


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    workers = get_state(request).workers.values()
    return {"object": "list", "data": [describe_model(worker) for worker in workers]}


@router.get("/v1/models/{name}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    return describe_model(get_state(request).worker(name))


# --- chat -------------------------------------------------------------------------------------


def to_content_part(part: ResponsePart) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": data_url(part)}}


def to_message(parts: Sequence[ResponsePart]) -> dict[str, Any]:
    """Text and images of a response as a message."""
    text = "".join(part for part in parts if isinstance(part, str))
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if any(isinstance(part, Image.Image) for part in parts):
        content = [to_content_part(part) for part in parts]
        message["images"] = [part for part in content if part["type"] == "image_url"]
        message["parts"] = content
    return message


def usage_of(responses: ResponseStream) -> dict[str, int]:
    prompt, generated = responses.prompt_tokens, responses.generated_tokens
    return {
        "prompt_tokens": prompt, "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }  # fmt: skip


@router.post(
    "/v1/chat/completions", response_model=None, response_class=Response,
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
)  # fmt: skip
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    state = get_state(request)
    worker = state.worker(body.model)
    tokenizer = worker.model.image_tokenizer
    options = body.generation(state.limits)
    reader = RequestReader(state.limits, tokenizer, worker.max_characters)
    async with state.decode_slots:  # Decoding images in this thread would block all requests.
        document = await asyncio.to_thread(to_document, body.messages, reader)
    body.messages.clear()  # The images are large, and the request may wait in the queue.
    free_body(request)
    preview_every = 0
    if body.previews and body.stream:
        preview_every = max(1, tokenizer.codes_per_image // (body.previews + 1))
    responses = ResponseStream(
        worker, document, options, body.num_choices, body.stop_strings, preview_every
    )
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
            "model": worker.name, "seed": options.seed}  # fmt: skip
    if body.stream:
        events = _stream_events(state, body, responses, {**head, "object": "chat.completion.chunk"})
        # A rejected request fails here, while the response can still have an error status.
        first = await first_or_disconnect(request, events)
        return StreamingResponse(
            _with_error_event(first, events), media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )  # fmt: skip
    reasons: dict[int, str] = {}
    notes: dict[int, str] = {}
    async for chunk in until_disconnect(request, state.instrument(worker, responses)):
        if chunk.finish_reason:
            reasons[chunk.index] = chunk.finish_reason
            if chunk.event.response is not None and chunk.event.response.note:
                notes[chunk.index] = chunk.event.response.note
    choices = [
        {"index": i, "message": to_message(responses.parts[i]), "finish_reason": reasons[i],
         "logprobs": None} | ({"note": notes[i]} if i in notes else {})
        for i in range(body.num_choices)
    ]  # fmt: skip
    return JSONResponse(
        {**head, "object": "chat.completion", "choices": choices, "usage": usage_of(responses)}
    )


async def _stream_events(
    state: ServerState, body: ChatRequest, responses: ResponseStream, head: dict[str, Any]
) -> AsyncGenerator[str, None]:
    """The server-sent events of a streamed response."""

    def event(index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **more}
        return _encode_event({**head, "choices": [choice]})

    started: set[int] = set()
    async with aclosing(state.instrument(responses.worker, responses)) as chunks:
        async for chunk in chunks:
            new, index = chunk.event, chunk.index
            if index not in started:
                started.add(index)
                yield event(index, {"role": "assistant", "content": ""})
            if new.text:
                yield event(index, {"content": new.text})
            elif new.image is not None:
                yield event(index, {"images": [to_content_part(new.image)]})
            elif new.preview is not None and (progress := new.progress or 0) < 1:
                # At a progress of 1 the complete image follows at once.
                preview = {"progress": round(progress, 4), **to_content_part(new.preview)}
                yield event(index, {"preview": preview})
            if chunk.finish_reason:
                note = new.response.note if new.response is not None else None
                yield event(index, {}, chunk.finish_reason, **({"note": note} if note else {}))
    if body.stream_options is not None and body.stream_options.include_usage:
        yield _encode_event({**head, "choices": [], "usage": usage_of(responses)})
    yield "data: [DONE]\n\n"


async def _with_error_event(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """The events; if one fails, an error event ends the stream."""
    async with aclosing(rest):
        try:
            yield first
            async for event in rest:
                yield event
        except Exception as error:
            yield _encode_event(openai_error(error)[1])


def _encode_event(value: dict[str, Any]) -> str:
    # ASCII: some clients treat U+2028 as the end of a line.
    return f"data: {json.dumps(value)}\n\n"


# --- images -----------------------------------------------------------------------------------


@router.post("/v1/images/generations", response_model=None)
async def create_images(body: ImageRequest, request: Request) -> Response:
    state = get_state(request)
    worker = state.worker(body.model)
    tokenizer = worker.model.image_tokenizer
    options = body.generation(state.limits, tokenizer.size)
    reader = RequestReader(state.limits, tokenizer, worker.max_characters)
    prompt = [reader.text(body.prompt, "prompt")]
    responses = ResponseStream(worker, prompt, options, body.num_choices)
    async for _ in until_disconnect(request, state.instrument(worker, responses)):
        pass
    images = [part for parts in responses.parts for part in parts if isinstance(part, Image.Image)]
    if len(images) < body.num_choices:
        raise RequestError(
            f"The model's context has no room for all images (generated {len(images)} of "
            f"{body.num_choices}). Shorten the prompt."
        )
    data = [{"b64_json": data_url(image).partition(",")[2]} for image in images]
    return JSONResponse({"created": int(time.time()), "data": data, "seed": options.seed, "usage": {
        "input_tokens": responses.prompt_tokens, "output_tokens": responses.generated_tokens,
        "total_tokens": responses.prompt_tokens + responses.generated_tokens,
    }})  # fmt: skip
