"""Medley's documents, as JSON Lines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from medley.data.document import DocumentError, ImagePart
from medley.data.document_json import read_document
from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    RecordError,
    Sample,
    extra_fields,
    resolve_image_paths,
)
from medley.datasets.embedded_images import has_bytes, read_images, save_embedded_image
from medley.datasets.input_files import records_at
from medley.datasets.placement import IMAGE_KEYS
from medley.images.formats import ImageError
from medley.utils.image_names import is_data_url

_DOCUMENT_KEYS = ("text", "messages", "image_path", "image_tokens")


def read(record: Any, config: ConversionConfig) -> Sample:
    try:
        remarks: list[str] = []
        result = read_document(_save_embedded_images(record, config, remarks))
        identifier = record.get("id")
        document = result.document.map_images(
            lambda part: _save_data_url(part, identifier, config, remarks)
        )
        document = resolve_image_paths(document, config.image_folder)
        fields = extra_fields(record, *_DOCUMENT_KEYS, *result.used_keys)
        return Sample(document, fields, (*remarks, *result.remarks))
    except DocumentError as error:
        raise RecordError(str(error)) from error


def _save_embedded_images(record: Any, config: ConversionConfig, remarks: list[str]) -> Any:
    """The record with paths in place of embedded images."""
    if not isinstance(record, dict):
        return record
    saved = {
        key: [str(i.path) for i in read_images(record[key], record.get("id"), config, remarks)]
        for key in IMAGE_KEYS
        if has_bytes(record.get(key))
    }
    return {**record, **saved}


def _save_data_url(
    part: ImagePart, identifier: Any, config: ConversionConfig, remarks: list[str]
) -> ImagePart:
    """The image with a path in place of a data URL."""
    if not is_data_url(str(part.path)):
        return part
    from medley.images.preprocess import decode_data_url  # here: it imports torch

    try:
        data = decode_data_url(str(part.path))
    except ImageError as error:
        raise RecordError(str(error)) from error
    return replace(part, path=save_embedded_image(data, identifier, config, remarks))


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    try:
        return {**sample.document.to_json(), **extra_fields(sample.fields, *_DOCUMENT_KEYS)}
    except DocumentError as error:
        raise RecordError(str(error)) from error


FORMAT = FormatSpec(lambda config: records_at(config.path), read, write, "jsonl")
