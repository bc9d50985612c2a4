"""Images that Parquet and Arrow files embed in a column: `{bytes, path}`, bytes, or lists of them.

The name of such an image is its path, or `FILE#ROW` without a path; `#ROW.ELEMENT` in a list. If
the path of a `{bytes, path}` has no bytes, it names a file on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from medley.errors import UserError
from medley.utils.tables import arrow_batches, parquet_batches

_ROWS = 256  # rows of a batch; fewer if its images are large
_BYTES, _PATH = "bytes", "path"


def table_batches(file: Path, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet or Arrow file, bounded in size."""
    if file.suffix.lower() == ".parquet":
        yield from parquet_batches(file, _ROWS, columns)
        return
    for batch in arrow_batches(file):
        yield batch if columns is None else batch.select(columns)


def is_embedded(kind: pa.DataType) -> bool:
    """Whether a column of this type contains images rather than their paths."""
    if _is_list(kind):
        return is_embedded(kind.value_type)
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return bool(names & {_BYTES, _PATH})
    return _is_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


@dataclass(frozen=True)
class EmbeddedImage:
    """Where an embedded image is.

    Attributes:
        name: identifies the image
        row: index in the table
        element: position in the row's list, None if the row has no list
        has_bytes: whether it is embedded; otherwise `name` is a file
    """

    name: str
    row: int
    element: int | None
    has_bytes: bool


def embedded_images(file: Path, column: pa.Array, first_row: int) -> list[list[EmbeddedImage]]:
    """The images of each row of a column, without reading their bytes.

    A row without an image has one entry, which raises an error when it is read.
    """
    rows = []
    for offset in range(len(column)):
        row, value = first_row + offset, column[offset]
        images = []
        if value.is_valid and _is_list(column.type):
            images = [_describe(file, row, k, one) for k, one in enumerate(value.values)]
        elif value.is_valid:
            images = [_describe(file, row, None, value)]
        rows.append(images or [EmbeddedImage(f"{file}#{row}", row, None, True)])
    return rows


def _describe(file: Path, row: int, element: int | None, value: pa.Scalar) -> EmbeddedImage:
    path, has_bytes = None, True
    if value.is_valid and pa.types.is_struct(value.type):
        names = [value.type.field(i).name for i in range(value.type.num_fields)]
        path = value[_PATH].as_py() if _PATH in names else None
        has_bytes = not path or (_BYTES in names and value[_BYTES].is_valid)
    number = f"{row}" if element is None else f"{row}.{element}"
    return EmbeddedImage(str(path) if path else f"{file}#{number}", row, element, has_bytes)


class _Cursor:
    """Reads rows of one column in ascending order; each process has one for the last table."""

    def __init__(self, file: str, column: str) -> None:
        self.key = (file, column)
        self._restart()

    def _restart(self) -> None:
        file, column = self.key
        self._batches = table_batches(Path(file), [column])
        self._start, self._values = 0, pa.array([], pa.null())

    def value(self, row: int) -> Any:
        if row < self._start:
            self._restart()
        while row >= self._start + len(self._values):
            self._start += len(self._values)
            self._values = next(self._batches).column(0)
        return self._values[row - self._start]


_last_cursor: dict[tuple[str, str], _Cursor] = {}  # one entry


def read_embedded(file: str, column: str, row: int, element: int | None) -> bytes | None:
    """The bytes of an embedded image; None if the row has none."""
    key = (file, column)
    if key not in _last_cursor:
        _last_cursor.clear()
        _last_cursor[key] = _Cursor(file, column)
    try:
        value = _last_cursor[key].value(row)
    except StopIteration as error:
        raise UserError(f"{file}: Row {row} does not exist any more.") from error
    if value.is_valid and element is not None:
        value = value.values[element]
    if value.is_valid and pa.types.is_struct(value.type):
        value = value[_BYTES] if _BYTES in [f.name for f in value.type] else None
    data = None if value is None else value.as_py()
    return data if isinstance(data, bytes) else None
