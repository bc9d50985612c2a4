"""Token files: JSON Lines or Parquet for exchange, a memory-mapped Arrow cache for reading.

A JSONL line is the document's line plus `tokens`, as MedMax writes it. The reader converts either
format once to a file of flat uint16 ids with offsets. It maps that file into memory, so any
sequence is read without loading the others.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
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
    open_cache,
    to_arrow,
    to_arrow_strings,
    to_numpy,
    writable_cache_path,
)
from medley.utils.config_files import one_line
from medley.utils.files import atomic_file, partial_hash, read_json, write_json
from medley.utils.jsonl import json_lines
from medley.utils.tables import batch_rows, parquet_batches

UNTRAINED_TURNS = "untrained_turns"  # field: numbers of the turns that training leaves out
_CACHE_VERSION = 2
MAX_TOKEN_ID = np.iinfo(np.uint16).max
_BATCH = 2000  # sequences in one record batch
_ROW_GROUP = 400  # sequences; small, so that writing overlaps with tokenizing
_DECIMAL = [str(number) for number in range(MAX_TOKEN_ID + 1)]


def fast_json(row: dict[str, Any], id_fields: Collection[str] = ()) -> str:
    """Exactly `json.dumps(row)`, but faster for the fields in `id_fields`.

    Each of these fields has a list of integers from 0 to MAX_TOKEN_ID, or a list of such lists.
    This is not checked.
    """
    fields = [
        f"{json.dumps(name)}: {_ids_json(value) if name in id_fields else json.dumps(value)}"
        for name, value in row.items()
    ]
    return f"{{{', '.join(fields)}}}"


def _ids_json(values: Any) -> str:
    if not isinstance(values, list) or len(values) < 2:
        return json.dumps(values)
    if isinstance(values[0], list):
        return f"[{', '.join(map(_ids_json, values))}]"
    return f"[{', '.join(itemgetter(*values)(_DECIMAL))}]"


def write_token_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows with `tokens` atomically and returns their number."""
    count = 0
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(fast_json(row, ("tokens",)) + "\n")
            count += 1
    return count


PARQUET_SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.uint16())), ("source", pa.string()), ("task", pa.string()),
        (UNTRAINED_TURNS, pa.list_(pa.uint16())),
    ]
)  # fmt: skip


def to_record_batch(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Rows with `tokens` -> the columns of PARQUET_SCHEMA; other keys are left out."""
    tokens = _to_arrow_lists([row["tokens"] for row in rows])
    untrained = _to_arrow_lists([row.get(UNTRAINED_TURNS) or [] for row in rows])
    texts = [
        to_arrow_strings([_optional_str(row.get(name)) for row in rows])
        for name in ("source", "task")
    ]
    return pa.record_batch([tokens, *texts, untrained], schema=PARQUET_SCHEMA)


def _to_arrow_lists(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    """Lists of numbers from 0 to MAX_TOKEN_ID -> an Arrow array."""
    offsets = array("i", accumulate(map(len, lists), initial=0))
    flat = array("H", chain.from_iterable(lists))
    return pa.ListArray.from_arrays(to_arrow(pa.int32(), offsets), to_arrow(pa.uint16(), flat))


class TokenParquetWriter:
    """Collects record batches of any size into row groups of some hundred rows."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  # closed by __exit__
        self._writer = pq.ParquetWriter(self._file, PARQUET_SCHEMA)
        self._pending: list[pa.RecordBatch] = []

    def __enter__(self) -> TokenParquetWriter:
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        self._pending.append(batch)
        if sum(map(len, self._pending)) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._pending, PARQUET_SCHEMA))
        self._pending = []

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self._flush()
                self._writer.close()
        finally:
            # After an error nothing more is written: it would fail again on a full disk.
            self._writer.is_open = False
            self._file.close()


def write_token_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows with `tokens` atomically and returns their number."""
    count = 0
    with atomic_file(path) as temporary, TokenParquetWriter(temporary) as writer:
        for batch in _batched(rows):
            writer.write(to_record_batch(batch))
            count += len(batch)
    return count


def _optional_str(value: Any) -> str | None:
    return None if value is None else str(value)


def _batched(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def read_token_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a token file with the location of each (`FILE:LINE`), from JSONL or Parquet."""
    if path.suffix == ".parquet":
        number = 0
        try:
            names = pq.read_schema(path).names
            columns = [name for name in PARQUET_SCHEMA.names if name in names]
            for batch in parquet_batches(path, _BATCH, columns):
                for row in batch_rows(batch):
                    number += 1
                    yield f"{path}: row {number}", row
        except FileNotFoundError as error:
            raise UserError(f"{path}: File not found.") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: Not a Parquet file ({one_line(error)}).") from error
        return
    for number, line in json_lines(path):
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise UserError(f"{path}:{number}: Invalid JSON (nested too deeply).") from error
        except ValueError as error:  # also for a number with too many digits
            reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
            raise UserError(f"{path}:{number}: Invalid JSON ({reason}).") from error
        yield f"{path}:{number}", row


class TokenDataset(Sequence[NDArray[np.int64]]):
    """The sequences of one token file, memory-mapped.

    `dataset[i]` are the ids of sequence i, int64 (S,); `lengths` are all lengths, int64 (N,);
    `task(i)` is the task of sequence i. The cache `.NAME.cache.arrow` next to the file takes two
    bytes per token and is rebuilt when the file changes. `untrained_turns(i)` are the numbers of
    the turns of sequence i that training leaves out; none in files of older versions.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: Token file not found. Create it with `medley tokenize`.")
        cache = writable_cache_path(self.path.with_name(f".{self.path.name}.cache.arrow"))
        task_names = cache.with_name(f"{cache.name}.tasks.json")
        key = f"{_CACHE_VERSION} {partial_hash(self.path)} {self.path.stat().st_mtime_ns}"
        opened = _open_cache(cache, task_names, key)
        if opened is None:
            _build_cache(self.path, cache, task_names, key)
            opened = _open_cache(cache, task_names, key)
            if opened is None:
                raise UserError(f"{cache}: The cache was damaged while it was written. Try again.")
        table, self._task_names = opened
        self._chunks = [
            (to_numpy(chunk.values, np.uint16), to_numpy(chunk.offsets, np.int32))
            for chunk in table["tokens"].chunks
        ]
        self._untrained = [
            (to_numpy(chunk.values, np.uint16), to_numpy(chunk.offsets, np.int32))
            for chunk in table[UNTRAINED_TURNS].chunks
        ]
        self._tasks = [to_numpy(chunk, np.int16) for chunk in table["task"].chunks]
        self.lengths: NDArray[np.int64] = np.concatenate(
            [np.diff(offsets).astype(np.int64) for _, offsets in self._chunks]
            or [np.zeros(0, np.int64)]
        )
        counts = [len(offsets) - 1 for _, offsets in self._chunks]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def _locate(self, index: int) -> tuple[int, int]:
        """The chunk of a sequence, and its offset in the chunk."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        return chunk, index - int(self._starts[chunk])

    def __getitem__(self, index: Any) -> Any:
        chunk, row = self._locate(index)
        values, offsets = self._chunks[chunk]
        return values[offsets[row] : offsets[row + 1]].astype(np.int64)

    def untrained_turns(self, index: int) -> tuple[int, ...]:
        """Numbers of the turns of a sequence that training leaves out, from 0."""
        chunk, row = self._locate(index)
        values, offsets = self._untrained[chunk]
        return tuple(values[offsets[row] : offsets[row + 1]].tolist())

    @property
    def has_untrained_turns(self) -> bool:
        return any(len(values) for values, _ in self._untrained)

    def task(self, index: int) -> str | None:
        chunk, row = self._locate(index)
        return self._task_names[int(self._tasks[chunk][row])]


def _cache_schema(key: str) -> pa.Schema:
    return pa.schema(
        [
            ("tokens", pa.list_(pa.uint16())), ("task", pa.int16()),
            (UNTRAINED_TURNS, pa.list_(pa.uint16())),
        ],
        metadata={CACHE_KEY: key.encode()},
    )  # fmt: skip


def _open_cache(
    cache: Path, task_names: Path, key: str
) -> tuple[pa.Table, list[str | None]] | None:
    """The table and the names of the tasks; None if a file is missing, damaged, or outdated."""
    table = open_cache(cache, _cache_schema(key))
    try:
        names = read_json(task_names)
    except UserError:
        return None
    if table is None or not isinstance(names, list):
        return None
    if not all(isinstance(name, str | None) for name in names):
        return None
    tasks = [to_numpy(chunk, np.int16) for chunk in table["task"].chunks]
    is_valid = all(((chunk >= 0) & (chunk < len(names))).all() for chunk in tasks)
    return (table, names) if is_valid else None


def _build_cache(path: Path, cache: Path, task_names: Path, key: str) -> None:
    schema = _cache_schema(key)
    max_tasks = np.iinfo(np.int16).max
    task_ids: dict[str | None, int] = {}
    with atomic_file(cache) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        for batch in _batched(_validated_rows(path)):
            ids = pa.array([row["tokens"] for row in batch], pa.list_(pa.uint16()))
            tasks = [
                task_ids.setdefault(_optional_str(row.get("task")), len(task_ids)) for row in batch
            ]
            if len(task_ids) > max_tasks:
                raise UserError(f"{path}: Too many different tasks (expected at most {max_tasks}).")
            untrained = [row.get(UNTRAINED_TURNS) or [] for row in batch]
            columns = [ids, pa.array(tasks, pa.int16()), pa.array(untrained, schema.types[2])]
            writer.write_batch(pa.record_batch(columns, schema=schema))
        write_json(task_names, list(task_ids))  # before the cache, which is unusable without it


def _validated_rows(path: Path) -> Iterator[dict[str, Any]]:
    for where, row in read_token_rows(path):
        tokens = row.get("tokens") if isinstance(row, dict) else None
        if not isinstance(tokens, list) or not tokens:
            raise UserError(f"{where}: 'tokens' is missing. Create it with `medley tokenize`.")
        if not all(type(token) is int for token in tokens):
            raise UserError(f"{where}: 'tokens' contains a value that is not an integer.")
        if min(tokens) < 0 or max(tokens) > MAX_TOKEN_ID:
            bad = min(tokens) if min(tokens) < 0 else max(tokens)
            raise UserError(
                f"{where}: A token id is out of range (got {bad}, expected 0 to {MAX_TOKEN_ID})."
            )
        check_untrained_turns(row, where)
        yield row


def check_untrained_turns(row: dict[str, Any], where: str) -> None:
    """Raises UserError unless the field is missing or a list of turn numbers."""
    turns = row.get(UNTRAINED_TURNS) or []
    is_list = isinstance(turns, list) and all(type(turn) is int for turn in turns)
    if not is_list or not all(0 <= turn <= MAX_TOKEN_ID for turn in turns):
        raise UserError(f"{where}: {UNTRAINED_TURNS!r} is not a list of turn numbers.")
