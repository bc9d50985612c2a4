"""Where a model runs: the device and dtype that users name, and layers on several GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from medley.errors import UserError
from medley.utils.distributed import local_rank, world_size

AUTO_MAP = "auto_map"  # the device name that distributes the layers over several GPUs
_DEPRECATED_AUTO_MAP = "map"  # alias
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNSPLIT = ["ChameleonDecoderLayer", "ChameleonSwinDecoderLayer"]


def resolve_device(name: str) -> torch.device:
    """`auto` or a torch device. Raises UserError for a device that is not available."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    expected = f"--device {name}: Unknown device, expected auto, cpu, cuda or mps."
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(expected)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(expected) from error
    if device.type == "cuda":
        _check_cuda(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            f"--device {name}: Metal is not available on this machine or in this torch build. "
            "Use cpu."
        )
    return device


def _check_cuda(device: torch.device) -> None:
    """Raises UserError with the reason why this GPU cannot be used."""
    if torch.version.cuda is None and torch.version.hip is None:
        raise UserError(
            f"--device {device}: CUDA is not available: this torch ({torch.__version__}) is built "
            "without it. Install a torch with CUDA (https://pytorch.org), or use cpu."
        )
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: CUDA is not available: {_cuda_problem()} Update the driver, "
            "install a torch for its CUDA version, or use cpu."
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(
            f"--device {device}: This GPU does not exist (expected cuda:0 to cuda:{count - 1}; "
            "CUDA_VISIBLE_DEVICES limits the list)."
        )


def _cuda_problem() -> str:
    """One sentence: no driver, a driver that is too old, no GPU."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        sentence = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        return f"{sentence}."
    return "no GPU was found."


def local_device(name: str) -> torch.device:
    """`resolve_device`, with one GPU for each rank of this machine."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None and world_size() > 1:
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return device


def describe_device(device: torch.device) -> str:
    """The kind of a device, for records: results in float32 may differ between two kinds."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """A name or a dtype -> dtype; None for the checkpoint's own."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: Unknown dtype, expected auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


# --- several GPUs ---------------------------------------------------------------------------------


def replace_deprecated_map(device: str) -> str:
    """The name of a device, with a warning if it is the old name of `auto_map`."""
    if device != _DEPRECATED_AUTO_MAP:
        return device
    warnings.warn(
        f"device {device!r} is deprecated. Use {AUTO_MAP!r}.", DeprecationWarning, stacklevel=4
    )
    return AUTO_MAP


def dispatch(decoder: Any, cache_bytes: int) -> Any:
    """Distributes the layers evenly over all GPUs, and the remaining ones to the CPU (accelerate).

    `cache_bytes` of the GPUs' memory stay free for keys and values.
    """
    from accelerate import dispatch_model  # slow to import
    from accelerate.utils import get_max_memory

    return dispatch_model(decoder, balanced_map(decoder, get_max_memory(), cache_bytes))


def balanced_map(
    decoder: Any, memory: Mapping[int | str, int], cache_bytes: int
) -> dict[str, int | str]:
    """The device of each part of a decoder. `memory` has the free bytes of each GPU and the CPU.

    The keys and values of a layer lie on its GPU, so that the GPUs share `cache_bytes` evenly.
    """
    from accelerate import infer_auto_device_map  # slow to import
    from accelerate.utils import get_balanced_memory

    gpus = [device for device in memory if isinstance(device, int)]
    room = {
        device: max(0, free - cache_bytes // len(gpus)) if isinstance(device, int) else free
        for device, free in memory.items()
    }
    if len(gpus) > 1:
        room = get_balanced_memory(decoder, room, no_split_module_classes=_UNSPLIT)
    devices: dict[str, int | str] = infer_auto_device_map(
        decoder, room, no_split_module_classes=_UNSPLIT
    )
    return devices
