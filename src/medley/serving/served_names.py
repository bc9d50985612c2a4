"""Names of models in requests: `NAME`, and `NAME:text`, `NAME:image`, `NAME:any` with a mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from medley.generation.config import Mode
from medley.serving.limits import RequestError
from medley.serving.schema import GenerationFields
from medley.serving.state import ServerState
from medley.serving.worker import EngineWorker

MODES: tuple[Mode, ...] = get_args(Mode)
_INPUTS = ["text", "image"]
_OUTPUTS = {"text": ["text"], "image": ["image"], "any": ["text", "image"]}


@dataclass(frozen=True)
class RequestedModel:
    """The model of a request: its worker, the name that the request used, and the name's mode."""

    worker: EngineWorker
    name: str
    mode: Mode | None = None


def find_model(state: ServerState, name: str | None) -> RequestedModel:
    """The model of a name; the first model for None. Raises RequestError for an unknown name."""
    base, _, suffix = (name or "").rpartition(":")
    for mode in MODES:
        if name not in state.workers and suffix == mode and base in state.workers:
            return RequestedModel(state.workers[base], f"{base}:{mode}", mode)
    worker = state.worker(name)
    return RequestedModel(worker, worker.name)


def choose_mode(model: RequestedModel, body: GenerationFields, default: Mode) -> Mode:
    """The mode of a request: its own, that of the model's name, or the default of the endpoint.

    Raises RequestError if the request contradicts the model's name.
    """
    requested = body.requested_mode
    if requested is not None and model.mode not in (None, "any", requested):
        raise RequestError(
            f"mode: Contradicts the model (got mode {requested} and model {model.name}). Use "
            f"model {model.worker.name}.",
            param="mode",
        )
    return requested or model.mode or default


def default_mode(state: ServerState, worker: EngineWorker) -> Mode:
    """The mode of requests that do not name one. A model without a decoder generates text only."""
    return state.defaults.mode if worker.model.image_tokenizer.has_decoder else "text"


# --- descriptions -----------------------------------------------------------------------------


def describe_model(state: ServerState, model: RequestedModel) -> dict[str, Any]:
    """A model as `/v1/models` describes it. `architecture` has OpenRouter's form."""
    worker, own = model.worker, model.worker.model
    mode = model.mode or default_mode(state, worker)
    has_decoder = own.image_tokenizer.has_decoder
    outputs = _OUTPUTS[model.mode or ("any" if has_decoder else "text")]
    return {
        "id": model.name, "object": "model", "created": worker.created, "owned_by": "medley",
        "root": worker.name, "mode": mode, "defaults": {**state.defaults.to_json(), "mode": mode},
        "architecture": {"input_modalities": _INPUTS, "output_modalities": outputs},
        "max_model_len": own.engine.max_seq_len, "image_size": own.image_tokenizer.size,
        "codes_per_image": own.image_tokenizer.codes_per_image,
        "generates_images": "image" in outputs,
        "context": own.engine.max_seq_len,  # alias
        "draws": "image" in outputs,  # alias
    }  # fmt: skip


def list_names(state: ServerState) -> list[RequestedModel]:
    """All names of all models: each name alone, then the names with a mode."""
    models = [RequestedModel(worker, name) for name, worker in state.workers.items()]
    for name, worker in state.workers.items():
        modes = MODES if worker.model.image_tokenizer.has_decoder else ("text",)
        models += [
            RequestedModel(worker, f"{name}:{mode}", mode)
            for mode in modes if f"{name}:{mode}" not in state.workers
        ]  # fmt: skip
    return models
