"""Memory-mapped Arrow files that serve as caches next to their source files.

Numbers are converted through their buffers. pyarrow's own conversions import pandas to check for a
Series, and that import takes longer than many complete runs.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

CACHE_KEY = b"medley.source"  # key in an Arrow file's metadata that identifies its source


def writable_cache_path(preferred: Path) -> Path:
    """The preferred path, or one in the user's cache folder if its folder is read-only."""
    if os.access(preferred.parent, os.W_OK):
        return preferred
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medley"
    name = hashlib.sha256(str(preferred.resolve()).encode()).hexdigest()[:16]
    base.mkdir(parents=True, exist_ok=True)
    return base / f"{preferred.name}.{name}"


def read_cache_key(cache: Path) -> str | None:
    """The source recorded in an Arrow file, or None if the file is missing or damaged."""
    try:
        with pa.memory_map(str(cache)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    value: bytes | None = metadata.get(CACHE_KEY)
    return value.decode() if value else None


def open_mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def to_numpy(values: pa.Array, dtype: type[np.generic]) -> NDArray[Any]:
    """An Arrow array of numbers without nulls -> a numpy array of the same memory."""
    buffer = values.buffers()[1]
    if buffer is None:
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype)[values.offset : values.offset + len(values)]


def to_arrow(kind: pa.DataType, values: array[int]) -> pa.Array:
    """A Python array of the same width -> an Arrow array."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values.tobytes())])


def to_arrow_strings(values: Sequence[str | None]) -> pa.StringArray:
    """Strings, with None for nulls -> an Arrow array."""
    encoded = [b"" if value is None else value.encode() for value in values]
    offsets = array("i", accumulate(map(len, encoded), initial=0))
    valid = np.packbits(np.array([v is not None for v in values], bool), bitorder="little")
    buffers = [pa.py_buffer(b) for b in (offsets.tobytes(), b"".join(encoded), valid.tobytes())]
    return pa.StringArray.from_buffers(len(values), *buffers)
