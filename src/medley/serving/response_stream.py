"""From a worker's thread to a client: events of one or several answers, as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from medley.data.document import Document
from medley.generation import GenerationOptions
from medley.inference.model import Prompt, StreamEvent
from medley.serving.stop_strings import StopWords
from medley.serving.worker import EngineWorker, GenerationJob, Tell

Events = asyncio.Queue[tuple[int, StreamEvent | Exception]]


def _teller(events: Events, index: int) -> Tell:
    """Puts a job's events into a queue of this loop, from any thread. It knows the queue alone:
    what held more would be garbage in a circle, with the job's pictures in it."""
    loop = asyncio.get_running_loop()

    def tell(event: StreamEvent | Exception) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return tell


@dataclass(frozen=True)
class Chunk:
    """An event of answer number `index`; `finish_reason` with its last one."""

    index: int
    event: StreamEvent
    finish_reason: str | None = None


class ResponseStream:
    """Jobs for `count` answers to one prompt. Leaving the block frees their rows."""

    def __init__(
        self,
        worker: EngineWorker,
        prompt: Prompt | Document,
        options: GenerationOptions,
        count: int = 1,
        stops: Sequence[str] = (),
        preview_every: int = 0,
    ) -> None:
        self.worker, self.stops = worker, [StopWords(stops) for _ in range(count)]
        self._events: Events = asyncio.Queue()
        until = time.monotonic() + worker.limits.seconds
        self.jobs = [
            GenerationJob(
                prompt, options, _teller(self._events, index), index, preview_every, until=until
            )
            for index in range(count)
        ]
        self.parts: list[list[Any]] = [[] for _ in range(count)]  # str and pictures, as told

    @property
    def prompt_tokens(self) -> int:
        return self.jobs[0].prompt_tokens

    @property
    def generated_tokens(self) -> int:
        return sum(job.generated for job in self.jobs)

    async def pieces(self) -> AsyncGenerator[Chunk, None]:
        """Events of all answers; raises what a job failed with. Busy comes before anything."""
        left = len(self.jobs)
        try:
            for job in self.jobs:
                self.worker.submit(job)
            while left:
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                for piece in self._told(index, event):
                    left -= piece.finish_reason is not None
                    yield piece
        finally:
            for job in self.jobs:
                if not job.over:
                    self.worker.cancel(job)

    def _told(self, index: int, event: StreamEvent) -> list[Chunk]:
        stop, job = self.stops[index], self.jobs[index]
        if stop.found:
            return []  # what the row had done before it was freed
        found: list[Chunk] = []
        if event.text is not None:
            found += self._text(index, stop(event.text))
            if stop.found:
                self.worker.cancel(job)
                found.append(Chunk(index, StreamEvent(), "stop"))
            return found
        if event.image is not None or event.answer is not None:
            found += self._text(index, stop.rest())
        if event.image is not None:
            self.parts[index].append(event.image)
        if event.answer is not None:
            reason = "length" if event.answer.finish_reason == "length" else "stop"
            return [*found, Chunk(index, event, reason)]
        return [*found, Chunk(index, event)]

    def _text(self, index: int, text: str) -> list[Chunk]:
        if not text:
            return []
        self.parts[index].append(text)
        return [Chunk(index, StreamEvent(text=text))]
