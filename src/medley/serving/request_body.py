"""Bodies of requests: limits of size and time, and a limit of the memory for all of them."""

from __future__ import annotations

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from medley.serving.limits import Limits, RequestError, ServerBusyError

_KEY = "medley.body"  # of the body in the scope of its request


class BodyMemory:
    """Counts the bytes of all bodies in memory. Used only in the event loop's thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def check(self, size: int) -> None:
        """Raises ServerBusyError if there is no memory for `size` more bytes."""
        if self.used + size > self.limit:
            raise ServerBusyError(
                f"The server is receiving too many request bodies (limit {self.limit} bytes)."
            )


class LimitedBody:
    """The `receive` of one request.

    Raises HTTPException with status 413 for a body above `max_bytes`, 408 for one that is not
    complete after `limits.body_seconds`, and 503 if the bodies of all requests exceed the memory
    for them.
    """

    def __init__(
        self, scope: Scope, receive: Receive, memory: BodyMemory, limits: Limits, max_bytes: int
    ) -> None:
        self.receive, self.memory, self.limits, self.max_bytes = receive, memory, limits, max_bytes
        self._deadline = time.monotonic() + limits.body_seconds
        self._size = self._reserved = 0
        self._is_complete = False
        scope[_KEY] = self

    async def __call__(self) -> Message:
        if self._is_complete:  # The application waits for the client to disconnect.
            return await self.receive()
        try:
            seconds = self._deadline - time.monotonic()
            message = await asyncio.wait_for(self.receive(), max(0.0, seconds))
        except asyncio.TimeoutError as error:
            limit = self.limits.body_seconds
            text = f"Timeout: the request body is not complete after {limit:g} s (the limit)."
            raise HTTPException(408, text) from error
        self._is_complete = not message.get("more_body", False)
        try:
            self._add(len(message.get("body", b"")))
        except RequestError as error:
            # Gradio converts other exceptions of `receive` to a status of 500.
            raise HTTPException(error.status, str(error), retry_headers(error)) from error
        return message

    def _add(self, size: int) -> None:
        self._size += size
        if self._size > self.max_bytes:
            raise body_too_large(self.max_bytes)
        self.memory.check(size)
        self.memory.used += size
        self._reserved += size

    def release(self) -> None:
        """Returns the memory; called when the body is no longer referenced."""
        self.memory.used -= self._reserved
        self._reserved = 0


def body_too_large(limit: int) -> RequestError:
    return RequestError(f"The request body is too large (limit {limit} bytes).", 413)


def retry_headers(error: Exception) -> dict[str, str]:
    """The Retry-After header of an error that has one."""
    seconds = getattr(error, "retry_after", None)
    return {} if seconds is None else {"Retry-After": str(seconds)}


async def read_body(receive: Receive) -> bytearray:
    """The whole body of a request. Raises ClientDisconnect, and what `receive` raises."""
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        data += message.get("body", b"")
        if not message.get("more_body", False):
            return data


def release_memory(scope: Scope) -> None:
    """Returns the memory of a request's body before the request ends."""
    body = scope.get(_KEY)
    if isinstance(body, LimitedBody):
        body.release()
