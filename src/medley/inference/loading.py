"""Loading: a checkpoint in any layout -> a Model on its device."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, get_args

import torch

from medley.checkpoints.adapter import (
    find_adapter,
    load_adapter,
    overwritten_tensors,
    resolve_base,
)
from medley.checkpoints.adapter_config import AdapterConfig
from medley.checkpoints.checkpoint import Checkpoint, is_adapter, open_checkpoint
from medley.errors import UserError
from medley.inference.model import Model
from medley.modeling.quantization import Quantize, quantize_layers
from medley.utils.distributed import local_rank, world_size
from medley.utils.manifest import check_fingerprint

AUTO_MAP = "auto_map"  # the device name that distributes the layers over several GPUs
_DEPRECATED_AUTO_MAP = "map"  # alias
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    ckpt: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    vqgan: str | Path | None = None,
    quantize: Quantize | None = None,
) -> Model:
    """Opens a checkpoint in any of the three layouts, or `tiny`, the embedded model.

    Args:
        ckpt: checkpoint folder, LoRA adapter folder, or `tiny`
        device: auto (CUDA, else MPS, else CPU; MPS is untested), a torch device, or auto_map, which
            distributes the layers over several GPUs
        dtype: auto is the checkpoint's own on an accelerator and float32 on the CPU
        adapter: LoRA adapter that is applied to `ckpt` without merging
        base: base checkpoint of a `ckpt` that is an adapter; by default the one it was trained on
        vqgan: folder of a VQGAN with a decoder
        quantize: store the layers' matrices in 4 or 8 bits

    Raises UserError for anything missing or mismatched.
    """
    checkpoint, adapter_folder = resolve(ckpt, adapter, base)
    return load_model(checkpoint, device, dtype, adapter_folder, vqgan, quantize)


def resolve(
    ckpt: str | Path, adapter: str | Path | None, base: str | Path | None
) -> tuple[Checkpoint, Path | None]:
    """The base checkpoint and the adapter to apply to it. Loads no weights."""
    path = Path(ckpt)
    if path.is_dir() and (is_adapter(path) or _contains_adapter_checkpoints(path)):
        if adapter is not None:
            raise UserError(
                f"{ckpt} is a LoRA adapter and cannot be combined with --adapter. Pass its base as "
                "--ckpt, or omit --adapter."
            )
        found = find_adapter(path)
        return resolve_base(found, base), found
    if base is not None:
        raise UserError(
            f"--base is only valid for a LoRA adapter, and {ckpt} is not one. Remove --base."
        )
    return open_checkpoint(ckpt), None if adapter is None else Path(adapter)


def _contains_adapter_checkpoints(path: Path) -> bool:
    return any(is_adapter(folder) for folder in path.glob("checkpoint-*"))


def load_model(
    checkpoint: Checkpoint,
    device: str,
    dtype: str | torch.dtype,
    adapter: str | Path | None,
    vqgan: str | Path | None,
    quantize: Quantize | None,
) -> Model:
    """`load` for a checkpoint that is resolved already."""
    if device == _DEPRECATED_AUTO_MAP:
        warnings.warn(
            f"device {device!r} is deprecated. Use {AUTO_MAP!r}.", DeprecationWarning, stacklevel=3
        )
        device = AUTO_MAP
    target = resolve_device("auto" if device == AUTO_MAP else device)
    if quantize not in (None, *get_args(Quantize)):
        raise UserError(f"quantize is {quantize!r}, expected {' or '.join(get_args(Quantize))}.")
    decoder: Any = checkpoint.decoder(resolve_dtype(dtype, target))
    if quantize is not None:
        quantize_layers(decoder, quantize, next(decoder.lm_head.parameters()).dtype)
    if adapter is not None:
        decoder = _load_checked_adapter(decoder, checkpoint, Path(adapter))
    vqgan_folder = None if vqgan is None else Path(vqgan)
    image_tokenizer = checkpoint.image_tokenizer(vqgan_folder, device=target)
    decoder = dispatch(decoder) if device == AUTO_MAP else decoder.to(target)
    return Model(decoder, checkpoint.text_tokenizer(), image_tokenizer, fuse=True)


def share_base(model: Model, checkpoint: Checkpoint, adapter: Path) -> Model:
    """A second model: an adapter on the decoder of `model`, which stays unchanged.

    Both share the base's weights and the tokenizers. The adapter needs memory for its own matrices
    and its cache only. `checkpoint` is the one that `model` was loaded from.
    """
    folder = find_adapter(adapter)
    if AdapterConfig.read(folder).changes_base or overwritten_tensors(folder):
        raise UserError(
            f"{adapter}: This adapter changes weights of its base, which other models share "
            "(init_lora_weights, bias, layer_replication, or saved embeddings). Serve it alone, "
            "or merge it first."
        )
    tensors = (*model.decoder.parameters(), *model.decoder.buffers())
    twin = copy.deepcopy(model.decoder, {id(tensor): tensor for tensor in tensors})
    decoder = _load_checked_adapter(twin, checkpoint, adapter)
    return Model(decoder, model.text_tokenizer, model.image_tokenizer, fuse=True)


def _load_checked_adapter(decoder: Any, checkpoint: Checkpoint, adapter: Path) -> Any:
    """Applies an adapter. Raises UserError if it was trained on another base."""
    folder = find_adapter(adapter)
    if (adapter / "manifest.json").is_file():
        check_fingerprint(adapter, checkpoint.fingerprint(), str(checkpoint.folder))
    return load_adapter(decoder, folder)


def dispatch(decoder: Any) -> Any:
    """Distributes the layers over all GPUs, and the remaining ones to the CPU (accelerate)."""
    from accelerate import dispatch_model, infer_auto_device_map  # slow to import

    unsplit = ["ChameleonDecoderLayer", "ChameleonSwinDecoderLayer"]
    return dispatch_model(decoder, infer_auto_device_map(decoder, no_split_module_classes=unsplit))


def resolve_device(name: str) -> torch.device:
    """`auto` or a torch device. Raises UserError for a device that is not available."""
    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(
                f"--device {name}: CUDA is not available on this machine or in this torch build. "
                "Use cpu."
            )
        if name == "mps" and not torch.backends.mps.is_available():
            raise UserError(
                "--device mps: Metal is not available on this machine or in this torch build. "
                "Use cpu."
            )
        expected = f"--device {name}: Unknown device, expected auto, cpu, cuda or mps."
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise UserError(expected)
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise UserError(expected) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def local_device(name: str) -> torch.device:
    """`resolve_device`, with one GPU for each rank of this machine."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None and world_size() > 1:
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """A name or a dtype -> dtype; None for the checkpoint's own."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: Unknown dtype, expected auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]
