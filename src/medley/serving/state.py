"""State shared by all requests of a server: models, limits and metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import torch
from fastapi import Request

from medley.generation.engine import MAX_NUM_SEQS
from medley.inference.model import Model
from medley.serving.generated_images import GeneratedImages
from medley.serving.limits import Limits, RequestError
from medley.serving.metrics import Metrics
from medley.serving.request_body import BodyMemory
from medley.serving.request_defaults import RequestDefaults
from medley.serving.response_store import ResponseStore
from medley.serving.response_stream import Chunk, ResponseStream
from medley.serving.worker import EngineWorker

Item = TypeVar("Item")
_END: Any = object()
DECODE_SLOTS = 4  # Requests that are decoded at once; each may need gigabytes.


class ServerState:
    """State of one server process.

    Attributes:
        workers: served models by name
        token: bearer token that requests need; None for no authentication
        draining: whether new requests are rejected because the server is shutting down
        has_ui: whether the web UI is mounted
        in_flight: API requests in progress
        on_shutdown: called before the server waits for open connections
        body_memory: limits the bytes of all request bodies
        defaults: what a request means that leaves a field out
        responses: stored responses of `/v1/responses`
        decode_slots: limits the requests whose body is parsed, or images are decoded, at once
        instance: random id of the process, different after each start
    """

    def __init__(
        self, workers: Mapping[str, EngineWorker], limits: Limits, token: str | None
    ) -> None:
        self.workers, self.limits, self.token = dict(workers), limits, token
        self.metrics = Metrics(self.workers)
        self.body_memory = BodyMemory(limits.received_bytes)
        self.defaults = RequestDefaults()
        self.responses = ResponseStore()
        self.draining = False
        self.has_ui = False
        self.in_flight = 0
        self.on_shutdown: list[Callable[[], None]] = []
        self.decode_slots = asyncio.Semaphore(DECODE_SLOTS)
        self.instance = secrets.token_hex(6)

    @classmethod
    def of_models(
        cls,
        models: Mapping[str, Model],
        limits: Limits,
        token: str | None,
        max_num_seqs: int = MAX_NUM_SEQS,
        chunk_size: int | None = None,
    ) -> ServerState:
        """The state of a server of some models."""
        # The image tokenizer disables TF32 while it encodes. The setting belongs to the process:
        # of two concurrent threads, the first to end would enable it again for the other.
        torch.backends.cudnn.allow_tf32 = False
        images = GeneratedImages()
        workers = {
            name: EngineWorker(name, model, limits, max_num_seqs, chunk_size, images)
            for name, model in models.items()
        }
        return cls(workers, limits, token)

    @property
    def is_idle(self) -> bool:
        has_jobs = any(worker.running or worker.waiting for worker in self.workers.values())
        return not (has_jobs or self.in_flight)

    def stopped_models(self) -> list[str]:
        """Models whose engine thread has ended."""
        return [name for name, worker in self.workers.items() if not worker.is_alive]

    def failing_models(self) -> list[str]:
        """Models whose engine has failed repeatedly, without a complete response in between."""
        return [name for name, worker in self.workers.items() if worker.is_failing]

    def worker(self, name: str | None) -> EngineWorker:
        """The worker of a model, or of the first model. Raises RequestError if it is unknown."""
        if name is None:
            return next(iter(self.workers.values()))
        if name not in self.workers:
            raise RequestError(
                f"Unknown model {name!r} (available: {', '.join(self.workers)}).", 404, "model"
            )
        return self.workers[name]

    async def instrument(
        self, worker: EngineWorker, responses: ResponseStream
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of a stream; records their latencies in the metrics."""
        start, is_first = time.monotonic(), True
        async with aclosing(responses.chunks()) as chunks:
            async for chunk in chunks:
                if is_first:
                    seconds = time.monotonic() - start
                    self.metrics.first_token_seconds.labels(worker.name).observe(seconds)
                    is_first = False
                yield chunk
        self.metrics.request_seconds.labels(worker.name).observe(time.monotonic() - start)


def get_state(request: Request) -> ServerState:
    """The state of the server that handles a request."""
    state: ServerState = request.app.state.medley
    return state


async def until_disconnect(
    request: Request, items: AsyncGenerator[Item, None]
) -> AsyncIterator[Item]:
    """Yields the items. Closes their source, which cancels its jobs, if the client disconnects."""
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    upcoming: asyncio.Future[Any] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(items, _END))
            await asyncio.wait({disconnected, upcoming}, return_when=asyncio.FIRST_COMPLETED)
            if not upcoming.done():
                raise RequestError("The client has disconnected.", 499)
            item, upcoming = upcoming.result(), None
            if item is _END:
                return
            yield item
    finally:
        await cancel_tasks(disconnected, upcoming)
        await items.aclose()


async def first_or_disconnect(request: Request, items: AsyncGenerator[Item, None]) -> Item:
    """The first item. Closes the source and raises RequestError if the client disconnects before.

    The caller streams the other items; a streaming response detects a disconnect by itself.
    """
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    upcoming = asyncio.ensure_future(anext(items))
    try:
        await asyncio.wait({disconnected, upcoming}, return_when=asyncio.FIRST_COMPLETED)
        if not upcoming.done():
            raise RequestError("The client has disconnected.", 499)
        return upcoming.result()
    except BaseException:
        await cancel_tasks(upcoming)
        await items.aclose()
        raise
    finally:
        await cancel_tasks(disconnected)


async def cancel_tasks(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancels tasks and waits for their end: a running generator cannot be closed."""
    for task in tasks:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
