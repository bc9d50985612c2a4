"""Limits of the server, and the errors of requests that it rejects."""

from __future__ import annotations

from dataclasses import dataclass

from medley.errors import UserError
from medley.generation import GenerationOptions

TRANSFER_SECONDS = 30.0  # time for the transfer of a request and its response, beside the timeout
RETRY_SECONDS = 5  # Within that time, the bodies of some other requests have been read.


@dataclass(frozen=True)
class Limits:
    """Limits of a request and of a model's queue.

    Attributes:
        max_body_bytes: bytes of a request body, or of a fetched image file
        max_bodies: request bodies of the maximum size that fit the memory for received bodies
        max_messages: messages of a request
        max_parts: content parts of all messages of a request
        max_pixels: pixels of an image, checked before it is decoded
        max_images: images of a request
        max_queue: waiting requests of a model
        request_timeout: seconds of a request, including its time in the queue
        head_timeout: seconds from the connection, or the first byte, to the end of a request's head
        body_timeout: seconds from the end of a request's head to the end of its body
        send_timeout: seconds without progress until a client that does not read is disconnected
        max_tokens: tokens of a response
        max_choices: responses to a request (`n`)
        image_hosts: `name` or `name:port` of the hosts that images may be fetched from
        session_upload_bytes: bytes of a session's uploads to the web UI within an hour
        session_upload_files: files of a session's uploads to the web UI within an hour
        ui_bytes: bytes of all files of the web UI
        ui_files: number of all files of the web UI
    """

    max_body_bytes: int = 64 << 20
    max_bodies: int = 8
    max_messages: int = 4096
    max_parts: int = 16384
    max_pixels: int = 50_000_000
    max_images: int = 32
    max_queue: int = 256
    request_timeout: float = 600.0
    head_timeout: float = 15.0
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    max_tokens: int = GenerationOptions.max_new_tokens
    max_choices: int = 8
    image_hosts: frozenset[str] = frozenset()
    session_upload_bytes: int = 512 << 20
    session_upload_files: int = 500
    ui_bytes: int = 4 << 30
    ui_files: int = 20_000

    @property
    def body_seconds(self) -> float:
        """Seconds to receive a body: with a short `request_timeout`, less than `body_timeout`."""
        return min(self.body_timeout, self.request_timeout + TRANSFER_SECONDS)

    @property
    def received_bytes(self) -> int:
        """Bytes of all bodies in memory: received, and not yet read into a prompt."""
        return self.max_bodies * self.max_body_bytes


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


class ServerBusyError(RequestError):
    """The server has no room for a request; `retry_after` is a number of seconds."""

    def __init__(self, message: str, retry_after: int = RETRY_SECONDS) -> None:
        super().__init__(f"{message} Retry in {retry_after} s.", 503)
        self.retry_after = retry_after
