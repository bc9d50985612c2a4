"""`POST /v1/images/generations`: images from a prompt, in the model's own size."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from medley.serving.json_body import JsonRoute
from medley.serving.limits import RequestError
from medley.serving.neutral_values import left_out
from medley.serving.response_stream import ResponseStream
from medley.serving.schema import ImageRequest
from medley.serving.served_names import find_model
from medley.serving.state import get_state, until_disconnect
from medley.serving.untrusted_inputs import RequestReader
from medley.utils.html import data_url

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/images/generations", response_model=None)
async def create_images(body: ImageRequest, request: Request) -> Response:
    state = get_state(request)
    model = find_model(state, body.model)
    if model.mode == "text":
        raise RequestError(
            f"model: Generates no images (got {model.name}). Use {model.worker.name}.",
            param="model",
        )
    worker, body = model.worker, state.defaults.apply(body)
    size = worker.model.image_tokenizer.size
    options = body.generation(state.limits, size, state.defaults.strict_image_size)
    prompt = [RequestReader.of_worker(worker).text(body.prompt, "prompt")]
    responses = ResponseStream(worker, prompt, options, body.num_choices)
    async for _ in until_disconnect(request, state.instrument(worker, responses)):
        pass
    images = [part for parts in responses.parts for part in parts if isinstance(part, Image.Image)]
    if len(images) < body.num_choices:
        raise RequestError(
            f"The model's context has no room for all images (generated {len(images)} of "
            f"{body.num_choices}). Shorten the prompt."
        )
    prompt_tokens, generated = responses.prompt_tokens, responses.generated_tokens
    result: dict[str, Any] = {
        "created": int(time.time()), "seed": options.seed, "size": f"{size}x{size}",
        "data": [_to_json(image, body.response_format) for image in images],
        "usage": {
            "input_tokens": prompt_tokens, "output_tokens": generated,
            "total_tokens": prompt_tokens + generated,
        },
    }  # fmt: skip
    note = body.size_note(size)
    return JSONResponse({**result, **({"note": note} if note else {}), **left_out()})


def _to_json(image: Image.Image, response_format: str | None) -> dict[str, str]:
    """An image as base64, or as a data URL for clients that expect a URL."""
    url = data_url(image)
    return {"url": url} if response_format == "url" else {"b64_json": url.partition(",")[2]}
