"""The ranks of a torchrun job: their numbers, and how they wait for each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

Value = TypeVar("Value")
TIMEOUT = timedelta(days=7)  # A rank with slow images must not abort the others.


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


@contextmanager
def process_group() -> Iterator[None]:
    """Connects the ranks of a torchrun job by gloo; does nothing in a single process."""
    import torch.distributed as dist  # here: programs without torch use this module as well

    if world_size() > 1:
        dist.init_process_group("gloo", timeout=TIMEOUT)
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
