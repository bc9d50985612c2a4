"""Records of JSON, JSON lines, CSV, Parquet and Arrow files, one at a time; and their writers."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import ijson  # type: ignore[import-untyped]  # has none
import pyarrow as pa
import pyarrow.parquet as pq

from medley.errors import UserError
from medley.formats.sample import Choices, Format, Found, RecordError

_LONGEST_CELL = 1 << 24  # characters of a CSV cell

csv.field_size_limit(_LONGEST_CELL)
_encode = json.JSONEncoder(ensure_ascii=False).encode  # made once: json.dumps makes one each time


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
    with open(path, "rb") as file:
        start = file.read(3)
        file.seek(3 if start == codecs.BOM_UTF8 else 0)
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        if not first:
            return
        if first == b"[":
            file.seek(-1, 1)
            yield from _json_list(file)
        else:
            yield from _json_lines(path)


def _json_list(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    number = -1
    try:
        for number, record in enumerate(ijson.items(file, "item", use_float=True)):
            yield f" record {number}", record
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        torn = "premature EOF" in reason or "Incomplete" in reason  # by ijson's two back ends
        said = "the file ends in the middle of it" if torn else f"not JSON ({reason})"
        yield f" record {number + 1}", RecordError(f"{said}; nothing behind it can be read")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield f"{number}", json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                yield f"{number}", RecordError(f"not JSON ({error})")


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows as dictionaries of text, by the names in the first line."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        number = 0
        try:
            for number, row in enumerate(rows):
                if None in row or None in row.values():
                    names = len(rows.fieldnames or ())
                    error = f"not {names} cells, as the first line names"
                    yield f" record {number}", RecordError(error)
                else:
                    yield f" record {number}", dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            reason = f"not CSV ({error}); nothing behind it can be read"
            yield f" record {number + 1}", RecordError(reason)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    with file:
        number = 0
        for batch in file.iter_batches(256):
            for record in batch.to_pylist():
                yield f" record {number}", record
                number += 1


def _arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """Arrow streams, as the `datasets` library keeps them on disk, mapped into memory."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            number = 0
            for batch in stream:
                for start in range(0, len(batch), 256):
                    for record in batch.slice(start, 256).to_pylist():
                        yield f" record {number}", record
                        number += 1
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not an Arrow stream ({error})") from error


def split_files(
    choices: Choices, names: Mapping[str, Sequence[str]], what: str
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
    path: Path, form: Format, choices: Choices
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what adds one record to a new file in the layout of a format.

    Adding raises RecordError for text that no file can hold (half of a surrogate pair).
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
    count = 0
    with open(path, "wb") as binary:

        def add(record: dict[str, Any]) -> None:
            nonlocal count
            data = _bytes_of(_encode(record))
            binary.write((b",\n" if count else b"[\n") if many else b"")
            binary.write(data if many else data + b"\n")
            count += 1

        yield add
        if many:
            binary.write(b"\n]\n" if count else b"[]\n")


def _bytes_of(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"a text is no Unicode ({error.reason}): it cannot be written") from error
