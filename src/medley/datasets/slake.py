"""SLAKE (Liu et al. 2021): English and Chinese questions about 642 images, in three JSON lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medley.datasets import vqa_rad
from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RawRecord,
    RecordError,
    Sample,
    extra_fields,
    get_value,
    repr_short,
)
from medley.datasets.readers import records_of, split_files

FILES = {
    "train": ("train.json",), "val": ("validate.json", "validation.json"), "test": ("test.json",),
}  # fmt: skip
LANGUAGES = ("en", "zh")


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    """The records in the configured language; an invalid language is left for `read` to report."""
    for split, path in split_files(config, FILES, "SLAKE"):
        for where, _, record in records_of(path, split):
            language = record.get("q_lang") if isinstance(record, dict) else None
            if config.language == "all" or language not in LANGUAGES or language == config.language:
                yield where, split, record


def read(record: Any, config: ConversionConfig) -> Sample:
    if get_value(record, "q_lang") not in LANGUAGES:
        raise RecordError(
            f"q_lang is invalid (got {repr_short(record['q_lang'])}, expected en or zh)."
        )
    sample = vqa_rad.read({**record, "image_name": get_value(record, "img_name")}, config)
    fields = {**extra_fields(sample.fields, "img_name"), "source": "slake"}
    return Sample(sample.document, fields, sample.remarks)


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    row = vqa_rad.write(sample, config)
    language = get_value(sample.fields, "q_lang")
    return {"img_name": row["image_name"], "q_lang": language, **extra_fields(row, "image_name")}


def image_folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "imgs"


FORMAT = FormatSpec(records, read, write, has_splits=True, default_image_folder=image_folder)
