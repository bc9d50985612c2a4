"""VQA-RAD as published (Lau et al. 2018): JSON lists of questions, and a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Found,
    RecordError,
    Sample,
    extra_fields,
    question_and_answer,
    relative_image_name,
    repr_short,
    resolve_image_path,
    text_of,
    to_qa,
    value_of,
)
from medley.datasets.readers import records_of, split_files

FILES = {"train": ("trainset.json",), "test": ("testset.json",)}
KINDS = ("OPEN", "CLOSED")


def image_folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    names = ("images", "VQA_RAD Image Folder")
    return next((folder / n for n in names if (folder / n).is_dir()), folder / names[0])


def records(choices: ConversionConfig) -> Iterator[Found]:
    for split, path in split_files(choices, FILES, "VQA-RAD"):
        yield from records_of(path, split)


def answer_type(value: Any) -> str:
    """OPEN or CLOSED. Raises RecordError for anything else."""
    kind = str(value).strip().upper()  # two rows of VQA-RAD say "CLOSED "
    if kind not in KINDS:
        raise RecordError(f"answer_type is {repr_short(value)}, expected OPEN or CLOSED")
    return kind


def read(record: Any, choices: ConversionConfig) -> Sample:
    remarks: list[str] = []
    question = text_of(record, "question", remarks).strip()
    answer = text_of(record, "answer", remarks).strip()
    path = resolve_image_path(value_of(record, "image_name"), choices.image_folder)
    fields = {
        "id": value_of(record, "qid"), "source": "vqa_rad", "task": "VQA",
        "answer_type": answer_type(value_of(record, "answer_type")),
    }  # fmt: skip
    fields |= extra_fields(record, "qid", "image_name", "question", "answer", *fields)
    return Sample(question_and_answer(path, question, answer), fields, tuple(remarks))


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    path, question, answer = to_qa(sample.document)
    if path is None:
        raise RecordError("no picture, and this format asks about pictures")
    if question.strip() != question or answer.strip() != answer:
        raise RecordError("blanks around the words, which this format does not keep")
    return {
        "qid": value_of(sample.fields, "id"),
        "image_name": relative_image_name(path, choices.image_folder),
        "question": question,
        "answer": answer,
        "answer_type": answer_type(value_of(sample.fields, "answer_type")),
        **extra_fields(sample.fields, "id", "answer_type", "source", "task"),
    }


FORMAT = FormatSpec(records, read, write, splits=True, images_in=image_folder)
