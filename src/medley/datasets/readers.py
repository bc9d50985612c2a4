"""Records of JSON, JSON lines, CSV, Parquet and Arrow files, one at a time; and their writers."""

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

from medley.datasets.base import ConversionConfig, FormatSpec, Found, RecordError
from medley.errors import UserError

_LONGEST_CELL = 1 << 24  # characters of a CSV cell
_PIECE = 1 << 20  # bytes that are read at once
_LARGEST_RECORD = 1 << 26  # characters
_DECODER = json.JSONDecoder()
_TORN = "the file ends in the middle of it"
_UNREAD = "; nothing behind it can be read"

csv.field_size_limit(_LONGEST_CELL)
_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False
).encode  # made once: json.dumps makes one each time


def records_of(path: Path, split: str = "") -> Iterator[Found]:
    """Where it stands, and each record of a file, whatever its kind.

    What cannot be read comes as a RecordError in a record's place: a bad line of JSON lines, the
    point where a JSON list breaks off. Raises UserError for a file that is not there.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".arrow": _arrow}
    reader = readers.get(path.suffix.lower(), _json)
    for place, record in reader(path):
        yield f"{path}:{place}", split, record


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start == "[":
        with open(path, "rb") as binary:
            yield from _json_list(binary)
    elif start:
        yield from _json_lines(path)


class _Window:
    """The part of a text file that is being read: from a place on, as much as was asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.place, self.ended = "", 0, False

    def more(self) -> bool:
        """Reads on, as much again as there is; False at the end. Raises UnicodeDecodeError."""
        if self.ended:
            return False
        self.text, self.place = self.text[self.place :], 0
        data = self.file.read(max(_PIECE, len(self.text)))
        self.ended = not data
        self.text += self.decoder.decode(data, final=self.ended)
        return True

    def next_mark(self) -> str:
        """The next character that is no blank, without taking it; nothing at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""


def _json_list(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The members of a list, one after another: no more than one of them is held."""
    window, number = _Window(file), 0
    try:
        window.next_mark()
        window.place += 1  # the bracket
        while (mark := window.next_mark()) != "]":
            if number:
                if mark != ",":
                    raise RecordError(_TORN if not mark else "not JSON (no comma before it)")
                window.place += 1
                window.next_mark()
            yield f" record {number}", _next_value(window)
            number += 1
        window.place += 1
        if window.next_mark():
            raise RecordError("not JSON (something stands behind the list)")
    except UnicodeDecodeError as error:
        yield f" record {number}", RecordError(f"not UTF-8 ({error.reason}){_UNREAD}", torn=True)
    except RecordError as error:
        yield f" record {number}", RecordError(f"{error}{_UNREAD}", torn=True)


def _next_value(window: _Window) -> Any:
    """Raises RecordError for what is no JSON, or too much of it."""
    while True:
        try:
            value, end = _DECODER.raw_decode(window.text, window.place)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos >= len(window.text) - 16
            if not cut:
                raise RecordError(f"not JSON ({error.msg})") from error
            if len(window.text) - window.place > _LARGEST_RECORD:
                raise RecordError(f"no JSON within {_LARGEST_RECORD} characters") from error
            if not window.more():
                after_comma = window.text[window.place : window.place + 1] == "]"
                said = "not JSON (a comma before the end of the list)" if after_comma else _TORN
                raise RecordError(said) from error
        except (RecursionError, ValueError) as error:
            raise RecordError(f"too deep, or too long a number ({error})") from error
        else:
            if end < len(window.text) or not window.more():
                window.place = end
                return value


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
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
                yield f"{number}", RecordError(f"not JSON ({error})", content=content)


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows as dictionaries of text, by the names in the first line."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not CSV ({error})") from error
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns have the same name, of {', '.join(names)}")
        for number in count():
            place = f" record {number}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                yield place, RecordError(f"not UTF-8 ({error.reason}){_UNREAD}", torn=True)
                return
            except csv.Error as error:  # of this row alone, unless a quote goes on to the end
                torn = "end of data" in str(error)
                reason = f"not CSV ({error}){_UNREAD if torn else ''}"
                yield place, RecordError(reason, torn=torn)
                continue
            if len(row) == len(names):
                yield place, dict(zip(names, row, strict=True))
            elif row:
                reason = f"{len(row)} cells, the first line names {len(names)}"
                yield place, RecordError(reason, content=row)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    with file:
        number = 0
        for batch in file.iter_batches(256):
            for record in batch.to_pylist():
                yield f" record {number}", _plain(record)
                number += 1


def _arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """Arrow streams, as the `datasets` library keeps them on disk, mapped into memory."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            number = 0
            for batch in stream:
                for start in range(0, len(batch), 256):
                    for record in batch.slice(start, 256).to_pylist():
                        yield f" record {number}", _plain(record)
                        number += 1
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not an Arrow stream ({error})") from error


def _plain(value: Any) -> Any:
    """A value of a table without what JSON has no place for: dates as text, no-numbers as null."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def split_files(
    choices: ConversionConfig, names: Mapping[str, Sequence[str]], what: str
) -> list[tuple[str, Path]]:
    """(split, file) of the splits that were asked for.

    `names` gives the usual file names of each split, below the input; an input that is a file
    itself is read as it is. Raises UserError where none of them is there.
    """
    path = choices.path
    if path.is_file():
        own = [
            split for split, usual in names.items() if path.name in {Path(n).name for n in usual}
        ]
        if choices.split not in ("all", *own[:1]):
            raise UserError(
                f"--split {choices.split}: {path} is {own[0] if own else 'of no split'}"
            )
        return [(own[0] if own else "", path)]
    wanted = list(names) if choices.split == "all" else [choices.split]
    if unknown := [split for split in wanted if split not in names]:
        raise UserError(f"--split {unknown[0]}: {what} has {', '.join(names)}")
    found = []
    for split in wanted:
        there = [path / name for name in names[split] if (path / name).is_file()]
        found += [(split, there[0])] if there else []
    if not found:
        usual = ", ".join(name for split in wanted for name in names[split])
        raise UserError(f"{path}: none of {usual} is there, expected {what}")
    return found


# --- writers ------------------------------------------------------------------------------


@contextmanager
def writer(
    path: Path, form: FormatSpec, choices: ConversionConfig
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what adds one record to a new file in the layout of a format.

    Adding raises RecordError for what no file can hold: half of a surrogate pair, a value that is
    none of JSON's.
    """
    if form.layout == "csv":
        assert form.columns is not None
        with open(path, "w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, form.columns(choices))
            rows.writeheader()

            def add_row(record: dict[str, Any]) -> None:
                _bytes_of("".join(map(str, record.values())))
                rows.writerow(record)

            yield add_row
        return
    many = form.layout == "json"
    written = 0
    with open(path, "wb") as binary:

        def add(record: dict[str, Any]) -> None:
            nonlocal written
            try:
                data = _bytes_of(_encode(record))
            except (TypeError, RecursionError) as error:
                raise RecordError(f"a value that JSON cannot hold ({error})") from error
            except ValueError as error:
                if isinstance(error, RecordError):
                    raise
                raise RecordError(f"a value that JSON cannot hold ({error})") from error
            binary.write((b",\n" if written else b"[\n") if many else b"")
            binary.write(data if many else data + b"\n")
            written += 1

        yield add
        if many:
            binary.write(b"\n]\n" if written else b"[]\n")


def _bytes_of(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"a text is no Unicode ({error.reason}): it cannot be written") from error
