"""Questions and answers in words alone: CSV, JSON lines, a JSON list, a JSON object of records."""

from __future__ import annotations

import codecs
import json
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
    text_of,
    to_qa,
)
from medley.datasets.readers import records_of
from medley.utils.files import read_json


def records(choices: ConversionConfig) -> Iterator[Found]:
    path = choices.path
    if path.suffix == ".json" and path.is_file() and _is_object(path):
        whole = read_json(path)
        if not all(isinstance(record, dict) for record in whole.values()):
            yield f"{path}: record 0", "", whole  # one record alone
            return
        for name, record in whole.items():  # as PubMedQA has it: records by their id
            yield f"{path}: record {name}", "", {"id": name, **record}
    else:
        yield from records_of(path)


def _is_object(path: Path) -> bool:
    """Whether a JSON file holds one object; an object in each line is JSON lines."""
    with open(path, "rb") as file:
        first = file.readline().removeprefix(codecs.BOM_UTF8)
        more = any(line.strip() for line in file)
    try:
        return isinstance(json.loads(first), dict) and not more
    except (json.JSONDecodeError, UnicodeDecodeError):
        return first.lstrip().startswith(b"{")


def read(record: Any, choices: ConversionConfig) -> Sample:
    remarks: list[str] = []
    question = text_of(record, choices.question_key, remarks)
    answer = text_of(record, choices.answer_key, remarks)
    fields = extra_fields(record, choices.question_key, choices.answer_key)
    return Sample(question_and_answer(None, question, answer), fields, tuple(remarks))


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    picture, question, answer = to_qa(sample.document)
    if picture is not None:
        raise RecordError("a picture, which this format has no place for")
    keys = (choices.question_key, choices.answer_key)
    return {keys[0]: question, keys[1]: answer, **extra_fields(sample.fields, *keys)}


def write_cells(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    row = write(sample, choices)
    return {name: row[name] for name in (choices.question_key, choices.answer_key)}


FORMAT = FormatSpec(records, read, write)
CSV = FormatSpec(
    records, read, write_cells, "csv", columns=lambda c: (c.question_key, c.answer_key)
)  # fmt: skip
