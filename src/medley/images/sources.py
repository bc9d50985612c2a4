"""Image lists of any length: CSV, Parquet, a folder, WebDataset tars; read part by part.

A part is a fixed range of the list's rows. Nothing holds the whole list, so that memory does
not grow with it; who needs a part reads up to it.
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
TAR_COLUMNS = ("__key__", "txt", "json")  # what --keep_columns keeps of a WebDataset sample
LONGEST_FIELD = 1 << 24  # characters of one field of a CSV
_ROWS_AT_ONCE = 4096  # rows of a table read in one go


Frames = Literal["first", "middle", "all"]


@dataclass(frozen=True)
class ImageSource:
    """Where a picture lies: a file, or a stretch of a tar. `name` is what everybody calls it."""

    name: str
    file: str
    frame: Frame | None = None
    offset: int | None = None
    length: int = 0

    def open(self, exif_orientation: bool = False) -> Image.Image:
        """The picture as RGB. Raises ImageError."""
        if self.offset is None:
            return open_image(self.file, self.frame, exif_orientation)
        with self._data() as data:
            # Without the number of its frame: the suffix says what a file is.
            name = self.name.removesuffix(f"#{self.frame}")
            return read_image(data, name, self.frame, exif_orientation)

    def frames(self) -> list[ImageSource]:
        """One source for each frame of the file, called `name#0`, `name#1` and so on.

        A file that cannot be read stays one source: whoever opens it will say why.
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
    """Rows `number * size` to `(number + 1) * size` of a list; `kept` are its other columns."""

    number: int
    sources: list[ImageSource]
    kept: pa.Table | None

    def with_frames(self, frames: Frames | None) -> Partition:
        """The same part with a frame chosen in each file, or with a source for every frame."""
        if frames is None:
            return self
        if frames != "all":
            return replace(self, sources=[replace(s, frame=frames) for s in self.sources])
        split = [(row, one) for row, s in enumerate(self.sources) for one in s.frames()]
        rows = pa.array([row for row, _ in split], pa.int64())
        kept = None if self.kept is None else self.kept.take(rows)
        return Partition(self.number, [one for _, one in split], kept)


class ImageList:
    """A list of pictures on disk, read as often as it is needed and never held.

    `image_key` is the column of the paths in a table; `limit` cuts the list. Raises UserError
    for what is no list; a row whose picture is bad is found out when the picture is opened.
    """

    def __init__(
        self,
        path: Path,
        image_key: str = "img_path",
        keep_columns: bool = False,
        limit: int | None = None,
    ) -> None:
        if not path.exists():
            raise UserError(f"{path}: no such image list or folder")
        self.path, self.image_key = path, image_key
        self.keep_columns, self.limit = keep_columns, limit

    def parts(self, size: int) -> Iterator[Partition]:
        """Every part in order, each of `size` rows but for the last."""
        left = sys.maxsize if self.limit is None else self.limit
        sources: list[ImageSource] = []
        tables: list[pa.Table] = []
        number = 0
        for more, kept in self._chunks():
            more = more[:left]
            left -= len(more)
            sources += more
            tables += [] if kept is None else [kept.slice(0, len(more))]
            while len(sources) >= size or (sources and left == 0):
                table = pa.concat_tables(tables) if tables else None
                yield Partition(number, sources[:size], table and table.slice(0, size))
                sources, tables = sources[size:], [] if table is None else [table.slice(size)]
                number += 1
            if left == 0:
                return
        if sources:
            yield Partition(number, sources, pa.concat_tables(tables) if tables else None)
        elif number == 0:
            raise UserError(f"{self.path}: a list without a single row")

    def digest(self, size: int) -> Digest:
        """Rows, and a hash over all their names: whether a list is still the same one."""
        digest = Digest()
        for part in self.parts(size):
            digest.add(part)
        return digest

    # --- where rows come from -------------------------------------------------------------

    def _chunks(self) -> Iterator[tuple[list[ImageSource], pa.Table | None]]:
        if self.path.is_dir() or self.path.suffix == TAR:
            yield from self._from_folder()
            return
        for table in self._tables():
            names = [str(name) for name in table[self.image_key].to_pylist()]
            kept = table.drop_columns([self.image_key]) if self.keep_columns else None
            yield [ImageSource(name, name) for name in names], kept

    def _tables(self) -> Iterator[pa.Table]:
        """Chunks of a CSV or Parquet file with the columns that are wanted of it."""
        try:
            if self.path.suffix == ".parquet":
                file = pq.ParquetFile(self.path)
                columns = self._wanted(file.schema_arrow.names)
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                    yield self._checked(pa.Table.from_batches([batch]))
                return
            yield from self._csv()
        except UserError:
            raise
        except (ValueError, csv.Error, pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: not a table that can be read ({reason})") from error

    def _csv(self) -> Iterator[pa.Table]:
        """Every field as it is written: "007" must not become 7, nor "NA" nothing."""
        csv.field_size_limit(LONGEST_FIELD)
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            columns = self._wanted(header)
            places = [header.index(name) for name in columns]
            rows = (row for row in reader if row)
            while chunk := list(islice(rows, _ROWS_AT_ONCE)):
                wrong = next((row for row in chunk if len(row) != len(header)), None)
                if wrong is not None:
                    raise UserError(
                        f"{self.path}: a row of {len(wrong)} fields, the header has {len(header)}: "
                        f"{','.join(wrong)[:100]!r} (at or before line {reader.line_num})"
                    )
                values = [pa.array([row[place] for row in chunk], pa.string()) for place in places]
                yield pa.table(dict(zip(columns, values, strict=True)))

    def _wanted(self, columns: list[str]) -> list[str]:
        if self.image_key not in columns:
            raise UserError(
                f"{self.path}: no column {self.image_key!r}, there are {', '.join(columns)}; "
                "name one with --image_key"
            )
        clash = sorted({"img_tokens", "img_path"} & set(columns) - {self.image_key})
        if self.keep_columns and clash:
            raise UserError(
                f"{self.path}: its column {clash[0]!r} would be written over; rename it, or "
                "name it with --image_key"
            )
        return columns if self.keep_columns else [self.image_key]

    def _checked(self, table: pa.Table) -> pa.Table:
        kind = table.schema.field(self.image_key).type
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
            raise UserError(
                f"{self.path}: column {self.image_key!r} holds {kind}, expected paths (strings)"
            )
        return table

    def _from_folder(self) -> Iterator[tuple[list[ImageSource], pa.Table | None]]:
        files = _walk(self.path) if self.path.is_dir() else iter([str(self.path)])
        rows: Iterator[tuple[ImageSource, _Sample]] = (row for f in files for row in _rows_of(f))
        found = False
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            found = True
            kept = [pa.array([s[name] for _, s in chunk], pa.string()) for name in TAR_COLUMNS]
            table = pa.table(dict(zip(TAR_COLUMNS, kept, strict=True)))
            yield [source for source, _ in chunk], table if self.keep_columns else None
        if not found:
            raise UserError(f"{self.path}: no pictures ({', '.join(SUFFIXES)}) in it")


class Digest:
    """Grows with the parts of a list, read in order."""

    def __init__(self) -> None:
        self.rows = 0
        self._hash = hashlib.sha256()

    def add(self, part: Partition) -> None:
        self.rows += len(part.sources)
        for source in part.sources:
            self._hash.update(source.name.encode(errors="surrogateescape") + b"\n")

    @property
    def hexadecimal(self) -> str:
        return self._hash.hexdigest()


_Sample = dict[str, str | None]


def _walk(folder: Path | str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Files below a folder that are pictures or tars, in an order that is always the same."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder}: a link that leads back to {real}, which holds it; remove it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real))
        elif entry.name.lower().endswith((*SUFFIXES, TAR)) or _is_bare_dicom(entry.path):
            yield entry.path


def _is_bare_dicom(path: str) -> bool:
    """Scanners write files without a suffix, or with a number for one; DICOM's mark tells them."""
    try:
        with open(path, "rb") as data:
            return medical.kind_of(data, path) == "dicom"
    except OSError:
        return False


def _rows_of(file: str) -> Iterator[tuple[ImageSource, _Sample]]:
    if not file.endswith(TAR):
        yield ImageSource(file, file), dict.fromkeys(TAR_COLUMNS)
        return
    try:
        with tarfile.open(file, "r:") as tar:
            for key, members in groupby(tar, lambda m: _sample_key(m.name)):
                # Links hold nothing and fail when they are opened: they are not passed over.
                whole = [m for m in members if not m.isdir()]
                yield from _pictures_of(tar, file, key, whole)
                tar.members = []  # type: ignore[attr-defined]  # it would remember them all
        with open(file, "rb") as raw:
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")  # tarfile itself says nothing
    except tarfile.TarError as error:
        raise UserError(
            f"{file}: not a tar that can be read ({error}); a compressed or broken one has to be "
            "unpacked or fetched again"
        ) from error


def _sample_key(member: str) -> str:
    """WebDataset: files of one sample stand together and share the name up to its first dot."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _pictures_of(
    tar: tarfile.TarFile, file: str, key: str, members: list[tarfile.TarInfo]
) -> Iterator[tuple[ImageSource, _Sample]]:
    sample: _Sample = {**dict.fromkeys(TAR_COLUMNS), "__key__": escape_name(key)}
    for member in members:
        kind = member.name.rpartition(".")[2].lower()
        if kind in TAR_COLUMNS and member.isfile():
            stream = tar.extractfile(member)
            assert stream is not None
            sample[kind] = stream.read().decode("utf-8", errors="replace")
    for member in members:
        if member.name.lower().endswith(SUFFIXES):
            name = f"{file}/{member.name}"
            yield ImageSource(name, file, None, member.offset_data, member.size), sample
