"""Pictures and their captions as CSV."""

from __future__ import annotations

from typing import Any

from medley.datasets.base import (
    Choices,
    Format,
    Sample,
    as_caption,
    captioned,
    others,
    picture_name,
    picture_path,
    text_of,
    value_of,
)
from medley.datasets.readers import records_of


def read(record: Any, choices: Choices) -> Sample:
    remarks: list[str] = []
    caption = text_of(record, choices.caption_key, remarks)
    path = picture_path(value_of(record, choices.image_key), choices.image_folder)
    fields = {"task": "Image Captioning"} | others(record, choices.caption_key, choices.image_key)
    return Sample(captioned(path, caption, choices), fields, tuple(remarks))


def write(sample: Sample, choices: Choices) -> dict[str, Any]:
    path, caption = as_caption(sample.document, choices)
    name = picture_name(path, choices.image_folder)
    return {choices.image_key: name, choices.caption_key: caption}


FORMAT = Format(
    lambda choices: records_of(choices.path), read, write, "csv",
    columns=lambda c: (c.image_key, c.caption_key), pictures_in=lambda path: path.parent,
)  # fmt: skip
