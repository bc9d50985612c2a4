"""Pictures and their captions as CSV."""

from __future__ import annotations

from typing import Any

from medley.document import Document, Picture, Turn
from medley.formats.files import records_of
from medley.formats.medtrinity import write as write_caption
from medley.formats.sample import (
    CAPTION_PROMPT,
    Choices,
    Format,
    Sample,
    others,
    picture_path,
    question_and_answer,
    text_of,
    value_of,
)


def read(record: Any, choices: Choices) -> Sample:
    """A question about the picture and its caption; without a question (`--prompt ""`) the caption
    stands behind the picture and both are learned."""
    remarks: list[str] = []
    caption = text_of(record, choices.caption_key, remarks)
    path = picture_path(value_of(record, choices.image_key), choices.image_folder)
    prompt = CAPTION_PROMPT if choices.prompt is None else choices.prompt
    if prompt:
        document = question_and_answer(path, prompt, caption)
    else:
        document = Document((Turn("assistant", (Picture(path=path), caption)),))
    fields = {"task": "Image Captioning"} | others(record, choices.caption_key, choices.image_key)
    return Sample(document, fields, tuple(remarks))


def write(sample: Sample, choices: Choices) -> dict[str, Any]:
    row = write_caption(sample, choices)
    return {choices.image_key: row["file_name"], choices.caption_key: row["caption"]}


FORMAT = Format(
    lambda choices: records_of(choices.path), read, write, "csv",
    columns=lambda c: (c.image_key, c.caption_key), pictures_in=lambda path: path.parent,
)  # fmt: skip
