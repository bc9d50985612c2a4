"""The images of a VQGAN's training run: which of them can be read, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from medley.errors import UserError
from medley.images.dataloader import ImageDataset, image_batches
from medley.images.image_source import ImageSource
from medley.images.sources import Partition
from medley.utils.distributed import is_main_rank, rank, world_size
from medley.utils.files import escape_name


def split_unreadable(
    sources: Sequence[ImageSource], dataset: ImageDataset, num_workers: int
) -> tuple[list[ImageSource], list[tuple[str, str]]]:
    """The readable images, and the name and the error of each unreadable one.

    Each rank reads its share of the images. All ranks get the same result.
    """
    own = Partition(0, list(sources[rank() :: world_size()]), None)
    errors: list[str] = []
    progress = tqdm(total=len(own.sources), desc="reading", disable=not is_main_rank())
    for batch in image_batches([own] if own.sources else [], dataset, 64, num_workers):
        errors += batch.errors
        progress.update(len(batch.errors))
    progress.close()
    by_rank: list[list[str]] = [errors]
    if dist.is_initialized():
        by_rank = [[] for _ in range(world_size())]
        dist.all_gather_object(by_rank, errors)
    by_index = {
        r + i * world_size(): error for r, own in enumerate(by_rank) for i, error in enumerate(own)
    }
    readable = [source for i, source in enumerate(sources) if not by_index[i]]
    failed = [(escape_name(sources[i].name), e) for i, e in sorted(by_index.items()) if e]
    return readable, failed


def hold_out(
    sources: Sequence[ImageSource], fraction: float, seed: int, where: str
) -> tuple[list[ImageSource], list[ImageSource]]:
    """A random split into training images and at least one held-out image.

    Raises UserError that starts with `where` if no training image is left.
    """
    count = max(1, round(len(sources) * fraction))
    if len(sources) <= count:
        raise UserError(
            f"{where}: Too few readable images (got {len(sources)}, expected 2 or more)."
        )
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed))
    shuffled = [sources[i] for i in order.tolist()]
    return shuffled[count:], shuffled[:count]


def training_batches(
    sources: Sequence[ImageSource],
    dataset: ImageDataset,
    steps: range,
    batch_size: int,
    seed: int,
    num_workers: int,
) -> Iterator[Tensor]:
    """This rank's squares uint8 (batch_size, H, W, 3) of each step, in a new order each epoch.

    A step reads the same images whether the run started there or earlier.
    """
    global_batch_size = batch_size * world_size()

    @lru_cache(2)
    def epoch_order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 7919 + epoch)
        return torch.randperm(len(sources), generator=generator).tolist()

    def source_at(position: int) -> ImageSource:
        epoch, index = divmod(position, len(sources))
        return sources[epoch_order(epoch)[index]]

    def partitions() -> Iterator[Partition]:
        for step in steps:
            first = step * global_batch_size + rank() * batch_size
            yield Partition(step, [source_at(i) for i in range(first, first + batch_size)], None)

    for batch in image_batches(partitions(), dataset, batch_size, num_workers):
        if any(batch.errors):
            error = next(e for e in batch.errors if e)
            raise UserError(f"{error} The image was readable at the start of the run.")
        yield batch.images
