"""JSON Lines files: read line by line, cut into ranges, written, appended to."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from medley.errors import UserError
from medley.utils.files import atomic_file, refuse_lfs_pointer


def jsonl_line(row: Any) -> str:
    """One row as a line of JSON, with its line break; letters of all scripts as they are."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes a file atomically: it has all rows, or it does not change."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(jsonl_line(row) for row in rows)


def append_jsonl(path: Path, row: Any) -> None:
    """Appends a row. A line that an interrupted run left incomplete is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = False
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as written:
            written.seek(-1, os.SEEK_END)
            incomplete = written.read(1) != b"\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + jsonl_line(row) if incomplete else jsonl_line(row))


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines of a UTF-8 text file, LF or CRLF, blank lines left out."""
    try:
        refuse_lfs_pointer(path)
        with open(path, encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise UserError(f"{path}: File not found.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error


@dataclass(frozen=True)
class LineRange:
    """A stretch of a file that holds whole lines: bytes, and the number of its first line."""

    offset: int
    length: int
    first_line: int

    def lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """Line numbers and lines, blank ones left out, a byte-order mark taken off."""
        with open(path, "rb") as file:
            file.seek(self.offset)
            block = file.read(self.length)
        if self.offset == 0:
            block = block.removeprefix(codecs.BOM_UTF8)
        for number, line in enumerate(block.split(b"\n"), self.first_line):
            if line.strip():
                yield number, line.rstrip(b"\r")


def line_ranges(path: Path, size: int = 1 << 17) -> Iterator[LineRange]:
    """Cuts a text file into ranges of about `size` bytes; a line that is longer has its own."""
    try:
        refuse_lfs_pointer(path)
        file = open(path, "rb")  # noqa: SIM115  # closed below; opening is what may fail
    except FileNotFoundError as error:
        raise UserError(f"{path}: File not found.") from error
    with file:
        offset, line = 0, 1
        while block := file.read(size):
            end = len(block) if len(block) < size else block.rfind(b"\n") + 1
            lines = block.count(b"\n", 0, end)
            if end == 0:
                end, lines = len(block) + _rest_of_line(file, size), 1
            yield LineRange(offset, end, line)
            offset, line = offset + end, line + lines
            file.seek(offset)


def _rest_of_line(file: BinaryIO, size: int) -> int:
    rest = 0
    while more := file.read(size):
        end = more.find(b"\n")
        if end >= 0:
            return rest + end + 1
        rest += len(more)
    return rest
