"""Memory that is freed stays with the process, so that large tensors need no new pages.

glibc hands every large block back to the kernel and asks for it again: on the machines of
docs/log.md a sixth to a quarter of the time of encoding pictures went there.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what is freed. False where there is no glibc.

    For programs that make tensors of the same sizes over and over; the process then stays at
    its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
