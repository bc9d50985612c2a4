"""Limits of the server, and the errors of requests that it rejects."""

from __future__ import annotations

from dataclasses import dataclass

from medley.errors import UserError
from medley.generation import GenerationOptions


@dataclass(frozen=True)
class Limits:
    """Limits of a request and of a model's queue.

    Attributes:
        max_body_bytes: bytes of a request body, or of a fetched image file
        max_pixels: pixels of an image, checked before it is decoded
        max_images: images of a request
        max_queue: waiting requests of a model
        request_timeout: seconds of a request, including its time in the queue
        max_tokens: tokens of a response
        max_choices: responses to a request (`n`)
        image_hosts: `name` or `name:port` of the hosts that images may be fetched from
    """

    max_body_bytes: int = 64 << 20
    max_pixels: int = 50_000_000
    max_images: int = 32
    max_queue: int = 256
    request_timeout: float = 600.0
    max_tokens: int = GenerationOptions.max_new_tokens
    max_choices: int = 8
    image_hosts: frozenset[str] = frozenset()


class RequestError(UserError):
    """A request is rejected. `status` is the HTTP status, `param` the invalid field."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class QueueFullError(RequestError):
    """Too many requests wait; `retry_after` is the expected number of seconds until one ends."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"The queue is full ({waiting} waiting requests). Retry in {retry_after} s.", 429
        )
        self.retry_after = retry_after
