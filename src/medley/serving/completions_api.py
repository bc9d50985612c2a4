"""`POST /v1/completions`: the raw continuation of a prompt, without the form of a conversation.

The model continues the prompt itself: no end-of-turn token follows it. Without a mode, only text is
generated.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from medley.generation import GenerationOptions
from medley.generation.config import Mode
from medley.inference.token_logprobs import TokenLogprob, token_logprobs
from medley.serving.chat_api import note_about
from medley.serving.image_text import to_markdown
from medley.serving.json_body import JsonRoute, free_body
from medley.serving.limits import Limits, RequestError
from medley.serving.neutral_values import COMPLETIONS, left_out
from medley.serving.response_message import (
    JSON_OR_EVENTS,
    encode_event,
    event_response,
    note_of,
    to_content_part,
    to_message,
)
from medley.serving.response_stream import ResponseStream
from medley.serving.schema import ImagesAs, SamplingFields, StreamOptions
from medley.serving.served_names import RequestedModel, choose_mode, find_model
from medley.serving.state import ServerState, first_or_disconnect, get_state, until_disconnect
from medley.serving.text_inputs import Prompts
from medley.serving.token_text import check_ids, ids_to_text, token_text
from medley.serving.tokens_api import read_ids
from medley.serving.untrusted_inputs import RequestReader
from medley.serving.worker import EngineWorker, ModelInput, TokenIds

router = APIRouter(route_class=JsonRoute)
DEFAULT_TOKENS = 16  # OpenAI's default
MAX_LOGPROBS = 20


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`. `max_tokens: 0` with `echo` returns the prompt alone."""

    unserved = COMPLETIONS
    defaults: ClassVar = {**SamplingFields.defaults, "max_tokens": ()}

    model: str
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = DEFAULT_TOKENS
    stream_options: StreamOptions | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def check(self, mode: Mode) -> None:
        """Raises RequestError for fields that contradict each other, or the chosen mode."""
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens: 0 needs echo.", param="max_tokens")
        if self.max_tokens == 0 and self.num_choices > 1:
            raise RequestError(
                f"n: Must be 1 with max_tokens 0 (got {self.n}): all choices would be equal.",
                param="n",
            )
        if self.logprobs is not None and (self.stream or self.stop_strings):
            raise RequestError("logprobs: Unsupported with stream and with stop.", param="logprobs")
        if self.logprobs is not None and mode != "text":
            raise RequestError(f"logprobs: Only in mode text (got {mode}).", param="logprobs")

    def _max_new_tokens(self, limits: Limits) -> int:
        return max(1, super()._max_new_tokens(limits))


@dataclass
class Completion:
    """The choices of one prompt.

    Attributes:
        echo: the text of the prompt, if it is part of the choices
        prompt_ids: token ids of the prompt, with `<s>`
        ids: generated token ids of each choice; not if a stop string ended it
        ends: finish reason and note of each choice
    """

    responses: ResponseStream | None
    echo: str
    prompt_ids: tuple[int, ...]
    ids: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)


@router.post("/v1/completions", **JSON_OR_EVENTS)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    state = get_state(request)
    model = find_model(state, body.model)
    body = state.defaults.apply(body)
    mode = choose_mode(model, body, "text")
    body.check(mode)
    options = body.generation(state.limits, mode)
    completions = await _read_prompts(body, model.worker, options)
    free_body(request)
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
            "created": int(time.time()), "model": model.name, "seed": options.seed,
            **left_out()}  # fmt: skip
    images_as = body.images_as or state.defaults.images_as
    if body.stream:
        events = _stream_events(state, body, completions, head, images_as)
        first = await first_or_disconnect(request, events)
        return event_response(first, events)
    async for _ in until_disconnect(request, _run_all(state, completions)):
        pass
    choices = []
    for completion in completions:
        choices += await _choices(body, model, completion, images_as)
    for index, choice in enumerate(choices):
        choice["index"] = index
    return JSONResponse({**head, "choices": choices, "usage": _usage(completions)})


async def _read_prompts(
    body: CompletionRequest, worker: EngineWorker, options: GenerationOptions
) -> list[Completion]:
    completions = []
    prompts = body.prompt
    for number, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{number}]"
        own: ModelInput
        if isinstance(prompt, str):
            own = [RequestReader.of_worker(worker).text(prompt, where)] if prompt else []
        else:
            own = check_ids(prompt, where, worker)
        ids: tuple[int, ...] = ()
        if body.echo or body.logprobs is not None:
            ids = await read_ids(worker, own)
            own = TokenIds(ids)  # so that the response does not encode the prompt again
        echo = ids_to_text(ids, worker.model.text_tokenizer) if body.echo else ""
        responses = None
        if body.max_tokens:
            responses = ResponseStream(
                worker, own, options, body.num_choices, body.stop_strings, raw_prompt=True
            )
        completions.append(Completion(responses, echo, ids))
    return completions


async def _run_all(
    state: ServerState, completions: Sequence[Completion]
) -> AsyncGenerator[None, None]:
    """Runs all prompts at once. Yields nothing: the results are in the completions."""
    tasks = [asyncio.ensure_future(_run(state, completion)) for completion in completions]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    yield


async def _run(state: ServerState, completion: Completion) -> None:
    responses = completion.responses
    if responses is None:
        completion.ends[0] = {"finish_reason": "length"}
        return
    async with aclosing(state.instrument(responses.worker, responses)) as chunks:
        async for chunk in chunks:
            if chunk.event.response is not None:
                completion.ids[chunk.index] = chunk.event.response.ids
            if chunk.finish_reason:
                end = {"finish_reason": chunk.finish_reason, **note_about(chunk)}
                completion.ends[chunk.index] = end


async def _choices(
    body: CompletionRequest, model: RequestedModel, completion: Completion, images_as: ImagesAs
) -> list[dict[str, Any]]:
    choices = []
    for index, end in sorted(completion.ends.items()):
        parts = completion.responses.parts[index] if completion.responses is not None else []
        message = to_message(parts, images_as)
        choice = {"text": completion.echo + message["content"], "logprobs": None, **end}
        choice |= {name: message[name] for name in ("images", "parts") if name in message}
        if body.logprobs is not None:
            generated = completion.ids.get(index, [])
            choice["logprobs"] = await _logprobs(body, model.worker, completion, generated)
        choices.append(choice)
    return choices


async def _logprobs(
    body: CompletionRequest, worker: EngineWorker, completion: Completion, generated: list[int]
) -> dict[str, Any]:
    """OpenAI's log probabilities of the generated tokens, with `echo` also of the prompt's.

    The first token of all follows `<s>` alone; OpenAI has null for it, which evaluations skip.
    """
    ids, top = (*completion.prompt_ids, *generated), body.logprobs or 0
    if len(ids) > worker.model.engine.max_seq_len:
        raise RequestError(
            f"prompt: Too long for log probabilities (got {len(ids)} tokens, limit "
            f"{worker.model.engine.max_seq_len}).",
            param="prompt",
        )
    future = worker.call(lambda model: token_logprobs(model.engine, ids, top))
    rows = await asyncio.wait_for(asyncio.wrap_future(future), worker.limits.request_timeout)
    first = 0 if body.echo else len(completion.prompt_ids) - 1
    return _to_json(rows[first:], worker, has_start=body.echo)


def _to_json(rows: Sequence[TokenLogprob], worker: EngineWorker, has_start: bool) -> dict[str, Any]:
    tokenizer = worker.model.text_tokenizer
    tokens = [token_text(row.token, tokenizer) for row in rows]
    offsets, end = [], 0
    for text in tokens:
        offsets.append(end)
        end += len(text)
    values: list[float | None] = [row.logprob for row in rows]
    tops: list[dict[str, float] | None] = []
    for row in rows:
        best: dict[str, float] = {}
        for token, value in row.top:  # Two tokens may have the same text: the first is more likely.
            best.setdefault(token_text(token, tokenizer), value)
        tops.append(best)
    if has_start and rows:
        values[0] = tops[0] = None
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops,
            "text_offset": offsets}  # fmt: skip


def _usage(completions: Sequence[Completion]) -> dict[str, int]:
    streams = [completion.responses for completion in completions]
    prompt = sum(
        len(completion.prompt_ids) if stream is None else stream.prompt_tokens
        for completion, stream in zip(completions, streams, strict=True)
    )
    generated = sum(stream.generated_tokens for stream in streams if stream is not None)
    return {
        "prompt_tokens": prompt, "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }  # fmt: skip


async def _stream_events(
    state: ServerState,
    body: CompletionRequest,
    completions: Sequence[Completion],
    head: dict[str, Any],
    images_as: ImagesAs,
) -> AsyncGenerator[str, None]:
    """The server-sent events of all prompts, one prompt after the other."""

    def event(index: int, text: str, reason: str | None = None, **more: Any) -> str:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": None, **more}
        return encode_event({**head, "choices": [choice]})

    for number, completion in enumerate(completions):
        first, responses = number * body.num_choices, completion.responses
        if responses is None:
            yield event(first, completion.echo)
            yield event(first, "", "length")
            continue
        echoes = range(first, first + body.num_choices if completion.echo else first)
        async with aclosing(state.instrument(responses.worker, responses)) as chunks:
            async for chunk in chunks:
                # Not before the first chunk: a full queue still gives its status until then.
                for index in echoes:
                    yield event(index, completion.echo)
                echoes = range(0)
                new, index = chunk.event, first + chunk.index
                if new.text:
                    yield event(index, new.text)
                elif new.image is not None and images_as == "markdown":
                    yield event(index, to_markdown(new.image))
                elif new.image is not None:
                    yield event(index, "", images=[to_content_part(new.image)])
                if chunk.finish_reason:
                    note = note_of(responses.parts[chunk.index]) if images_as == "images" else ""
                    yield event(index, note, chunk.finish_reason, **note_about(chunk))
    if body.stream_options is not None and body.stream_options.include_usage:
        yield encode_event({**head, "choices": [], "usage": _usage(completions)})
    yield "data: [DONE]\n\n"
