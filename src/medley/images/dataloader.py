"""Pictures of a list as batches of squares, read ahead in worker processes.

A picture that cannot be read takes no place in its batch: its error stands beside its name.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medley.images.preprocess import Fit, ImageError, to_uint8_square
from medley.images.sources import ImageSource, Partition
from medley.utils.files import escape_name

MOST_WORKERS = 8


@dataclass(frozen=True)
class ImageBatch:
    """Some pictures of one part, in order. `squares` uint8 (N, H, W, 3) are those without error."""

    part: Partition
    ends_part: bool
    names: list[str]
    errors: list[str]  # one for each name, empty where the picture was read
    squares: Tensor


class ImageDataset(Dataset[tuple[list[str], Tensor]]):
    """Reads pictures of any kind as uint8 squares of `size` pixels; asked for whole batches."""

    def __init__(self, size: int, fit: Fit, exif_orientation: bool = False) -> None:
        self.size, self.fit, self.exif_orientation = size, fit, exif_orientation

    def __getitems__(self, sources: list[ImageSource]) -> tuple[list[str], Tensor]:
        errors: list[str] = []
        squares: list[Tensor] = [torch.zeros(0, self.size, self.size, 3, dtype=torch.uint8)]
        for source in sources:
            try:
                if escape_name(source.name) != source.name:
                    raise ImageError(
                        f"{escape_name(source.name)}: its name is not UTF-8; rename it"
                    )
                image = source.open(self.exif_orientation)
                squares.append(to_uint8_square(image, self.size, self.fit)[None])
                errors.append("")
            except ImageError as error:
                errors.append(escape_name(str(error)))
        return errors, torch.cat(squares)


def image_batches(
    parts: Iterable[Partition],
    squares: ImageDataset,
    batch_size: int,
    workers: int,
    pin: bool = False,
) -> Iterator[ImageBatch]:
    """Batches of at most `batch_size` pictures, in order, none across the end of a part."""
    ahead: deque[tuple[Partition, list[ImageSource], bool]] = deque()  # asked for, not yet come

    def asked() -> Iterator[list[ImageSource]]:
        for part in parts:
            for start in range(0, len(part.sources), batch_size):
                chosen = part.sources[start : start + batch_size]
                ahead.append((part, chosen, start + batch_size >= len(part.sources)))
                yield chosen

    loader: DataLoader[tuple[list[str], Tensor]] = DataLoader(
        squares,
        batch_sampler=asked(),
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # a batch comes as it is
        pin_memory=pin,
    )
    for errors, read in loader:
        part, sources, ends_part = ahead.popleft()
        names = [escape_name(source.name) for source in sources]
        yield ImageBatch(part, ends_part, names, errors, read)


def _as_it_is(batch: tuple[list[str], Tensor]) -> tuple[list[str], Tensor]:
    return batch


def auto_workers(device: torch.device, ranks_here: int) -> int:
    """Reading processes for each rank: the cores that encoding leaves idle."""
    cores = (os.cpu_count() or 1) // ranks_here
    busy = 1 if device.type == "cpu" else 0
    least = 0 if device.type == "cpu" else 1
    return max(least, min(MOST_WORKERS, cores - busy))
