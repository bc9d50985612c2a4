"""Files that appear whole or not at all, and the manifest that says where they come from."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import secrets
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from medley.errors import UserError
from medley.version import __version__

HASHED_BYTES = 1 << 20  # of a large input, its first and last megabyte and its size


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
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
def whole_folder(path: Path) -> Iterator[Path]:
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


def printable(name: str) -> str:
    """A name whose bytes are no UTF-8, or that holds a NUL, with those bytes written out."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def refuse_half_characters(place: str, value: Any) -> None:
    """Raises UserError for a text with half of a character, which no file can hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: a text with half of a character ({error.reason})") from error
    elif isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            refuse_half_characters(place, own)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a log; what a killed run left half-written ends first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = False
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as written:
            written.seek(-1, os.SEEK_END)
            torn = written.read(1) != b"\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n" if torn else f"{line}\n")


def write_json(path: Path, value: Any) -> None:
    """Numbers that are none, or infinite, become null: JSON has no word for them."""
    with whole_file(path) as temporary:
        text = json.dumps(finite(value), ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same with null for numbers that are none, or infinite."""
    if isinstance(value, dict):
        return {name: finite(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines of a UTF-8 text file, LF or CRLF, blank lines left out."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
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
        file = open(path, "rb")  # noqa: SIM115  # closed below; opening is what may fail
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
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


def quick_hash(path: Path) -> str:
    """SHA-256 over the size, the first and the last megabyte of a file: fast at any size."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        digest.update(handle.read(HASHED_BYTES))
        if size > HASHED_BYTES:
            handle.seek(max(HASHED_BYTES, size - HASHED_BYTES))
            digest.update(handle.read(HASHED_BYTES))
    return digest.hexdigest()


def hash_of(path: Path) -> str:
    """`quick_hash` of a file; of a folder over the names and hashes of the files directly in it."""
    if not path.is_dir():
        return quick_hash(path)
    own = sorted(file for file in path.iterdir() if file.is_file())
    named = "".join(f"{file.name} {quick_hash(file)}\n" for file in own)
    return hashlib.sha256(named.encode()).hexdigest()


# --- manifests ----------------------------------------------------------------------------


def manifest_path(path: Path) -> Path:
    """`manifest.json` in a folder, `NAME.manifest.json` beside a single file."""
    return path / "manifest.json" if path.is_dir() else path.with_name(f"{path.name}.manifest.json")


def write_manifest(
    path: Path,
    options: dict[str, Any],
    inputs: Sequence[Path],
    fingerprint: str | None,
    **more: Any,
) -> None:
    write_json(
        manifest_path(path),
        {
            "medley": __version__,
            "git_commit": _git_commit(),
            "options": options,
            "inputs": {str(p): quick_hash(p) for p in inputs if p.is_file()},
            "token_space": fingerprint,
            **more,
        },
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a file or folder, or an empty one where there is none."""
    place = manifest_path(path)
    manifest: dict[str, Any] = read_json(place) if place.exists() else {}
    return manifest


def check_fingerprint(path: Path, expected: str, whose: str, fit: str | None = None) -> None:
    """Refuses a file of another token space; warns where a file does not say which it is, and
    where its pictures were fitted into squares in another way than `fit`.
    """
    manifest = read_manifest(path)
    found = manifest.get("token_space")
    if fit is not None and manifest.get("fit") not in (None, fit):
        warnings.warn(
            f"{path}: its pictures were made square by --fit {manifest['fit']}, {whose} has {fit}: "
            "the model will see other pictures in use than in training",
            stacklevel=2,
        )
    if found is None:
        warnings.warn(
            f"{path} carries no token-space fingerprint: make sure that its image codes come "
            f"from the VQGAN of {whose}",
            stacklevel=2,
        )
    elif found != expected:
        raise UserError(
            f"{path}: its image codes come from another VQGAN (token space {found[:12]}, "
            f"{whose} has {expected[:12]}; see {manifest_path(path)}): tokenize the pictures "
            "again with this checkpoint"
        )


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / ".git").exists():
        return None  # an installed wheel: no commit to name
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return None  # no git on this machine
    return done.stdout.strip() or None
