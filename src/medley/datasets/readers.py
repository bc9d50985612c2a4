"""Readers that stream the records of JSON, JSON Lines, CSV, Parquet and Arrow files; writers."""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from medley.datasets.base import ConversionConfig, FormatSpec, RawRecord, RecordError
from medley.errors import UserError
from medley.utils.files import refuse_lfs_pointer
from medley.utils.tables import arrow_batches, batch_rows, parquet_batches

_MAX_CELL = 1 << 24  # characters of a CSV cell
_CHUNK = 1 << 20  # bytes per read
_MAX_RECORD = 1 << 26  # characters
_BATCH = 256  # table rows that are converted to Python values at once
_DECODER = json.JSONDecoder()
_TRUNCATED = "The file ends in the middle of this record."
_ENCODING_HINT = (
    " Convert the file, for example with iconv -f WINDOWS-1252 (or UTF-16) -t UTF-8. The format "
    "labels_csv reads other encodings with --encoding."
)
_REST_UNREADABLE = " The rest of the file cannot be read."

csv.field_size_limit(_MAX_CELL)
_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False
).encode  # json.dumps would create an encoder for each record


def records_of(path: Path, split: str = "", encoding: str = "utf-8") -> Iterator[RawRecord]:
    """The records of a file of any supported type, with their locations.

    A part that cannot be parsed becomes a RecordError in place of a record: an invalid line of JSON
    Lines, or the position where a JSON list breaks off. `encoding` is that of a CSV file. Raises
    UserError for a missing file.
    """
    if not path.is_file():
        problem = "Expected a file, not a folder" if path.is_dir() else "No such file"
        raise UserError(f"{path}: {problem}.")
    refuse_lfs_pointer(path)
    read_csv = partial(_read_csv, encoding=_text_encoding(encoding))
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]]
    readers = {".parquet": _read_parquet, ".csv": read_csv, ".tsv": read_csv,
               ".arrow": _read_arrow}  # fmt: skip
    reader = readers.get(path.suffix.lower(), _read_json)
    for location, record in reader(path):
        yield f"{path}:{location}", split, record


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
    if first == "[":
        with open(path, "rb") as binary:
            yield from _read_json_list(binary)
    elif first:
        yield from _read_json_lines(path)


class _TextWindow:
    """A part of a text file in memory, and a position in it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.at_end = "", 0, False

    def read_more(self) -> bool:
        """Doubles the text. Returns False at the end of the file. Raises UnicodeDecodeError."""
        if self.at_end:
            return False
        self.text, self.position = self.text[self.position :], 0
        data = self.file.read(max(_CHUNK, len(self.text)))
        self.at_end = not data
        self.text += self.decoder.decode(data, final=self.at_end)
        return True

    def peek(self) -> str:
        """Skips whitespace and returns the next character, "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.read_more():
                return ""


def _read_json_list(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Streams the elements of a list; holds one element at a time."""
    window, number = _TextWindow(file), 0
    try:
        window.peek()
        window.position += 1  # the opening bracket
        while (character := window.peek()) != "]":
            if number:
                if character != ",":
                    raise RecordError("Invalid JSON (missing comma)." if character else _TRUNCATED)
                window.position += 1
                window.peek()
            yield f" record {number}", _next_value(window)
            number += 1
        window.position += 1
        if window.peek():
            raise RecordError("Invalid JSON (extra data after the list).")
    except UnicodeDecodeError as error:
        reason = f"Invalid UTF-8 ({error.reason}).{_ENCODING_HINT}{_REST_UNREADABLE}"
        yield f" record {number}", RecordError(reason, truncated=True)
    except RecordError as error:
        yield f" record {number}", RecordError(f"{error}{_REST_UNREADABLE}", truncated=True)


def _next_value(window: _TextWindow) -> Any:
    """Parses one value. Raises RecordError for invalid JSON, and for a value that is too large."""
    while True:
        try:
            value, end = _DECODER.raw_decode(window.text, window.position)
        except json.JSONDecodeError as error:
            incomplete = error.msg.startswith("Unterminated") or error.pos >= len(window.text) - 16
            if not incomplete:
                raise RecordError(f"Invalid JSON ({error.msg}).") from error
            if len(window.text) - window.position > _MAX_RECORD:
                raise RecordError(f"No JSON value within {_MAX_RECORD} characters.") from error
            if not window.read_more():
                after_comma = window.text[window.position : window.position + 1] == "]"
                reason = "Invalid JSON (trailing comma in the list)." if after_comma else _TRUNCATED
                raise RecordError(reason) from error
        except (RecursionError, ValueError) as error:
            raise RecordError(f"The nesting is too deep or a number too long ({error}).") from error
        else:
            if end < len(window.text) or not window.read_more():
                window.position = end
                return value


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield f"{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                content = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
                hint = _ENCODING_HINT if isinstance(error, UnicodeDecodeError) else ""
                yield f"{number}", RecordError(f"Invalid JSON ({error}).{hint}", content=content)


def _text_encoding(name: str) -> str:
    """An encoding of CSV files; that of UTF-8 skips a byte-order mark. Raises UserError."""
    try:
        found = codecs.lookup(name).name
        "a".encode(found)  # refuses codecs of bytes, such as base64
    except (LookupError, ValueError) as error:
        raise UserError(
            f"--encoding {name}: Unknown encoding (expected utf-8, cp1252, ...)."
        ) from error
    return "utf-8-sig" if found == "utf-8" else found


def _read_csv(path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
    """Rows as dictionaries of text; the first line has the names of the columns."""
    with open(path, encoding=encoding, newline="") as file:
        delimiter = _find_delimiter(path, encoding)
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
        except (csv.Error, UnicodeDecodeError) as error:
            hint = _ENCODING_HINT if isinstance(error, UnicodeDecodeError) else ""
            raise UserError(f"{path}: Invalid CSV ({error}).{hint}") from error
        if len(set(names)) < len(names):
            raise UserError(f"{path}: Duplicate column name (got {', '.join(names)}).")
        for number in count():
            location = f" record {number}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                name = "UTF-8" if encoding == "utf-8-sig" else encoding
                reason = f"Invalid {name} ({error.reason}).{_ENCODING_HINT}{_REST_UNREADABLE}"
                yield location, RecordError(reason, truncated=True)
                return
            except csv.Error as error:
                # Only this row is invalid, unless an open quote extends to the end of the file.
                truncated = "end of data" in str(error)
                reason = f"Invalid CSV ({error}).{_REST_UNREADABLE if truncated else ''}"
                yield location, RecordError(reason, truncated=truncated)
                continue
            if len(row) == len(names):
                yield location, dict(zip(names, row, strict=True))
            elif row:
                reason = f"The number of cells is invalid (got {len(row)}, expected {len(names)})."
                yield location, RecordError(reason, content=row)


def _find_delimiter(path: Path, encoding: str) -> str:
    """The delimiter of a CSV file: a semicolon or a tab if the first line has no comma."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with open(path, encoding=encoding, errors="replace", newline="") as file:
        header = file.readline(_MAX_CELL)
    unquoted = "".join(header.split('"')[::2])
    if "," in unquoted:
        return ","
    return next((d for d in (";", "\t") if d in unquoted), ",")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    yield from _table_rows(path, "a Parquet file", parquet_batches(path, _BATCH))


def _read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """Memory-maps an Arrow file or stream, the file format of the `datasets` library."""
    yield from _table_rows(path, "an Arrow file or stream", arrow_batches(path))


def _table_rows(
    path: Path, kind: str, batches: Iterator[pa.RecordBatch]
) -> Iterator[tuple[str, Any]]:
    rows = (row for batch in batches for row in batch_rows(batch))
    for number in count():
        try:
            row = next(rows)
        except StopIteration:
            return
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            if not number:
                raise UserError(f"{path}: The file is not {kind} ({reason}).") from error
            reason = f"The table is damaged ({reason}).{_REST_UNREADABLE}"
            yield f" record {number}", RecordError(reason, truncated=True)
            return
        yield f" record {number}", _to_json_value(row)


def _to_json_value(value: Any) -> Any:
    """Converts a table value: dates and decimals to text, NaN and infinity to null."""
    if isinstance(value, dict):
        return {name: _to_json_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_to_json_value(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- writers ------------------------------------------------------------------------------

RecordWriter = Callable[[dict[str, Any]], None]


@contextmanager
def open_writer(path: Path, spec: FormatSpec, config: ConversionConfig) -> Iterator[RecordWriter]:
    """Opens a new file in a format's layout and gives a function that adds a record.

    The function raises RecordError for text with an unpaired surrogate and for values that JSON
    cannot represent.
    """
    if spec.layout == "csv":
        assert spec.columns is not None
        with open(path, "w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, spec.columns(config))
            rows.writeheader()

            def add_row(record: dict[str, Any]) -> None:
                _to_utf8("".join(map(str, record.values())))  # checks the text
                rows.writerow(record)

            yield add_row
        return
    is_list = spec.layout == "json"
    written = 0
    with open(path, "wb") as binary:

        def add(record: dict[str, Any]) -> None:
            nonlocal written
            try:
                data = _to_utf8(_encode(record))
            except RecordError:
                raise
            except (TypeError, RecursionError, ValueError) as error:
                raise RecordError(f"JSON cannot represent a value ({error}).") from error
            binary.write((b",\n" if written else b"[\n") if is_list else b"")
            binary.write(data if is_list else data + b"\n")
            written += 1

        yield add
        if is_list:
            binary.write(b"\n]\n" if written else b"[]\n")


def _to_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"A string is not valid Unicode ({error.reason}).") from error
