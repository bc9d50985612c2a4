"""Parquet files of image codes: `partition_<k>_rank_<r>.parquet`.

Partition k is a fixed range of the input's rows, and r is the rank that wrote it. An existing file
is complete. Its metadata lists the images of its range that failed, so no other state is needed to
resume a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medley.errors import UserError
from medley.utils.arrow_cache import (
    CACHE_KEY,
    cached_list_size,
    open_cache,
    open_mapped,
    to_numpy,
    writable_cache_path,
)
from medley.utils.config_files import library_errors, one_line
from medley.utils.files import atomic_file
from medley.utils.jsonl import write_jsonl
from medley.utils.tables import parquet_batches
from medley.utils.unicode_names import existing_name, normal_forms

_NAME = re.compile(r"partition_(\d+)_rank_(\d+)\.parquet")
MAX_PATH_BYTES = 1 << 16
_REMAKE = "Remove the file, and make its codes again with `medley tokenize-images`."
_FAILED = b"medley.failed"  # key in the metadata of a partition file


@dataclass(frozen=True)
class TokenizationFailure:
    img_path: str
    error: str


def partition_file(folder: Path, partition: int, rank: int) -> Path:
    return folder / f"partition_{partition}_rank_{rank}.parquet"


def finished_partitions(folder: Path) -> dict[int, Path]:
    """Partition number -> its file. Raises UserError for a duplicate partition."""
    files: dict[int, Path] = {}
    for path in sorted(folder.glob("partition_*.parquet")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        number = int(match[1])
        if number in files:
            raise UserError(
                f"{folder}: Duplicate partition {number} ({files[number].name}, {path.name}), "
                "probably because two runs wrote into one folder. Remove one of the two files."
            )
        files[number] = path
    return files


def assign_partitions(
    rows: int, size: int, finished: Collection[int], rank: int, world_size: int
) -> set[int]:
    """The unfinished partitions of `rows` rows that a rank encodes."""
    count = -(-rows // size)
    unfinished = [number for number in range(count) if number not in finished]
    return set(unfinished[rank::world_size])


def write_partition(
    path: Path,
    paths: Sequence[str],
    codes: NDArray[np.uint16],
    failures: Iterable[TokenizationFailure],
    extra_columns: dict[str, pa.Array] | None = None,
) -> None:
    """Writes paths (N), image codes (N, C), further columns of the input, and the failures.

    Raises UserError if another rank has written the same partition.
    """
    assert codes.dtype == np.uint16 and len(codes) == len(paths)
    _check_unique(path)
    flat = pa.array(codes.reshape(-1), pa.uint16())
    columns: dict[str, pa.Array] = {
        "img_path": pa.array(paths, pa.string()),
        "img_tokens": pa.FixedSizeListArray.from_arrays(flat, codes.shape[1]),
        **(extra_columns or {}),
    }
    failed = json.dumps([[f.img_path, f.error] for f in failures], ensure_ascii=False)
    table = pa.table(columns).replace_schema_metadata({_FAILED: failed.encode()})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
        _check_unique(path)  # again, because encoding a partition takes time


def _check_unique(path: Path) -> None:
    """Raises UserError if another rank's file of the same partition exists."""
    partition = path.name.rpartition("_rank_")[0]
    others = [p.name for p in path.parent.glob(f"{partition}_rank_*.parquet") if p != path]
    if others:
        raise UserError(
            f"{path}: {others[0]} already contains the same images, so another run is writing into "
            "this folder. Stop one of the two runs."
        )


def read_failures(path: Path) -> list[TokenizationFailure]:
    """The images without codes that a partition file lists. Raises UserError for a damaged one."""
    with library_errors(path, "Not a Parquet file of image codes", _REMAKE):
        metadata = _read_metadata(path).metadata or {}
        return [TokenizationFailure(*pair) for pair in json.loads(metadata.get(_FAILED, b"[]"))]


def _read_metadata(path: Path) -> pq.FileMetaData:
    """Raises UserError for a damaged file."""
    try:
        return pq.read_metadata(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: Not a Parquet file of image codes ({one_line(error)}). {_REMAKE}"
        ) from error


def write_error_lists(folder: Path) -> tuple[int, int]:
    """Writes `errors_rank_<r>.jsonl` from the metadata of the partition files.

    Returns the number of images with codes and the number of failures.
    """
    encoded = 0
    by_rank: dict[int, list[TokenizationFailure]] = {}
    for path in finished_partitions(folder).values():
        match = _NAME.fullmatch(path.name)
        assert match is not None
        by_rank.setdefault(int(match[2]), []).extend(read_failures(path))
        encoded += _read_metadata(path).num_rows
    for old in folder.glob("errors_rank_*.jsonl"):
        old.unlink()
    for rank, failures in by_rank.items():
        if failures:
            write_jsonl(folder / f"errors_rank_{rank}.jsonl", map(asdict, failures))
    return encoded, sum(map(len, by_rank.values()))


class ImageTokenStore:
    """Looks up the codes of an image in a folder of partition files, or in one Parquet file.

    An image is identified by its path as written or in another normal form of Unicode, then by its
    real path. On first use, all files are converted to one memory-mapped Arrow file with an index
    of path hashes next to it. The codes of millions of images therefore need no memory.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.parquet")) if self.folder.is_dir() else [self.folder]
        if not files or not files[0].exists():
            raise UserError(
                f"{folder}: No Parquet files of image codes found. Create them with "
                "`medley tokenize-images`."
            )
        parent = self.folder if self.folder.is_dir() else self.folder.parent
        name = "" if self.folder.is_dir() else f"{self.folder.name}."
        cache = writable_cache_path(parent / f".{name}codes")
        table, index = cache.with_name(f"{cache.name}.arrow"), cache.with_name(f"{cache.name}.npy")
        key = hashlib.sha256()
        for file in files:
            status = file.stat()
            key.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        self._open(table, index, files, key.hexdigest())
        self._real_paths: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def _open(self, table: Path, index: Path, files: list[Path], key: str) -> None:
        opened = _open_cache(table, index, key)
        if opened is None:
            _build_cache(self.folder, files, table, index, key)
            opened = _open_cache(table, index, key)
            if opened is None:
                raise UserError(f"{table}: The cache was damaged while it was written. Try again.")
        mapped, (self._hashes, self._rows) = opened
        self._path_chunks = mapped["img_path"].chunks
        self.codes_per_image: int = mapped.schema.field("img_tokens").type.list_size
        self._codes = [
            to_numpy(chunk.values, np.uint16).reshape(len(chunk), -1)
            for chunk in mapped["img_tokens"].chunks
        ]
        self._starts = list(accumulate(map(len, self._codes), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __contains__(self, path: str) -> bool:
        return self._find_row(path) is not None

    def paths(self) -> Iterator[str]:
        """The paths of all images as written, in the order of the files."""
        for chunk in self._path_chunks:
            yield from chunk.to_pylist()

    def get(self, path: str) -> NDArray[np.uint16] | None:
        """Codes (C,) of an image in mapped memory, or None if the store does not contain it."""
        row = self._find_row(path)
        if row is None:
            return None
        chunk, offset = self._locate(row)
        codes: NDArray[np.uint16] = self._codes[chunk][offset]
        return codes

    def _locate(self, row: int) -> tuple[int, int]:
        """The chunk of a row, and its offset in the chunk."""
        chunk = bisect_right(self._starts, row) - 1
        return chunk, row - self._starts[chunk]

    def _path(self, row: int) -> str:
        chunk, offset = self._locate(row)
        return str(self._path_chunks[chunk][offset].as_py())

    def _find_row(self, path: str) -> int | None:
        for form in normal_forms(path):
            for row in _rows_with_hash(self._hashes, self._rows, _path_hash(form)):
                if self._path(row) == form:
                    return row
        real = _real_path(path)
        if self._real_paths is None:  # built on first use: it resolves every path on disk
            hashes = np.array([_path_hash(_real_path(p)) for p in self.paths()], np.uint64)
            order = np.argsort(hashes, kind="stable")
            self._real_paths = hashes[order], order
        for row in _rows_with_hash(*self._real_paths, _path_hash(real)):
            if _real_path(self._path(row)) == real:
                return row
        return None


def _real_path(path: str) -> str:
    return str(Path(existing_name(path)).resolve())


def _path_hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "little")


def _rows_with_hash(hashes: NDArray[np.uint64], rows: NDArray[Any], wanted: int) -> Iterator[int]:
    """The rows with a hash, from sorted hashes and their rows."""
    key = np.uint64(wanted)
    first = int(np.searchsorted(hashes, key))
    while first < len(hashes) and hashes[first] == key:
        yield int(rows[first])
        first += 1


def _cache_schema(key: str, codes_per_image: int) -> pa.Schema:
    return pa.schema(
        [
            ("img_path", pa.large_string()),
            ("img_tokens", pa.list_(pa.uint16(), codes_per_image)),
        ],
        metadata={CACHE_KEY: key.encode()},
    )


def _open_cache(table: Path, index: Path, key: str) -> tuple[pa.Table, NDArray[Any]] | None:
    """Paths with codes, and sorted hashes with rows; None if a file is damaged or outdated."""
    codes_per_image = cached_list_size(table, "img_tokens")
    if codes_per_image is None:
        return None
    opened = open_cache(table, _cache_schema(key, codes_per_image))
    try:
        rows = np.load(index, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # numpy's errors for a damaged file
        return None
    if opened is None or rows.dtype != np.uint64 or rows.shape != (2, len(opened)):
        return None
    is_sorted = bool((rows[0, 1:] >= rows[0, :-1]).all())
    is_valid = is_sorted and bool((rows[1] < len(opened)).all())
    return (opened, rows) if is_valid else None


def _build_cache(folder: Path, files: list[Path], table: Path, index: Path, key: str) -> None:
    """Writes paths and codes as one Arrow file, and the sorted path hashes with their rows."""
    schema = _cache_schema(key, _codes_per_image(files))
    list_type = schema.field("img_tokens").type
    hash_chunks: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
    with atomic_file(table) as temporary:
        with pa.ipc.new_file(str(temporary), schema) as writer:
            for file, batch in ((f, b) for f in files for b in _batches(f)):
                lengths = set(pc.unique(pc.list_value_length(batch["img_tokens"])).to_pylist())
                if lengths - {list_type.list_size}:
                    raise UserError(
                        f"{file}: Images have different numbers of codes "
                        f"({sorted(lengths | {list_type.list_size})}). Use codes of one VQGAN."
                    )
                try:
                    codes = batch["img_tokens"].cast(list_type)
                except pa.ArrowInvalid as error:
                    raise UserError(
                        f"{file}: img_tokens contains a value that is not a valid image code "
                        f"({error})."
                    ) from error
                paths = batch["img_path"].cast(pa.large_string())
                writer.write_table(pa.table([paths, codes], schema=schema))
                hash_chunks.append(np.array([_path_hash(p) for p in paths.to_pylist()], np.uint64))
        hashes = np.concatenate(hash_chunks)
        order = np.argsort(hashes, kind="stable")
        _check_consistent(folder, temporary, hashes[order], order)
        with atomic_file(index) as temporary_index, open(temporary_index, "wb") as out:
            np.save(out, np.stack([hashes[order], order.astype(np.uint64)]))


def _codes_per_image(files: list[Path]) -> int:
    """Number of codes of the first image; 0 if every image failed."""
    for file in files:
        for batch in _batches(file):
            if len(batch):
                return len(batch["img_tokens"][0])
    return 0


def _batches(file: Path) -> Iterator[pa.Table]:
    try:
        for batch in parquet_batches(file, 5000, ["img_path", "img_tokens"]):
            if batch.num_columns != 2:
                raise KeyError("img_path or img_tokens is missing")
            table = pa.Table.from_batches([batch])
            _check_path_lengths(file, table["img_path"])
            yield table
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: Not a Parquet file of image codes ({one_line(error)})."
        ) from error


def _check_path_lengths(file: Path, paths: pa.ChunkedArray) -> None:
    longest = pc.max(pc.binary_length(paths)).as_py() or 0
    if longest > MAX_PATH_BYTES:
        raise UserError(
            f"{file}: img_path contains a value of {longest} bytes (expected paths of at most "
            f"{MAX_PATH_BYTES}). Write the file again with `medley tokenize-images`."
        )


def _check_consistent(
    folder: Path, table: Path, hashes: NDArray[np.uint64], rows: NDArray[np.int64]
) -> None:
    """Raises UserError for a duplicate path with different codes."""
    duplicates = np.flatnonzero(hashes[1:] == hashes[:-1])
    if not len(duplicates):
        return
    mapped = open_mapped(table)
    for i in duplicates:
        first, second = (mapped.slice(int(row), 1).to_pylist()[0] for row in rows[i : i + 2])
        same_path = first["img_path"] == second["img_path"]
        if same_path and first["img_tokens"] != second["img_tokens"]:
            raise UserError(
                f"{folder}: Duplicate path {first['img_path']} with different image codes."
            )
