"""Readers that stream the records of JSON, JSON Lines, CSV, Parquet and Arrow files; writers."""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from medley.datasets.base import ConversionConfig, FormatSpec, RawRecord, RecordError
from medley.errors import UserError

_MAX_CELL = 1 << 24  # characters of a CSV cell
_CHUNK = 1 << 20  # bytes per read
_MAX_RECORD = 1 << 26  # characters
_BATCH = 256  # table rows that are converted to Python values at once
_DECODER = json.JSONDecoder()
_TRUNCATED = "The file ends in the middle of this record."
_REST_UNREADABLE = " The rest of the file cannot be read."

csv.field_size_limit(_MAX_CELL)
_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False
).encode  # json.dumps would create an encoder for each record


def records_of(path: Path, split: str = "") -> Iterator[RawRecord]:
    """The records of a file of any supported type, with their locations.

    A part that cannot be parsed becomes a RecordError in place of a record: an invalid line of JSON
    Lines, or the position where a JSON list breaks off. Raises UserError for a missing file.
    """
    if not path.is_file():
        raise UserError(f"{path}: No such file.")
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_csv,
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
        reason = f"Invalid UTF-8 ({error.reason}).{_REST_UNREADABLE}"
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
                yield f"{number}", RecordError(f"Invalid JSON ({error}).", content=content)


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows as dictionaries of text; the first line has the names of the columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: Invalid CSV ({error}).") from error
        if len(set(names)) < len(names):
            raise UserError(f"{path}: Duplicate column name (got {', '.join(names)}).")
        for number in count():
            location = f" record {number}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                reason = f"Invalid UTF-8 ({error.reason}).{_REST_UNREADABLE}"
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


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: The file is not a Parquet file ({error}).") from error
    with file:
        number = 0
        for batch in file.iter_batches(_BATCH):
            for record in batch.to_pylist():
                yield f" record {number}", _to_json_value(record)
                number += 1


def _read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """Memory-maps an Arrow stream, the file format of the `datasets` library."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            number = 0
            for batch in stream:
                for start in range(0, len(batch), _BATCH):
                    for record in batch.slice(start, _BATCH).to_pylist():
                        yield f" record {number}", _to_json_value(record)
                        number += 1
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: The file is not an Arrow stream ({error}).") from error


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


def split_files(
    config: ConversionConfig, names: Mapping[str, Sequence[str]], dataset: str
) -> list[tuple[str, Path]]:
    """(split, file) for each selected split of a dataset.

    Args:
        config: gives the input, a folder or a single file, and the selected split
        names: published file names of each split, relative to the folder
        dataset: name of the dataset in errors

    Raises:
        UserError: there is no file of a selected split.
    """
    path = config.path
    if path.is_file():
        splits = [s for s, files in names.items() if path.name in {Path(f).name for f in files}]
        if config.split not in ("all", *splits[:1]):
            own_split = splits[0] if splits else "of an unknown split"
            raise UserError(f"--split {config.split}: {path} is {own_split}.")
        return [(splits[0] if splits else "", path)]
    selected = list(names) if config.split == "all" else [config.split]
    if unknown := [split for split in selected if split not in names]:
        raise UserError(
            f"--split {unknown[0]}: {dataset} has no such split (expected one of "
            f"{', '.join(names)})."
        )
    files = []
    for split in selected:
        existing = [path / name for name in names[split] if (path / name).is_file()]
        files += [(split, existing[0])] if existing else []
    if not files:
        expected = ", ".join(name for split in selected for name in names[split])
        raise UserError(f"{path}: No file of {dataset} found (expected one of {expected}).")
    return files


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
