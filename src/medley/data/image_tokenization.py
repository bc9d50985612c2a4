"""Image batches -> image codes in partition files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from medley.data.image_token_store import TokenizationFailure, partition_file, write_partition
from medley.errors import UserError
from medley.images.dataloader import ImageBatch

# Images uint8 (N, H, W, 3) -> a function that waits for their codes (N, C).
StartEncoding = Callable[[Tensor], Callable[[], Tensor]]


def encode_partitions(
    batches: Iterable[ImageBatch], start: StartEncoding, folder: Path, rank: int
) -> Iterator[ImageBatch]:
    """Encodes batches and writes each partition after its last batch; yields every encoded batch.

    `start` starts to convert images uint8 (N, H, W, 3) to codes (N, C).
    """
    finished: list[ImageBatch] = []
    codes: list[Tensor] = []
    for batch, encoded in _encode_overlapped(batches, start):
        finished.append(batch)
        codes.append(encoded)
        yield batch
        if batch.ends_partition:
            _write_batches(folder, rank, finished, torch.cat(codes))
            finished, codes = [], []


def _encode_overlapped(
    batches: Iterable[ImageBatch], start: StartEncoding
) -> Iterator[tuple[ImageBatch, Tensor]]:
    """Batches with their codes (N, C) on the CPU.

    CUDA kernels run asynchronously: the codes of a batch are read only after the next batch was
    queued, so that loading the next images overlaps with encoding.
    """
    previous: tuple[ImageBatch, Callable[[], Tensor]] | None = None
    for batch in batches:
        with _explained(batch):
            started = start(batch.images)
        if previous is not None:
            yield previous[0], _finish(*previous)
        previous = batch, started
    if previous is not None:
        yield previous[0], _finish(*previous)


def _finish(batch: ImageBatch, result: Callable[[], Tensor]) -> Tensor:
    with _explained(batch):
        return result().cpu()


@contextmanager
def _explained(batch: ImageBatch) -> Iterator[None]:
    """Raises UserError where a batch does not fit in the memory of the GPU."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of GPU memory while encoding a batch of {len(batch.images)} images. "
            "Reduce --bs, or end other programs that use the GPU."
        ) from error


def _write_batches(folder: Path, rank: int, batches: Sequence[ImageBatch], codes: Tensor) -> None:
    """Writes one partition from its batches. `codes` (N, C) has no rows for failed images."""
    partition = batches[0].partition
    names = [name for batch in batches for name in batch.names]
    errors = [error for batch in batches for error in batch.errors]
    encoded = [row for row, error in enumerate(errors) if not error]
    failures = [TokenizationFailure(n, e) for n, e in zip(names, errors, strict=True) if e]
    extra = {}
    if partition.extra_columns is not None:
        table = partition.extra_columns.take(pa.array(encoded, pa.int64())).combine_chunks()
        extra = {name: table[name] for name in table.column_names}
    path = partition_file(folder, partition.number, rank)
    paths = [names[row] for row in encoded]
    write_partition(path, paths, codes.numpy().astype(np.uint16), failures, extra)
