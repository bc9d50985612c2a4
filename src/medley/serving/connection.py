"""HTTP connections with time limits that begin when a client connects.

uvicorn has a time limit only for idle connections. The limits of the application begin after the
head of a request; those of this module cover the head, the rest of a body that the application no
longer reads, and clients that do not read their response.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from medley.serving.limits import Limits

IDLE_SECONDS = 30  # Time between two requests of a connection.
CLOSE_SECONDS = 10  # At shutdown, for clients that receive the last events slowly.
SEND_BUFFER = 256 << 10  # bytes of a response in the kernel, so that it shows what a client reads
MIN_BYTES = 64 << 10  # bytes that a client must read in `send_timeout` seconds
BODY_GRACE = 5.0  # seconds after the time for a body, for the application to return status 408
REST_GRACE = 1.0  # seconds after the time for a body, for the client to read its rejection

_HEAD, _BODY, _REST = "head", "body", "rest of a body after its response"
_TIMEOUT = b"Timeout: the head of the request is incomplete."
_TIMEOUT_RESPONSE = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_TIMEOUT), _TIMEOUT)
)


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration of a server with `limits`. It has no WebSockets."""

    def __init__(self, app: FastAPI, limits: Limits, log_level: str = "warning") -> None:
        super().__init__(
            app, http=Connection, ws="none", access_log=False, log_level=log_level,
            timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=CLOSE_SECONDS,
        )  # fmt: skip
        self.limits = limits


class Connection(H11Protocol):
    """A connection that is closed if the client sends or reads too slowly."""

    def __init__(self, config: ServerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.limits = config.limits
        # What is received, and the request before it or the one that it belongs to.
        self._receiving: tuple[str, object] | None = None
        self._receive_timer: asyncio.TimerHandle | None = None
        self._body_cycle: object = None  # the request of `_body_deadline`
        self._body_deadline = 0.0
        self._send_timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # `pause_writing` is then called as soon as the client reads more slowly than we write.
        transport.set_write_buffer_limits(high=0)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._set_receive_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receive_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # --- receiving ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_receive_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_receive_timer()

    def _set_receive_timer(self) -> None:
        """Starts the timer of a head or a body at its first byte, and stops it at its last one."""
        receiving = self._find_receiving()
        if receiving == self._receiving:
            return
        if self._receive_timer is not None:
            self._receive_timer.cancel()
        self._receiving, self._receive_timer = receiving, None
        if receiving is not None:
            seconds = self._seconds_for(*receiving)
            self._receive_timer = self.loop.call_later(seconds, self._end_receiving)

    def _seconds_for(self, part: str, cycle: object) -> float:
        if part == _HEAD:
            return self.limits.head_timeout
        if self._body_cycle is not cycle:
            self._body_cycle = cycle
            self._body_deadline = self.loop.time() + self.limits.body_seconds
        grace = REST_GRACE if part == _REST else BODY_GRACE
        return max(0.0, self._body_deadline - self.loop.time()) + grace

    def _find_receiving(self) -> tuple[str, object] | None:
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            return _REST if self.cycle.response_complete else _BODY, self.cycle
        # A new connection must send a head; between two requests, uvicorn's own limit applies.
        if state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            return _HEAD, self.cycle
        return None

    def _end_receiving(self) -> None:
        if self.transport.is_closing():
            return
        is_head = self._receiving is not None and self._receiving[0] == _HEAD
        if is_head and self.conn.trailing_data[0]:
            self.transport.write(_TIMEOUT_RESPONSE)
        self.transport.close()

    # --- sending --------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_send_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def _set_send_timer(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(self.limits.send_timeout, self._check_sent)

    def _check_sent(self) -> None:
        if self._unsent - self.transport.get_write_buffer_size() < MIN_BYTES:
            self.transport.abort()  # `close` would wait until the client has read everything.
        else:
            self._set_send_timer()
