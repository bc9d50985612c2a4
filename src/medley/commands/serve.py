"""`medley serve`: models behind OpenAI's protocol and LLaVA's, or LLaVA's controller.

medley serve --ckpt CKPT [--ckpt NAME=OTHER] [--adapter NAME=DIR] [--port 8000]
medley serve --controller --port 21001
medley serve --check http://127.0.0.1:8000
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import time
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medley.commands.model_options import ModelOptions
from medley.errors import PartialFailure, UserError
from medley.inference.loading import resolve, share_base
from medley.inference.model import Model
from medley.modeling.quantization import Quantize

_TOKEN = "MEDLEY_TOKEN"
_ANY_HOST = ("0.0.0.0", "::")
SEEN = 1.0  # seconds that a server which was told to end still answers, if only to refuse
CLOSING = 10  # seconds that last words have to reach slow readers


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serves models.

    Args:
        ckpt: checkpoints, each PATH or NAME=PATH
        adapter: adapters, each NAME=DIR, on the first checkpoint; each is a model of its own name
        vqgan: folder of a VQGAN with a decoder, for checkpoints that carry none
        device: auto, cpu, cuda or mps
        dtype: auto, float32, bfloat16 or float16
        quantize: keep the layers' matrices in 4 or 8 bits (bitsandbytes)
        host: address to listen at; 0.0.0.0 for all
        port: port to listen at; 0 for any that is free
        token_variable: environment variable with the bearer token; without it nobody is asked
        rows: requests of a model that are worked on at once
        max_queue: requests of a model that may wait
        max_seconds: time that a request may take
        max_tokens: longest answer
        max_body: megabytes of a request
        max_pixels: pixels of a picture
        max_pictures: pictures of a request
        image_hosts: hosts from which a request may have a picture fetched; none unless named
        register: address of a LLaVA controller to register with
        own_address: this server's address as the controller is to know it
        controller: be a LLaVA controller, and no model
        dispatch: how the controller chooses, shortest_queue or lottery
        worker_hosts: hosts that a controller's workers may be on; this machine unless named
        drain_seconds: time that running requests have to end when the server is stopped
        check: address of a running server to send a test message to
        page: also serve a page at /, to talk to the models in a browser
        votes: folder to keep the page's votes in, with their talks and pictures; none unless named
        examples: documents file (JSON lines) whose questions the page offers, beside its own
    """

    ckpt: list[str] | None = None
    adapter: list[str] | None = None
    vqgan: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantize | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token_variable: str = _TOKEN
    rows: int = 32
    max_queue: int = 256
    max_seconds: float = 600.0
    max_tokens: int = 4096
    max_body: int = 64
    max_pixels: int = 50_000_000
    max_pictures: int = 32
    image_hosts: list[str] | None = None
    register: str | None = None
    own_address: str | None = None
    controller: bool = False
    dispatch: str = "shortest_queue"
    worker_hosts: list[str] | None = None
    drain_seconds: int = 30
    check: str | None = None
    page: bool = False
    votes: Path | None = None
    examples: Path | None = None

    def __post_init__(self) -> None:
        if (self.ckpt is not None) + self.controller + (self.check is not None) != 1:
            raise UserError("give one of --ckpt, --controller and --check")
        if self.dispatch not in ("shortest_queue", "lottery"):
            raise UserError(f"--dispatch is {self.dispatch!r}, expected shortest_queue or lottery")
        least = {"rows": 1, "max_queue": 0, "max_tokens": 1, "max_body": 1, "max_pixels": 1,
                 "max_pictures": 0, "port": 0, "drain_seconds": 0}  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"--{name} is {getattr(self, name)}, expected {value} or more")
        if self.max_seconds <= 0:
            raise UserError(f"--max_seconds is {self.max_seconds}, expected above 0")
        unknown = self.port == 0 or self.host in _ANY_HOST
        if self.register is not None and self.own_address is None and unknown:
            raise UserError(
                f"--register with --host {self.host} --port {self.port} needs --own_address, by "
                "which the controller reaches this server"
            )
        for address in (self.register, self.own_address, self.check):
            scheme = urllib.parse.urlsplit(address or "http:").scheme
            if scheme not in ("http", "https"):
                raise UserError(f"{address}: expected an http or https address")

    def models(self) -> dict[str, ModelOptions]:
        """Name -> how it is loaded. Raises UserError where two have one name."""
        found: dict[str, ModelOptions] = {}
        base = ModelOptions(ckpt="", vqgan=self.vqgan, device=self.device, dtype=self.dtype,
                            quantize=self.quantize)  # fmt: skip
        named: list[tuple[str, str, Path | None]] = [
            (*_named(text), None) for text in self.ckpt or []
        ]
        first = named[0][1] if named else ""
        named += [(name, first, Path(path)) for name, path in map(_named, self.adapter or [])]
        for name, path, adapter in named:
            if name in found:
                raise UserError(f"two models are called {name!r}: name one of them, NAME=PATH")
            found[name] = replace(base, ckpt=path, adapter=adapter)
        return found


def _named(text: str) -> tuple[str, str]:
    """`NAME=PATH`, or a path that is called as its last part."""
    name, equals, path = text.partition("=")
    if equals and "/" not in name:
        return name, path
    return Path(text).name or text, text


def serve(options: ServeOptions) -> None:
    if options.check is not None:
        check(options.check, os.environ.get(options.token_variable))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if options.controller:
        from medley.serving.controller import LOCAL, make_controller_app
        from medley.serving.state import State

        hosts = frozenset(options.worker_hosts or LOCAL)
        nothing = State({}, _limits(options), os.environ.get(options.token_variable) or None)
        _warn_of_strangers(nothing, options)
        _run(make_controller_app(options.dispatch, hosts, state=nothing), options, nothing)  # type: ignore[arg-type]
        return
    from medley.serving.app import make_app

    state = state_of(options)
    app = make_app(state)
    if options.page:
        from medley.serving.ui.examples import read_examples
        from medley.serving.ui.mount import add_page

        own = read_examples(options.examples) if options.examples is not None else []
        add_page(app, state, options.votes, own)
    if options.register is not None:
        _register(app, state, options)
    _warn_of_strangers(state, options)
    _run(app, options, state)


def _warn_of_strangers(state: Any, options: ServeOptions) -> None:
    if state.token is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"whoever reaches {options.host} may use this server; {options.token_variable} in the "
            "environment asks for a token"
        )


def _limits(options: ServeOptions) -> Any:
    from medley.serving.limits import Limits

    return Limits(
        body=options.max_body << 20, pixels=options.max_pixels, pictures=options.max_pictures,
        queue=options.max_queue, seconds=options.max_seconds, tokens=options.max_tokens,
        hosts=frozenset(options.image_hosts or ()),
    )  # fmt: skip


def state_of(options: ServeOptions) -> Any:
    """The models, loaded, and what is shared."""
    from medley.serving.state import State
    from medley.serving.worker import EngineWorker

    limits = _limits(options)
    # Of the whole process: each encoding switches it off for itself, and the last one on again
    # while another thread's still runs.
    torch.backends.cudnn.allow_tf32 = False
    workers = {
        name: EngineWorker(name, model, limits, options.rows)
        for name, model in load_models(options).items()
    }
    return State(workers, limits, os.environ.get(options.token_variable) or None)


def load_models(options: ServeOptions) -> dict[str, Model]:
    """By name. Adapters lie over the first checkpoint's weights, which are in memory once."""
    loaded: dict[str, Model] = {}
    for name, chosen in options.models().items():
        if chosen.adapter is None:
            # Text alone needs no VQGAN decoder; who asks for a picture is told.
            loaded[name] = replace(chosen, mode="text").load(options.rows)
            continue
        checkpoint, adapter = resolve(chosen.ckpt, chosen.adapter, None)
        assert adapter is not None
        loaded[name] = share_base(next(iter(loaded.values())), checkpoint, adapter)
    return loaded


def _register(app: Any, state: Any, options: ServeOptions) -> None:
    """Has the application keep itself registered while it runs."""
    from medley.serving.worker_heartbeat import keep_registered

    own = (options.own_address or f"http://{options.host}:{options.port}").rstrip("/")
    controller = str(options.register).rstrip("/")
    before = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(inner: Any) -> AsyncIterator[None]:
        async with before(inner):
            telling = asyncio.create_task(keep_registered(state, controller, own))
            yield
            telling.cancel()

    app.router.lifespan_context = lifespan


def _run(app: Any, options: ServeOptions, state: Any) -> None:
    """Listens until it is told to stop, then lets what runs end.

    SIGTERM: who is new is answered 503, for a second at least, so that a load balancer's look at
    /health sees it before the door is shut. Ctrl-C needs no such second, and twice ends at once.
    """
    import uvicorn

    class Server(uvicorn.Server):
        told: float | None = None
        least = 0.0

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.told is not None:
                if sig == signal.SIGINT:
                    self.force_exit = self.should_exit = True
                return
            self.told, state.draining = time.monotonic(), True
            self.least = SEEN if sig == signal.SIGTERM else 0.0

        async def on_tick(self, counter: int) -> bool:
            if self.told is not None:
                passed = time.monotonic() - self.told
                late = passed > options.drain_seconds
                self.should_exit |= passed >= self.least and (state.idle or late)
                if self.should_exit:
                    for close in state.closing:
                        close()
                if late:  # what still runs is told so, as its last word
                    await asyncio.gather(
                        *(asyncio.to_thread(worker.stop) for worker in state.workers.values())
                    )
            return await super().on_tick(counter)

    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listening = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"--host {options.host} --port {options.port}: {error.strerror}") from error
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"listening at http://{host}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", timeout_keep_alive=30,
        timeout_graceful_shutdown=CLOSING,
    )  # fmt: skip
    server = Server(config)
    asyncio.run(server.serve(sockets=[listening]))


def check(address: str, token: str | None) -> None:
    """Asks a running server for its models and a word of each. Raises DataLost where one fails."""
    import httpx

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    base = address.rstrip("/")
    try:
        with httpx.Client(base_url=base, headers=headers, timeout=120) as client:
            health = client.get("/health")
            print(f"{base}/health: {health.status_code} {health.text}")
            listed = client.get("/v1/models")
            if listed.status_code != 200:
                raise UserError(f"{base}/v1/models: {listed.status_code} {listed.text}")
            failed = []
            for row in listed.json()["data"]:
                body = {"model": row["id"], "max_tokens": 16, "mode": "text", "temperature": 0,
                        "messages": [{"role": "user", "content": "Hello"}]}  # fmt: skip
                answer = client.post("/v1/chat/completions", json=body)
                if answer.status_code == 200:
                    said = answer.json()["choices"][0]["message"]["content"]
                    print(f"{row['id']}: {json.dumps(said, ensure_ascii=False)}")
                else:
                    failed.append(f"{row['id']}: {answer.status_code} {answer.text}")
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise UserError(f"{base}: {error}") from error
    if failed or health.status_code != 200:
        raise PartialFailure("; ".join(failed) or f"{base}/health: {health.status_code}")
