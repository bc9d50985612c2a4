"""What the server's requests share: models by name, limits, counters, and how errors are said."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request

from medley.errors import UserError
from medley.serving.limits import Limits, QueueFullError, RequestError
from medley.serving.metrics import Metrics
from medley.serving.response_stream import Chunk, ResponseStream
from medley.serving.worker import EngineWorker

Result = TypeVar("Result")
Item = TypeVar("Item")
_END: Any = object()
READERS = 4  # requests whose pictures are unpacked at once: each may take gigabytes
LONGEST = 1000  # characters of a message: a request's own words come back in some


class State:
    """Of one server. `draining` says that it takes no more requests."""

    def __init__(
        self, workers: Mapping[str, EngineWorker], limits: Limits, token: str | None
    ) -> None:
        self.workers, self.limits, self.token = dict(workers), limits, token
        self.metrics = Metrics(self.workers)
        self.draining = False
        self.page = False  # whether there is one
        self.asked = 0  # requests for answers that are under way
        self.closing: list[Callable[[], None]] = []  # called before connections are waited for
        self.reading = asyncio.Semaphore(READERS)
        self.instance = secrets.token_hex(6)  # another one after each start

    @property
    def idle(self) -> bool:
        at_work = any(worker.running or worker.waiting for worker in self.workers.values())
        return not (at_work or self.asked)

    def worker(self, name: str | None) -> EngineWorker:
        """Raises RequestError for a model that is not there; the first one, where none is named."""
        if name is None:
            return next(iter(self.workers.values()))
        if name not in self.workers:
            raise RequestError(
                f"no model {name!r}, there is {', '.join(self.workers)}", 404, "model"
            )
        return self.workers[name]

    async def in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.to_thread(work, *arguments)

    async def instrument(
        self, worker: EngineWorker, answers: ResponseStream
    ) -> AsyncGenerator[Chunk, None]:
        """The pieces, with what they took told to the counters."""
        start, first = time.monotonic(), True
        async with aclosing(answers.pieces()) as pieces:
            async for piece in pieces:
                if first:
                    self.metrics.first_token.labels(worker.name).observe(time.monotonic() - start)
                    first = False
                yield piece
        self.metrics.whole.labels(worker.name).observe(time.monotonic() - start)


async def until_disconnect(
    request: Request, items: AsyncGenerator[Item, None]
) -> AsyncIterator[Item]:
    """The items, as long as the client is there; else their source is closed, which frees rows."""
    gone = asyncio.ensure_future(_gone(request))
    coming: asyncio.Future[Any] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(items, _END))
            await asyncio.wait({gone, coming}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise RequestError("the client has gone", 499)
            item, coming = coming.result(), None
            if item is _END:
                return
            yield item
    finally:
        await cancelled(gone, coming)
        await items.aclose()


async def first_or_disconnect(request: Request, items: AsyncGenerator[Item, None]) -> Item:
    """The first item, with the client watched until then; whoever streams the rest watches it
    from there on."""
    gone = asyncio.ensure_future(_gone(request))
    coming = asyncio.ensure_future(anext(items))
    try:
        await asyncio.wait({gone, coming}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise RequestError("the client has gone", 499)
        return coming.result()
    except BaseException:
        await cancelled(coming)
        await items.aclose()
        raise
    finally:
        await cancelled(gone)


async def cancelled(*tasks: asyncio.Future[Any] | None) -> None:
    """Ends tasks, and waits until they have: a generator that runs cannot be closed."""
    for task in tasks:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error, in OpenAI's form."""
    status, param, kind = 500, None, "server_error"
    message = f"{type(error).__name__} inside of the server"
    if isinstance(error, RequestError):
        status, param, message = error.status, error.param, str(error)
    elif isinstance(error, UserError):
        status, message = 400, str(error)
    if status < 500:
        kind = "rate_limit_error" if isinstance(error, QueueFullError) else "invalid_request_error"
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]}…"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": None}}
