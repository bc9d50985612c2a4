"""The images of a VQGAN's training run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medley.errors import UserError
from medley.images.dataloader import ImageDataset
from medley.images.image_source import ImageSource
from medley.images.preprocess import Preprocessing
from medley.vqgan.training_data import hold_out, split_unreadable, training_batches

DATASET = ImageDataset(8, Preprocessing())


@pytest.fixture
def sources(tmp_path: Path) -> list[ImageSource]:
    """Five images of different gray values."""
    names = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, name in enumerate(names):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(name)
    return [ImageSource(name, name) for name in names]


def gray_values(batches: list[torch.Tensor]) -> list[int]:
    return [int(square[0, 0, 0]) // 40 for batch in batches for square in batch]


def test_every_epoch_has_all_images_in_a_new_order(sources: list[ImageSource]) -> None:
    batches = list(training_batches(sources, DATASET, range(10), 2, 0, 0))
    values = gray_values(batches)
    epochs = [values[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_resumed_run_reads_the_same_images(sources: list[ImageSource]) -> None:
    batches = list(training_batches(sources, DATASET, range(10), 2, 3, 0))
    resumed = list(training_batches(sources, DATASET, range(6, 10), 2, 3, 0))
    assert gray_values(resumed) == gray_values(batches)[12:]


def test_unreadable_images_are_separated_with_their_errors(sources: list[ImageSource]) -> None:
    Path(sources[3].file).write_bytes(b"damaged")
    readable, failed = split_unreadable(sources, DATASET, 0)
    assert readable == [*sources[:3], sources[4]]
    assert [name for name, _ in failed] == [sources[3].name]
    assert "3.png" in failed[0][1]


def test_at_least_one_image_is_held_out(sources: list[ImageSource]) -> None:
    training, held_out = hold_out(sources, 0.01, 0, "list.csv")
    assert len(held_out) == 1
    assert {s.name for s in (*training, *held_out)} == {s.name for s in sources}
    assert hold_out(sources, 0.01, 0, "list.csv") == (training, held_out)
    with pytest.raises(UserError, match=r"list\.csv: Too few readable images \(got 1"):
        hold_out(sources[:1], 0.5, 0, "list.csv")
