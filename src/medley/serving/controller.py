"""LLaVA's controller: workers register, clients ask it which one to use, or through it.

It talks only to workers on hosts that its owner named (this machine unless told otherwise): an
address in a request is no reason to open a connection.
"""

from __future__ import annotations

import asyncio
import random
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from medley.serving.app import RequestMiddleware
from medley.serving.limits import RequestError
from medley.serving.llava_api import message
from medley.serving.state import State, error_body
from medley.serving.untrusted_inputs import shown

EXPIRES = 30.0  # seconds without a heart beat, after which a worker is forgotten
ASKS = 5.0  # seconds that a worker has to tell its status
NO_WORKER, NOT_REACHED = 2, 3
LOCAL = frozenset(("127.0.0.1", "localhost", "::1"))
Dispatch = Literal["shortest_queue", "lottery"]


class WorkerStatus(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_names: list[str]
    speed: float = Field(1.0, gt=0)
    queue_length: int = Field(0, ge=0)


@dataclass
class RegisteredWorker:
    """A worker: what it told, and when it was heard last."""

    status: WorkerStatus
    check: bool
    heard: float


class Controller:
    """Workers by their addresses. `ask` gives a worker's status, or None where it is not there."""

    def __init__(
        self,
        ask: Callable[[str], Any],
        dispatch: Dispatch = "shortest_queue",
        hosts: frozenset[str] = LOCAL,
        seed: int | None = None,
    ) -> None:
        self.ask, self.dispatch, self.hosts = ask, dispatch, hosts
        self.workers: dict[str, RegisteredWorker] = {}
        self._choose = random.Random(seed)

    async def register(self, name: str, check: bool, status: WorkerStatus | None) -> bool:
        """Raises RequestError for a worker on a host that was not named."""
        if not self._takes(name):
            raise RequestError(
                f"{shown(name)}: not on one of this controller's hosts "
                f"({', '.join(sorted(self.hosts))}), or more than scheme://host:port; "
                "--worker_hosts names others",
                403,
            )
        if status is None:
            status = await self.ask(name)
        if status is None:
            return False
        self.workers[name] = RegisteredWorker(status, check, time.monotonic())
        return True

    def _takes(self, name: str) -> bool:
        """A worker's own address and nothing behind it: we send there what we are sent."""
        try:
            parts = urllib.parse.urlsplit(name)
            port = parts.port
        except ValueError:
            return False
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        plain = f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")
        known = parts.scheme in ("http", "https") and parts.hostname in self.hosts
        return known and name.lower() == plain.lower()

    async def refresh(self) -> None:
        """Asks every worker anew; those that do not answer are forgotten. Until all have answered,
        or not, the others are there."""
        names = list(self.workers)
        for name, status in zip(
            names, await asyncio.gather(*(self.ask(n) for n in names)), strict=True
        ):
            known = self.workers.get(name)
            if known is None:
                continue
            if status is None:
                del self.workers[name]
            else:
                self.workers[name] = RegisteredWorker(status, known.check, time.monotonic())

    def forget_silent(self, now: float) -> None:
        self.workers = {
            name: known for name, known in self.workers.items()
            if not known.check or now - known.heard <= EXPIRES
        }  # fmt: skip

    def models(self) -> list[str]:
        lists = [known.status.model_names for known in self.workers.values()]
        return sorted({name for names in lists for name in names})

    def heart_beat(self, name: str, queue_length: int) -> bool:
        known = self.workers.get(name)
        if known is None:
            return False
        known.status.queue_length, known.heard = queue_length, time.monotonic()
        return True

    def address(self, model: str) -> str:
        """A worker that has the model, or nothing; it is taken to have one request more."""
        fitting = {n: k for n, k in self.workers.items() if model in k.status.model_names}
        if not fitting:
            return ""
        if self.dispatch == "lottery":
            speeds = [known.status.speed for known in fitting.values()]
            return self._choose.choices(list(fitting), speeds)[0]
        load = {n: k.status.queue_length / k.status.speed for n, k in fitting.items()}
        name = min(load, key=load.__getitem__)
        fitting[name].status.queue_length += 1
        return name

    async def status(self) -> WorkerStatus:
        """Of all workers that answer, as one."""
        asked = await asyncio.gather(*(self.ask(name) for name in self.workers))
        found = [status for status in asked if status is not None]
        return WorkerStatus.model_construct(
            model_names=sorted({name for status in found for name in status.model_names}),
            speed=sum(status.speed for status in found),
            queue_length=sum(status.queue_length for status in found),
        )


# --- the application --------------------------------------------------------------------------


class Registration(BaseModel):
    worker_name: str
    check_heart_beat: bool
    worker_status: WorkerStatus | None = None


class HeartBeat(BaseModel):
    worker_name: str
    queue_length: int = Field(ge=0)


class ModelRequest(BaseModel):
    model: str


def make_controller_app(
    dispatch: Dispatch = "shortest_queue",
    hosts: frozenset[str] = LOCAL,
    client: httpx.AsyncClient | None = None,
    state: State | None = None,
) -> FastAPI:
    """The controller as an application; `client` talks to the workers. `state` has the token that
    it asks for, and sends to the workers, and the largest body."""
    limits = httpx.Limits(max_connections=None)  # streams must not keep questions waiting
    own = client or httpx.AsyncClient(timeout=None, follow_redirects=False, limits=limits)
    headers = {"Authorization": f"Bearer {state.token}"} if state and state.token else {}

    async def ask(name: str) -> WorkerStatus | None:
        try:
            found = await own.post(f"{name}/worker_get_status", timeout=ASKS, headers=headers)
            return WorkerStatus.model_validate(found.json()) if found.status_code == 200 else None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return None

    controller = Controller(ask, dispatch, hosts)

    async def watch() -> None:
        while True:
            await asyncio.sleep(EXPIRES / 2)
            controller.forget_silent(time.monotonic())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch())
        yield
        watching.cancel()
        await own.aclose()

    app = FastAPI(title="Medley controller", lifespan=lifespan, docs_url=None, redoc_url=None)
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
        return {"address": controller.address(body.model)}

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(body: HeartBeat) -> dict[str, bool]:
        return {"exist": controller.heart_beat(body.worker_name, body.queue_length)}

    @app.post("/worker_get_status")
    async def worker_get_status() -> Response:
        return JSONResponse((await controller.status()).model_dump())

    @app.post("/worker_generate_stream", response_model=None)
    async def worker_generate_stream(request: Request) -> Response:
        try:
            data = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        return StreamingResponse(_through(controller, own, data, headers),
                                 media_type="application/octet-stream")  # fmt: skip

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        status, body = error_body(error)
        return JSONResponse(body, status)

    @app.exception_handler(RequestValidationError)
    async def bad(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return await refused(request, RequestError(f"{place}: {first['msg']}", 400, place))

    if state is not None:
        app.add_middleware(RequestMiddleware, state=state)
    return app


async def _through(
    controller: Controller, client: httpx.AsyncClient, data: bytes, headers: dict[str, str]
) -> AsyncIterator[bytes]:
    """A request given on to a worker, and its answer back. One error, and then no more."""
    try:
        wanted = ModelRequest.model_validate_json(data).model
    except ValueError:
        yield message("not a request of this protocol: it names no model", NO_WORKER)
        return
    address = controller.address(wanted)
    if not address:
        known = ", ".join(controller.models()) or "none"
        yield message(f"no worker has the model {shown(wanted)}; there is {known}", NO_WORKER)
        return
    try:
        async with client.stream(
            "POST", f"{address}/worker_generate_stream", content=data,
            headers=headers | {"Content-Type": "application/json"},
            timeout=httpx.Timeout(None, connect=ASKS),
        ) as answer:  # fmt: skip
            if answer.status_code != 200:  # it drains, or wants another token
                yield message(f"the worker {address} says {answer.status_code}", NOT_REACHED)
                return
            async for piece in answer.aiter_bytes():
                yield piece
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield message(f"the worker {address} is not reached ({error})", NOT_REACHED)
