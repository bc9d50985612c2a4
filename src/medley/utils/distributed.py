"""The ranks that torchrun starts: who this one is, and how they wait for each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

Value = TypeVar("Value")
PATIENCE = timedelta(days=7)  # a rank with slow pictures must not make the others give up


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_rank() -> bool:
    return rank() == 0


@contextmanager
def all_ranks() -> Iterator[None]:
    """Joins the ranks, so that the last step knows that all have ended."""
    import torch.distributed as dist  # here: programs that need no torch ask for ranks, too

    if world_size() > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
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
    """What `work` gives on rank 0, for every rank.

    Where it raises, the other ranks leave without a word: the error is told once.
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
    worked, value = box[0]
    if not worked:
        raise SystemExit(2)
    return value  # type: ignore[return-value]  # a tuple's second half, of the kind of its first
