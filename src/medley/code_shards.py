"""Parquet shards of image codes: `partition_<k>_rank_<r>.parquet`.

Partition k is a fixed range of the input, r the rank that wrote it. A file that exists is
whole, and holds in its metadata the pictures of its range that failed, so that nothing has to
be remembered anywhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medley.errors import UserError
from medley.files import whole_file

_NAME = re.compile(r"partition_(\d+)_rank_(\d+)\.parquet")
_FAILED = b"medley.failed"


@dataclass(frozen=True)
class Failure:
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
    failures: Iterable[Failure],
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
    with whole_file(path) as temporary:
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


def read_failures(path: Path) -> list[Failure]:
    metadata = pq.read_schema(path).metadata or {}
    return [Failure(*pair) for pair in json.loads(metadata.get(_FAILED, b"[]"))]


def write_error_lists(folder: Path) -> tuple[int, int]:
    """Writes `errors_rank_<r>.jsonl` from what the partition files carry.

    Gives how many pictures have codes, and how many failed.
    """
    encoded = 0
    by_rank: dict[int, list[Failure]] = {}
    for path in finished_partitions(folder).values():
        match = _NAME.fullmatch(path.name)
        assert match is not None
        by_rank.setdefault(int(match[2]), []).extend(read_failures(path))
        encoded += pq.read_metadata(path).num_rows
    for old in folder.glob("errors_rank_*.jsonl"):
        old.unlink()
    for rank, failures in by_rank.items():
        if failures:
            with whole_file(folder / f"errors_rank_{rank}.jsonl") as temporary:
                lines = [
                    json.dumps({"img_path": f.img_path, "error": f.error}, ensure_ascii=False)
                    for f in failures
                ]
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return encoded, sum(map(len, by_rank.values()))


class CodeShards:
    """Looks up the codes of a picture in a folder of shards, or in one Parquet file.

    A picture is found by the path as it was written, then by its real path.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.parquet")) if self.folder.is_dir() else [self.folder]
        if not files or not files[0].exists():
            raise UserError(f"{folder}: no Parquet files of image codes there")
        self._rows: dict[str, tuple[int, ...]] = {}
        for file in files:
            self._read(file)
        lengths = {len(codes) for codes in self._rows.values()}
        if len(lengths) > 1:
            raise UserError(
                f"{folder}: pictures with different numbers of codes: {sorted(lengths)}"
            )
        self.codes_per_image = lengths.pop() if lengths else 0
        self._real: dict[str, str] | None = None

    def _read(self, file: Path) -> None:
        try:
            table = pq.read_table(file, columns=["img_path", "img_tokens"])
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise UserError(f"{file}: not a shard of image codes ({error})") from error
        for path, codes in zip(
            table["img_path"].to_pylist(), table["img_tokens"].to_pylist(), strict=True
        ):
            known = self._rows.setdefault(path, tuple(codes))
            if known != tuple(codes):
                raise UserError(f"{file}: {path} stands twice, with different image codes")

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, path: str) -> bool:
        return self.get(path) is not None

    def get(self, path: str) -> tuple[int, ...] | None:
        """Codes of a picture, or None."""
        found = self._rows.get(path)
        if found is None:
            if self._real is None:
                self._real = {str(Path(p).resolve()): p for p in self._rows}
            written = self._real.get(str(Path(path).resolve()))
            found = None if written is None else self._rows[written]
        return found
