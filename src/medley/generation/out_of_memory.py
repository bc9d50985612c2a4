"""Errors of a device or a host without free memory."""

from __future__ import annotations

import gc

import torch

_CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError for the CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)


def release_unused_memory(device: torch.device) -> None:
    """Returns cached blocks to the device. Call it after the exception was handled.

    Until then, the traceback keeps the tensors of the failed pass alive.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
