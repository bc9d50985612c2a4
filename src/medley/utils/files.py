"""Files and folders that are written atomically, JSON files, and hashes of files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.utils.temporary_files import disk_errors, temporary_path

HASHED_BYTES = 1 << 20  # `partial_hash` reads as many bytes from each end of a file
HASHED_SAMPLES, SAMPLE_BYTES = 256, 1 << 12  # `sampled_hash` reads so many samples of this size


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds.

    Raises UserError if the disk is full.
    """
    with disk_errors(path), temporary_path(path) as temporary:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; renames it to `path` if the block succeeds.

    Raises UserError if `path` exists and is not an empty folder, or if the disk is full.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path}: already exists and is not empty. Name another folder or remove it."
        )
    with disk_errors(path), temporary_path(path, folder=True) as temporary:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.replace(path)


def nearest_parent(path: Path) -> Path:
    """The deepest existing folder that contains `path`, or `path` itself."""
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())


def require_space(target: Path, size: int) -> None:
    """Raises UserError if the disk of `target` has less than `size` free bytes."""
    free = shutil.disk_usage(nearest_parent(target)).free
    if size > free:
        raise UserError(
            f"{target}: not enough disk space (needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
            "free). Free some space or name another folder."
        )


def escape_name(name: str) -> str:
    """A file name as printable text: bytes that are not UTF-8, and NUL, as escape sequences."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def check_unicode(where: str, value: Any) -> None:
    """Raises UserError for a string with an unpaired surrogate, which UTF-8 cannot encode."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: a string contains an unpaired surrogate ({error.reason}). "
                "Write the character in full."
            ) from error
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            check_unicode(where, item)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically. NaN and infinity become null; JSON cannot represent them."""
    with atomic_file(path) as temporary:
        text = json.dumps(nan_to_null(value), ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def nan_to_null(value: Any) -> Any:
    """A copy of a JSON value with None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: nan_to_null(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The value of a JSON file, with or without a byte-order mark.

    Raises UserError for a file that is missing or not JSON. `config_files.read_json_object` also
    checks that the file contains an object, and bounds its size.
    """
    try:
        refuse_lfs_pointer(path)
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: File not found.") from error
    except RecursionError as error:
        raise UserError(f"{path}: not JSON (nested too deeply)") from error
    except ValueError as error:  # not UTF-8, not JSON, or a number with too many digits
        raise UserError(f"{path}: not JSON ({error})") from error


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git LFS left a pointer in place of the file's content."""
    with open(path, "rb") as handle:
        return handle.read(40).startswith(b"version https://git-lfs")


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError for a pointer of Git LFS."""
    if is_lfs_pointer(path):
        raise UserError(
            f"{path}: The file is a Git LFS pointer, not the data. Fetch the data with "
            "`git lfs pull`."
        )


def partial_hash(path: Path) -> str:
    """SHA-256 of a file's size and its first and last megabyte; fast for files of any size."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        digest.update(handle.read(HASHED_BYTES))
        if size > HASHED_BYTES:
            handle.seek(max(HASHED_BYTES, size - HASHED_BYTES))
            digest.update(handle.read(HASHED_BYTES))
    return digest.hexdigest()


def sampled_hash(path: Path) -> str:
    """SHA-256 of a file's size and of samples all over it: other weights give another hash."""
    size = path.stat().st_size
    if size <= HASHED_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        for number in range(HASHED_SAMPLES):
            handle.seek(number * (size - SAMPLE_BYTES) // (HASHED_SAMPLES - 1))
            digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


def path_hash(path: Path) -> str:
    """`partial_hash` of a file; for a folder a hash of the names and hashes of its files.

    Files in subfolders do not count.
    """
    if not path.is_dir():
        return partial_hash(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    listing = "".join(f"{file.name} {partial_hash(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()
