"""`medley serve`: models behind OpenAI's and LLaVA's protocols, or LLaVA's controller.

medley serve --ckpt CKPT [NAME=CKPT ...] [--adapter NAME=DIR ...] [--ui] [--port 8000]
medley serve --controller --port 21001
medley serve --probe http://127.0.0.1:8000
"""

from __future__ import annotations

import logging
import os
import urllib.parse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from medley.commands.model_options import ModelOptions
from medley.errors import UserError
from medley.generation.config import Mode
from medley.generation.engine import MAX_NUM_SEQS
from medley.generation.speculation import check_speculation
from medley.inference.memory import (
    GPU_MEMORY_UTILIZATION,
    cache_summary,
    check_cache_limits,
    limit_caches,
)
from medley.inference.model import Model
from medley.modeling.quantization import Quantize
from medley.serving.limits import Limits
from medley.serving.served_models import ServedModel, load_models, parse_models
from medley.utils.cli_options import Alias
from medley.utils.extras import require_extra

if TYPE_CHECKING:
    from medley.serving.state import ServerState

TOKEN_ENV = "MEDLEY_TOKEN"
_ALL_INTERFACES = ("0.0.0.0", "::")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serves models over HTTP.

    Args:
        ckpt: checkpoints, each PATH or NAME=PATH
        adapter: adapters of the first checkpoint, each NAME=DIR; each is a model of its own
        vqgan: folder of a VQGAN with a decoder, for checkpoints without one
        device: auto, cpu, cuda or mps
        dtype: auto, float32, bfloat16 or float16
        quantize: quantize the weights of the layers to 8 or 4 bits (bitsandbytes)
        host: address to listen at; 0.0.0.0 for all interfaces
        port: port to listen at; 0 for any free port
        token_env: environment variable with the bearer token; without it, no authentication
        max_num_seqs: maximum number of running requests of a model
        chunked_prefill_size: maximum prompt tokens that are read between two decode steps, so that
            long prompts do not hold up other requests; default 128 on a CPU, 512 on a GPU
        kv_cache_gb: gigabytes for keys and values of all models; default a share of the free memory
        gpu_memory_utilization: that share of the memory that is free after loading
        speculate: image codes that one pass draws at most (the images stay the same); auto measures
            what saves time, off draws one
        default_mode: mode of requests that do not ask for images: text, image or any
        images_as: form of images in responses, images (a field beside the text) or markdown
        defaults: defaults of requests, NAME=VALUE[,NAME=VALUE ...], for example
            repetition_penalty=1,temperature=0
        lenient: leave out unknown fields and unsupported values of requests, and cut max_tokens to
            the limit, instead of rejecting them; the response and the log name them
        strict_image_size: reject image sizes that the model cannot generate, instead of generating
            its own size
        max_queue: maximum number of waiting requests of a model
        request_timeout: maximum seconds of a request
        body_timeout: maximum seconds to receive the body of a request
        max_tokens: maximum tokens of a response
        max_body_mb: maximum megabytes of a request body
        max_pixels: maximum pixels of an image
        max_images_per_request: maximum number of images of a request
        allowed_image_hosts: hosts that images of a request may be fetched from; default none
        allowed_origins: origins whose pages may use the API from a browser (CORS), for example
            http://localhost:5173; * for all pages; default none
        register: URL of a LLaVA controller to register with
        public_url: URL of this server for the controller
        controller: run a LLaVA controller instead of models
        dispatch_method: how the controller chooses a worker, shortest_queue or lottery
        worker_hosts: allowed hosts of the controller's workers; default this machine
        drain_seconds: seconds for running requests to finish when the server is stopped
        probe: URL of a running server to test
        ui: also serve a web UI at /
        max_upload_mb: maximum megabytes that a session uploads to the web UI within an hour
        max_ui_mb: maximum megabytes of all files of the web UI
        feedback_dir: folder for feedback from the web UI, with conversations; default none
        examples: documents file (JSON Lines) whose questions the web UI offers as examples
    """

    ckpt: list[str] | None = None
    adapter: list[str] | None = None
    vqgan: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantize | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token_env: str = TOKEN_ENV
    max_num_seqs: int = MAX_NUM_SEQS
    chunked_prefill_size: int | None = None
    kv_cache_gb: float | None = None
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    speculate: Literal["auto", "off"] | int = "auto"
    default_mode: Mode | None = None
    images_as: Literal["images", "markdown"] | None = None
    defaults: list[str] | None = None
    lenient: bool = False
    strict_image_size: bool = False
    max_queue: int = Limits.max_queue
    request_timeout: float = Limits.request_timeout
    body_timeout: float = Limits.body_timeout
    max_tokens: int = Limits.max_tokens
    max_body_mb: int = Limits.max_body_bytes >> 20
    max_pixels: int = Limits.max_pixels
    max_images_per_request: int = Limits.max_images
    allowed_image_hosts: list[str] | None = None
    allowed_origins: list[str] | None = None
    register: str | None = None
    public_url: str | None = None
    controller: bool = False
    dispatch_method: Literal["shortest_queue", "lottery"] = "shortest_queue"
    worker_hosts: list[str] | None = None
    drain_seconds: int = 30
    probe: str | None = None
    ui: bool = False
    max_upload_mb: int = Limits.session_upload_bytes >> 20
    max_ui_mb: int = Limits.ui_bytes >> 20
    feedback_dir: Path | None = None
    examples: Path | None = None

    aliases: ClassVar = {
        "token_variable": Alias("token_env"),
        "rows": Alias("max_num_seqs"),
        "max_seconds": Alias("request_timeout"),
        "max_body": Alias("max_body_mb"),
        "max_pictures": Alias("max_images_per_request"),  # alias
        "image_hosts": Alias("allowed_image_hosts"),
        "own_address": Alias("public_url"),
        "dispatch": Alias("dispatch_method"),
        "check": Alias("probe"),
        "page": Alias("ui"),
        "votes": Alias("feedback_dir"),
    }

    def __post_init__(self) -> None:
        if (self.ckpt is not None) + self.controller + (self.probe is not None) != 1:
            raise UserError("Give exactly one of --ckpt, --controller and --probe.")
        minimum = {"max_num_seqs": 1, "max_queue": 0, "max_tokens": 1, "max_body_mb": 1,
                   "max_pixels": 1, "max_images_per_request": 0, "port": 0, "max_upload_mb": 1,
                   "max_ui_mb": 1, "drain_seconds": 0}  # fmt: skip
        for name, limit in minimum.items():
            if getattr(self, name) < limit:
                raise UserError(f"--{name} must be at least {limit} (got {getattr(self, name)}).")
        for name in ("request_timeout", "body_timeout"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be positive (got {getattr(self, name)}).")
        check_cache_limits(self.kv_cache_gb, self.gpu_memory_utilization)
        check_speculation(self.speculate, has_images=self.default_mode != "text")
        if self.chunked_prefill_size is not None and self.chunked_prefill_size < 1:
            raise UserError(
                f"--chunked_prefill_size must be at least 1 (got {self.chunked_prefill_size})."
            )
        is_ambiguous = self.port == 0 or self.host in _ALL_INTERFACES
        if self.register is not None and self.public_url is None and is_ambiguous:
            raise UserError(
                f"--register with --host {self.host} --port {self.port} needs --public_url, the "
                "URL at which the controller reaches this server."
            )
        if self.allowed_origins and self.controller:
            raise UserError("--allowed_origins is for models, not for --controller. Remove it.")
        for url in (self.register, self.public_url, self.probe):
            scheme = urllib.parse.urlsplit(url or "http:").scheme
            if scheme not in ("http", "https"):
                raise UserError(f"{url}: Not an http or https URL.")

    @property
    def models(self) -> list[ServedModel]:
        """Raises UserError if two models have the same name."""
        return parse_models(self.ckpt or [], self.adapter or [])

    @property
    def limits(self) -> Limits:
        return Limits(
            max_body_bytes=self.max_body_mb << 20, max_pixels=self.max_pixels,
            max_images=self.max_images_per_request, max_queue=self.max_queue,
            request_timeout=self.request_timeout, max_tokens=self.max_tokens,
            body_timeout=self.body_timeout, session_upload_bytes=self.max_upload_mb << 20,
            ui_bytes=self.max_ui_mb << 20,
            image_hosts=frozenset(self.allowed_image_hosts or ()),
        )  # fmt: skip

    @property
    def token(self) -> str | None:
        return os.environ.get(self.token_env) or None

    def load_checkpoint(self, ckpt: str) -> Model:
        # In mode "text", a VQGAN without a decoder is accepted; requests for images are rejected.
        options = ModelOptions(
            ckpt=ckpt, vqgan=self.vqgan, device=self.device, dtype=self.dtype,
            quantize=self.quantize, mode="text",
        )  # fmt: skip
        return options.load(self.max_num_seqs)


def serve(options: ServeOptions) -> None:
    require_serving_extras(options)
    if options.probe is not None:
        from medley.serving.probe import probe

        probe(options.probe, options.token)
        return
    from medley.serving.server import run_server
    from medley.serving.state import ServerState

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if options.controller:
        from medley.serving.controller import LOCAL_HOSTS, make_controller_app

        state = ServerState({}, options.limits, options.token)
        hosts = frozenset(options.worker_hosts or LOCAL_HOSTS)
        app = make_controller_app(options.dispatch_method, hosts, state=state)
    else:
        from medley.serving.app import make_app
        from medley.serving.cors import parse_origins

        origins = parse_origins(options.allowed_origins or [])  # before the models are loaded
        examples = []
        if options.ui:
            from medley.serving.ui.examples import read_examples

            examples = read_examples(options.examples) if options.examples is not None else []
        state = load_state(options)
        app = make_app(state, origins)
        if options.ui:
            from medley.serving.ui.mount import mount_ui

            mount_ui(app, state, options.feedback_dir, examples)
        if options.register is not None:
            from medley.serving.worker_heartbeat import register_on_startup

            own_url = options.public_url or f"http://{options.host}:{options.port}"
            register_on_startup(app, state, options.register, own_url)
    if state.token is None and options.host not in _LOOPBACK:
        print(
            f"Warning: no authentication. Anyone who can reach {options.host} can use this server. "
            f"Set {options.token_env} to require a bearer token."
        )
    if state.token is None and "*" in (options.allowed_origins or ()):
        print(
            "Warning: no authentication, and --allowed_origins *. Every page in a browser that can "
            f"reach this server can use it. Name the origins, or set {options.token_env}."
        )
    run_server(app, state, options.host, options.port, options.drain_seconds)


def require_serving_extras(options: ServeOptions) -> None:
    """Raises UserError if an optional package of the requested features is not installed."""
    modules = ["httpx"]
    if options.probe is None:
        modules += ["fastapi", "uvicorn", "prometheus_client"]
    for module in modules:
        require_extra(module, "serve", "medley serve")
    if options.ui:
        require_extra("gradio", "serve", "medley serve --ui")


def load_state(options: ServeOptions) -> ServerState:
    """Loads the models; the state of a server, for `medley.serving.app.make_app`."""
    from medley.serving.request_defaults import parse_defaults
    from medley.serving.state import ServerState

    defaults = parse_defaults(
        options.defaults or [],
        options.limits,
        options.default_mode,
        options.images_as,
        options.strict_image_size,
    )  # before the models are loaded
    models = load_models(options.models, options.load_checkpoint)
    limit_caches(list(models.values()), options.kv_cache_gb, options.gpu_memory_utilization)
    for name, model in models.items():
        model.engine.set_speculation(options.speculate)
        print(f"{name}: {cache_summary(model)}", flush=True)
    state = ServerState.of_models(
        models, options.limits, options.token, options.max_num_seqs, options.chunked_prefill_size
    )
    state.defaults = replace(defaults, lenient=options.lenient)
    return state
