"""Images and their captions, as CSV."""

from __future__ import annotations

from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Sample,
    extra_fields,
    get_text,
    relative_image_name,
)
from medley.datasets.embedded_images import require_images
from medley.datasets.input_files import records_at
from medley.datasets.pairs import from_caption, to_caption


def read(record: Any, config: ConversionConfig) -> Sample:
    remarks: list[str] = []
    caption = get_text(record, config.caption_key, remarks)
    images = require_images(record, [config.image_key], record.get("id"), config, remarks)
    fields = {"task": "Image Captioning"}
    fields |= extra_fields(record, config.caption_key, config.image_key)
    document = from_caption(images, caption, config, record, (config.image_key,))
    return Sample(document, fields, tuple(remarks))


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    path, caption = to_caption(sample.document, config)
    name = relative_image_name(path, config.image_folder)
    return {config.image_key: name, config.caption_key: caption}


FORMAT = FormatSpec(
    lambda config: records_at(config.path), read, write, "csv",
    columns=lambda config: (config.image_key, config.caption_key),
    default_image_folder=lambda path: path if path.is_dir() else path.parent,
)  # fmt: skip
