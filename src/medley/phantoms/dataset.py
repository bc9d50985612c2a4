"""Rows of a phantom dataset: documents for training, questions for testing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from medley.data.document import Document, ImagePart, Turn
from medley.data.vocabulary import END_TURN, IMAGE
from medley.phantoms.captions import documents, questions
from medley.phantoms.scenes import Phantom


def document_row(document: Document, **fields: Any) -> dict[str, Any]:
    """A document whose images have paths -> a row of a documents file."""

    def text(turn: Turn) -> str:
        return "".join(IMAGE if isinstance(part, ImagePart) else part for part in turn.parts)

    paths = [str(image.path) for image in document.images]
    return {"text": END_TURN.join(map(text, document.turns)), "image_path": paths, **fields}


def training_rows(scan: Phantom, path: str, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """The training documents of a scan whose image is at `path`."""
    for document in documents(scan, ImagePart(path=path), rng):
        first = document.turns[0]
        is_vqa = first.role == "user" and any(isinstance(p, ImagePart) for p in first.parts)
        task = "VQA" if is_vqa else "Image Generation"
        yield document_row(document, source="phantoms", task=task, modality=scan.modality)


def question_rows(scan: Phantom, path: str) -> Iterator[dict[str, Any]]:
    """One row per question, so that no question reveals the answer to another one."""
    for question, answer in questions(scan):
        document = Document(
            (Turn("user", (ImagePart(path=path), question)), Turn("assistant", (answer,)))
        )
        answer_type = "CLOSED" if answer in ("yes", "no") else "OPEN"
        yield document_row(
            document, source="phantoms", task="VQA", answer_type=answer_type,
            modality=scan.modality,
        )  # fmt: skip
