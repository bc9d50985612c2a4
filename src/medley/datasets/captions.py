"""Pictures and their captions as CSV."""

from __future__ import annotations

from typing import Any

from medley.datasets.base import (
    ConversionConfig,
    FormatSpec,
    Sample,
    extra_fields,
    from_caption,
    relative_image_name,
    resolve_image_path,
    text_of,
    to_caption,
    value_of,
)
from medley.datasets.readers import records_of


def read(record: Any, choices: ConversionConfig) -> Sample:
    remarks: list[str] = []
    caption = text_of(record, choices.caption_key, remarks)
    path = resolve_image_path(value_of(record, choices.image_key), choices.image_folder)
    fields = {"task": "Image Captioning"} | extra_fields(
        record, choices.caption_key, choices.image_key
    )
    return Sample(from_caption(path, caption, choices), fields, tuple(remarks))


def write(sample: Sample, choices: ConversionConfig) -> dict[str, Any]:
    path, caption = to_caption(sample.document, choices)
    name = relative_image_name(path, choices.image_folder)
    return {choices.image_key: name, choices.caption_key: caption}


FORMAT = FormatSpec(
    lambda choices: records_of(choices.path), read, write, "csv",
    columns=lambda c: (c.image_key, c.caption_key), images_in=lambda path: path.parent,
)  # fmt: skip
