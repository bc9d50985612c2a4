"""Token sequences on disk: JSONL or Parquet to exchange, an Arrow IPC cache to read.

JSONL lines are the document's line plus `tokens`, as MedMax writes them. The reader turns
either format into one file of flat uint16 ids with offsets, once, and maps it into memory:
any sequence is then at hand at once, whatever the size of the whole.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medley.errors import UserError
from medley.utils.arrow_cache import (
    CACHE_KEY,
    array_of,
    cache_key,
    cache_place,
    numbers_of,
    open_mapped,
    strings_of,
)
from medley.utils.files import atomic_file, partial_hash, read_json, write_json
from medley.utils.jsonl import json_lines

LARGEST_ID = np.iinfo(np.uint16).max
_BATCH = 2000  # sequences of one record batch
_ROW_GROUP = 400  # of Parquet: small enough that writing goes on while others are tokenized


_NUMBERS = [str(number) for number in range(LARGEST_ID + 1)]


def json_line(row: dict[str, Any], ids: Collection[str] = ()) -> str:
    """`json.dumps(row)`, the very same text; faster for the fields named in `ids`.

    Each of those holds a list of ids or codes, whole numbers from 0 to LARGEST_ID, or a list of
    such lists; nobody checks that here.
    """
    parts = [
        f"{json.dumps(name)}: {_ids_text(value) if name in ids else json.dumps(value)}"
        for name, value in row.items()
    ]
    return f"{{{', '.join(parts)}}}"


def _ids_text(values: Any) -> str:
    if not isinstance(values, list) or len(values) < 2:
        return json.dumps(values)
    if isinstance(values[0], list):
        return f"[{', '.join(map(_ids_text, values))}]"
    return f"[{', '.join(itemgetter(*values)(_NUMBERS))}]"


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes lines with `tokens`, whole or not at all; gives their count."""
    count = 0
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json_line(row, ("tokens",)) + "\n")
            count += 1
    return count


PARQUET_SCHEMA = pa.schema(
    [("tokens", pa.list_(pa.uint16())), ("source", pa.string()), ("task", pa.string())]
)


def parquet_batch(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Rows with `tokens` as Parquet holds them: `tokens` (uint16), `source`, `task`."""
    offsets = array("i", accumulate((len(row["tokens"]) for row in rows), initial=0))
    flat = array("H", chain.from_iterable(row["tokens"] for row in rows))
    tokens = pa.ListArray.from_arrays(array_of(pa.int32(), offsets), array_of(pa.uint16(), flat))
    texts = [strings_of([_text(row.get(n)) for row in rows]) for n in ("source", "task")]
    return pa.record_batch([tokens, *texts], schema=PARQUET_SCHEMA)


class ParquetOutput:
    """Writes batches of any size in row groups of some hundred rows, each with its dictionary."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, PARQUET_SCHEMA)
        self._held: list[pa.RecordBatch] = []

    def __enter__(self) -> ParquetOutput:
        return self

    def __call__(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)
        if sum(map(len, self._held)) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._held, PARQUET_SCHEMA))
        self._held = []

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()


def write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes rows with `tokens`, whole or not at all; gives their count."""
    count = 0
    with atomic_file(path) as temporary, ParquetOutput(temporary) as write:
        for batch in _batched(rows):
            write(parquet_batch(batch))
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


class TokenDataset(Sequence[NDArray[np.int64]]):
    """The sequences of one tokens file, memory-mapped.

    `shards[i]` are the ids of sequence i, int64 (S,); `lengths` all lengths, int64 (N,);
    `task(i)` its task. The cache, two bytes a token, stands beside the file as
    `.NAME.cache.arrow` and is made again when the file changes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such tokens file; make it with tokenizer.tokenize_jsonl")
        cache = cache_place(self.path.with_name(f".{self.path.name}.cache.arrow"))
        names = cache.with_name(f"{cache.name}.tasks.json")
        key = f"{partial_hash(self.path)} {self.path.stat().st_mtime_ns}"
        if cache_key(cache) != key or not names.exists():
            _make_cache(self.path, cache, names, key)
        table = open_mapped(cache)
        self._parts = [
            (numbers_of(chunk.values, np.uint16), numbers_of(chunk.offsets, np.int32))
            for chunk in table["tokens"].chunks
        ]
        self._task_names: list[str | None] = read_json(names)
        self._tasks = [numbers_of(chunk, np.int16) for chunk in table["task"].chunks]
        self.lengths: NDArray[np.int64] = np.concatenate(
            [np.diff(offsets).astype(np.int64) for _, offsets in self._parts]
            or [np.zeros(0, np.int64)]
        )
        counts = [len(offsets) - 1 for _, offsets in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def _find(self, index: int) -> tuple[int, int]:
        """The part that holds a sequence, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def __getitem__(self, index: Any) -> Any:
        part, place = self._find(index)
        values, offsets = self._parts[part]
        return values[offsets[place] : offsets[place + 1]].astype(np.int64)

    def task(self, index: int) -> str | None:
        part, place = self._find(index)
        return self._task_names[int(self._tasks[part][place])]


def _make_cache(path: Path, cache: Path, names: Path, key: str) -> None:
    schema = pa.schema(
        [("tokens", pa.list_(pa.uint16())), ("task", pa.int16())],
        metadata={CACHE_KEY: key.encode()},
    )
    known: dict[str | None, int] = {}
    with atomic_file(cache) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        for batch in _batched(_checked_rows(path)):
            ids = pa.array([row["tokens"] for row in batch], pa.list_(pa.uint16()))
            tasks = [known.setdefault(_text(row.get("task")), len(known)) for row in batch]
            if len(known) > np.iinfo(np.int16).max:
                raise UserError(f"{path}: more than {np.iinfo(np.int16).max} different tasks")
            writer.write_batch(pa.record_batch([ids, pa.array(tasks, pa.int16())], schema=schema))
        write_json(names, list(known))  # before the cache has its name: it is useless without


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
