from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medley.document import Document
from medley.errors import UserError
from medley.formats import vqa_rad


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(8):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "images" / f"p{number}.png")
    Image.new("RGB", (4, 4), (0, 0, 0)).save(tmp_path / "images" / "copy_of_p0.png")
    rows = [record(i, f"p{i % 8}.png") for i in range(16)] + [record(16, "copy_of_p0.png")]
    (tmp_path / "trainset.json").write_text(json.dumps(rows[:12]))
    (tmp_path / "testset.json").write_text(json.dumps(rows[12:]))
    return tmp_path


def record(number: int, picture: str, **change: Any) -> dict[str, Any]:
    row = {
        "qid": number, "image_name": picture, "image_organ": "HEAD", "question": "How many?",
        "answer": number, "answer_type": "CLOSED " if number % 2 else "OPEN",
    }  # fmt: skip
    return row | change


def test_questions_become_documents(folder: Path) -> None:
    questions = list(vqa_rad.read(folder))
    assert len(questions) == 17
    row = questions[1].document()
    assert row["answer_type"] == "CLOSED"
    document = Document.from_json(row)
    assert document.turns[1].parts == ("1",)
    assert str(document.pictures[0].path) == str(folder / "images" / "p1.png")


def test_no_picture_is_in_both_halves_whatever_its_name(folder: Path) -> None:
    questions = list(vqa_rad.read(folder))
    train, test = vqa_rad.split_by_picture(questions, 0.5)
    assert len(train) + len(test) == 17
    assert train and test

    def names(part: list[vqa_rad.Question]) -> set[str]:
        return {Path(q.image_path).name.removeprefix("copy_of_") for q in part}

    assert not names(train) & names(test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_type": "MAYBE"}, "record 0: answer_type is 'MAYBE'"),
        ({"image_name": "gone.png"}, "record 0: no such picture"),
    ],
)
def test_bad_records_are_named(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "trainset.json").write_text(json.dumps([record(0, "p0.png", **change)]))
    with pytest.raises(UserError, match=message):
        list(vqa_rad.read(folder))


def test_a_missing_field_is_named(folder: Path) -> None:
    row = record(0, "p0.png")
    del row["answer"]
    (folder / "trainset.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match="record 0: 'answer' is missing"):
        list(vqa_rad.read(folder))
