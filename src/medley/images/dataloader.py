"""Batches of square images, read ahead in worker processes.

An image that cannot be read is left out of the batch's tensor. Its name and error stay in the
batch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medley.images.formats import ImageError
from medley.images.image_source import ImageSource
from medley.images.preprocess import Preprocessing, to_uint8_square
from medley.images.sources import Partition
from medley.utils.files import escape_name

MAX_WORKERS = 8


@dataclass(frozen=True)
class ImageBatch:
    """Some images of one partition, in order.

    Attributes:
        partition: the partition
        ends_partition: whether this is its last batch
        names: names of all images of the batch
        errors: one for each name; empty for an image that was read
        images: uint8 (N, H, W, 3), the images without error
    """

    partition: Partition
    ends_partition: bool
    names: list[str]
    errors: list[str]
    images: Tensor


class ImageDataset(Dataset[tuple[list[str], Tensor]]):
    """Reads images of any format as uint8 squares of `size` pixels, a batch at a time."""

    def __init__(self, size: int, preprocessing: Preprocessing) -> None:
        self.size, self.preprocessing = size, preprocessing

    def __getitems__(self, sources: list[ImageSource]) -> tuple[list[str], Tensor]:
        """Sources -> one error per source (empty if none), and the images without error."""
        errors: list[str] = []
        images: list[Tensor] = [torch.zeros(0, self.size, self.size, 3, dtype=torch.uint8)]
        for source in sources:
            try:
                if escape_name(source.name) != source.name:
                    raise ImageError(
                        f"{escape_name(source.name)}: The file name is not UTF-8. Rename the file."
                    )
                image = source.open(self.preprocessing.exif_orientation)
                images.append(to_uint8_square(image, self.size, self.preprocessing.fit)[None])
                errors.append("")
            except ImageError as error:
                errors.append(escape_name(str(error)))
        return errors, torch.cat(images)


def image_batches(
    partitions: Iterable[Partition],
    dataset: ImageDataset,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[ImageBatch]:
    """Batches of at most `batch_size` images, in order. No batch spans two partitions."""
    requested: deque[tuple[Partition, list[ImageSource], bool]] = deque()  # not yet received

    def batches_of_sources() -> Iterator[list[ImageSource]]:
        for partition in partitions:
            for start in range(0, len(partition.sources), batch_size):
                sources = partition.sources[start : start + batch_size]
                is_last = start + batch_size >= len(partition.sources)
                requested.append((partition, sources, is_last))
                yield sources

    loader: DataLoader[tuple[list[str], Tensor]] = DataLoader(
        dataset,
        batch_sampler=batches_of_sources(),
        num_workers=num_workers,
        collate_fn=_identity,  # type: ignore[arg-type]  # the dataset returns complete batches
        pin_memory=pin_memory,
    )
    for errors, images in loader:
        partition, sources, is_last = requested.popleft()
        names = [escape_name(source.name) for source in sources]
        yield ImageBatch(partition, is_last, names, errors, images)


def _identity(batch: tuple[list[str], Tensor]) -> tuple[list[str], Tensor]:
    return batch


def default_num_workers(device: torch.device, ranks_on_machine: int) -> int:
    """Reader processes for each rank: the cores that encoding does not use."""
    cores = (os.cpu_count() or 1) // ranks_on_machine
    used = 1 if device.type == "cpu" else 0
    minimum = 0 if device.type == "cpu" else 1
    return max(minimum, min(MAX_WORKERS, cores - used))
