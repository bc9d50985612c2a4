"""SLAKE (Liu et al. 2021): bilingual questions about 642 pictures, in three JSON lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medley.datasets import vqa_rad
from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Found,
    RecordError,
    Sample,
    extra_fields,
    repr_short,
    value_of,
)
from medley.datasets.readers import records_of, split_files

FILES = {
    "train": ("train.json",), "val": ("validate.json", "validation.json"), "test": ("test.json",),
}  # fmt: skip
LANGUAGES = ("en", "zh")


def records(choices: ConversionConfig) -> Iterator[Found]:
    """Those of the language that was asked for."""
    for split, path in split_files(choices, FILES, "SLAKE"):
        for found in records_of(path, split):
            record = found[2]
            language = record.get("q_lang") if isinstance(record, dict) else None
            if (
                choices.language == "all"
                or language not in LANGUAGES
                or language == choices.language
            ):
                yield found


def read(record: Any, choices: ConversionConfig) -> Sample:
    if value_of(record, "q_lang") not in LANGUAGES:
        raise RecordError(f"q_lang is {repr_short(record['q_lang'])}, expected en or zh")
    sample = vqa_rad.read({**record, "image_name": value_of(record, "img_name")}, choices)
    fields = {**extra_fields(sample.fields, "img_name"), "source": "slake"}
    return Sample(sample.document, fields, sample.remarks)


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    row = vqa_rad.write(sample, choices)
    language = value_of(sample.fields, "q_lang")
    return {"img_name": row["image_name"], "q_lang": language, **extra_fields(row, "image_name")}


def image_folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "imgs"


FORMAT = FormatSpec(records, read, write, splits=True, images_in=image_folder)
