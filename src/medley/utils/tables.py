"""Parquet and Arrow files of unknown origin: batches and rows of bounded size.

A Parquet file of a few hundred bytes can hold thousands of references to one long value. Its
metadata and the headers of its dictionaries bound the size of a batch before it is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from medley.errors import UserError
from medley.utils.arrow_messages import check_messages

MAX_BATCH_BYTES = 1 << 28  # bytes of a decoded batch
_MAX_ROW_EXPANSION = 100  # decoded bytes of a row for each compressed byte of its column
_MAX_LIST_EXPANSION = 100_000  # decoded bytes of a list column for each compressed byte
_PYTHON_NUMBER = 40  # bytes of a number in a Python list
_ROWS = 256  # rows that are converted to Python values at once
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_DICTIONARY_PAGE = 2
_ARROW_MAGIC, _FILE_START = b"ARROW1", b"ARROW1\0\0"
_SHARING = ("dictionary", "view", "run_end_encoded")  # types in which rows share values


def parquet_batches(
    path: Path, rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet file, of at most `rows` rows and about `MAX_BATCH_BYTES` bytes.

    Raises UserError for a file whose rows are far larger than the file, and pyarrow's errors for a
    file that is not Parquet.
    """
    with pq.ParquetFile(path) as file:
        bounded = min(rows, _rows_per_batch(path, file, columns))
        yield from file.iter_batches(bounded, columns=columns)


def _rows_per_batch(path: Path, file: pq.ParquetFile, columns: Sequence[str] | None) -> int:
    """The number of rows of any row group that surely fit into `MAX_BATCH_BYTES`; at least 1."""
    largest_row = 1
    with open(path, "rb") as data:
        for group in range(file.metadata.num_row_groups):
            row_group = file.metadata.row_group(group)
            row_bytes = 0
            for index in range(row_group.num_columns):
                chunk = row_group.column(index)
                if columns is None or chunk.path_in_schema.partition(".")[0] in columns:
                    leaf = file.schema.column(index)
                    row_bytes += _row_bytes(path, data, chunk, leaf, max(1, row_group.num_rows))
            largest_row = max(largest_row, row_bytes)
    return max(1, MAX_BATCH_BYTES // largest_row)


def _row_bytes(
    path: Path, data: BinaryIO, chunk: pq.ColumnChunkMetaData, leaf: pq.ColumnSchema, rows: int
) -> int:
    """Bound of the decoded bytes of one row in a column; lists count with their mean length."""
    values_per_row = -(-chunk.num_values // rows)
    mean = -(-chunk.total_uncompressed_size // rows)
    is_list = leaf.max_repetition_level > 0
    if leaf.physical_type == "BYTE_ARRAY":
        width = _longest_shared_value(data, chunk)
    elif is_list:
        width = _PYTHON_NUMBER
    else:
        width = leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else 8
    row_bytes = max(mean, values_per_row * width)
    compressed = min(chunk.total_compressed_size, path.stat().st_size)
    decoded = chunk.num_values * width if is_list else 0
    is_bomb = row_bytes > max(MAX_BATCH_BYTES, _MAX_ROW_EXPANSION * compressed)
    if is_bomb or decoded > max(8 * MAX_BATCH_BYTES, _MAX_LIST_EXPANSION * compressed):
        raise UserError(
            f"{path}: The column {chunk.path_in_schema} may expand to {max(row_bytes, decoded)} "
            f"bytes (got {compressed} compressed bytes, limit {MAX_BATCH_BYTES} bytes per row). "
            "Write the file again with smaller values or row groups."
        )
    return row_bytes


def _longest_shared_value(data: BinaryIO, chunk: pq.ColumnChunkMetaData) -> int:
    """Bound of the length of a value that many rows can share; 0 if each row has its own."""
    if "DELTA_BYTE_ARRAY" in chunk.encodings:  # a value can repeat the beginning of the last one
        return int(chunk.total_uncompressed_size)
    offset = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        offset = min(offset, chunk.dictionary_page_offset)
    data.seek(max(0, offset))
    kind, size = _page_kind_and_size(data.read(16))
    return size if kind == _DICTIONARY_PAGE else 0


def _page_kind_and_size(header: bytes) -> tuple[int, int]:
    """Type and decoded size of a page: the first two fields of its header, in Thrift's encoding."""
    numbers, position = [], 0
    for _ in range(2):
        if header[position : position + 1] != b"\x15":  # the next field, a 32-bit integer
            return -1, 0
        position += 1
        value = shift = 0
        while position < len(header):
            byte = header[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                break
        numbers.append((value >> 1) ^ -(value & 1))
    return numbers[0], numbers[1]


def arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a memory-mapped Arrow file or stream, checked in full.

    A file is read as the stream that it contains: its footer could name other places. Raises
    UserError for false sizes, and pyarrow's errors for a damaged file.
    """
    with pa.memory_map(str(path)) as source:
        start = len(_FILE_START) if source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC else 0
        if start:
            end = source.size() - len(_ARROW_MAGIC)
            source.seek(max(0, end))
            if end < start or source.read() != _ARROW_MAGIC:
                raise pa.ArrowInvalid("the file is truncated, its footer is missing")
        source.seek(start)
        check_messages(source, str(path), MAX_BATCH_BYTES)
        source.seek(start)
        with pa.ipc.open_stream(source) as stream:
            for batch in stream:
                batch.validate(full=True)
                yield batch


def batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch as Python values; a few at a time, so that long values fit."""
    shares_values = any(kind in str(t) for t in batch.schema.types for kind in _SHARING)
    is_large = batch.nbytes > MAX_BATCH_BYTES
    step = 1 if shares_values or is_large else _ROWS
    for start in range(0, batch.num_rows, step):
        yield from batch.slice(start, step).to_pylist()
