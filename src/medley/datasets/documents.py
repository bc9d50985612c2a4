"""Our own documents, as JSON lines."""

from __future__ import annotations

from typing import Any

from medley.data.document import Document, DocumentError
from medley.datasets.base import Choices, Format, RecordError, Sample, others, placed
from medley.datasets.readers import records_of

_OWN = ("text", "messages", "image_path", "image_tokens")


def read(record: Any, choices: Choices) -> Sample:
    try:
        document = placed(Document.from_json(record), choices.image_folder)
        return Sample(document, others(record, *_OWN))
    except DocumentError as error:
        raise RecordError(str(error)) from error


def write(sample: Sample, choices: Choices) -> dict[str, Any]:
    try:
        return {**sample.document.to_json(), **others(sample.fields, *_OWN)}
    except DocumentError as error:
        raise RecordError(str(error)) from error


FORMAT = Format(lambda choices: records_of(choices.path), read, write, "jsonl")
