"""The FastAPI application: routes, authentication, body limit, timeouts and error responses."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medley.serving import llava_api, openai_api
from medley.serving.limits import QueueFullError, RequestError
from medley.serving.metrics import CONTENT_TYPE
from medley.serving.schema import ErrorBody
from medley.serving.state import ServerState, error_body
from medley.version import __version__

log = logging.getLogger("medley.serving")
TRANSFER_SECONDS = 30.0  # time for the transfer of a request and its response, beside the timeout
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's client would repeat a request that timed out.
API_PREFIXES = ("/v1/", "/worker_", "/metrics", "/openapi.json")
PUBLIC_PATHS = ("/health",)  # no token: load balancers request it


def make_app(state: ServerState) -> FastAPI:
    """The application. Its lifespan starts and stops the threads of the models."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for worker in state.workers.values():
            worker.start()
        yield
        state.draining = True
        # In other threads: the last events of running requests need this loop.
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
        (RequestError, on_error), (RequestValidationError, on_validation_error),
        (HTTPException, on_http_error), (Exception, on_error),
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]  # narrower than Exception
    timeout = state.limits.request_timeout + TRANSFER_SECONDS
    app.add_middleware(RequestMiddleware, state=state, timeout=timeout)
    return app


async def health(request: Request) -> Response:
    """Status 200; 503 while the server drains, or if the thread of a model has stopped."""
    state: ServerState = request.app.state.medley
    stopped = state.stopped_models()
    status = "draining" if state.draining else f"dead: {', '.join(stopped)}" if stopped else "ok"
    models = {name: {"running": worker.running, "waiting": worker.waiting}
              for name, worker in state.workers.items()}  # fmt: skip
    body = {"status": status, "models": models, "version": __version__, "instance": state.instance}
    return JSONResponse(body, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    return Response(request.app.state.medley.metrics.render(), media_type=CONTENT_TYPE)


# --- errors -----------------------------------------------------------------------------------


async def on_error(request: Request, error: Exception) -> Response:
    status, body = error_body(error)
    if status >= 500 and not isinstance(error, RequestError):
        log.error("%s %s", request.method, request.url.path, exc_info=error)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFullError) else {}
    return JSONResponse(body, status, headers | (NO_RETRY if status == 408 else {}))


async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
    return await on_error(request, validation_error(error))


def validation_error(error: RequestValidationError) -> RequestError:
    """The first error with its field, without the value, which may be an image."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return RequestError(f"{field}: {first['msg']}.", 400, field)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    response = await on_error(request, RequestError(str(error.detail), error.status_code))
    response.headers.update(error.headers or {})  # for example Allow, with status 405
    return response


# --- the middleware ---------------------------------------------------------------------------


class RequestMiddleware:
    """Checks and logs every request.

    Rejects requests without the token, with a body above the limit, and new API requests while the
    server drains. Ends an API request after `timeout` seconds. The log line contains neither the
    prompt nor the response.
    """

    def __init__(self, app: ASGIApp, state: ServerState, timeout: float | None = None) -> None:
        self.app, self.state, self.timeout = app, state, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, request_id = time.monotonic(), 0, secrets.token_hex(6)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id.encode())]
                message["headers"] = headers
            await send(message)

        try:
            rejection = self._check(scope)
            if rejection is not None:
                code, body = error_body(rejection)
                challenge = {"WWW-Authenticate": "Bearer"} if code == 401 else None
                await JSONResponse(body, code, challenge)(scope, receive, send_with_id)
            else:
                is_api = scope["method"] == "POST" and scope["path"].startswith(API_PREFIXES)
                self.state.in_flight += is_api
                try:
                    response = self.app(scope, self._limit_body(receive), send_with_id)
                    await asyncio.wait_for(response, self.timeout if is_api else None)
                finally:
                    self.state.in_flight -= is_api
        except asyncio.TimeoutError:
            if status:
                raise  # The response has begun; only closing the connection can end it.
            error = RequestError(f"Timeout: not finished after {self.timeout:.0f} s.", 408)
            await JSONResponse(error_body(error)[1], 408, NO_RETRY)(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self.state.metrics.requests.labels(path, str(status)).inc()
            seconds = time.monotonic() - start
            # Health checks and the web UI's files are requested all the time.
            is_notable = status >= 400 or path.startswith(API_PREFIXES)
            level = logging.INFO if is_notable else logging.DEBUG
            log.log(level, "%s %s %s %d %.3f s", request_id, scope["method"], path, status, seconds)

    def _check(self, scope: Scope) -> RequestError | None:
        """The reason to reject a request before its body is read."""
        headers = {key.lower(): value for key, value in scope["headers"]}
        path = scope["path"]
        is_api = path.startswith(API_PREFIXES)
        # The web UI has its own login.
        needs_token = is_api if self.state.has_ui else path not in PUBLIC_PATHS
        if self.state.token is not None and needs_token:
            token = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
            if not hmac.compare_digest(token, self.state.token.encode()):
                return RequestError("Missing or invalid bearer token.", 401)
        # The web UI may still send events, for example to stop a response.
        if self.state.draining and is_api and scope["method"] == "POST":
            return RequestError("The server is shutting down. Use another server.", 503)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.state.limits.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> RequestError:
        limit = self.state.limits.max_body_bytes
        return RequestError(f"The request body is too large (limit {limit} bytes).", 413)

    def _limit_body(self, receive: Receive) -> Receive:
        """`receive` with a check of the size, for bodies without a Content-Length."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.state.limits.max_body_bytes:
                error = self._too_large()
                # FastAPI converts other exceptions of `receive` to a status of 400.
                raise HTTPException(error.status, str(error))
            return message

        return limited
