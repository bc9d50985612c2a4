"""Token sequences on disk: JSONL or Parquet to exchange, an Arrow IPC cache to read.

JSONL lines are the document's line plus `tokens`, as MedMax writes them. The reader turns
either format into one file of flat uint16 ids with offsets, once, and maps it into memory:
any sequence is then at hand at once, whatever the size of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medley.errors import UserError
from medley.files import json_lines, quick_hash, whole_file

LARGEST_ID = np.iinfo(np.uint16).max
_BATCH = 2000  # sequences of one record batch


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes lines with `tokens`, whole or not at all; gives their count."""
    count = 0
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row) + "\n")
            count += 1
    return count


def write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes `tokens` (uint16, dictionary-encoded), `source` and `task`; gives their count."""
    schema = pa.schema(
        [("tokens", pa.list_(pa.uint16())), ("source", pa.string()), ("task", pa.string())]
    )
    count = 0
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for batch in _batched(rows):
            columns = {name: [_text(row.get(name)) for row in batch] for name in ("source", "task")}
            columns["tokens"] = [row["tokens"] for row in batch]
            writer.write_table(pa.table(columns, schema=schema))
            count += len(batch)
    return count


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _batched(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a tokens file with the place of each (`FILE:LINE`), from JSONL or Parquet."""
    if path.suffix == ".parquet":
        number = 0
        try:
            reader = pq.ParquetFile(path)
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file") from error
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a Parquet file ({error})") from error
        wanted = [n for n in ("tokens", "source", "task") if n in reader.schema_arrow.names]
        for batch in reader.iter_batches(_BATCH, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
        return
    for number, line in json_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg})") from error
        yield f"{path}:{number}", row


class TokenShards(Sequence[NDArray[np.int64]]):
    """The sequences of one tokens file, memory-mapped.

    `shards[i]` are the ids of sequence i, int64 (S,); `lengths` all lengths, int64 (N,);
    `tasks[i]` its task. The cache stands beside the file as `.NAME.cache.arrow` and is made
    again when the file changes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such tokens file; make it with tokenizer.tokenize_jsonl")
        cache = self.path.with_name(f".{self.path.name}.cache.arrow")
        key = f"{quick_hash(self.path)} {self.path.stat().st_mtime_ns}"
        if not cache.exists() or _cache_key(cache) != key:
            _make_cache(self.path, cache, key)
        self._map = pa.memory_map(str(cache))
        table = pa.ipc.open_file(self._map).read_all()
        self._parts = [
            (chunk.values.to_numpy(), chunk.offsets.to_numpy().astype(np.int64))
            for chunk in table["tokens"].chunks
        ]
        self.tasks: list[str | None] = table["task"].to_pylist()
        self.lengths: NDArray[np.int64] = np.concatenate(
            [np.diff(offsets) for _, offsets in self._parts] or [np.zeros(0, np.int64)]
        )
        counts = [len(offsets) - 1 for _, offsets in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        values, offsets = self._parts[part]
        place = index - int(self._starts[part])
        return values[offsets[place] : offsets[place + 1]].astype(np.int64)


def _cache_key(cache: Path) -> str | None:
    try:
        with pa.memory_map(str(cache)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    value: bytes | None = metadata.get(b"medley.source")
    return value.decode() if value else None


def _make_cache(path: Path, cache: Path, key: str) -> None:
    schema = pa.schema(
        [("tokens", pa.list_(pa.uint16())), ("task", pa.string())],
        metadata={b"medley.source": key.encode()},
    )
    with whole_file(cache) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        for batch in _batched(_checked_rows(path)):
            ids = pa.array([row["tokens"] for row in batch], pa.list_(pa.uint16()))
            tasks = pa.array([_text(row.get("task")) for row in batch], pa.string())
            writer.write_batch(pa.record_batch([ids, tasks], schema=schema))


def _checked_rows(path: Path) -> Iterator[dict[str, Any]]:
    for place, row in read_rows(path):
        tokens = row.get("tokens") if isinstance(row, dict) else None
        if not isinstance(tokens, list) or not tokens:
            raise UserError(f"{place}: no 'tokens' there; make them with tokenizer.tokenize_jsonl")
        if not all(type(token) is int for token in tokens):
            raise UserError(f"{place}: 'tokens' holds something that is no whole number")
        if min(tokens) < 0 or max(tokens) > LARGEST_ID:
            raise UserError(f"{place}: a token id outside of 0 to {LARGEST_ID}")
        yield row
