"""From the page's settings to a model's answer, as it grows."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from medley.data.document import ContentPart, Document, ImagePart
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.inference.model import StreamEvent
from medley.serving.response_stream import ResponseStream
from medley.serving.state import State, cancelled, error_body
from medley.serving.ui.conversation import CancelToken, ChatMessage, Conversation, Shown
from medley.serving.ui.image_store import ImageStore
from medley.serving.untrusted_inputs import RequestReader
from medley.serving.worker import EngineWorker

log = logging.getLogger("medley.serving")
Item = TypeVar("Item")
PREVIEWS = 8  # of a picture, while it is drawn
EVERY = 0.1  # seconds between two looks at an answer that grows
PULSE = 1.0  # seconds of silence after which the page is told something all the same
_END: Any = object()
_COUNTS = ("seed", "min_images", "max_images", "max_new_tokens", "text_top_k", "image_top_k")


def options_of(settings: Mapping[str, Any], tries: int) -> GenerationOptions:
    """`seed` is -1 for another one each time, `max_images` 0 for any number. Raises UserError for
    values that do not go together."""
    values = dict(settings)
    for name, value in values.items():
        if value is None:
            raise UserError(f"{name} is empty, expected a value")
        if name in _COUNTS:
            values[name] = int(value)
    values["max_images"] = values["max_images"] or None
    seed = values["seed"]
    values["seed"] = secrets.randbelow(2**31) if seed == -1 else seed + tries
    return GenerationOptions(**values)


async def answers(
    state: State, gallery: ImageStore, model: str, talk: Conversation, settings: Mapping[str, Any]
) -> AsyncGenerator[Conversation, None]:
    """The talk with its answer, again and again as that grows; the last one is whole. What goes
    wrong is the answer, in plain words. Closing it, or the talk's halt, frees the model's row."""
    began, halt = time.monotonic(), talk.halt or CancelToken()
    halt.taken = True
    last = ChatMessage("assistant", (), f"{model} is asked…", model, "under way", dict(settings))
    yield talk.answer(last)
    try:
        worker = state.worker(model)
        if state.draining:
            raise UserError("the server is shutting down")
        options = options_of(settings, talk.tries)
        last = replace(last, settings={**settings, "seed": options.seed})
        async with state.reading if talk.pictures else nullcontext():
            document = await state.in_thread(_document, talk, worker)
        every = max(1, worker.model.image_tokenizer.codes_per_image // PREVIEWS)
        asked = ResponseStream(worker, document, options, preview_every=every)
        del document  # its pictures are large, and the worker forgets them once it has read them
        note, told, seen = "", 0.0, last
        async with (
            aclosing(state.instrument(worker, asked)) as pieces,
            aclosing(_until_cancelled(pieces, halt)) as looked,
        ):
            async for piece in looked:
                if piece is None:
                    if (before := worker.before(asked.jobs[0])) is not None:
                        seen = replace(seen, note=f"waiting, {before} before you")
                    yield talk.answer(seen)
                    continue
                event = piece.event
                if event.answer is not None:
                    note = event.answer.note or ""
                    continue
                last, seen = await _grown(state, gallery, last, seen, event)
                if event.preview is not None or time.monotonic() - told >= EVERY:
                    told = time.monotonic()
                    yield talk.answer(seen)
        if halt.wanted.is_set():
            parts = await state.in_thread(gallery.settled, seen.parts)
            yield talk.answer(replace(seen, parts=parts, note="stopped", standing="stopped"))
            return
        seconds, tokens = time.monotonic() - began, asked.generated_tokens
        line = f"{model}, seed {options.seed}, {tokens} tokens in {seconds:.1f} s"
        if not last.parts:
            note = note or "the model ended its answer without a word"
        yield talk.answer(replace(last, note=f"{line}; {note}" if note else line, standing=""))
    except Exception as error:
        status, body = error_body(error)
        if status >= 500:
            log.error("an answer on the page", exc_info=error)
        reason = body["error"]["message"]
        yield talk.answer(replace(last, note=f"Not answered: {reason}", standing="failed"))
    finally:
        halt.ended.set()


def _document(talk: Conversation, worker: EngineWorker) -> Document:
    """What the model is asked, read within a request's limits."""
    reader = RequestReader(worker.limits, worker.model.image_tokenizer, worker.most_characters)
    reader.refuse_many(len(talk.pictures))

    def part(shown: Shown, place: str) -> ContentPart:
        if isinstance(shown, str):
            return reader.text(shown, place)
        return ImagePart(image=reader.picture(shown.read(), place, shown.name))

    return talk.document(part)


async def _grown(
    state: State, gallery: ImageStore, last: ChatMessage, seen: ChatMessage, event: StreamEvent
) -> tuple[ChatMessage, ChatMessage]:
    """An answer with what is new of it, and as it is shown: with a picture that is not whole."""
    parts = last.parts
    if event.progress is not None:
        if event.preview is not None and event.progress < 1:
            preview = await state.in_thread(gallery.preview, event.preview)
            seen = replace(last, parts=(*parts, preview))
        return last, replace(seen, note=f"drawing, {100 * event.progress:.0f} %")
    if event.text and parts and isinstance(parts[-1], str):
        parts = (*parts[:-1], parts[-1] + event.text)
    elif event.text:
        parts = (*parts, event.text)
    if event.image is not None:
        parts = (*parts, await state.in_thread(gallery.drawn, event.image))
    last = replace(last, parts=parts, note="")
    return last, last


async def _until_cancelled(
    items: AsyncGenerator[Item, None], halt: CancelToken
) -> AsyncGenerator[Item | None, None]:
    """The items, and None after each while without one: only between two updates does the page
    notice that its browser has gone. Ends early where the answer is not wanted any more."""
    ending = asyncio.ensure_future(halt.wanted.wait())
    coming: asyncio.Future[Any] | None = None
    try:
        while not halt.wanted.is_set():
            coming = coming or asyncio.ensure_future(anext(items, _END))
            await asyncio.wait({coming, ending}, timeout=PULSE, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                item, coming = coming.result(), None
                if item is _END:
                    return
                yield item
            elif not halt.wanted.is_set():
                yield None
    finally:
        await cancelled(ending, coming)
