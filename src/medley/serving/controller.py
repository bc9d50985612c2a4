"""LLaVA's controller: workers register with it; clients ask it for a worker, or send requests
through it.

The controller connects only to workers on hosts that its operator allowed (by default, this
machine). A URL in a request never makes it connect to another host.
"""

from __future__ import annotations

import asyncio
import random
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from medley.serving.app import RequestMiddleware
from medley.serving.error_responses import add_error_handlers
from medley.serving.json_body import JsonRoute, parse_json
from medley.serving.limits import Limits, RequestError
from medley.serving.llava_api import encode_message
from medley.serving.state import ServerState
from medley.serving.untrusted_inputs import repr_short

EXPIRATION_SECONDS = 30.0  # A worker without a heartbeat for so long is removed.
STATUS_TIMEOUT = 5.0  # seconds
NO_WORKER, UNREACHABLE = 2, 3  # LLaVA's error codes
LOCAL_HOSTS = frozenset(("127.0.0.1", "localhost", "::1"))
DispatchMethod = Literal["shortest_queue", "lottery"]


class WorkerStatus(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_names: list[str]
    speed: float = Field(1.0, gt=0)
    queue_length: int = Field(0, ge=0)


StatusRequest = Callable[[str], Awaitable[WorkerStatus | None]]


@dataclass
class RegisteredWorker:
    """A worker's last status; `check_heartbeat` is False for one that never expires."""

    status: WorkerStatus
    check_heartbeat: bool
    last_heartbeat: float  # time.monotonic()


class Controller:
    """Registered workers by URL.

    `request_status` returns the status of a worker, or None if it does not respond.
    """

    def __init__(
        self,
        request_status: StatusRequest,
        dispatch_method: DispatchMethod = "shortest_queue",
        hosts: frozenset[str] = LOCAL_HOSTS,
        seed: int | None = None,
    ) -> None:
        self.request_status, self.dispatch_method = request_status, dispatch_method
        self.hosts = hosts
        self.workers: dict[str, RegisteredWorker] = {}
        self._random = random.Random(seed)

    async def register(self, url: str, check_heartbeat: bool, status: WorkerStatus | None) -> bool:
        """Adds a worker. Returns False if it does not respond to a status request.

        Raises RequestError for a worker on a host that is not allowed.
        """
        if not self._is_allowed(url):
            raise RequestError(
                f"worker_name: Not scheme://host:port of an allowed host (got {repr_short(url)}, "
                f"allowed hosts: {', '.join(sorted(self.hosts))}). --worker_hosts allows others.",
                403,
            )
        if status is None:
            status = await self.request_status(url)
        if status is None:
            return False
        self.workers[url] = RegisteredWorker(status, check_heartbeat, time.monotonic())
        return True

    def _is_allowed(self, url: str) -> bool:
        """Whether a URL is `scheme://host:port` of an allowed host, without anything else.

        The controller forwards requests to the URL, so it must not have a path or credentials.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError:
            return False
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        plain = f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")
        is_allowed = parts.scheme in ("http", "https") and parts.hostname in self.hosts
        return is_allowed and url.lower() == plain.lower()

    async def refresh(self) -> None:
        """Requests the status of all workers, then removes those that did not respond."""
        urls = list(self.workers)
        statuses = await asyncio.gather(*(self.request_status(url) for url in urls))
        for url, status in zip(urls, statuses, strict=True):
            worker = self.workers.get(url)
            if worker is None:
                continue
            if status is None:
                del self.workers[url]
            else:
                self.workers[url] = RegisteredWorker(
                    status, worker.check_heartbeat, time.monotonic()
                )

    def remove_expired(self, now: float) -> None:
        """Removes workers whose last heartbeat is too old."""
        self.workers = {
            url: worker for url, worker in self.workers.items()
            if not worker.check_heartbeat or now - worker.last_heartbeat <= EXPIRATION_SECONDS
        }  # fmt: skip

    def models(self) -> list[str]:
        """Models of all workers."""
        return sorted({name for w in self.workers.values() for name in w.status.model_names})

    def record_heartbeat(self, url: str, queue_length: int) -> bool:
        """Returns False for a worker that is not registered."""
        worker = self.workers.get(url)
        if worker is None:
            return False
        worker.status.queue_length, worker.last_heartbeat = queue_length, time.monotonic()
        return True

    def choose_worker(self, model: str) -> str:
        """The URL of a worker with the model, or "".

        With `shortest_queue`, the worker's queue is counted as one request longer.
        """
        candidates = {u: w for u, w in self.workers.items() if model in w.status.model_names}
        if not candidates:
            return ""
        if self.dispatch_method == "lottery":
            speeds = [worker.status.speed for worker in candidates.values()]
            return self._random.choices(list(candidates), speeds)[0]
        load = {u: w.status.queue_length / w.status.speed for u, w in candidates.items()}
        url = min(load, key=load.__getitem__)
        candidates[url].status.queue_length += 1
        return url

    async def total_status(self) -> WorkerStatus:
        """One status for all workers that respond."""
        statuses = await asyncio.gather(*(self.request_status(url) for url in self.workers))
        received = [status for status in statuses if status is not None]
        return WorkerStatus.model_construct(
            model_names=sorted({name for status in received for name in status.model_names}),
            speed=sum(status.speed for status in received),
            queue_length=sum(status.queue_length for status in received),
        )


# --- the application --------------------------------------------------------------------------


class Registration(BaseModel):
    worker_name: str
    check_heart_beat: bool
    worker_status: WorkerStatus | None = None


class Heartbeat(BaseModel):
    worker_name: str
    queue_length: int = Field(ge=0)


class ModelRequest(BaseModel):
    model: str


def make_controller_app(
    dispatch_method: DispatchMethod = "shortest_queue",
    hosts: frozenset[str] = LOCAL_HOSTS,
    client: httpx.AsyncClient | None = None,
    state: ServerState | None = None,
) -> FastAPI:
    """The controller's application.

    `client` connects to the workers. `state` has the limits of request bodies, and the token that
    clients send to the controller and the controller to the workers.
    """
    state = state or ServerState({}, Limits(), None)
    body_limits = state.limits
    # Without a limit: open streams must not delay status requests.
    limits = httpx.Limits(max_connections=None)
    http = client or httpx.AsyncClient(timeout=None, follow_redirects=False, limits=limits)
    headers = {"Authorization": f"Bearer {state.token}"} if state.token else {}

    async def request_status(url: str) -> WorkerStatus | None:
        try:
            response = await http.post(
                f"{url}/worker_get_status", timeout=STATUS_TIMEOUT, headers=headers
            )
            if response.status_code != 200:
                return None
            return WorkerStatus.model_validate(response.json())
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return None

    controller = Controller(request_status, dispatch_method, hosts)

    async def remove_expired_workers() -> None:
        while True:
            await asyncio.sleep(EXPIRATION_SECONDS / 2)
            controller.remove_expired(time.monotonic())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        removal = asyncio.create_task(remove_expired_workers())
        yield
        removal.cancel()
        await http.aclose()

    app = FastAPI(title="Medley controller", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    app.state.medley = state
    app.state.controller = controller

    @app.post("/register_worker")
    async def register_worker(body: Registration) -> None:
        await controller.register(body.worker_name, body.check_heart_beat, body.worker_status)

    @app.post("/refresh_all_workers")
    async def refresh_all_workers() -> None:
        await controller.refresh()

    @app.post("/list_models")
    async def list_models() -> dict[str, Any]:
        return {"models": controller.models()}

    @app.post("/get_worker_address")
    async def get_worker_address(body: ModelRequest) -> dict[str, str]:
        return {"address": controller.choose_worker(body.model)}

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(body: Heartbeat) -> dict[str, bool]:
        return {"exist": controller.record_heartbeat(body.worker_name, body.queue_length)}

    @app.post("/worker_get_status")
    async def worker_get_status() -> Response:
        return JSONResponse((await controller.total_status()).model_dump())

    @app.post("/worker_generate_stream", response_model=None)
    async def worker_generate_stream(request: Request) -> Response:
        try:
            data = bytes(await request.body())  # httpx would iterate over a bytearray.
        except ClientDisconnect:
            return Response(status_code=499)
        return StreamingResponse(
            _forward(controller, http, data, headers, body_limits),
            media_type="application/octet-stream",
        )

    add_error_handlers(app)
    app.add_middleware(RequestMiddleware, state=state)
    return app


async def _forward(
    controller: Controller,
    client: httpx.AsyncClient,
    data: bytes,
    headers: dict[str, str],
    limits: Limits,
) -> AsyncIterator[bytes]:
    """Forwards a request to a worker, and yields its response, or one error message."""
    try:
        model = ModelRequest.model_validate(await parse_json(data, limits)).model
    except RequestError as error:
        yield encode_message(str(error), NO_WORKER)
        return
    except ValueError:
        yield encode_message("Invalid request: it has no model.", NO_WORKER)
        return
    url = controller.choose_worker(model)
    if not url:
        available = ", ".join(controller.models()) or "none"
        yield encode_message(
            f"No worker has the model {repr_short(model)} (available: {available}).", NO_WORKER
        )
        return
    try:
        async with client.stream(
            "POST", f"{url}/worker_generate_stream", content=data,
            headers=headers | {"Content-Type": "application/json"},
            timeout=httpx.Timeout(None, connect=STATUS_TIMEOUT),
        ) as response:  # fmt: skip
            if response.status_code != 200:  # The worker drains, or needs another token.
                yield encode_message(
                    f"Worker {url} returned status {response.status_code}.", UNREACHABLE
                )
                return
            async for data in response.aiter_bytes():
                yield data
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield encode_message(f"Worker {url} cannot be reached ({error}).", UNREACHABLE)
