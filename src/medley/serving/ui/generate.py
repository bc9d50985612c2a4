"""Generation of a response in the web UI, with updates while it grows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from medley.data.document import ContentPart, Document
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.inference.response import StreamEvent
from medley.serving.error_responses import logged_error
from medley.serving.limits import RequestError
from medley.serving.response_stream import ResponseStream
from medley.serving.schema import random_seed
from medley.serving.state import ServerState, cancel_tasks
from medley.serving.ui.conversation import (
    CancelToken,
    ChatMessage,
    Conversation,
    MessagePart,
    Settings,
)
from medley.serving.ui.image_store import ImageStore
from medley.serving.ui.settings import INTEGER_SETTINGS, NO_IMAGE_LIMIT, RANDOM_SEED
from medley.serving.untrusted_inputs import RequestReader
from medley.serving.worker import EngineWorker

Item = TypeVar("Item")
PREVIEWS_PER_IMAGE = 8
UPDATE_SECONDS = 0.1  # minimum time between two updates of a growing text
KEEPALIVE_SECONDS = 1.0  # maximum time between two updates
_END: Any = object()


def to_options(settings: Settings, attempts: int) -> GenerationOptions:
    """Settings of the UI -> generation options. Each regeneration uses the next seed.

    Raises UserError for values that are missing, invalid or contradict each other.
    """
    values = dict(settings)
    for name, value in values.items():
        if value is None:
            raise UserError(f"{name} is empty. Enter a value.")
        if name in INTEGER_SETTINGS:
            values[name] = int(value)
    if values["max_images"] == NO_IMAGE_LIMIT:
        values["max_images"] = None
    seed = values["seed"]
    values["seed"] = random_seed() if seed == RANDOM_SEED else seed + attempts
    return GenerationOptions(**values)


async def generate_response(
    state: ServerState,
    store: ImageStore,
    model: str,
    conversation: Conversation,
    settings: Settings,
) -> AsyncGenerator[Conversation, None]:
    """Yields the conversation with the growing response; the last one is complete.

    An error becomes the response. Closing the generator, or requesting the conversation's
    cancellation, ends the model's work.
    """
    start, cancel = time.monotonic(), conversation.cancel or CancelToken()
    cancel.started = True
    response = ChatMessage("assistant", (), "sending…", model, "generating", dict(settings))
    yield conversation.with_response(response)
    try:
        worker = state.worker(model)
        if state.draining:
            raise RequestError("The server is shutting down.", 503)
        options = to_options(settings, conversation.attempts)
        response = replace(response, settings={**settings, "seed": options.seed})
        async with state.decode_slots if conversation.images else nullcontext():
            document = await asyncio.to_thread(_read_document, conversation, worker)
        preview_every = max(1, worker.model.image_tokenizer.codes_per_image // PREVIEWS_PER_IMAGE)
        stream = ResponseStream(worker, document, options, preview_every=preview_every)
        del document  # Its images are large; the worker deletes them after the prefill.
        note, last_update, displayed = "", 0.0, response
        async with (
            aclosing(state.instrument(worker, stream)) as chunks,
            aclosing(_until_cancelled(chunks, cancel)) as items,
        ):
            async for chunk in items:
                if chunk is None:
                    if (position := worker.queue_position(stream.jobs[0])) is not None:
                        displayed = replace(displayed, note=f"queued, {position} requests ahead")
                    yield conversation.with_response(displayed)
                    continue
                event = chunk.event
                if event.response is not None:
                    note = event.response.note or ""
                    continue
                response, displayed = await _apply_event(store, response, displayed, event)
                now = time.monotonic()
                if event.preview is not None or now - last_update >= UPDATE_SECONDS:
                    last_update = now
                    yield conversation.with_response(displayed)
        if cancel.requested.is_set():
            parts = await asyncio.to_thread(store.persist_previews, displayed.parts)
            stopped = replace(displayed, parts=parts, note="stopped", status="stopped")
            yield conversation.with_response(stopped)
            return
        seconds, tokens = time.monotonic() - start, stream.generated_tokens
        line = f"{model}, seed {options.seed}, {tokens} tokens in {seconds:.1f} s"
        if not response.parts:
            note = note or "the response is empty"
        complete = replace(response, note=f"{line}; {note}" if note else line, status="")
        yield conversation.with_response(complete)
    except Exception as error:
        _, body = logged_error(error, "a response in the web UI failed")
        failed = replace(response, note=f"Error: {body['error']['message']}", status="failed")
        yield conversation.with_response(failed)
    finally:
        cancel.finished.set()


def _read_document(conversation: Conversation, worker: EngineWorker) -> Document:
    """The prompt, read within the limits of a request."""
    reader = RequestReader.of_worker(worker)
    reader.check_image_count(len(conversation.images))

    def read_part(part: MessagePart, where: str) -> ContentPart:
        if isinstance(part, str):
            return reader.text(part, where)
        return reader.part_from_bytes(part.read_bytes(), where, part.name)

    return conversation.to_document(read_part)


async def _apply_event(
    store: ImageStore, response: ChatMessage, displayed: ChatMessage, event: StreamEvent
) -> tuple[ChatMessage, ChatMessage]:
    """The response with a new event, and as it is displayed: with the preview of an image."""
    parts = response.parts
    if event.progress is not None:
        if event.preview is not None and event.progress < 1:
            preview = await asyncio.to_thread(store.add_preview, event.preview)
            displayed = replace(response, parts=(*parts, preview))
        return response, replace(displayed, note=f"generating an image, {event.progress:.0%}")
    if event.text and parts and isinstance(parts[-1], str):
        parts = (*parts[:-1], parts[-1] + event.text)
    elif event.text:
        parts = (*parts, event.text)
    if event.image is not None:
        parts = (*parts, await asyncio.to_thread(store.add_generated, event.image))
    response = replace(response, parts=parts, note="")
    return response, response


async def _until_cancelled(
    items: AsyncGenerator[Item, None], cancel: CancelToken
) -> AsyncGenerator[Item | None, None]:
    """Yields the items until cancellation is requested, and None after each second without one.

    Gradio detects that a browser has disconnected only between two updates.
    """
    cancelled = asyncio.ensure_future(cancel.requested.wait())
    upcoming: asyncio.Future[Any] | None = None
    try:
        while not cancel.requested.is_set():
            upcoming = upcoming or asyncio.ensure_future(anext(items, _END))
            await asyncio.wait(
                {upcoming, cancelled}, timeout=KEEPALIVE_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )  # fmt: skip
            if upcoming.done():
                item, upcoming = upcoming.result(), None
                if item is _END:
                    return
                yield item
            elif not cancel.requested.is_set():
                yield None
    finally:
        await cancel_tasks(cancelled, upcoming)
