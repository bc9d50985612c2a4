"""JSON bodies: bounded before they are parsed, and parsed outside of the event loop.

A body of 64 MB may hold 30 million values, which need gigabytes and many seconds. The parser of the
standard library holds the interpreter's lock until it has finished, so a thread alone would not
keep the event loop responsive: the number of values is limited first.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute

from medley.serving.limits import Limits, RequestError
from medley.serving.neutral_values import left_out, start_request
from medley.serving.request_body import read_body, release_memory

log = logging.getLogger("medley.serving")
MAX_VALUES = 100_000  # values of a body: parsed in tens of milliseconds
MAX_DEPTH = 64  # nested arrays and objects
_CHUNK = 1 << 20  # bytes
_OPEN, _CLOSE, _COMMA, _QUOTE = b"[{", b"]}", b",", b'"'


async def parse_json(data: bytes | bytearray, limits: Limits) -> Any:
    """The value of a JSON body, parsed in a thread.

    Raises RequestError beyond a limit, and ValueError for invalid JSON.
    """
    return await asyncio.to_thread(_parse, data, limits)


def _parse(data: bytes | bytearray, limits: Limits) -> Any:
    check_structure(data)
    value = json.loads(str(data, "utf-8-sig"))  # UTF-16 would evade `check_structure`.
    _check_messages(value, limits)
    return value


def check_structure(data: bytes | bytearray) -> None:
    """Raises RequestError for too many values or nested values. Does not validate the JSON."""
    opened = sum(map(data.count, (b"[", b"{")))
    if opened <= MAX_DEPTH and opened + data.count(_COMMA) < MAX_VALUES:
        return  # Even if all of these characters are outside of strings.
    values, depth = _measure(data)
    if values > MAX_VALUES:
        raise RequestError(
            f"The request body has too many JSON values (got at least {values}, limit "
            f"{MAX_VALUES})."
        )
    if depth > MAX_DEPTH:
        raise RequestError(
            f"The request body is nested too deeply (got {depth} levels, limit {MAX_DEPTH})."
        )


def _measure(data: bytes | bytearray) -> tuple[int, int]:
    """Number of values and depth of a JSON text, as far as the limits hold.

    An empty array counts as two values. The numbers of invalid JSON have no meaning.
    """
    values, level, depth, in_string, rest = 1, 0, 0, False, b""
    for start in range(0, len(data), _CHUNK):
        # Without escaped characters, each quote begins or ends a string.
        piece = (rest + data[start : start + _CHUNK]).replace(rb"\\", b"")
        rest = piece[-1:] if piece.endswith(b"\\") else b""
        piece = piece[: len(piece) - len(rest)].replace(rb"\"", b"")
        characters = np.frombuffer(piece, np.uint8)
        quotes = characters == ord(_QUOTE)
        outside = ~np.logical_xor.accumulate(quotes) ^ in_string
        in_string ^= bool(quotes.sum() % 2)
        symbols = characters[outside]
        opens, closes = np.isin(symbols, list(_OPEN)), np.isin(symbols, list(_CLOSE))
        values += int(opens.sum()) + int((symbols == ord(_COMMA)).sum())
        levels = level + np.cumsum(opens.astype(np.int64) - closes)
        if len(levels):
            level, depth = int(levels[-1]), max(depth, int(levels.max()))
        if values > MAX_VALUES or depth > MAX_DEPTH:
            break
    return values, depth


def _check_messages(value: Any, limits: Limits) -> None:
    """Raises RequestError if a request has too many messages or content parts."""
    for field in ("messages", "input"):
        rows = value.get(field) if isinstance(value, dict) else None
        if isinstance(rows, list):
            _check_counts([row for row in rows if isinstance(row, dict)], field, limits)


def _check_counts(messages: list[dict[str, Any]], field: str, limits: Limits) -> None:
    parts = sum(
        len(member)
        for message in messages
        for member in message.values() if isinstance(member, list)
    )  # fmt: skip
    for name, count, limit in (
        ("messages", len(messages), limits.max_messages),
        ("content parts", parts, limits.max_parts),
    ):
        if count > limit:
            raise RequestError(
                f"{field}: Too many {name} (got {count}, limit {limit}).", param=field
            )


class JsonRequest(Request):
    """A request whose JSON body is bounded, parsed in a thread, and freed on request."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            # A bytearray, so that `json` can free the bytes while FastAPI still refers to them.
            self._body = await read_body(self.receive)  # type: ignore[assignment]
            self._stream_consumed = True
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            data, state = await self.body(), self.app.state.medley
            assert isinstance(data, bytearray)
            async with state.decode_slots:
                self._json = await parse_json(data, state.limits)
            data.clear()
        return self._json

    def free_body(self) -> None:
        """Frees the parsed body, whose images are large, and returns its memory."""
        if isinstance(getattr(self, "_json", None), dict):
            self._json.clear()
        release_memory(self.scope)


class JsonRoute(APIRoute):
    """A route whose request is a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            start_request(request.app.state.medley.defaults.lenient)
            response = await handler(JsonRequest(request.scope, request.receive))
            if notes := left_out():
                log.info("%s: left out: %s", request.url.path, "; ".join(notes["left_out"]))
            return response

        return handle


def free_body(request: Request) -> None:
    """Frees the parsed body of a request before it waits in a queue."""
    if isinstance(request, JsonRequest):
        request.free_body()
