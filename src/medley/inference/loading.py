"""`medley.load`: a checkpoint of any layout, ready to read, write and draw."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import torch

from medley.checkpoints.adapter import find_adapter, load_adapter, read_adapter, resolve_base
from medley.checkpoints.checkpoint import Checkpoint, is_adapter, open_checkpoint
from medley.errors import UserError
from medley.inference.model import Model
from medley.modeling.quantization import Quantize, quantize_layers
from medley.utils.distributed import local_rank, world_size
from medley.utils.manifest import check_fingerprint

AUTO_MAP = "map"  # the device that stands for several
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

    `device` auto takes CUDA, then MPS (which nobody has tried yet), then the CPU; map spreads the
    layers over several GPUs.
    `quantize` keeps the layers' matrices in 4 or 8 bits. `dtype` auto the checkpoint's own on an
    accelerator and float32 on the CPU. `adapter` is laid over it unmerged; a `ckpt` that is an
    adapter finds its base by itself, or by `base`. `vqgan` names a folder with a VQGAN that has
    a decoder. Raises UserError for anything missing or mismatched.
    """
    checkpoint, over = resolve(ckpt, adapter, base)
    return load_model(checkpoint, device, dtype, over, vqgan, quantize)


def resolve(
    ckpt: str | Path, adapter: str | Path | None, base: str | Path | None
) -> tuple[Checkpoint, Path | None]:
    """The checkpoint that is meant, and the adapter to lay over it; nothing is loaded yet."""
    path = Path(ckpt)
    if path.is_dir() and (is_adapter(path) or _holds_checkpoints(path)):
        if adapter is not None:
            raise UserError(
                f"{ckpt} is an adapter itself; give the base as --ckpt, or no --adapter"
            )
        over = find_adapter(path)
        return resolve_base(over, base), over
    if base is not None:
        raise UserError(f"--base names the base of an adapter, and {ckpt} is none")
    return open_checkpoint(ckpt), None if adapter is None else Path(adapter)


def _holds_checkpoints(path: Path) -> bool:
    return any(is_adapter(folder) for folder in path.glob("checkpoint-*"))


def load_model(
    checkpoint: Checkpoint,
    device: str,
    dtype: str | torch.dtype,
    adapter: str | Path | None,
    vqgan: str | Path | None,
    quantize: Quantize | None,
) -> Model:
    target = resolve_device("auto" if device == AUTO_MAP else device)
    chosen = resolve_dtype(dtype, target)
    if quantize not in (None, *get_args(Quantize)):
        raise UserError(f"quantize is {quantize!r}, expected {' or '.join(get_args(Quantize))}")
    decoder: Any = checkpoint.decoder(chosen)
    if quantize is not None:
        quantize_layers(decoder, quantize, next(decoder.lm_head.parameters()).dtype)
    if adapter is not None:
        decoder = _attach_checked(decoder, checkpoint, Path(adapter))
    elsewhere = None if vqgan is None else Path(vqgan)
    images = checkpoint.image_tokenizer(elsewhere, device=target)
    decoder = dispatch(decoder) if device == AUTO_MAP else decoder.to(target)
    return Model(decoder, checkpoint.text_tokenizer(), images, fuse=True)


def share_base(model: Model, checkpoint: Checkpoint, adapter: Path) -> Model:
    """A second model with an adapter over the first one's decoder, which stays as it is.

    They share the base's weights and the tokenizers: an adapter takes the memory of its own
    matrices and of its cache. `checkpoint` is what `model` was loaded from.
    """
    config, _ = read_adapter(find_adapter(adapter))
    started = config.get("init_lora_weights", True)
    if started not in (True, False, None, "gaussian") or config.get("bias", "none") != "none":
        raise UserError(
            f"{adapter}: it changes its base's own weights (init_lora_weights {started!r}, bias "
            f"{config.get('bias')!r}), which other models share; merge it first"
        )
    tensors = (*model.decoder.parameters(), *model.decoder.buffers())
    twin = copy.deepcopy(model.decoder, {id(tensor): tensor for tensor in tensors})
    decoder = _attach_checked(twin, checkpoint, adapter)
    return Model(decoder, model.tokenizer, model.image_tokenizer, fuse=True)


def _attach_checked(decoder: Any, checkpoint: Checkpoint, adapter: Path) -> Any:
    """Raises UserError for an adapter that was trained on another base."""
    folder = find_adapter(adapter)
    if (adapter / "manifest.json").is_file():
        check_fingerprint(adapter, checkpoint.fingerprint(), str(checkpoint.folder))
    return load_adapter(decoder, folder)


def dispatch(decoder: Any) -> Any:
    """Lays the layers over all GPUs, and over the CPU what they have no room for (accelerate)."""
    from accelerate import dispatch_model, infer_auto_device_map  # slow to import

    whole_layers = ["ChameleonDecoderLayer", "ChameleonSwinDecoderLayer"]
    places = infer_auto_device_map(decoder, no_split_module_classes=whole_layers)
    return dispatch_model(decoder, places)


def resolve_device(name: str) -> torch.device:
    """`auto` or a torch device. Raises UserError for one that is not there."""
    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine (or this torch) has no CUDA; use cpu")
        if name == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine (or this torch) has no Metal; use cpu")
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise UserError(f"--device {name}: expected auto, cpu, cuda or mps")
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise UserError(f"--device {name}: expected auto, cpu, cuda or mps") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def local_device(name: str) -> torch.device:
    """`resolve_device`, with a GPU of its own for each rank of this machine."""
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
        raise UserError(f"--dtype {dtype}: expected auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
