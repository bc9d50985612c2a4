"""Image lists of any length (CSV, Parquet, Arrow, folder, WebDataset tar), read by partition.

A partition is a fixed range of the list's rows. The complete list is never in memory. To process a
partition, a reader iterates over the rows before it.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medley.errors import UserError
from medley.images.embedded import embedded_images, is_embedded, table_batches
from medley.images.folders import TAR_COLUMNS, Sample, describe_skipped, folder_images, is_tar
from medley.images.formats import Frames, has_image_suffix
from medley.images.image_source import ImageSource

MAX_FIELD_LENGTH = 1 << 24  # characters of one CSV field
MAX_PATH_LENGTH = 1 << 16  # characters
MAX_COLUMN_BYTES = 2 << 30  # of the other columns of one partition
TABLE_SUFFIXES = (".parquet", ".arrow")
_DELIMITERS = (",", ";", "\t")
_CHUNK = 4096  # rows of a list that are read together


@dataclass(frozen=True)
class Partition:
    """Rows `number * size` to `(number + 1) * size` of a list.

    `extra_columns` are the columns of these rows other than the path, if requested.
    """

    number: int
    sources: list[ImageSource]
    extra_columns: pa.Table | None

    def select_frames(self, frames: Frames | None) -> Partition:
        """The partition with one frame selected in each file, or with a source for each frame."""
        if frames is None:
            return self
        if frames != "all":
            return replace(self, sources=[replace(s, frame=frames) for s in self.sources])
        expanded = [(row, one) for row, s in enumerate(self.sources) for one in s.frames()]
        rows = pa.array([row for row, _ in expanded], pa.int64())
        columns = None if self.extra_columns is None else self.extra_columns.take(rows)
        return Partition(self.number, [source for _, source in expanded], columns)


class ImageList:
    """A list of images on disk, read on demand.

    Args:
        path: CSV, Parquet or Arrow file, folder, tar, or one image
        image_key: column of the paths, or of the embedded images
        keep_columns: read the other columns as well
        limit: use only the first rows

    `skipped` counts the files of a folder that are not images, by suffix. It is complete after an
    iteration over the list.

    Raises UserError for an invalid list. A broken image raises ImageError when it is opened.
    """

    def __init__(
        self,
        path: Path,
        image_key: str = "img_path",
        keep_columns: bool = False,
        limit: int | None = None,
    ) -> None:
        if not path.exists():
            raise UserError(f"{path}: Image list or folder not found.")
        self.path, self.image_key = path, image_key
        self.keep_columns, self.limit = keep_columns, limit
        self.skipped: Counter[str] = Counter()

    def partitions(self, size: int) -> Iterator[Partition]:
        """All partitions in order, each with `size` rows except the last."""
        remaining = sys.maxsize if self.limit is None else self.limit
        sources: list[ImageSource] = []
        tables: list[pa.Table] = []
        number = 0
        for chunk, columns in self._chunks():
            chunk = chunk[:remaining]
            remaining -= len(chunk)
            sources += chunk
            tables += [] if columns is None else [columns.slice(0, len(chunk))]
            self._check_column_bytes(tables)
            while len(sources) >= size or (sources and remaining == 0):
                table = pa.concat_tables(tables) if tables else None
                yield Partition(number, sources[:size], table and table.slice(0, size))
                sources, tables = sources[size:], [] if table is None else [table.slice(size)]
                number += 1
            if remaining == 0:
                return
        if sources:
            yield Partition(number, sources, pa.concat_tables(tables) if tables else None)
        elif number == 0:
            raise UserError(f"{self.path}: The list has no rows.")

    def digest(self, size: int) -> ListDigest:
        """Number of rows and a hash of all names, to detect a changed list."""
        digest = ListDigest()
        for partition in self.partitions(size):
            digest.add(partition)
        return digest

    # --- reading rows ---------------------------------------------------------------------

    def _chunks(self) -> Iterator[tuple[list[ImageSource], pa.Table | None]]:
        if self.path.is_dir() or is_tar(self.path.name) or has_image_suffix(self.path.name):
            yield from self._folder_chunks()
            return
        row = 0
        for table in self._tables():
            images = table[self.image_key].combine_chunks()
            columns = table.drop_columns([self.image_key]) if self.keep_columns else None
            if not is_embedded(images.type):
                names = [str(name) for name in images.to_pylist()]
                yield [ImageSource(name, name) for name in names], columns
            else:
                sources, rows = self._embedded_sources(images, row)
                yield sources, None if columns is None else columns.take(rows)
            row += len(table)

    def _embedded_sources(
        self, images: pa.Array, first_row: int
    ) -> tuple[list[ImageSource], pa.Array]:
        """The images of a chunk, and the row of each in the chunk."""
        by_row = embedded_images(self.path, images, first_row)
        sources = [
            ImageSource(
                one.name, str(self.path), column=self.image_key, row=one.row, element=one.element
            )
            if one.has_bytes
            else ImageSource(one.name, one.name)
            for row in by_row
            for one in row
        ]
        rows = [offset for offset, row in enumerate(by_row) for _ in row]
        return sources, pa.array(rows, pa.int64())

    def _tables(self) -> Iterator[pa.Table]:
        """Chunks of a table with the requested columns."""
        try:
            if self.path.suffix.lower() not in TABLE_SUFFIXES:
                yield from self._csv_tables()
                return
            columns: list[str] | None = None
            if self.path.suffix.lower() == ".parquet":
                columns = self._select_columns(pq.read_schema(self.path).names)
            for batch in table_batches(self.path, columns):
                selected = columns or self._select_columns(batch.schema.names)
                yield self._check_path_type(pa.Table.from_batches([batch]).select(selected))
        except UserError:
            raise
        except (ValueError, csv.Error, pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: Cannot read the table ({reason}).") from error

    def _csv_tables(self) -> Iterator[pa.Table]:
        """Chunks of a CSV. Every field is a string: "007" stays "007", and "NA" stays "NA"."""
        csv.field_size_limit(MAX_FIELD_LENGTH)
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            first_line = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=self._delimiter(first_line))
            header = next(reader, [])
            columns = self._select_columns(header)
            indices = [header.index(name) for name in columns]
            rows = (row for row in reader if row)
            while chunk := list(islice(rows, _CHUNK)):
                wrong = next((row for row in chunk if len(row) != len(header)), None)
                if wrong is not None:
                    raise UserError(
                        f"{self.path}: A row has {len(wrong)} fields (expected {len(header)}, as "
                        f"in the header): {','.join(wrong)[:100]!r} (at or before line "
                        f"{reader.line_num})."
                    )
                values = [pa.array([row[i] for row in chunk], pa.string()) for i in indices]
                yield pa.table(dict(zip(columns, values, strict=True)))

    def _delimiter(self, header: str) -> str:
        """The delimiter with which a header has the column of the paths; else a comma."""
        for delimiter in _DELIMITERS:
            if self.image_key in next(csv.reader([header], delimiter=delimiter), []):
                return delimiter
        return _DELIMITERS[0]

    def _select_columns(self, columns: list[str]) -> list[str]:
        if self.image_key not in columns:
            raise UserError(
                f"{self.path}: Column {self.image_key!r} not found (columns: "
                f"{', '.join(columns)}). Set --image_key."
            )
        clash = sorted({"img_tokens", "img_path"} & set(columns) - {self.image_key})
        if self.keep_columns and clash:
            raise UserError(
                f"{self.path}: Column {clash[0]!r} would be overwritten. Rename it, or pass it as "
                "--image_key."
            )
        return columns if self.keep_columns else [self.image_key]

    def _check_path_type(self, table: pa.Table) -> pa.Table:
        kind = table.schema.field(self.image_key).type
        if is_embedded(kind):
            return table
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
            raise UserError(
                f"{self.path}: Column {self.image_key!r} has type {kind} (expected strings, or "
                "images as bytes, as {bytes, path}, or as lists of them)."
            )
        for chunk in table[self.image_key].chunks:
            values = chunk.dictionary if pa.types.is_dictionary(kind) else chunk
            if (longest := pc.max(pc.utf8_length(values)).as_py() or 0) > MAX_PATH_LENGTH:
                raise UserError(
                    f"{self.path}: Column {self.image_key!r} has a value of {longest} characters "
                    f"(expected paths of at most {MAX_PATH_LENGTH})."
                )
        return table

    def _check_column_bytes(self, tables: list[pa.Table]) -> None:
        if (size := sum(table.nbytes for table in tables)) > MAX_COLUMN_BYTES:
            raise UserError(
                f"{self.path}: The other columns of a partition are too large (got {size} bytes, "
                f"expected at most {MAX_COLUMN_BYTES}). Use a smaller --partition_size, or do not "
                "keep columns."
            )

    def _folder_chunks(self) -> Iterator[tuple[list[ImageSource], pa.Table | None]]:
        self.skipped.clear()
        rows: Iterator[tuple[ImageSource, Sample]] = folder_images(self.path, self.skipped)
        is_empty = True
        while chunk := list(islice(rows, _CHUNK)):
            is_empty = False
            columns = [pa.array([s[name] for _, s in chunk], pa.string()) for name in TAR_COLUMNS]
            table = pa.table(dict(zip(TAR_COLUMNS, columns, strict=True)))
            yield [source for source, _ in chunk], table if self.keep_columns else None
        if is_empty:
            skipped = describe_skipped(self.skipped) or "the folder is empty"
            raise UserError(f"{self.path}: No images found ({skipped}).")


class ListDigest:
    """A running hash over the partitions of a list, added in order."""

    def __init__(self) -> None:
        self.rows = 0
        self._hash = hashlib.sha256()

    def add(self, partition: Partition) -> None:
        self.rows += len(partition.sources)
        for source in partition.sources:
            self._hash.update(source.name.encode(errors="surrogateescape") + b"\n")

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
