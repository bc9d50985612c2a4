"""VQA-RAD as published (Lau et al. 2018): JSON lists of questions, and a folder of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.files import read_json
from medley.images import content_hash, open_image
from medley.vocabulary import END_TURN, IMAGE

FILES = ("trainset.json", "testset.json")


@dataclass(frozen=True)
class Question:
    """One question about one picture; `closed` where the answer is one of a few given ones."""

    identifier: str
    image_path: str
    question: str
    answer: str
    closed: bool
    organ: str

    def document(self) -> dict[str, Any]:
        """A line of a documents file."""
        return {
            "text": f"{IMAGE}{self.question}{END_TURN}{self.answer}",
            "image_path": self.image_path,
            "source": "vqa_rad",
            "task": "VQA",
            "id": self.identifier,
            "answer_type": "CLOSED" if self.closed else "OPEN",
            "organ": self.organ,
        }


def image_folder(folder: Path) -> Path:
    names = ("images", "VQA_RAD Image Folder")
    return next((folder / n for n in names if (folder / n).is_dir()), folder / names[0])


def read(folder: Path) -> Iterator[Question]:
    """Every question of both published files, in their order.

    Raises UserError, naming file and record, for a missing field, an unknown answer type or a
    picture that is not there.
    """
    images = image_folder(folder)
    for name in FILES:
        path = folder / name
        records = read_json(path)
        if not isinstance(records, list):
            raise UserError(f"{path}: expected a list of questions")
        for number, record in enumerate(records):
            yield _question(record, f"{path}: record {number}", images)


def _question(record: Any, place: str, images: Path) -> Question:
    try:
        kind = str(record["answer_type"]).strip().upper()  # two rows say "CLOSED "
        question = Question(
            identifier=str(record["qid"]),
            image_path=str(images / Path(record["image_name"]).name),
            question=str(record["question"]).strip(),
            answer=str(record["answer"]).strip(),  # numbers are answers too
            closed=kind == "CLOSED",
            organ=str(record.get("image_organ", "")),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{place}: {error} is missing") from error
    if kind not in ("OPEN", "CLOSED"):
        raise UserError(f"{place}: answer_type is {kind!r}, expected OPEN or CLOSED")
    if not Path(question.image_path).is_file():
        raise UserError(f"{place}: no such picture, {question.image_path}")
    return question


def split_by_picture(
    questions: list[Question], test_share: float
) -> tuple[list[Question], list[Question]]:
    """Train and test questions without a common picture, told apart by content.

    The published split asks about the same pictures in both halves; this one puts each
    picture, by the hash of its pixels, into one of them, the same one on every machine.
    """
    hashes = {p: content_hash(open_image(p)) for p in sorted({q.image_path for q in questions})}

    def in_test(question: Question) -> bool:
        digest = hashlib.sha256(f"split {hashes[question.image_path]}".encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < test_share

    train = [q for q in questions if not in_test(q)]
    return train, [q for q in questions if in_test(q)]
