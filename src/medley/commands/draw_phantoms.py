"""Draws phantoms to files: pictures, documents to learn from, questions to be tested with.

    medley draw-phantoms --output DIR --modality MR-CT --train 300 --test 60

writes `images/`, `pictures.csv`, `train.jsonl` and `test.jsonl` to DIR.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medley.checkpoints.checkpoint import TINY, open_checkpoint
from medley.data.document import Document, ImagePart, Turn
from medley.data.vocabulary import END_TURN, IMAGE
from medley.errors import UserError
from medley.phantoms import (
    ALL_MODALITIES,
    MODALITIES,
    NEW_MODALITY,
    Phantom,
    documents,
    questions,
)
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_dir
from medley.utils.manifest import write_manifest

STREAM = 1_000_003  # beside the seed: no scan of another program that has the same seed comes again


@dataclass(frozen=True)
class DrawPhantomsOptions:
    """Draws phantoms to files.

    Args:
        output: folder of pictures and documents
        modality: CT, MR, X-ray, histology, ultrasound or MR-CT; several with commas
        known_share: share of the scans that are of the embedded model's own modalities instead, so
            that these are not forgotten
        train: scans to learn from
        test: scans to be tested with
        seed: seed of the scans
        size: pixels along a side; what the embedded model reads unless given
    """

    output: Path
    modality: str = NEW_MODALITY
    known_share: float = 0.0
    train: int = 300
    test: int = 60
    seed: int = 1
    size: int | None = None


def as_row(document: Document, **more: Any) -> dict[str, Any]:
    """A document whose pictures have paths -> a line of a documents file."""

    def text(turn: Turn) -> str:
        return "".join(IMAGE if isinstance(part, ImagePart) else part for part in turn.parts)

    paths = [str(picture.path) for picture in document.pictures]
    return {"text": END_TURN.join(map(text, document.turns)), "image_path": paths, **more}


def train_rows(scan: Phantom, path: str, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for document in documents(scan, ImagePart(path=path), rng):
        shown = any(isinstance(p, ImagePart) for p in document.turns[0].parts)
        asked = shown and document.turns[0].role == "user"
        task = "VQA" if asked else "Image Generation"
        yield as_row(document, source="phantoms", task=task, modality=scan.modality)


def test_rows(scan: Phantom, path: str) -> Iterator[dict[str, Any]]:
    """One line a question, so that each is answered without a hint from the others."""
    for question, answer in questions(scan):
        document = Document(
            (Turn("user", (ImagePart(path=path), question)), Turn("assistant", (answer,)))
        )
        kind = "CLOSED" if answer in ("yes", "no") else "OPEN"
        yield as_row(
            document, source="phantoms", task="VQA", answer_type=kind, modality=scan.modality
        )


def checked(options: DrawPhantomsOptions) -> tuple[str, ...]:
    """The modalities. Raises UserError for what cannot be drawn."""
    modalities = tuple(name.strip() for name in options.modality.split(","))
    unknown = [m for m in modalities if m not in ALL_MODALITIES]
    if unknown:
        raise UserError(f"--modality {unknown[0]}: expected {', '.join(ALL_MODALITIES)}")
    for name, least in (("train", 0), ("test", 0), ("seed", 0), ("size", 8)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: expected {least} or more")
    if not options.train + options.test:
        raise UserError("--train 0 --test 0: nothing to draw")
    if not 0 <= options.known_share <= 1:
        raise UserError(f"--known_share {options.known_share}: expected 0 to 1")
    return modalities


def draw_phantoms(options: DrawPhantomsOptions) -> None:
    modalities = checked(options)
    size = options.size or open_checkpoint(TINY).vqgan()[0].config.resolution
    # Each with a stream of its own: more scans to learn from do not change the others.
    words, *streams = (np.random.default_rng((options.seed, STREAM, part)) for part in range(3))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    paths: list[str] = []
    with atomic_dir(options.output) as folder:
        (folder / "images").mkdir()
        for number in range(options.train + options.test):
            rng = streams[number >= options.train]
            known = rng.random() < options.known_share
            scan = Phantom.random(rng, MODALITIES if known else modalities)
            name = f"images/{number:06d}.png"
            scan.image(size).save(folder / name)
            path = str(options.output / name)
            paths.append(path)
            if number < options.train:
                rows["train"] += train_rows(scan, path, words)
            else:
                rows["test"] += test_rows(scan, path)
        for part, lines in rows.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
        pd.DataFrame({"img_path": paths}).to_csv(folder / "pictures.csv", index=False)
    write_manifest(options.output, resolved(options), [], None)
    print(
        f"{options.output}: {len(paths)} pictures, {len(rows['train'])} documents to learn from, "
        f"{len(rows['test'])} questions to be tested with"
    )
