"""The sizes in the messages of an Arrow stream, checked before anything is decoded.

A message of a hundred bytes can claim 2**60 rows of a type without data, or a compressed buffer of
a terabyte. Its metadata is a flatbuffer (Arrow's Message.fbs). pyarrow verifies its structure, and
shows no sizes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from medley.errors import UserError

_RECORD_BATCH, _DICTIONARY = 3, 2  # types of a message's header
_UNCOMPRESSED = -1  # length before a buffer that compression would not make smaller
_ROWS_WITHOUT_DATA = 1 << 20  # of types that need no bytes
_MAX_EXPANSION = 100  # decoded bytes for each compressed byte, beyond `limit`


def check_messages(source: Any, where: str, limit: int) -> None:
    """Reads the metadata of all messages from the position of a memory-mapped file.

    Args:
        limit: bytes of a decoded batch that are always accepted

    Raises UserError for sizes that do not fit the file, and pyarrow's errors for a file that is
    not Arrow. Ends quietly where the file is damaged: reading it reports where.
    """
    reader = pa.ipc.MessageReader.open_stream(source)
    rows = decoded = 0
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        try:
            batch = _record_batch(memoryview(message.metadata))
            if batch is None:
                continue
            body = memoryview(message.body)
            size, lengths = _decoded_bytes(batch, body), list(batch.node_lengths())
        except struct.error as error:
            raise UserError(f"{where}: The file is damaged ({error}). Copy it again.") from error
        if size > max(limit, _MAX_EXPANSION * len(body)):
            raise UserError(
                f"{where}: A batch may expand to {size} bytes (got {len(body)} bytes, limit "
                f"{limit} bytes). Write the file again with smaller batches."
            )
        rows += batch.integer(0)
        decoded += size
        # Each row of a type with data needs at least one bit.
        if max([rows, *lengths]) > 8 * decoded + _ROWS_WITHOUT_DATA or min([0, *lengths]) < 0:
            raise UserError(
                f"{where}: The file claims more values than it contains (got "
                f"{max([rows, *lengths])} values in {decoded} bytes). Write the file again."
            )


class _Table:
    """A table of a flatbuffer: fields by their number, found through its vtable."""

    def __init__(self, data: memoryview, position: int) -> None:
        self.data, self.position = data, position
        self.vtable = position - self._read("<i", position)
        self.fields = (self._read("<H", self.vtable) - 4) // 2

    def _read(self, kind: str, position: int) -> int:
        return int(struct.unpack_from(kind, self.data, position)[0])

    def _field(self, number: int) -> int:
        """The position of a field; 0 if it is absent."""
        if number >= self.fields:
            return 0
        offset = self._read("<H", self.vtable + 4 + 2 * number)
        return self.position + offset if offset else 0

    def byte(self, number: int) -> int:
        position = self._field(number)
        return self._read("<B", position) if position else 0

    def integer(self, number: int) -> int:
        """A 64-bit integer."""
        position = self._field(number)
        return self._read("<q", position) if position else 0

    def table(self, number: int) -> _Table | None:
        position = self._field(number)
        return _Table(self.data, position + self._read("<I", position)) if position else None

    def pairs(self, number: int) -> Iterator[tuple[int, int]]:
        """A vector of structs of two 64-bit integers."""
        position = self._field(number)
        if position:
            start = position + self._read("<I", position)
            for index in range(self._read("<I", start)):
                yield struct.unpack_from("<qq", self.data, start + 4 + 16 * index)

    def node_lengths(self) -> Iterator[int]:
        """The number of values of each column and each nested column of a record batch."""
        return (length for length, _ in self.pairs(1))


def _record_batch(metadata: memoryview) -> _Table | None:
    """The record batch in a message, also that of a dictionary."""
    message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    header = message.table(2)
    if message.byte(1) == _DICTIONARY and header is not None:
        return header.table(1)
    return header if message.byte(1) == _RECORD_BATCH else None


def _decoded_bytes(batch: _Table, body: memoryview) -> int:
    """The bytes of all buffers of a record batch after decompression, as far as it says so."""
    is_compressed = batch.table(3) is not None
    total = 0
    for offset, length in batch.pairs(2):
        if is_compressed and length >= 8 and 0 <= offset <= len(body) - 8:
            claimed = struct.unpack_from("<q", body, offset)[0]
            total += length - 8 if claimed == _UNCOMPRESSED else max(0, claimed)
        elif 0 <= length <= len(body):
            total += length
    return total
