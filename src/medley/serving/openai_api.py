"""OpenAI's protocol: models, chat completions, pictures from words.

A picture in an answer stands in `images` of its message, and in `parts`, which has words and
pictures in their order; `content` is the words alone, as existing clients expect it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from medley.serving.limits import RequestError
from medley.serving.messages import document_of
from medley.serving.response_stream import ResponseStream
from medley.serving.schema import ChatRequest, ImageRequest
from medley.serving.state import State, error_body, first_or_disconnect, until_disconnect
from medley.serving.untrusted_inputs import RequestReader, data_address, png_base64
from medley.serving.worker import EngineWorker

router = APIRouter()


def state_of(request: Request) -> State:
    found: State = request.app.state.medley
    return found


# --- models -----------------------------------------------------------------------------------


def model_row(worker: EngineWorker) -> dict[str, Any]:
    model = worker.model
    return {
        "id": worker.name, "object": "model", "created": worker.created, "owned_by": "medley",
        "context": model.engine.context, "image_size": model.image_tokenizer.size,
        "codes_per_image": model.image_tokenizer.codes_per_image,
        "draws": model.image_tokenizer.has_decoder,
    }  # fmt: skip


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    workers = state_of(request).workers.values()
    return {"object": "list", "data": [model_row(worker) for worker in workers]}


@router.get("/v1/models/{name}")
async def one_model(name: str, request: Request) -> dict[str, Any]:
    return model_row(state_of(request).worker(name))


# --- chat -------------------------------------------------------------------------------------


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_address(image)}}


def message_of(parts: list[Any]) -> dict[str, Any]:
    """An answer's words and pictures as a message."""
    words = "".join(part for part in parts if isinstance(part, str))
    message: dict[str, Any] = {"role": "assistant", "content": words}
    if any(isinstance(part, Image.Image) for part in parts):
        shown = [{"type": "text", "text": part} if isinstance(part, str) else image_part(part)
                 for part in parts]  # fmt: skip
        message["images"] = [part for part in shown if part["type"] == "image_url"]
        message["parts"] = shown
    return message


def usage_of(answers: ResponseStream) -> dict[str, int]:
    read, written = answers.prompt_tokens, answers.generated_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


@router.post(
    "/v1/chat/completions", response_model=None, response_class=Response,
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
)  # fmt: skip
async def chat(body: ChatRequest, request: Request) -> Response:
    state = state_of(request)
    worker = state.worker(body.model)
    limits = state.limits
    options = body.generation(limits)
    # Pictures are unpacked in another thread: they would keep everybody waiting.
    reader = RequestReader(limits, worker.model.image_tokenizer, worker.most_characters)
    async with state.reading:
        document = await state.in_thread(document_of, body.messages, reader)
    each = worker.model.image_tokenizer.codes_per_image
    every = max(1, each // (body.previews + 1)) if body.previews and body.stream else 0
    answers = ResponseStream(worker, document, options, body.answers, body.stops, every)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
            "model": worker.name, "seed": options.seed}  # fmt: skip
    if body.stream:
        chunks = _chunks(state, body, answers, {**head, "object": "chat.completion.chunk"})
        # What is refused is refused with its status.
        first = await first_or_disconnect(request, chunks)
        return StreamingResponse(_sent(first, chunks), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store"})  # fmt: skip
    reasons: dict[int, str] = {}
    notes: dict[int, str] = {}
    async for piece in until_disconnect(request, state.instrument(worker, answers)):
        if piece.finish_reason:
            reasons[piece.index] = piece.finish_reason
            if piece.event.answer is not None and piece.event.answer.note:
                notes[piece.index] = piece.event.answer.note
    choices = [
        {"index": i, "message": message_of(answers.parts[i]), "finish_reason": reasons[i],
         "logprobs": None} | ({"note": notes[i]} if i in notes else {})
        for i in range(body.answers)
    ]  # fmt: skip
    return JSONResponse(
        {**head, "object": "chat.completion", "choices": choices, "usage": usage_of(answers)}
    )


async def _chunks(
    state: State, body: ChatRequest, answers: ResponseStream, head: dict[str, Any]
) -> AsyncGenerator[str, None]:
    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **more}
        return _event({**head, "choices": [choice]})

    begun: set[int] = set()
    async with aclosing(state.instrument(answers.worker, answers)) as pieces:
        async for piece in pieces:
            event, index = piece.event, piece.index
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if event.text:
                yield chunk(index, {"content": event.text})
            elif event.image is not None:
                yield chunk(index, {"images": [image_part(event.image)]})
            elif event.preview is not None and (event.progress or 0) < 1:  # else the whole is next
                shown = {"progress": round(event.progress or 0, 4), **image_part(event.preview)}
                yield chunk(index, {"preview": shown})
            if piece.finish_reason:
                note = event.answer.note if event.answer is not None else None
                yield chunk(index, {}, piece.finish_reason, **({"note": note} if note else {}))
    if body.stream_options is not None and body.stream_options.include_usage:
        yield _event({**head, "choices": [], "usage": usage_of(answers)})
    yield "data: [DONE]\n\n"


async def _sent(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """The stream; what fails on its way ends it with an error in its place."""
    async with aclosing(rest):
        try:
            yield first
            async for text in rest:
                yield text
        except Exception as error:
            yield _event(error_body(error)[1])


def _event(value: dict[str, Any]) -> str:
    # In ASCII: some clients take U+2028 for the end of a line.
    return f"data: {json.dumps(value)}\n\n"


# --- pictures ---------------------------------------------------------------------------------


@router.post("/v1/images/generations", response_model=None)
async def images(body: ImageRequest, request: Request) -> Response:
    state = state_of(request)
    worker = state.worker(body.model)
    options = body.generation(state.limits, worker.model.image_tokenizer.size)
    reader = RequestReader(state.limits, worker.model.image_tokenizer, worker.most_characters)
    answers = ResponseStream(worker, [reader.text(body.prompt, "prompt")], options, body.answers)
    async for _ in until_disconnect(request, state.instrument(worker, answers)):
        pass
    drawn = [part for parts in answers.parts for part in parts if isinstance(part, Image.Image)]
    if len(drawn) < body.answers:
        raise RequestError(
            f"{len(drawn)} of {body.answers} pictures were drawn: no room in the model's context"
        )
    data = [{"b64_json": png_base64(image)} for image in drawn]
    return JSONResponse({"created": int(time.time()), "data": data, "seed": options.seed, "usage": {
        "input_tokens": answers.prompt_tokens, "output_tokens": answers.generated_tokens,
        "total_tokens": answers.prompt_tokens + answers.generated_tokens,
    }})  # fmt: skip
