"""Parquet shards of image codes: `partition_<k>_rank_<r>.parquet`.

Partition k is a fixed range of the input, r the rank that wrote it. A file that exists is
whole, and holds in its metadata the pictures of its range that failed, so that nothing has to
be remembered anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medley.errors import UserError
from medley.utils.arrow_cache import CACHE_KEY, cache_key, cache_place, numbers_of, open_mapped
from medley.utils.files import atomic_file

_NAME = re.compile(r"partition_(\d+)_rank_(\d+)\.parquet")
_FAILED = b"medley.failed"


@dataclass(frozen=True)
class TokenizationFailure:
    img_path: str
    error: str


def partition_file(folder: Path, partition: int, rank: int) -> Path:
    return folder / f"partition_{partition}_rank_{rank}.parquet"


def finished_partitions(folder: Path) -> dict[int, Path]:
    """Partition number -> its file. Raises UserError for one that stands there twice."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("partition_*.parquet")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        number = int(match[1])
        if number in found:
            raise UserError(
                f"{folder}: partition {number} stands there twice ({found[number].name}, "
                f"{path.name}): two runs wrote into one folder; remove one of the two"
            )
        found[number] = path
    return found


def write_partition(
    path: Path,
    paths: Sequence[str],
    codes: np.ndarray[Any, np.dtype[Any]],
    failures: Iterable[TokenizationFailure],
    extra: dict[str, pa.Array] | None = None,
) -> None:
    """Writes paths (N) and codes uint16 (N, C), with columns of the input where asked for."""
    assert codes.dtype == np.uint16 and len(codes) == len(paths)
    _refuse_second(path)
    flat = pa.array(codes.reshape(-1), pa.uint16())
    columns: dict[str, pa.Array] = {
        "img_path": pa.array(paths, pa.string()),
        "img_tokens": pa.FixedSizeListArray.from_arrays(flat, codes.shape[1]),
        **(extra or {}),
    }
    failed = json.dumps([[f.img_path, f.error] for f in failures], ensure_ascii=False)
    table = pa.table(columns).replace_schema_metadata({_FAILED: failed.encode()})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
        _refuse_second(path)  # looked for once more: encoding a partition takes its time


def _refuse_second(path: Path) -> None:
    """Raises UserError where another rank's file of the same partition stands already."""
    partition = path.name.rpartition("_rank_")[0]
    others = [p.name for p in path.parent.glob(f"{partition}_rank_*.parquet") if p != path]
    if others:
        raise UserError(
            f"{path}: {others[0]} holds the same pictures already: another run is writing into "
            "this folder; let one of the two end"
        )


def read_failures(path: Path) -> list[TokenizationFailure]:
    metadata = pq.read_schema(path).metadata or {}
    return [TokenizationFailure(*pair) for pair in json.loads(metadata.get(_FAILED, b"[]"))]


def write_error_lists(folder: Path) -> tuple[int, int]:
    """Writes `errors_rank_<r>.jsonl` from what the partition files carry.

    Gives how many pictures have codes, and how many failed.
    """
    encoded = 0
    by_rank: dict[int, list[TokenizationFailure]] = {}
    for path in finished_partitions(folder).values():
        match = _NAME.fullmatch(path.name)
        assert match is not None
        by_rank.setdefault(int(match[2]), []).extend(read_failures(path))
        encoded += pq.read_metadata(path).num_rows
    for old in folder.glob("errors_rank_*.jsonl"):
        old.unlink()
    for rank, failures in by_rank.items():
        if failures:
            with atomic_file(folder / f"errors_rank_{rank}.jsonl") as temporary:
                lines = [
                    json.dumps({"img_path": f.img_path, "error": f.error}, ensure_ascii=False)
                    for f in failures
                ]
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return encoded, sum(map(len, by_rank.values()))


class ImageTokenStore:
    """Looks up the codes of a picture in a folder of shards, or in one Parquet file.

    A picture is found by the path as it was written, then by its real path. The shards are
    turned once into a file that is mapped into memory, with an index of hashes beside it:
    nothing of them is held, so that millions of pictures cost no memory.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.parquet")) if self.folder.is_dir() else [self.folder]
        if not files or not files[0].exists():
            raise UserError(f"{folder}: no Parquet files of image codes there")
        inside = self.folder if self.folder.is_dir() else self.folder.parent
        name = "" if self.folder.is_dir() else f"{self.folder.name}."
        place = cache_place(inside / f".{name}codes")
        table, index = place.with_name(f"{place.name}.arrow"), place.with_name(f"{place.name}.npy")
        key = hashlib.sha256()
        for file in files:
            status = file.stat()
            key.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        self._open(table, index, files, key.hexdigest())
        self._real: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def _open(self, table: Path, index: Path, files: list[Path], key: str) -> None:
        if cache_key(table) != key or not index.exists():
            _make_table(self.folder, files, table, index, key)
        mapped = open_mapped(table)
        self._paths = mapped["img_path"]
        self._path_chunks = self._paths.chunks
        self.codes_per_image: int = mapped.schema.field("img_tokens").type.list_size
        self._codes = [
            numbers_of(chunk.values, np.uint16).reshape(len(chunk), -1)
            for chunk in mapped["img_tokens"].chunks
        ]
        self._starts = list(accumulate(map(len, self._codes), initial=0))
        self._hashes, self._rows = np.load(index, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, path: str) -> bool:
        return self._row(path) is not None

    def paths(self) -> Iterator[str]:
        """Every picture's path as it was written, in the order of the shards."""
        for chunk in self._paths.chunks:
            yield from chunk.to_pylist()

    def get(self, path: str) -> NDArray[np.uint16] | None:
        """Codes (C,) of a picture, in mapped memory, or None."""
        row = self._row(path)
        if row is None:
            return None
        chunk, place = self._find(row)
        codes: NDArray[np.uint16] = self._codes[chunk][place]
        return codes

    def _find(self, row: int) -> tuple[int, int]:
        chunk = bisect_right(self._starts, row) - 1
        return chunk, row - self._starts[chunk]

    def _path(self, row: int) -> str:
        chunk, place = self._find(row)
        return str(self._path_chunks[chunk][place].as_py())

    def _row(self, path: str) -> int | None:
        for row in _with_hash(self._hashes, self._rows, _hash(path)):
            if self._path(row) == path:
                return row
        real = str(Path(path).resolve())
        if self._real is None:  # made when it is first needed: it asks the disk for every path
            hashes = np.array([_hash(str(Path(p).resolve())) for p in self.paths()], np.uint64)
            order = np.argsort(hashes, kind="stable")
            self._real = hashes[order], order
        for row in _with_hash(*self._real, _hash(real)):
            if str(Path(self._path(row)).resolve()) == real:
                return row
        return None


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "little")


def _with_hash(hashes: NDArray[np.uint64], rows: NDArray[Any], wanted: int) -> Iterator[int]:
    """Rows of a sorted table of hashes that have the wanted one."""
    key = np.uint64(wanted)
    first = int(np.searchsorted(hashes, key))
    while first < len(hashes) and hashes[first] == key:
        yield int(rows[first])
        first += 1


def _make_table(folder: Path, files: list[Path], table: Path, index: Path, key: str) -> None:
    """Writes paths and codes as one Arrow file, and their hashes, sorted, with their rows."""
    lists = pa.list_(pa.uint16(), _codes_per_image(files))
    schema = pa.schema(
        [("img_path", pa.large_string()), ("img_tokens", lists)],
        metadata={CACHE_KEY: key.encode()},
    )
    found: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
    with atomic_file(table) as temporary:
        with pa.ipc.new_file(str(temporary), schema) as writer:
            for file, batch in ((f, b) for f in files for b in _batches(f)):
                lengths = set(pc.unique(pc.list_value_length(batch["img_tokens"])).to_pylist())
                if lengths - {lists.list_size}:
                    raise UserError(
                        f"{file}: pictures with different numbers of codes: "
                        f"{sorted(lengths | {lists.list_size})}"
                    )
                try:
                    codes = batch["img_tokens"].cast(lists)
                except pa.ArrowInvalid as error:
                    raise UserError(f"{file}: a code that is none ({error})") from error
                paths = batch["img_path"].cast(pa.large_string())
                writer.write_table(pa.table([paths, codes], schema=schema))
                found.append(np.array([_hash(path) for path in paths.to_pylist()], np.uint64))
        hashes = np.concatenate(found)
        order = np.argsort(hashes, kind="stable")
        _refuse_contradictions(folder, temporary, hashes[order], order)
        with atomic_file(index) as numbers, open(numbers, "wb") as out:
            np.save(out, np.stack([hashes[order], order.astype(np.uint64)]))


def _codes_per_image(files: list[Path]) -> int:
    """Codes of the first picture; 0 where every picture failed."""
    for file in files:
        for batch in _batches(file):
            if len(batch):
                return len(batch["img_tokens"][0])
    return 0


def _batches(file: Path) -> Iterator[pa.Table]:
    try:
        for batch in pq.ParquetFile(file).iter_batches(5000, columns=["img_path", "img_tokens"]):
            if batch.num_columns != 2:
                raise KeyError("img_path or img_tokens is missing")
            yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise UserError(f"{file}: not a shard of image codes ({error})") from error


def _refuse_contradictions(
    folder: Path, table: Path, hashes: NDArray[np.uint64], rows: NDArray[np.int64]
) -> None:
    """Raises UserError for a path that stands twice with different codes."""
    twins = np.flatnonzero(hashes[1:] == hashes[:-1])
    if not len(twins):
        return
    mapped = open_mapped(table)
    for place in twins:
        one, other = (mapped.slice(int(row), 1).to_pylist()[0] for row in rows[place : place + 2])
        if one["img_path"] == other["img_path"] and one["img_tokens"] != other["img_tokens"]:
            raise UserError(f"{folder}: {one['img_path']} stands twice, with different image codes")
