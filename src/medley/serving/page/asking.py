"""From the page's settings to a model's answer, as it grows."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from PIL import Image

from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.serving.answering import Answering
from medley.serving.page.talk import Said, Talk
from medley.serving.state import State, error_body

PREVIEWS = 8  # of a picture, while it is drawn
EVERY = 0.1  # seconds between two looks at an answer that grows


def options_of(settings: Mapping[str, Any], tries: int) -> GenerationOptions:
    """`seed` is -1 for another one each time, `max_images` 0 for any number. Raises UserError for
    values that do not go together."""
    values = dict(settings)
    for name in ("seed", "min_images", "max_images", "max_new_tokens"):
        if values[name] is None:
            raise UserError(f"{name} is empty, expected a number")
        values[name] = int(values[name])
    values["max_images"] = values["max_images"] or None
    seed = values["seed"]
    values["seed"] = secrets.randbelow(2**31) if seed == -1 else seed + tries
    return GenerationOptions(**values)


async def answers(
    state: State, model: str, talk: Talk, settings: Mapping[str, Any]
) -> AsyncGenerator[Talk, None]:
    """The talk with its answer, again and again as that grows; the last one is whole. What goes
    wrong is the answer, in plain words. Closing it frees the model's row."""
    began = time.monotonic()
    last = Said("assistant", (), f"{model} is asked…", model, "under way")
    yield talk.answer(last)
    try:
        worker = state.worker(model)
        if state.draining:
            raise UserError("the server is shutting down")
        options = options_of(settings, talk.tries)
        every = max(1, worker.model.image_tokenizer.codes_per_image // PREVIEWS)
        asked = Answering(worker, talk.document(), options, preview_every=every)
        told, note = 0.0, ""
        async with aclosing(state.timed(worker, asked)) as pieces:
            async for piece in pieces:
                shown: tuple[str | Image.Image, ...] = tuple(_joined(asked.parts[0]))
                event = piece.event
                if event.answer is not None:
                    note = event.answer.note or ""
                    continue
                if time.monotonic() - told < EVERY and event.preview is None:
                    continue
                told = time.monotonic()
                growing = ""
                if event.preview is not None and (event.progress or 0) < 1:
                    shown = (*shown, event.preview)
                    growing = f"drawing, {100 * (event.progress or 0):.0f} %"
                last = Said("assistant", shown, growing, model, "under way")
                yield talk.answer(last)
        seconds, tokens = time.monotonic() - began, asked.generated_tokens
        line = f"{model}, seed {options.seed}, {tokens} tokens in {seconds:.1f} s"
        whole = tuple(_joined(asked.parts[0]))
        if not whole:
            note = note or "the model ended its answer without a word"
        yield talk.answer(Said("assistant", whole, f"{line}; {note}" if note else line, model))
    except Exception as error:
        _, body = error_body(error)
        reason = body["error"]["message"]
        yield talk.answer(Said("assistant", last.parts, f"Not answered: {reason}", model, "failed"))


def _joined(parts: list[Any]) -> list[str | Image.Image]:
    """Neighbouring pieces of text as one."""
    found: list[str | Image.Image] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found
