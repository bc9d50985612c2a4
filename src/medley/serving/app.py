"""The application: routes, who may ask, how much, and what is said of errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from medley.serving import llava_api, openai_api
from medley.serving.limits import QueueFullError, RequestError
from medley.serving.metrics import CONTENT_TYPE
from medley.serving.schema import ErrorBody
from medley.serving.state import State, error_body
from medley.version import __version__

log = logging.getLogger("medley.serving")
GRACE = 30.0  # seconds that a client has beside what the model takes, to send and to read
ONCE = {"x-should-retry": "false"}  # OpenAI's client would ask again for the whole work
PROTOCOLS = ("/v1/", "/worker_", "/metrics", "/openapi.json")
OPEN = ("/health",)  # without a token: what a load balancer asks
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def make_app(state: State) -> FastAPI:
    """The application of some models. Their threads begin and end with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for worker in state.workers.values():
            worker.start()
        yield
        state.draining = True
        # In another thread: what runs is told its end through this loop.
        await asyncio.gather(*(asyncio.to_thread(w.stop) for w in state.workers.values()))

    app = FastAPI(
        title="Medley", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )  # fmt: skip
    app.state.medley = state
    app.include_router(openai_api.router)
    app.include_router(llava_api.router)
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response)
    for kind, handler in (
        (RequestError, on_error), (RequestValidationError, on_bad_request),
        (HTTPException, on_http), (Exception, on_error),
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]  # narrower than Exception
    app.add_middleware(RequestMiddleware, state=state, seconds=state.limits.seconds + GRACE)
    return app


async def health(request: Request) -> Response:
    """Whether requests are taken: 503 while it drains, and where a model's thread has died."""
    state: State = request.app.state.medley
    dead = [name for name, worker in state.workers.items() if not worker.alive]
    status = "draining" if state.draining else f"dead: {', '.join(dead)}" if dead else "ok"
    rows = {name: {"running": worker.running, "waiting": worker.waiting}
            for name, worker in state.workers.items()}  # fmt: skip
    body = {"status": status, "models": rows, "version": __version__, "instance": state.instance}
    return JSONResponse(body, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    return Response(request.app.state.medley.metrics.text(), media_type=CONTENT_TYPE)


# --- errors -----------------------------------------------------------------------------------


async def on_error(request: Request, error: Exception) -> Response:
    status, body = error_body(error)
    if status >= 500 and not isinstance(error, RequestError):
        log.error("%s %s", request.method, request.url.path, exc_info=error)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFullError) else {}
    return JSONResponse(body, status, headers | (ONCE if status == 408 else {}))


async def on_bad_request(request: Request, error: RequestValidationError) -> Response:
    """The first thing that is wrong, with its place; never the value, which may be a picture."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return await on_error(request, RequestError(f"{place}: {first['msg']}", 400, place))


async def on_http(request: Request, error: HTTPException) -> Response:
    answer = await on_error(request, RequestError(str(error.detail), error.status_code))
    answer.headers.update(error.headers or {})  # of 405, what is allowed
    return answer


# --- the gate ---------------------------------------------------------------------------------


class RequestMiddleware:
    """Before every request: a token where one is wanted, a body within its limit, no new work
    while the server drains; after it a line for the log, without what was asked or said. A request
    that takes longer than it may ends, whatever it waits for."""

    def __init__(self, app: Any, state: State, seconds: float | None = None) -> None:
        self.app, self.state = app, state
        self.seconds = seconds  # of a whole request, the client's part of it too

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, name = time.monotonic(), 0, secrets.token_hex(6)

        async def telling(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            refused = self._refused(scope)
            if refused is not None:
                code, body = error_body(refused)
                headers = {"WWW-Authenticate": "Bearer"} if code == 401 else None
                await JSONResponse(body, code, headers)(scope, receive, telling)
            else:
                protocol = scope["method"] == "POST" and scope["path"].startswith(PROTOCOLS)
                self.state.asked += protocol
                try:
                    working = self.app(scope, self._counted(receive), telling)
                    await asyncio.wait_for(working, self.seconds if protocol else None)
                finally:
                    self.state.asked -= protocol
        except asyncio.TimeoutError:
            if status:
                raise  # the connection is cut: its answer cannot be taken back
            late = RequestError(f"not done after {self.seconds:.0f} s, which is the limit", 408)
            await JSONResponse(error_body(late)[1], 408, ONCE)(scope, receive, telling)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self.state.metrics.requests.labels(path, str(status)).inc()
            took = time.monotonic() - start
            # Balancers ask for health, and browsers for the page's files, all the time.
            level = logging.INFO if status >= 400 or path.startswith(PROTOCOLS) else logging.DEBUG
            log.log(level, "%s %s %s %d %.3f s", name, scope["method"], path, status, took)

    def _refused(self, scope: MutableMapping[str, Any]) -> RequestError | None:
        headers = {key.lower(): value for key, value in scope["headers"]}
        path = scope["path"]
        # The page has a login of its own.
        asked = path.startswith(PROTOCOLS) if self.state.page else path not in OPEN
        if self.state.token is not None and asked:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
            if not hmac.compare_digest(given, self.state.token.encode()):
                return RequestError("a bearer token is needed, and this is not it", 401)
        # What the page's browsers send to end something is taken to the end.
        new = scope["method"] == "POST" and path.startswith(PROTOCOLS)
        if self.state.draining and new:
            return RequestError("the server is shutting down: ask another one", 503)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.state.limits.body:
            return self._too_large()
        return None

    def _too_large(self) -> RequestError:
        return RequestError(f"the body is larger than {self.state.limits.body} bytes", 413)

    def _counted(self, receive: Receive) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.state.limits.body:
                refused = self._too_large()  # of a kind that FastAPI lets through
                raise HTTPException(refused.status, str(refused))
            return message

        return counted
