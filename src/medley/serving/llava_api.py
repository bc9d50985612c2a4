"""LLaVA's worker protocol, for LLaVA's controller, front ends and scripts.

A prompt is one text with an `<image>` for each base64 image. A response is a stream of messages
that end with a zero byte. Each message repeats the prompt and the text so far. LLaVA's protocol has
no images in responses, so only text is generated.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from medley.data.document import ContentPart, Document, Turn
from medley.data.vocabulary import IMAGE
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.serving.error_responses import logged_error
from medley.serving.json_body import JsonRoute, free_body
from medley.serving.limits import RequestError
from medley.serving.response_stream import ResponseStream
from medley.serving.schema import MAX_SCALE, StopString, random_seed
from medley.serving.state import ServerState
from medley.serving.untrusted_inputs import RequestReader

router = APIRouter(route_class=JsonRoute)
MAX_NEW_TOKENS = 1024  # LLaVA's limit
GREEDY_TEMPERATURE = 0.001  # LLaVA decodes greedily up to this temperature.
WORKER_ERROR = 1  # error_code of a worker; the controller uses 2 (no worker) and 3 (unreachable)
END = b"\0"


class GenerateRequest(BaseModel):
    """`POST /worker_generate_stream`; other fields of LLaVA's clients are ignored.

    The defaults and the ranges are LLaVA's. Its sliders send 0 for `top_p` and `max_new_tokens`.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    prompt: str
    temperature: float = Field(1.0, ge=0, le=MAX_SCALE)
    top_p: float = Field(1.0, ge=0, le=1)
    max_new_tokens: int = Field(256, ge=0)
    stop: StopString | None = None
    images: list[str] | None = None

    def to_options(self) -> GenerationOptions:
        greedy = self.temperature <= GREEDY_TEMPERATURE or self.top_p == 0
        return GenerationOptions(
            mode="text",
            max_new_tokens=max(1, min(self.max_new_tokens, MAX_NEW_TOKENS)),
            text_greedy=greedy,
            text_temperature=1.0 if greedy else self.temperature,
            text_top_p=self.top_p or 1.0,
            repetition_penalty=1.0,
            seed=random_seed(),
        )

    def to_document(self, reader: RequestReader) -> Document:
        """Raises RequestError for an invalid image, or another number of images than `<image>`."""
        images = self.images or []
        texts = self.prompt.split(IMAGE) if images else [self.prompt]
        if len(texts) - 1 != len(images):
            raise RequestError(
                f"images: The prompt has {len(texts) - 1} {IMAGE}, the request {len(images)} "
                "images. Send as many of both."
            )
        reader.check_image_count(len(images))
        reader.text(self.prompt, "prompt")
        parts: list[ContentPart] = [texts[0]] if texts[0] else []
        for number, (data, text) in enumerate(zip(images, texts[1:], strict=True)):
            parts.append(reader.part_from_base64(data, f"images[{number}]"))
            if text:
                parts.append(text)
        return Document((Turn("user", tuple(parts)),))


def encode_message(text: str, error_code: int = 0) -> bytes:
    """One message of the protocol."""
    return json.dumps({"text": text, "error_code": error_code}).encode() + END


async def encode_stream(prompt: str, pieces: AsyncIterator[str]) -> AsyncIterator[bytes]:
    """Pieces of text -> messages with the prompt and the text so far."""
    text = prompt
    async for piece in pieces:
        text += piece
        yield encode_message(text)


@router.post(
    "/worker_generate_stream", response_model=None, response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)  # fmt: skip
async def generate(request: Request) -> Response:
    try:
        # The streaming response receives from the client itself, to detect its disconnect.
        await request.body()
    except ClientDisconnect:
        return Response(status_code=499)
    stream = _generate(request.app.state.medley, request)
    return StreamingResponse(stream, media_type="application/octet-stream")


async def _generate(state: ServerState, request: Request) -> AsyncIterator[bytes]:
    """The messages of a response. Errors are messages, too; LLaVA's clients ignore the status."""
    try:
        body = GenerateRequest.model_validate(await request.json())
        worker = state.worker(body.model)
        reader = RequestReader.of_worker(worker)
        async with state.decode_slots:
            document = await asyncio.to_thread(body.to_document, reader)
        body.images = None  # They are large, and the request may wait in the queue.
        free_body(request)
        stop_strings = [body.stop] if body.stop else []
        responses = ResponseStream(worker, document, body.to_options(), 1, stop_strings)

        async def texts() -> AsyncIterator[str]:
            async for chunk in chunks:
                if chunk.event.text:
                    yield chunk.event.text

        async with aclosing(state.instrument(worker, responses)) as chunks:
            async for message in encode_stream(body.prompt, texts()):
                yield message
        text = "".join(part for part in responses.parts[0] if isinstance(part, str))
        yield encode_message(body.prompt + text)
    except UserError as error:
        yield encode_message(str(error), WORKER_ERROR)
    except ValueError as error:
        yield encode_message(f"Invalid request: {_describe(error)}.", WORKER_ERROR)
    except Exception as error:
        detail = logged_error(error, "a response to a LLaVA client failed")[1]["error"]
        yield encode_message(detail["message"], WORKER_ERROR)


def _describe(error: ValueError) -> str:
    """The first error of a request, without the value, which may be an image."""
    if not isinstance(error, ValidationError):
        return "expected a JSON object"
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "body"
    return f"{field}: {first['msg']}"


def worker_status(state: ServerState) -> dict[str, Any]:
    """LLaVA's status of a worker: its models, and the number of unfinished requests."""
    jobs = sum(worker.running + worker.waiting for worker in state.workers.values())
    return {"model_names": list(state.workers), "speed": 1, "queue_length": jobs}


@router.post("/worker_get_status")
async def get_status(request: Request) -> Response:
    return JSONResponse(worker_status(request.app.state.medley))
