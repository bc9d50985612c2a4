"""Medley's documents, as JSON Lines."""

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

_DOCUMENT_KEYS = ("text", "messages", "image_path", "image_tokens")


def read(record: Any, config: ConversionConfig) -> Sample:
    try:
        document = resolve_image_paths(Document.from_json(record), config.image_folder)
        return Sample(document, extra_fields(record, *_DOCUMENT_KEYS))
    except DocumentError as error:
        raise RecordError(str(error)) from error


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    try:
        return {**sample.document.to_json(), **extra_fields(sample.fields, *_DOCUMENT_KEYS)}
    except DocumentError as error:
        raise RecordError(str(error)) from error


FORMAT = FormatSpec(lambda config: records_of(config.path), read, write, "jsonl")
