"""Keeps freed memory in the process, so that new large tensors need no new pages.

glibc returns every large block to the kernel and requests it again. On the machines of docs/log.md
this took between a sixth and a quarter of the time of encoding images.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Configures glibc's allocator to keep freed memory. Returns False if there is no glibc.

    For programs that allocate tensors of the same sizes repeatedly. The process then keeps its
    peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
