"""Exact float32: a block in which no matrix product or convolution rounds its inputs.

TF32 on a GPU, bfloat16 in oneDNN and autocast round the inputs of float32 products to 8 to 11
bits. That changes image codes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The products of every backend. Convolutions and recurrent layers of cuDNN are set together: torch
# refuses to read its common flag while they differ.
_PRODUCTS = (
    ("cuda", "matmul"),
    ("cudnn", "conv"),
    ("cudnn", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
)


def _set(module: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute; returns a function that restores it."""
    before = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, before)


def _set_exact(backend: str, product: str) -> Callable[[], None]:
    """Sets one product to exact float32; returns a function that restores it."""
    module = getattr(getattr(torch.backends, backend), product)
    before = module.fp32_precision
    module.fp32_precision = "ieee"

    def restore() -> None:
        module.fp32_precision = "none"  # follows the setting of its backend, or the global one
        if module.fp32_precision != before:
            module.fp32_precision = before

    return restore


def _set_all_exact() -> list[Callable[[], None]]:
    if hasattr(torch.backends, "fp32_precision"):  # torch 2.9 and later
        return [_set_exact(*product) for product in _PRODUCTS]
    return [
        _set(torch.backends.cuda.matmul, "allow_tf32", False),
        _set(torch.backends.cudnn, "allow_tf32", False),
    ]


class _Settings:
    """torch's precision settings belong to the process: blocks of several threads share them.

    The first block that is entered sets them, and the last one that ends restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._restore: list[Callable[[], None]] = []

    def enter(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._restore = _set_all_exact()
            self._blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                for restore in self._restore:
                    restore()


_SETTINGS = _Settings()


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """In this block, float32 products on any device keep all bits of their inputs.

    Autocast is off for `device`. Blocks may be nested and may run in several threads.
    """
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if torch.amp.is_autocast_available(device.type):
        autocast = torch.autocast(device.type, enabled=False)
    _SETTINGS.enter()
    try:
        with autocast:
            yield
    finally:
        _SETTINGS.leave()
