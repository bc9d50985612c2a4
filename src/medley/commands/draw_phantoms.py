"""Generates a dataset of phantoms: synthetic scans with documents and questions.

    medley draw-phantoms --output DIR --modality MR-CT --train 300 --test 60

In: only the options. Out, in DIR: `images/`, `images.csv` (paths of all images), `train.jsonl`
(documents to train on) and `test.jsonl` (one question per row).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from medley.checkpoints.checkpoint import open_checkpoint
from medley.errors import UserError
from medley.phantoms import ALL_MODALITIES, MODALITIES, NEW_MODALITY, Phantom
from medley.phantoms.dataset import question_rows, training_rows
from medley.tiny.embedded import TINY
from medley.utils.cli_options import Alias, resolved
from medley.utils.files import atomic_dir
from medley.utils.jsonl import write_jsonl
from medley.utils.manifest import write_manifest

# Part of the seed, so that no scan equals one of another program with the same --seed.
STREAM = 1_000_003


@dataclass(frozen=True)
class DrawPhantomsOptions:
    """Generates a dataset of phantoms.

    Args:
        output: folder for images and documents
        modality: CT, MR, X-ray, histology, ultrasound or MR-CT; separate several with commas
        known_fraction: fraction of scans of the embedded model's own modalities instead, which
            limits forgetting
        train: number of scans to train on
        test: number of scans to test with
        seed: seed of the scans
        size: pixels along a side; the embedded model's image size by default
    """

    aliases: ClassVar = {"known_share": Alias("known_fraction")}
    output: Path
    modality: str = NEW_MODALITY
    known_fraction: float = 0.0
    train: int = 300
    test: int = 60
    seed: int = 1
    size: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.modalities if name not in ALL_MODALITIES]
        if unknown:
            raise UserError(
                f"--modality {unknown[0]}: Unknown modality. Use {', '.join(ALL_MODALITIES)}."
            )
        for name, least in (("train", 0), ("test", 0), ("seed", 0), ("size", 8)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} {value}: Expected {least} or more.")
        if not self.train + self.test:
            raise UserError("--train 0 --test 0: Expected at least one scan.")
        if not 0 <= self.known_fraction <= 1:
            raise UserError(f"--known_fraction {self.known_fraction}: Expected 0 to 1.")

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.modality.split(","))


def draw_phantoms(options: DrawPhantomsOptions) -> None:
    size = options.size or open_checkpoint(TINY).vqgan()[0].config.resolution
    # Separate generators: a larger training set does not change the test set.
    text_rng, *scan_rngs = (
        np.random.default_rng((options.seed, STREAM, part)) for part in range(3)
    )
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    paths: list[str] = []
    with atomic_dir(options.output) as folder:
        (folder / "images").mkdir()
        for number in range(options.train + options.test):
            rng = scan_rngs[number >= options.train]
            is_known = rng.random() < options.known_fraction
            scan = Phantom.random(rng, MODALITIES if is_known else options.modalities)
            name = f"images/{number:06d}.png"
            scan.image(size).save(folder / name)
            path = str(options.output / name)
            paths.append(path)
            if number < options.train:
                rows["train"] += training_rows(scan, path, text_rng)
            else:
                rows["test"] += question_rows(scan, path)
        for split, split_rows in rows.items():
            write_jsonl(folder / f"{split}.jsonl", split_rows)
        pd.DataFrame({"img_path": paths}).to_csv(folder / "images.csv", index=False)
    write_manifest(options.output, resolved(options), [], None)
    print(
        f"{options.output}: {len(paths)} images, {len(rows['train'])} training documents, "
        f"{len(rows['test'])} test questions"
    )
