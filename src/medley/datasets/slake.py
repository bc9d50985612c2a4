"""SLAKE (Liu et al. 2021): English and Chinese questions about 642 images, in three JSON lists."""

from __future__ import annotations

import re
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
from medley.datasets.input_files import ROW_ID, split_files, table_records
from medley.datasets.readers import records_of

FILES = {
    "train": ("train.json",), "val": ("validate.json", "validation.json"), "test": ("test.json",),
}  # fmt: skip
LANGUAGES = ("en", "zh")


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    """The records in the configured language; an invalid language is left for `read` to report."""
    for where, split, record in _all_records(config):
        language = record.get("q_lang") if isinstance(record, dict) else None
        if config.language == "all" or language not in LANGUAGES or language == config.language:
            yield where, split, record


def _all_records(config: ConversionConfig) -> Iterator[RawRecord]:
    tables = table_records(config, FILES)
    if tables is not None:  # the copies on hubs
        for where, split, record in tables:
            if isinstance(record, dict) and "q_lang" not in record:
                record = {**record, "q_lang": _guess_language(record.get("question"))}
            yield where, split, record
        return
    for split, path in split_files(config, FILES, "SLAKE"):
        yield from records_of(path, split)


def _guess_language(question: Any) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", str(question)) else "en"


def read(record: Any, config: ConversionConfig) -> Sample:
    if get_value(record, "q_lang") not in LANGUAGES:
        raise RecordError(
            f"q_lang is invalid (got {repr_short(record['q_lang'])}, expected en or zh)."
        )
    renamed = extra_fields(record, "img_name")
    if "img_name" in record or ROW_ID not in record:
        renamed["image_name"] = get_value(record, "img_name")
    sample = vqa_rad.read(renamed, config)
    return Sample(sample.document, {**sample.fields, "source": "slake"}, sample.remarks)


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    row = vqa_rad.write(sample, config)
    language = get_value(sample.fields, "q_lang")
    return {"img_name": row["image_name"], "q_lang": language, **extra_fields(row, "image_name")}


def image_folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "imgs"


FORMAT = FormatSpec(records, read, write, has_splits=True, default_image_folder=image_folder)
