"""Images and their captions, as CSV."""

from __future__ import annotations

from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Sample,
    extra_fields,
    from_caption,
    get_text,
    get_value,
    relative_image_name,
    resolve_image_path,
    to_caption,
)
from medley.datasets.readers import records_of


def read(record: Any, config: ConversionConfig) -> Sample:
    remarks: list[str] = []
    caption = get_text(record, config.caption_key, remarks)
    path = resolve_image_path(get_value(record, config.image_key), config.image_folder)
    fields = {"task": "Image Captioning"}
    fields |= extra_fields(record, config.caption_key, config.image_key)
    return Sample(from_caption(path, caption, config), fields, tuple(remarks))


def write(sample: Sample, config: ConversionConfig) -> dict[str, Any]:
    path, caption = to_caption(sample.document, config)
    name = relative_image_name(path, config.image_folder)
    return {config.image_key: name, config.caption_key: caption}


FORMAT = FormatSpec(
    lambda config: records_of(config.path), read, write, "csv",
    columns=lambda config: (config.image_key, config.caption_key),
    default_image_folder=lambda path: path.parent,
)  # fmt: skip
