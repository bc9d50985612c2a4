"""Files that appear whole or not at all, and the manifest that says where they come from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medley.errors import UserError

HASHED_BYTES = 1 << 20  # of a large input, its first and last megabyte and its size


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, renamed to it when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several machines that share a folder may have the same process numbers.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, renamed to it when the block ends well.

    Raises UserError where `path` exists already and holds something.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already; name another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_space(target: Path, size: int) -> None:
    """Raises UserError where the disk of `target` has no room for so many bytes."""
    folder = target
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{target}: needs {size / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free; "
            "make room or name another folder"
        )


def escape_name(name: str) -> str:
    """A name whose bytes are no UTF-8, or that holds a NUL, with those bytes written out."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def check_unicode(place: str, value: Any) -> None:
    """Raises UserError for a text with half of a character, which no file can hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: a text with half of a character ({error.reason})") from error
    elif isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            check_unicode(place, own)


def write_json(path: Path, value: Any) -> None:
    """Numbers that are none, or infinite, become null: JSON has no word for them."""
    with atomic_file(path) as temporary:
        text = json.dumps(nan_to_null(value), ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def nan_to_null(value: Any) -> Any:
    """The same with null for numbers that are none, or infinite."""
    if isinstance(value, dict):
        return {name: nan_to_null(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def partial_hash(path: Path) -> str:
    """SHA-256 over the size, the first and the last megabyte of a file: fast at any size."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        digest.update(handle.read(HASHED_BYTES))
        if size > HASHED_BYTES:
            handle.seek(max(HASHED_BYTES, size - HASHED_BYTES))
            digest.update(handle.read(HASHED_BYTES))
    return digest.hexdigest()


def path_hash(path: Path) -> str:
    """`partial_hash` of a file; of a folder over the names and hashes of the files directly in it."""
    if not path.is_dir():
        return partial_hash(path)
    own = sorted(file for file in path.iterdir() if file.is_file())
    named = "".join(f"{file.name} {partial_hash(file)}\n" for file in own)
    return hashlib.sha256(named.encode()).hexdigest()
