"""Questions and answers without images: CSV, JSON Lines, a JSON list, a JSON object of records."""

from __future__ import annotations

import codecs
import json
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
)
from medley.datasets.input_files import records_at
from medley.datasets.pairs import from_qa, to_qa
from medley.utils.files import read_json


def records(config: ConversionConfig) -> Iterator[RawRecord]:
    path = config.path
    if path.suffix == ".json" and path.is_file() and _is_object(path):
        content = read_json(path)
        if not all(isinstance(record, dict) for record in content.values()):
            yield f"{path}: record 0", "", content  # the object is a single record
            return
        for name, record in content.items():  # PubMedQA's layout: id -> record
            yield f"{path}: record {name}", "", {"id": name, **record}
    else:
        yield from records_at(path)


def _is_object(path: Path) -> bool:
    """Whether a JSON file is a single object; one object per line is JSON Lines."""
    with open(path, "rb") as file:
        first = file.readline().removeprefix(codecs.BOM_UTF8)
        has_more_lines = any(line.strip() for line in file)
    try:
        return isinstance(json.loads(first), dict) and not has_more_lines
    except (json.JSONDecodeError, UnicodeDecodeError):
        return first.lstrip().startswith(b"{")


def read(record: Any, config: ConversionConfig) -> Sample:
    remarks: list[str] = []
    question = get_text(record, config.question_key, remarks)
    answer = get_text(record, config.answer_key, remarks)
    fields = extra_fields(record, config.question_key, config.answer_key)
    document = from_qa([], question, answer, record)
    return Sample(document, fields, tuple(remarks))


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    image_path, question, answer = to_qa(sample.document)
    if image_path is not None:
        raise RecordError("The record has an image; this format cannot represent it.")
    record = {config.question_key: question, config.answer_key: answer}
    return {**record, **extra_fields(sample.fields, config.question_key, config.answer_key)}


def write_csv_row(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    row = write(sample, config)
    return {name: row[name] for name in (config.question_key, config.answer_key)}


FORMAT = FormatSpec(records, read, write)
CSV_FORMAT = FormatSpec(
    records, read, write_csv_row, "csv",
    columns=lambda config: (config.question_key, config.answer_key),
)  # fmt: skip
