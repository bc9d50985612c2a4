"""`POST /v1/embeddings`: texts, images, and mixtures of both.

An embedding is the mean of the decoder's hidden states at one layer (`Model.embed`). The response
names the layer, because the model was not trained to embed.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from torch import Tensor

from medley.inference.embeddings import check_layer
from medley.inference.model import Model
from medley.serving.json_body import JsonRoute, free_body
from medley.serving.limits import RequestError
from medley.serving.messages import read_parts
from medley.serving.neutral_values import EMBEDDINGS, left_out
from medley.serving.schema import RequestFields
from medley.serving.served_names import find_model
from medley.serving.state import get_state, until_disconnect
from medley.serving.text_inputs import EmbeddingInputs
from medley.serving.token_text import check_ids
from medley.serving.tokens_api import read_ids
from medley.serving.untrusted_inputs import RequestReader
from medley.serving.worker import EngineWorker, ModelInput, TokenIds

router = APIRouter(route_class=JsonRoute)


class EmbeddingRequest(RequestFields):
    """`POST /v1/embeddings`.

    An input is a text, token ids, a content part (`{"type": "image_url", ...}`), or a list of
    content parts that belong together.
    """

    unserved = EMBEDDINGS

    model: str
    input: EmbeddingInputs
    encoding_format: Literal["float", "base64"] = "float"
    layer: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
    state = get_state(request)
    model = find_model(state, body.model)
    worker = model.worker
    decoder = worker.model.engine.decoder
    layer = check_layer(decoder, body.layer)
    async with state.decode_slots:
        prompts = await asyncio.to_thread(_read_inputs, body.input, worker)
    free_body(request)
    data: list[dict[str, Any]] = []
    tokens = 0
    async for count, vector in until_disconnect(request, _embed(worker, prompts, layer)):
        tokens += count
        data.append(
            {
                "object": "embedding", "index": len(data),
                "embedding": _to_json(vector, body.encoding_format),
            }
        )  # fmt: skip
    return {
        "object": "list", "data": data, "model": model.name,
        "method": {"pooling": "mean", "layer": layer, "normalized": True,
                   "hidden_layers": decoder.config.num_hidden_layers},
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, **left_out(),
    }  # fmt: skip


def _read_inputs(inputs: Sequence[Any], worker: EngineWorker) -> list[ModelInput]:
    """The inputs as prompts; the limits of a request hold for all of them together."""
    reader = RequestReader.of_worker(worker)
    rows = [item if isinstance(item, list) else [item] for item in inputs]
    parts = [part for row in rows for part in row if isinstance(part, dict)]
    reader.check_image_count(
        sum(part.get("type") not in ("text", "input_text") for part in parts), "input"
    )
    return [_read_input(row, f"input[{number}]", worker, reader) for number, row in enumerate(rows)]


def _read_input(
    row: Sequence[Any], where: str, worker: EngineWorker, reader: RequestReader
) -> ModelInput:
    if all(isinstance(item, int) for item in row):
        return check_ids(row, where, worker)
    # The characters of one input are limited, not those of all.
    own = reader.with_new_text()
    parts = [{"type": "text", "text": item} if isinstance(item, str) else item for item in row]
    prompt = read_parts(parts, where, own)
    if not prompt:
        raise RequestError(f"{where}: An empty input has no embedding.", param=where)
    return list(prompt)


async def _embed(
    worker: EngineWorker, prompts: Sequence[ModelInput], layer: int
) -> AsyncGenerator[tuple[int, Tensor], None]:
    """Number of tokens and embedding of each prompt."""
    for prompt in prompts:
        ids = prompt.ids if isinstance(prompt, TokenIds) else await read_ids(worker, prompt)
        future = worker.call(partial(Model.embed_ids, ids=ids, layer=layer))
        waiting = asyncio.wrap_future(future)
        yield len(ids), await asyncio.wait_for(waiting, worker.limits.request_timeout)


def _to_json(vector: Tensor, encoding_format: str) -> list[float] | str:
    """The numbers, or the base64 of their little-endian float32 values (OpenAI's client's wish)."""
    if encoding_format == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
