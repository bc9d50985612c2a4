"""Arrow files that are mapped into memory, kept as caches beside what they were made of.

Numbers go in and out by their buffers: pyarrow's own conversions import pandas to look whether
they were given a Series, which takes longer than many a whole run.
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

CACHE_KEY = b"medley.source"  # in an Arrow file's metadata: what it was made of


def cache_place(wanted: Path) -> Path:
    """Where a cache goes: the wanted place, or the user's cache folder where that is read-only."""
    if os.access(wanted.parent, os.W_OK):
        return wanted
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medley"
    name = hashlib.sha256(str(wanted.resolve()).encode()).hexdigest()[:16]
    base.mkdir(parents=True, exist_ok=True)
    return base / f"{wanted.name}.{name}"


def cache_key(cache: Path) -> str | None:
    """What an Arrow file was made of, or None for one that is not there or broken."""
    try:
        with pa.memory_map(str(cache)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    value: bytes | None = metadata.get(CACHE_KEY)
    return value.decode() if value else None


def open_mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def numbers_of(values: pa.Array, dtype: type[np.generic]) -> NDArray[Any]:
    """An Arrow array of numbers without nulls -> the same memory as a numpy array."""
    buffer = values.buffers()[1]
    if buffer is None:
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype)[values.offset : values.offset + len(values)]


def array_of(kind: pa.DataType, values: array[int]) -> pa.Array:
    """A Python array of the same width -> an Arrow array."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values.tobytes())])


def strings_of(values: Sequence[str | None]) -> pa.StringArray:
    """Strings, some of them missing -> an Arrow array."""
    encoded = [b"" if value is None else value.encode() for value in values]
    offsets = array("i", accumulate(map(len, encoded), initial=0))
    there = np.packbits(np.array([v is not None for v in values], bool), bitorder="little")
    buffers = [pa.py_buffer(b) for b in (offsets.tobytes(), b"".join(encoded), there.tobytes())]
    return pa.StringArray.from_buffers(len(values), *buffers)
