"""Our own documents, as JSON lines."""

from __future__ import annotations

from typing import Any

from medley.data.document import Document, DocumentError
from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RecordError,
    Sample,
    extra_fields,
    resolve_image_paths,
)
from medley.datasets.readers import records_of

_OWN = ("text", "messages", "image_path", "image_tokens")


def read(record: Any, choices: ConversionConfig) -> Sample:
    try:
        document = resolve_image_paths(Document.from_json(record), choices.image_folder)
        return Sample(document, extra_fields(record, *_OWN))
    except DocumentError as error:
        raise RecordError(str(error)) from error


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    try:
        return {**sample.document.to_json(), **extra_fields(sample.fields, *_OWN)}
    except DocumentError as error:
        raise RecordError(str(error)) from error


FORMAT = FormatSpec(lambda choices: records_of(choices.path), read, write, "jsonl")
