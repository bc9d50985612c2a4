"""The FastAPI application: routes, authentication, body limit, timeouts and error responses."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medley.serving import llava_api, openai_api
from medley.serving.cors import ApiCORSMiddleware
from medley.serving.error_responses import (
    NO_RETRY,
    add_error_handlers,
    on_error,
    openai_error,
)
from medley.serving.limits import TRANSFER_SECONDS, RequestError
from medley.serving.metrics import CONTENT_TYPE
from medley.serving.request_body import LimitedBody, body_too_large, retry_headers
from medley.serving.schema import ErrorBody
from medley.serving.state import ServerState
from medley.serving.unknown_urls import add_hints, shown_path
from medley.version import __version__

log = logging.getLogger("medley.serving")
API_PREFIXES = ("/v1/", "/worker_", "/metrics", "/openapi.json", "/tokenize", "/detokenize")
PUBLIC_PATHS = ("/health",)  # no token: load balancers request it
UPLOAD_PATH = "/gradio_api/upload"
MAX_UI_BODY = 4 << 20  # bytes of any other request of the web UI


def make_app(state: ServerState, allowed_origins: Collection[str] = ()) -> FastAPI:
    """The application. Its lifespan starts and stops the threads of the models.

    Pages of `allowed_origins` may use the API from a browser; `*` allows all pages.
    """

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
    # Other paths of the API and other methods: without this route they would reach the web UI.
    app.router.routes.append(Route("/v1/{path:path}", openai_api.router, include_in_schema=False))
    add_hints(app)
    add_error_handlers(app)
    timeout = state.limits.request_timeout + TRANSFER_SECONDS
    app.add_middleware(RequestMiddleware, state=state, timeout=timeout)
    if allowed_origins:  # Outermost: errors need the headers, and preflight requests no token.
        app.add_middleware(ApiCORSMiddleware, allow_origins=allowed_origins)
    return app


async def health(request: Request) -> Response:
    """Status 200; 503 while the server drains, or if a model's engine is dead or keeps failing."""
    state: ServerState = request.app.state.medley
    status = "draining" if state.draining else "ok"
    for problem, names in (("failing", state.failing_models()), ("dead", state.stopped_models())):
        if names and not state.draining:
            status = f"{problem}: {', '.join(names)}"
    models = {name: {"running": worker.running, "waiting": worker.waiting}
              for name, worker in state.workers.items()}  # fmt: skip
    body = {"status": status, "models": models, "version": __version__, "instance": state.instance}
    return JSONResponse(body, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    return Response(request.app.state.medley.metrics.render(), media_type=CONTENT_TYPE)


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
                code, body = openai_error(rejection)
                headers = {"WWW-Authenticate": "Bearer"} if code == 401 else {}
                headers |= retry_headers(rejection)
                await JSONResponse(body, code, headers)(scope, receive, send_with_id)
            else:
                is_api = scope["method"] == "POST" and scope["path"].startswith(API_PREFIXES)
                memory, limits = self.state.body_memory, self.state.limits
                limited = LimitedBody(
                    scope, receive, memory, limits, self._max_bytes(scope["path"])
                )
                self.state.in_flight += is_api
                try:
                    response = self.app(scope, limited, send_with_id)
                    await asyncio.wait_for(response, self.timeout if is_api else None)
                finally:
                    self.state.in_flight -= is_api
                    limited.release()
        except asyncio.TimeoutError:
            if status:
                raise  # The response has begun; only closing the connection can end it.
            error = RequestError(f"Timeout: not finished after {self.timeout:.0f} s.", 408)
            await JSONResponse(openai_error(error)[1], 408, NO_RETRY)(scope, receive, send_with_id)
        except Exception as error:
            if status:
                raise
            # Here, and not outside of all middleware, so that browsers get CORS headers, too.
            await (await on_error(Request(scope), error))(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self.state.metrics.requests.labels(path, str(status)).inc()
            seconds = time.monotonic() - start
            # Health checks and the web UI's files are requested all the time.
            is_notable = status >= 400 or path.startswith(API_PREFIXES)
            level = logging.INFO if is_notable else logging.DEBUG
            shown = shown_path(scope["path"]) if status == 404 else path
            log.log(
                level, "%s %s %s %d %.3f s", request_id, scope["method"], shown, status, seconds
            )

    def _check(self, scope: Scope) -> RequestError | None:
        """The reason to reject a request before its body is read."""
        headers = {key.lower(): value for key, value in scope["headers"]}
        path = scope["path"]
        is_api = path.startswith(API_PREFIXES)
        # The web UI has its own login.
        needs_token = is_api if self.state.has_ui else path not in PUBLIC_PATHS
        if self.state.token is not None and needs_token:
            scheme, _, token = headers.get(b"authorization", b"").strip().partition(b" ")
            is_valid = hmac.compare_digest(token.strip(), self.state.token.encode())
            if scheme.lower() != b"bearer" or not is_valid:
                return RequestError(
                    "Missing or invalid bearer token. Send the header Authorization: Bearer TOKEN.",
                    401,
                )
        # The web UI may still send events, for example to stop a response.
        if self.state.draining and is_api and scope["method"] == "POST":
            return RequestError("The server is shutting down. Use another server.", 503)
        length = headers.get(b"content-length", b"0")
        size, max_bytes = int(length) if length.isdigit() else 0, self._max_bytes(path)
        if size > max_bytes:
            return body_too_large(max_bytes)
        try:
            self.state.body_memory.check(size)
        except RequestError as error:
            return error
        return None

    def _max_bytes(self, path: str) -> int:
        """Bytes of a body."""
        has_images = path.startswith(API_PREFIXES) or path == UPLOAD_PATH or not self.state.has_ui
        limit = self.state.limits.max_body_bytes
        return limit if has_images else min(limit, MAX_UI_BODY)
