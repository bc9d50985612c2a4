"""LLaVA's worker protocol: its controller, front ends and scripts can ask our models.

A prompt is one text with an `<image>` for each picture, sent as base64; the answer's text so far is
sent again with every piece, behind the prompt, each message ended by a zero byte. LLaVA has no
place for pictures in answers: words alone are generated.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from medley.data.document import ContentPart, Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.serving.limits import RequestError
from medley.serving.response_stream import ResponseStream
from medley.serving.schema import StopWord, any_seed
from medley.serving.state import State, error_body
from medley.serving.untrusted_inputs import RequestReader

log = logging.getLogger("medley.serving")
router = APIRouter()
MOST_TOKENS = 1024  # that LLaVA's worker gives
GREEDY = 0.001  # temperatures up to this are none
OWN_ERROR = 1  # of the worker; 2: the controller has no worker, 3: the worker is not reached
END = b"\0"


class GenerateRequest(BaseModel):
    """`POST /worker_generate_stream`; fields that LLaVA's clients add are left unread."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    prompt: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    max_new_tokens: int = Field(256, ge=0)  # its sliders reach down to 0, and its top-p as well
    stop: StopWord | None = None
    images: list[str] | None = None

    @property
    def tokens(self) -> int:
        return max(1, min(self.max_new_tokens, MOST_TOKENS))

    def options(self) -> GenerationOptions:
        greedy = self.temperature <= GREEDY or self.top_p == 0
        return GenerationOptions(
            mode="text", text_greedy=greedy, text_top_p=self.top_p or 1.0,
            max_new_tokens=self.tokens, text_temperature=1.0 if greedy else self.temperature,
            repetition_penalty=1.0, seed=any_seed(),
        )  # fmt: skip

    def document(self, reader: RequestReader) -> Document:
        """Raises RequestError where pictures and marks are not as many, or one is none."""
        own = self.images or []
        texts = self.prompt.split(IMAGE) if own else [self.prompt]
        if len(texts) - 1 != len(own):
            raise RequestError(f"{len(own)} pictures for {len(texts) - 1} {IMAGE} in the prompt")
        reader.refuse_many(len(own))
        reader.text(self.prompt, "prompt")
        parts: list[ContentPart] = [texts[0]] if texts[0] else []
        for number, (text, image) in enumerate(zip(texts[1:], own, strict=True)):
            picture = reader.base64(image, f"images[{number}]")
            parts += [ImagePart(image=picture), text] if text else [ImagePart(image=picture)]
        return Document((Turn("user", tuple(parts)),))


def message(text: str, code: int = 0) -> bytes:
    return json.dumps({"text": text, "error_code": code}).encode() + END


async def told(prompt: str, pieces: AsyncIterator[str]) -> AsyncIterator[bytes]:
    """Pieces of text as LLaVA's messages."""
    said = ""
    async for piece in pieces:
        said += piece
        yield message(prompt + said)


@router.post(
    "/worker_generate_stream", response_model=None, response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)  # fmt: skip
async def generate(request: Request) -> Response:
    try:
        data = await request.body()  # before the answer begins, which listens for the client's end
    except ClientDisconnect:
        return Response(status_code=499)
    stream = _generate(request.app.state.medley, data)
    return StreamingResponse(stream, media_type="application/octet-stream")


async def _generate(state: State, data: bytes) -> AsyncIterator[bytes]:
    """Errors are messages, too: LLaVA's clients read nothing else."""
    try:
        body = GenerateRequest.model_validate_json(data)
        worker = state.worker(body.model)
        reader = RequestReader(state.limits, worker.model.image_tokenizer, worker.most_characters)
        async with state.reading:
            document = await state.in_thread(body.document, reader)
        stops = [body.stop] if body.stop else []
        answers = ResponseStream(worker, document, body.options(), 1, stops)

        async def texts() -> AsyncIterator[str]:
            async for piece in pieces:
                if piece.event.text:
                    yield piece.event.text

        async with aclosing(state.instrument(worker, answers)) as pieces:
            async for part in told(body.prompt, texts()):
                yield part
        yield message(body.prompt + "".join(p for p in answers.parts[0] if isinstance(p, str)))
    except UserError as error:
        yield message(str(error), OWN_ERROR)
    except ValueError as error:  # not as the protocol has it
        yield message(f"not a request of this protocol: {_first_line(error)}", OWN_ERROR)
    except Exception as error:
        log.exception("an answer to LLaVA's client has failed")
        yield message(error_body(error)[1]["error"]["message"], OWN_ERROR)


def _first_line(error: ValueError) -> str:
    """What is wrong, without the value, which may be a picture."""
    errors: Sequence[Any] = error.errors() if hasattr(error, "errors") else []
    if not errors:
        return "no JSON object"
    place = ".".join(str(part) for part in errors[0]["loc"]) or "body"
    return f"{place}: {errors[0]['msg']}"


def status_of(state: State) -> dict[str, Any]:
    """What a worker tells of itself."""
    waiting = sum(worker.running + worker.waiting for worker in state.workers.values())
    return {"model_names": list(state.workers), "speed": 1, "queue_length": waiting}


@router.post("/worker_get_status")
async def worker_status(request: Request) -> Response:
    return JSONResponse(status_of(request.app.state.medley))
