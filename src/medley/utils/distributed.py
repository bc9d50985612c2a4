"""The ranks of a torchrun job: their numbers, and how they wait for each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
# For every backend. A rank with slow images, or one that writes a checkpoint or generates samples,
# must not abort the others. torchrun ends the ranks that wait for one that failed.
TIMEOUT = timedelta(days=7)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_rank() -> bool:
    return rank() == 0


def use_own_gpu() -> None:
    """Makes the GPU of this rank torch's current one; does nothing in a single process.

    Otherwise every rank would also allocate on the first GPU.
    """
    import torch

    if world_size() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())


@contextmanager
def process_group(device: torch.device | None = None) -> Iterator[None]:
    """Connects the ranks of a torchrun job; does nothing in a single process.

    Objects and tensors on the CPU travel through gloo. With a `device` of CUDA, tensors on GPUs
    travel through NCCL, from GPU to GPU, if each rank has its own.
    """
    import torch  # here: programs without torch use this module as well
    import torch.distributed as dist

    if world_size() > 1:
        on_cuda = device is not None and device.type == "cuda"
        # NCCL refuses two ranks on one GPU.
        on_cuda = on_cuda and local_world_size() <= torch.cuda.device_count()
        if on_cuda:
            use_own_gpu()
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def from_main_rank(work: Callable[[], Value]) -> Value:
    """Runs `work` on rank 0 and returns its result on every rank.

    If it raises, the other ranks exit silently with status 2, so that the error is printed once.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return work()
    box: list[tuple[bool, Value | None]] = [(False, None)]
    try:
        if is_main_rank():
            box[0] = (True, work())
    finally:
        dist.broadcast_object_list(box, src=0)
    succeeded, value = box[0]
    if not succeeded:
        raise SystemExit(2)
    return value  # type: ignore[return-value]  # None occurs only without success
