"""Arrays of an .npz file, read row by row and never with pickled objects."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from medley.errors import UserError
from medley.utils.files import refuse_lfs_pointer

_BLOCK = 1 << 22  # bytes that are read at once
_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError,
           SyntaxError)  # fmt: skip


@dataclass(frozen=True)
class NpzArray:
    """The header of an array in an .npz file.

    Attributes:
        path: the file
        name: name of the array
        shape: its shape
        dtype: its type, never object
        is_fortran: whether its first axis varies fastest
        offset: bytes before its values
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    offset: int

    def load(self) -> NDArray[Any]:
        """All values. Raises UserError for a damaged file."""
        rows = list(self.rows())
        return np.stack(rows) if rows else np.empty(self.shape, self.dtype)

    def rows(self) -> Iterator[NDArray[Any]]:
        """The elements along the first axis. Raises UserError for a damaged file."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(_member(self.name)) as file:
                file.seek(self.offset)
                yield from self._fortran_rows(file) if self.is_fortran else self._rows(file)
        except _ERRORS as error:
            raise _damaged(self.path, self.name, error) from error

    def _rows(self, file: IO[bytes]) -> Iterator[NDArray[Any]]:
        row_shape = self.shape[1:]
        row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
        per_block = max(1, _BLOCK // max(row_bytes, 1))
        for start in range(0, self.shape[0], per_block):
            count = min(per_block, self.shape[0] - start)
            data = file.read(count * row_bytes)
            if len(data) < count * row_bytes:
                raise EOFError(f"row {start + len(data) // max(row_bytes, 1)} is missing")
            yield from np.frombuffer(data, self.dtype).reshape(count, *row_shape)

    def _fortran_rows(self, file: IO[bytes]) -> Iterator[NDArray[Any]]:
        values = np.frombuffer(file.read(), self.dtype)
        yield from values.reshape(self.shape[::-1]).T


def _member(name: str) -> str:
    return f"{name}.npy"


def _damaged(path: Path, name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: The array {name!r} is damaged ({reason}). Download the file again.")


def read_headers(path: Path) -> dict[str, NpzArray]:
    """The arrays of a file by name, without their values.

    Raises UserError for a file that is missing, not .npz or damaged, and for pickled objects.
    """
    if not path.is_file():
        problem = "Expected an .npz file, not a folder" if path.is_dir() else "No such file"
        raise UserError(f"{path}: {problem}.")
    refuse_lfs_pointer(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            return {
                member.filename.removesuffix(".npy"): _read_header(path, archive, member)
                for member in members if member.filename.endswith(".npy")
            }  # fmt: skip
    except UserError:
        raise
    except _ERRORS as error:
        raise UserError(f"{path}: The file is not an .npz file ({error}).") from error


def _read_header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NpzArray:
    name = member.filename.removesuffix(".npy")
    try:
        with archive.open(member) as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
            offset = file.tell()
    except _ERRORS as error:
        raise _damaged(path, name, error) from error
    if dtype.hasobject:
        raise UserError(
            f"{path}: The array {name!r} holds pickled Python objects, which could run any "
            "program when they are loaded. Save it as numbers."
        )
    size = offset + int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if size != member.file_size:
        raise UserError(
            f"{path}: The array {name!r} is damaged (got {member.file_size} bytes, expected {size} "
            f"for the shape {shape}). Download the file again."
        )
    return NpzArray(path, name, shape, dtype, is_fortran, offset)
