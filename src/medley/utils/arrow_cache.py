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


def open_cache(cache: Path, schema: pa.Schema) -> pa.Table | None:
    """The table in a cache; None if the file is missing, damaged, or of another schema or source.

    Offsets and sizes are checked. Changed bytes among the values are not found.
    """
    try:
        table = open_mapped(cache)
        is_valid = table.schema.equals(schema, check_metadata=True)
        if is_valid:
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        return None
    return table if is_valid else None


def cached_list_size(cache: Path, column: str) -> int | None:
    """The size of the lists in a column of a cache; None if the file is missing or damaged."""
    try:
        with pa.memory_map(str(cache)) as source:
            kind = pa.ipc.open_file(source).schema.field(column).type
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None
    return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else None


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
