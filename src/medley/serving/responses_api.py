"""`/v1/responses`: create, stream, retrieve and delete responses.

A stored response has the token ids of its conversation, so that a request that continues it has
exactly the tokens that the model has seen and generated.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from medley.data.document import ContentPart, ImagePart, parts_to_ids
from medley.inference.response import strip_terminators
from medley.serving.error_responses import CodedError
from medley.serving.json_body import JsonRoute, free_body
from medley.serving.limits import RequestError
from medley.serving.messages import to_document
from medley.serving.neutral_values import left_out
from medley.serving.response_builder import ResponseBuilder
from medley.serving.response_items import to_messages
from medley.serving.response_message import JSON_OR_EVENTS, encode_event, event_response
from medley.serving.response_store import StoredResponse, owner_of
from medley.serving.response_stream import Chunk, ResponseStream, join_texts
from medley.serving.responses_schema import ResponseRequest
from medley.serving.served_names import RequestedModel, choose_mode, find_model
from medley.serving.state import ServerState, first_or_disconnect, get_state, until_disconnect
from medley.serving.tokens_api import read_ids
from medley.serving.untrusted_inputs import RequestReader
from medley.serving.worker import EngineWorker, TokenIds

router = APIRouter(route_class=JsonRoute)


class Conversation:
    """The prompt of one request.

    Attributes:
        ids: token ids without the instructions, which the next request does not inherit
        instructions: token ids of the instructions, which follow `<s>`
        note: which turns were left out
    """

    def __init__(self, ids: tuple[int, ...], instructions: tuple[int, ...] = ()) -> None:
        self.ids, self.instructions = ids, instructions
        self.note: str | None = None

    @property
    def prompt(self) -> TokenIds:
        return TokenIds((self.ids[0], *self.instructions, *self.ids[1:]))

    def truncate(self, limit: int, end_turn: int) -> None:
        """Leaves out the oldest turns, two at a time, until the prompt has `limit` tokens."""
        excess = len(self.ids) + len(self.instructions) - limit
        if excess <= 0:
            return
        ends = [i for i, token in enumerate(self.ids) if token == end_turn]
        cuts = ends[1:-1:2]  # The last turn of the user stays.
        if cuts:
            count = min(bisect_left(cuts, excess) + 1, len(cuts))  # A cut at i drops i tokens.
            self.ids = (self.ids[0], *self.ids[cuts[count - 1] + 1 :])
            self.note = f"truncation: The {2 * count} oldest turns were left out."


@router.post("/v1/responses", **JSON_OR_EVENTS)
async def create_response(body: ResponseRequest, request: Request) -> Response:
    state = get_state(request)
    model = find_model(state, body.model)
    worker, body = model.worker, state.defaults.apply(body)
    body.check()
    options = body.generation(state.limits, choose_mode(model, body, "text"))
    owner = owner_of(request)
    conversation = await _read_conversation(state, body, worker, owner)
    body.input = ""
    free_body(request)
    vocabulary, tokenizer = worker.model.vocabulary, worker.model.image_tokenizer
    if body.truncation == "auto":
        context = worker.model.engine.max_seq_len
        reserve = min(options.max_new_tokens, context // 4)
        conversation.truncate(context - reserve, vocabulary.end_turn)
    preview_every = 0
    if body.partial_images:
        preview_every = -(-tokenizer.codes_per_image // (body.partial_images + 1))
    responses = ResponseStream(
        worker, conversation.prompt, options, 1, body.stop_strings, preview_every
    )
    head = _head(body, model, options.seed, conversation.note)
    builder = ResponseBuilder(head, body.images_as or state.defaults.images_as)
    run = _Run(state, responses, builder, conversation, owner if body.store else None)
    if body.stream:
        events = _stream_events(run)
        first = await first_or_disconnect(request, events)
        return event_response(first, events, partial(_failure_events, builder))
    last: dict[str, Any] = {}
    async for event in until_disconnect(request, run.events()):
        last = event
    return JSONResponse(last["response"])


async def _read_conversation(
    state: ServerState, body: ResponseRequest, worker: EngineWorker, owner: str
) -> Conversation:
    """The tokens of the stored conversation, the input and the instructions."""
    previous = _previous(state, body, worker, owner)
    messages, names = to_messages(body.input)
    reader = RequestReader.of_worker(worker)
    async with state.decode_slots:
        document = await asyncio.to_thread(to_document, messages, reader, names)
    ids = await read_ids(worker, document, raw_prompt=False)
    if previous is not None:
        ids = (*previous.ids, worker.model.vocabulary.end_turn, *ids[1:])
    instructions: tuple[int, ...] = ()
    if body.instructions:
        text = reader.text(body.instructions, "instructions")
        instructions = (await read_ids(worker, [text, "\n"]))[1:]
    return Conversation(ids, instructions)


def _previous(
    state: ServerState, body: ResponseRequest, worker: EngineWorker, owner: str
) -> StoredResponse | None:
    name = body.previous_response_id
    if not name:
        return None
    stored = state.responses.get(owner, name)
    if stored is None:
        raise CodedError(
            f"previous_response_id: No such response (got {name[:80]!r}). It was not stored, was "
            "deleted, or belongs to another API key; the oldest are dropped. Send the conversation "
            "as input.",
            "previous_response_not_found",
            "previous_response_id",
        )
    if stored.token_space != token_space(worker):
        raise RequestError(
            f"previous_response_id: A model with other tokens has generated {name}. Use its model, "
            "or send the conversation as input.",
            param="previous_response_id",
        )
    return stored


def token_space(worker: EngineWorker) -> tuple[str, int]:
    """What token ids mean: equal for adapters of one checkpoint."""
    model = worker.model
    return model.image_tokenizer.fingerprint, model.raw_tokenizer.get_vocab_size()


def _head(
    body: ResponseRequest, model: RequestedModel, seed: int, note: str | None
) -> dict[str, Any]:
    """The fields of a response object that repeat the request."""
    return {
        "id": f"resp_{secrets.token_hex(16)}", "object": "response", "created_at": int(time.time()),
        "model": model.name, "seed": seed, "error": None, "incomplete_details": None,
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {}, "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id, "store": body.store,
        "temperature": body.temperature, "top_p": body.top_p, "truncation": body.truncation,
        "tools": body.tools or [], "tool_choice": body.tool_choice or "auto",
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": None, "summary": None},
        "background": False, "usage": None, **({"note": note} if note else {}), **left_out(),
    }  # fmt: skip


# --- generation -------------------------------------------------------------------------------


class _Run:
    """One response while it is generated. It is stored at its end for `owner`, if not None."""

    def __init__(
        self,
        state: ServerState,
        responses: ResponseStream,
        builder: ResponseBuilder,
        conversation: Conversation,
        owner: str | None,
    ) -> None:
        self.state, self.responses, self.builder = state, responses, builder
        self.conversation, self.owner = conversation, owner
        self._parts: list[ContentPart] = []

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        builder, worker = self.builder, self.responses.worker
        is_first = True
        async with aclosing(self.state.instrument(worker, self.responses)) as chunks:
            async for chunk in chunks:
                for event in builder.begin() if is_first else ():
                    yield event
                is_first = False
                for event in builder.add(chunk):
                    yield event
                self._remember(chunk)
                if chunk.finish_reason:
                    for event in self._end(chunk):
                        yield event

    def _remember(self, chunk: Chunk) -> None:
        event, worker = chunk.event, self.responses.worker
        if event.text:
            self._parts.append(event.text)
        if event.image is not None:
            self._parts.append(ImagePart(codes=event.codes))
            if self.builder.images_as == "images":  # A client may send the id of the item only.
                name = self.builder.output[-1]["id"]
                space = worker.model.image_tokenizer.fingerprint
                worker.generated_images.add(space, name, event.codes)

    def _end(self, chunk: Chunk) -> list[dict[str, Any]]:
        status = "incomplete" if chunk.finish_reason == "length" else "completed"
        fields: dict[str, Any] = {"usage": _usage(self.responses), "completed_at": int(time.time())}
        if status == "incomplete":
            fields["incomplete_details"] = {"reason": "max_output_tokens"}
        response = chunk.event.response
        if response is not None and response.note:
            fields["note"] = response.note
        events = self.builder.end(status, **fields)
        if self.owner is not None:
            ids = (*self.conversation.ids, *self._generated(chunk))
            space = token_space(self.responses.worker)
            stored = StoredResponse(events[-1]["response"], ids, space)
            self.state.responses.add(self.owner, stored)
        return events

    def _generated(self, chunk: Chunk) -> Sequence[int]:
        """Token ids of the response. A stop string has cut the text, so it is encoded again."""
        model, response = self.responses.worker.model, chunk.event.response
        if response is None:
            return parts_to_ids(join_texts(self._parts), model.text_tokenizer)
        return strip_terminators(response.ids, model.vocabulary, response.finish_reason)


def _usage(responses: ResponseStream) -> dict[str, Any]:
    prompt, generated = responses.prompt_tokens, responses.generated_tokens
    return {
        # Clients read members of the details; the number of cached tokens is not known.
        "input_tokens": prompt, "input_tokens_details": {},
        "output_tokens": generated, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + generated,
    }  # fmt: skip


async def _stream_events(run: _Run) -> AsyncGenerator[str, None]:
    async with aclosing(run.events()) as events:
        async for event in events:
            yield encode_event(event, event["type"])


def _failure_events(builder: ResponseBuilder, body: dict[str, Any]) -> Iterable[str]:
    """`error` and `response.failed`, which end the stream."""
    return [encode_event(last, last["type"]) for last in builder.fail(body["error"])]


# --- stored responses -------------------------------------------------------------------------


def _not_found(name: str) -> RequestError:
    return RequestError(
        f"No stored response {name[:80]!r}. It was not stored, was deleted, or belongs to another "
        "API key; the oldest are dropped.",
        404, "response_id",
    )  # fmt: skip


@router.get("/v1/responses/{response_id}")
async def get_response(response_id: str, request: Request) -> dict[str, Any]:
    stored = get_state(request).responses.get(owner_of(request), response_id)
    if stored is None:
        raise _not_found(response_id)
    return stored.response


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
    if not get_state(request).responses.delete(owner_of(request), response_id):
        raise _not_found(response_id)
    return {"id": response_id, "object": "response", "deleted": True}
