"""What a server lets a request be, and the errors that say so."""

from __future__ import annotations

from dataclasses import dataclass

from medley.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bytes of a body, pixels and number of pictures, requests that wait, seconds and tokens of
    one, answers to one; `hosts` (`name` or `name:port`) are those whose pictures may be fetched."""

    body: int = 64 << 20
    pixels: int = 50_000_000
    pictures: int = 32
    queue: int = 256
    seconds: float = 600.0
    tokens: int = 4096
    answers: int = 8
    hosts: frozenset[str] = frozenset()


class RequestError(UserError):
    """A request that is not served: its status, and the field that is at fault."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class QueueFullError(RequestError):
    """Too many wait; `retry_after` says in how many seconds there may be room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"{waiting} requests are waiting, which is the limit; come again in {retry_after} s",
            429,
        )
        self.retry_after = retry_after
