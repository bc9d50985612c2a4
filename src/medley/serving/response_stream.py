"""Responses as streams of chunks: from the worker's thread to the event loop of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from PIL import Image

from medley.generation import GenerationOptions, Request
from medley.inference.response import StreamEvent
from medley.serving.limits import RequestError
from medley.serving.stop_strings import StopStringFilter
from medley.serving.worker import EngineWorker, EventCallback, GenerationJob, ModelInput

T = TypeVar("T")
EventQueue = asyncio.Queue[tuple[int, StreamEvent | Exception]]
ResponsePart = str | Image.Image


def join_texts(parts: Sequence[str | T]) -> list[str | T]:
    """Parts with one text for each run of texts: a stream has a piece for each token."""
    joined: list[str | T] = []
    for is_text, run in groupby(parts, lambda part: isinstance(part, str)):
        own = list(run)
        joined += ["".join(map(str, own))] if is_text else own
    return joined


def _callback(events: EventQueue, index: int) -> EventCallback:
    """A function that puts a job's events into a queue of this loop, from any thread.

    The callback captures only the queue. Capturing the job would create a reference cycle that
    keeps its images alive.
    """
    loop = asyncio.get_running_loop()

    def put(event: StreamEvent | Exception) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return put


@dataclass(frozen=True)
class Chunk:
    """An event of response number `index`; the last one has a `finish_reason`."""

    index: int
    event: StreamEvent
    finish_reason: str | None = None


class ResponseStream:
    """`count` responses to one prompt, each a job of a worker.

    `parts` are the text and the images of each response, as far as they were yielded.
    """

    def __init__(
        self,
        worker: EngineWorker,
        prompt: ModelInput,
        options: GenerationOptions,
        count: int = 1,
        stop_strings: Sequence[str] = (),
        preview_every: int = 0,
        raw_prompt: bool = False,
    ) -> None:
        self.worker, self.options, self.raw_prompt = worker, options, raw_prompt
        self._prompt: ModelInput | None = prompt  # None once it was read: images are large
        self.prompt_tokens = 0
        self._filters = [StopStringFilter(stop_strings) for _ in range(count)]
        self._events: EventQueue = asyncio.Queue()
        self._deadline = time.monotonic() + worker.limits.request_timeout
        self.jobs = [
            GenerationJob(_callback(self._events, index), preview_every, self._deadline)
            for index in range(count)
        ]
        self.parts: list[list[ResponsePart]] = [[] for _ in range(count)]

    @property
    def generated_tokens(self) -> int:
        return sum(job.generated_tokens for job in self.jobs)

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Submits the jobs and yields the chunks of all responses.

        Raises QueueFullError before the first chunk, and later the error of a failed job. Closing
        the generator cancels the jobs.
        """
        unfinished = len(self.jobs)
        try:
            await self._submit()
            while unfinished:
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                for chunk in self._to_chunks(index, event):
                    unfinished -= chunk.finish_reason is not None
                    yield chunk
        finally:
            for job in self.jobs:
                if not job.done:
                    self.worker.cancel(job)

    async def _submit(self) -> None:
        """Reads the prompt in another thread, then queues the jobs."""
        places = len(self.jobs)
        self.worker.enter(places)
        try:
            ids = await self._read_prompt()
            self.prompt_tokens = len(ids)
            for index, job in enumerate(self.jobs):
                job.request = Request(ids, self.options, index)
                places -= 1
                self.worker.submit(job)
        finally:
            self.worker.leave(places)

    async def _read_prompt(self) -> tuple[int, ...]:
        assert self._prompt is not None
        future = self.worker.read_prompt(self._prompt, self.options, self.raw_prompt)
        reading = asyncio.wrap_future(future)
        self._prompt = None
        try:
            return await asyncio.wait_for(reading, self._deadline - time.monotonic())
        except asyncio.TimeoutError as error:
            seconds = self.worker.limits.request_timeout
            raise RequestError(
                f"Timeout: not finished after {seconds:.0f} s (the limit).", 408
            ) from error
        except asyncio.CancelledError:
            self.worker.check_alive()  # a worker that stops cancels what it has not read
            raise

    def _to_chunks(self, index: int, event: StreamEvent) -> list[Chunk]:
        stop, job = self._filters[index], self.jobs[index]
        if stop.found:
            return []  # The job generated this event before it was cancelled.
        chunks: list[Chunk] = []
        if event.text is not None:
            chunks += self._text_chunks(index, stop(event.text))
            if stop.found:
                self.worker.cancel(job)
                chunks.append(Chunk(index, StreamEvent(), "stop"))
            return chunks
        if event.image is not None or event.response is not None:
            chunks += self._text_chunks(index, stop.flush())
        if event.image is not None:
            self.parts[index].append(event.image)
            self.worker.remember_image(event.image, event.codes)
        if event.response is not None:
            reason = "length" if event.response.finish_reason == "length" else "stop"
            return [*chunks, Chunk(index, event, reason)]
        return [*chunks, Chunk(index, event)]

    def _text_chunks(self, index: int, text: str) -> list[Chunk]:
        if not text:
            return []
        self.parts[index].append(text)
        return [Chunk(index, StreamEvent(text=text))]
