"""Image lists of any length (CSV, Parquet, folder, WebDataset tar), read one partition at a time.

A partition is a fixed range of the list's rows. The complete list is never in memory. To process a
partition, a reader iterates over the rows before it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medley.errors import UserError
from medley.images import medical
from medley.images.preprocess import Frame, count_frames, open_image, read_image
from medley.utils.files import escape_name

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", *medical.SUFFIXES
)  # fmt: skip
TAR = ".tar"
TAR_COLUMNS = ("__key__", "txt", "json")  # the columns of a WebDataset sample
MAX_FIELD_LENGTH = 1 << 24  # characters of one CSV field
_CHUNK = 4096  # rows of a table that are read together


Frames = Literal["first", "middle", "all"]


@dataclass(frozen=True)
class ImageSource:
    """An image in a file or in a tar (`offset`, `length`).

    `name` identifies the image in outputs and errors.
    """

    name: str
    file: str
    frame: Frame | None = None
    offset: int | None = None
    length: int = 0

    def open(self, exif_orientation: bool = False) -> Image.Image:
        """The image as RGB. Raises ImageError."""
        if self.offset is None:
            return open_image(self.file, self.frame, exif_orientation)
        with self._data() as data:
            # Without the frame number, because the suffix determines the format.
            name = self.name.removesuffix(f"#{self.frame}")
            return read_image(data, name, self.frame, exif_orientation)

    def frames(self) -> list[ImageSource]:
        """One source for each frame of the file, named `name#0`, `name#1` and so on.

        An unreadable file stays one source; opening it raises the error.
        """
        try:
            with self._data() as data:
                count = count_frames(data, self.name)
        except Exception:
            count = 1
        if count == 1:
            return [self]
        return [replace(self, name=f"{self.name}#{i}", frame=i) for i in range(count)]

    def _data(self) -> BinaryIO:
        if self.offset is None:
            return open(self.file, "rb")
        with open(self.file, "rb") as tar:
            tar.seek(self.offset)
            return io.BytesIO(tar.read(self.length))


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
        path: CSV or Parquet file, folder, or tar
        image_key: column of the paths in a table
        keep_columns: read the other columns as well
        limit: use only the first rows

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
        if self.path.is_dir() or self.path.suffix == TAR:
            yield from self._folder_chunks()
            return
        for table in self._tables():
            names = [str(name) for name in table[self.image_key].to_pylist()]
            columns = table.drop_columns([self.image_key]) if self.keep_columns else None
            yield [ImageSource(name, name) for name in names], columns

    def _tables(self) -> Iterator[pa.Table]:
        """Chunks of a CSV or Parquet file with the requested columns."""
        try:
            if self.path.suffix == ".parquet":
                file = pq.ParquetFile(self.path)
                columns = self._select_columns(file.schema_arrow.names)
                for batch in file.iter_batches(_CHUNK, columns=columns):
                    yield self._check_path_type(pa.Table.from_batches([batch]))
                return
            yield from self._csv_tables()
        except UserError:
            raise
        except (ValueError, csv.Error, pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: Cannot read the table ({reason}).") from error

    def _csv_tables(self) -> Iterator[pa.Table]:
        """Chunks of a CSV. Every field is a string: "007" stays "007", and "NA" stays "NA"."""
        csv.field_size_limit(MAX_FIELD_LENGTH)
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
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
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
            raise UserError(
                f"{self.path}: Column {self.image_key!r} has type {kind} (expected strings)."
            )
        return table

    def _folder_chunks(self) -> Iterator[tuple[list[ImageSource], pa.Table | None]]:
        files = _walk(self.path) if self.path.is_dir() else iter([str(self.path)])
        rows: Iterator[tuple[ImageSource, _Sample]] = (row for f in files for row in _file_rows(f))
        is_empty = True
        while chunk := list(islice(rows, _CHUNK)):
            is_empty = False
            columns = [pa.array([s[name] for _, s in chunk], pa.string()) for name in TAR_COLUMNS]
            table = pa.table(dict(zip(TAR_COLUMNS, columns, strict=True)))
            yield [source for source, _ in chunk], table if self.keep_columns else None
        if is_empty:
            raise UserError(f"{self.path}: No images found (expected {', '.join(SUFFIXES)}).")


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


_Sample = dict[str, str | None]


def _walk(folder: Path | str, ancestors: tuple[str, ...] = ()) -> Iterator[str]:
    """Images and tars below a folder, sorted by name."""
    real = os.path.realpath(folder)
    if real in ancestors:
        raise UserError(f"{folder}: A symbolic link to its own ancestor {real}. Remove the link.")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, (*ancestors, real))
        elif entry.name.lower().endswith((*SUFFIXES, TAR)) or _has_dicom_magic(entry.path):
            yield entry.path


def _has_dicom_magic(path: str) -> bool:
    """Whether a file is DICOM. Scanners write files without a suffix, or with a numeric one."""
    try:
        with open(path, "rb") as data:
            return medical.detect_format(data, path) == "dicom"
    except OSError:
        return False


def _file_rows(file: str) -> Iterator[tuple[ImageSource, _Sample]]:
    """The images of one file: one, or all images of a tar."""
    if not file.endswith(TAR):
        yield ImageSource(file, file), dict.fromkeys(TAR_COLUMNS)
        return
    try:
        with tarfile.open(file, "r:") as tar:
            for key, members in groupby(tar, lambda m: _sample_key(m.name)):
                # Links are included: they have no content, so opening them reports an error.
                files = [m for m in members if not m.isdir()]
                yield from _tar_images(tar, file, key, files)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
        with open(file, "rb") as raw:
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                # tarfile does not report this.
                raise tarfile.ReadError("the end-of-archive block is missing")
    except tarfile.TarError as error:
        raise UserError(
            f"{file}: Cannot read the tar ({error}). Decompress it if it is compressed; download "
            "it again if it is broken."
        ) from error


def _sample_key(member: str) -> str:
    """WebDataset: adjacent files with the same name up to the first dot form a sample."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _tar_images(
    tar: tarfile.TarFile, file: str, key: str, members: list[tarfile.TarInfo]
) -> Iterator[tuple[ImageSource, _Sample]]:
    sample: _Sample = {**dict.fromkeys(TAR_COLUMNS), "__key__": escape_name(key)}
    for member in members:
        suffix = member.name.rpartition(".")[2].lower()
        if suffix in TAR_COLUMNS and member.isfile():
            stream = tar.extractfile(member)
            assert stream is not None
            sample[suffix] = stream.read().decode("utf-8", errors="replace")
    for member in members:
        if member.name.lower().endswith(SUFFIXES):
            name = f"{file}/{member.name}"
            yield ImageSource(name, file, None, member.offset_data, member.size), sample
