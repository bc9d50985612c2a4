"""VQA-RAD (Lau et al. 2018) as published: JSON lists of questions, and an image folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RawRecord,
    RecordError,
    Sample,
    extra_fields,
    get_text,
    get_value,
    relative_image_name,
    repr_short,
)
from medley.datasets.embedded_images import require_images
from medley.datasets.input_files import ROW_ID, split_files, table_records
from medley.datasets.pairs import from_qa, to_qa
from medley.datasets.readers import records_of

IMAGE_KEYS = ("image_name", "image")
FILES = {"train": ("trainset.json",), "test": ("testset.json",)}
ANSWER_TYPES = ("OPEN", "CLOSED")


def image_folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    names = ("images", "VQA_RAD Image Folder")
    return next((folder / n for n in names if (folder / n).is_dir()), folder / names[0])


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    tables = table_records(config, FILES)
    if tables is not None:  # the copies on hubs
        yield from tables
        return
    for split, path in split_files(config, FILES, "VQA-RAD"):
        yield from records_of(path, split)


def parse_answer_type(value: Any) -> str:
    """OPEN or CLOSED. Raises RecordError for any other value."""
    answer_type = str(value).strip().upper()  # two records of VQA-RAD have "CLOSED "
    if answer_type not in ANSWER_TYPES:
        raise RecordError(
            f"answer_type is invalid (got {repr_short(value)}, expected OPEN or CLOSED)."
        )
    return answer_type


def read(record: Any, config: ConversionConfig) -> Sample:
    remarks: list[str] = []
    question = get_text(record, "question", remarks).strip()
    answer = get_text(record, "answer", remarks).strip()
    identifier = get_value(record, "id" if ROW_ID in record else "qid")
    images = require_images(record, IMAGE_KEYS, identifier, config, remarks)
    if ROW_ID in record and "answer_type" not in record:  # hubs omit it
        answer_type = "CLOSED" if answer.lower() in ("yes", "no") else "OPEN"
    else:
        answer_type = parse_answer_type(get_value(record, "answer_type"))
    fields = {"id": identifier, "source": "vqa_rad", "task": "VQA", "answer_type": answer_type}
    fields |= extra_fields(record, "qid", *IMAGE_KEYS, "question", "answer", ROW_ID, *fields)
    document = from_qa(images, question, answer, record, IMAGE_KEYS)
    return Sample(document, fields, tuple(remarks))


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    path, question, answer = to_qa(sample.document)
    if path is None:
        raise RecordError("The record has no image; this format requires one.")
    if question.strip() != question or answer.strip() != answer:
        raise RecordError(
            "The question or the answer begins or ends with whitespace; this format cannot "
            "represent it."
        )
    return {
        "qid": get_value(sample.fields, "id"),
        "image_name": relative_image_name(path, config.image_folder),
        "question": question,
        "answer": answer,
        "answer_type": parse_answer_type(get_value(sample.fields, "answer_type")),
        **extra_fields(sample.fields, "id", "answer_type", "source", "task"),
    }


FORMAT = FormatSpec(records, read, write, has_splits=True, default_image_folder=image_folder)
