"""`POST /tokenize` and `POST /detokenize`, in vLLM's form."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from medley.serving.json_body import JsonRoute, free_body
from medley.serving.messages import to_document
from medley.serving.neutral_values import left_out
from medley.serving.schema import RequestFields
from medley.serving.served_names import find_model
from medley.serving.state import get_state
from medley.serving.text_inputs import TokenId
from medley.serving.token_text import check_ids, ids_to_text
from medley.serving.untrusted_inputs import RequestReader
from medley.serving.worker import EngineWorker, ModelInput

router = APIRouter(route_class=JsonRoute)


class TokenizeRequest(RequestFields):
    """`POST /tokenize`: a prompt without its end-of-turn token, or messages with it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _has_one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_input", "Send either prompt or messages.")
        return self


class DetokenizeRequest(RequestFields):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids. `add_special_tokens: false` leaves out `<s>`."""
    state = get_state(request)
    worker = find_model(state, body.model).worker
    reader = RequestReader.of_worker(worker)
    prompt: ModelInput
    if body.messages is not None:
        async with state.decode_slots:
            prompt = await asyncio.to_thread(to_document, body.messages, reader)
        body.messages.clear()
    else:
        prompt = [reader.text(body.prompt or "", "prompt")]
    free_body(request)
    ids = await read_ids(worker, prompt, raw_prompt=body.messages is None)
    shown = ids if body.add_special_tokens else ids[1:]
    raw = worker.model.raw_tokenizer
    strings = [raw.id_to_token(token) for token in shown] if body.return_token_strs else None
    return {
        "count": len(shown), "max_model_len": worker.model.engine.max_seq_len,
        "tokens": list(shown), "token_strs": strings, **left_out(),
    }  # fmt: skip


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of token ids, with `<image>` for each image."""
    worker = find_model(get_state(request), body.model).worker
    prompt = check_ids(body.tokens, "tokens", worker)
    text = await asyncio.to_thread(ids_to_text, prompt.ids, worker.model.text_tokenizer)
    return {"prompt": text, **left_out()}


async def read_ids(
    worker: EngineWorker, prompt: ModelInput, raw_prompt: bool = True
) -> tuple[int, ...]:
    """Token ids of a prompt, in a place of the model's queue."""
    worker.enter(1)
    try:
        future = worker.read_prompt(prompt, None, raw_prompt)
        return await asyncio.wait_for(asyncio.wrap_future(future), worker.limits.request_timeout)
    finally:
        worker.leave(1)
